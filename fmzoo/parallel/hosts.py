"""What several processes must agree on: who writes, whether all went well, when to stop.

Everything here works unchanged in a single process, at no cost.
"""

import logging
import signal
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_main():
  """True in the one process that writes logs and moves files."""
  return jax.process_index() == 0


def all_agree(holds):
  """True if `holds` is true in every process; all of them must call it, and all get one answer."""
  if jax.process_count() == 1:
    return bool(holds)
  return bool(np.all(multihost_utils.process_allgather(np.array(bool(holds)))))


def barrier(name):
  """Waits until every process is here; `name` tells barriers apart and must be the same in all."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


class Preemption:
  """Notices SIGTERM, so that the loop can save and leave in good order.

  Under `jax.distributed` the runtime catches the signal itself and makes every process stop at the
  same step; a handler of ours would stop one host and leave the others waiting in a collective.
  Only the main thread may install a handler: elsewhere SIGTERM keeps its meaning, and a line in
  the log says so. As a context manager it gives the former handler back.
  """

  def __init__(self):
    self._noticed = False
    self._former = None
    self._distributed = jax.distributed.is_initialized()
    if self._distributed:
      return
    if threading.current_thread() is not threading.main_thread():
      logging.getLogger(__name__).warning(
        'SIGTERM will not save: Preemption was made outside of the main thread'
      )
      return
    self._former = signal.signal(signal.SIGTERM, self._notice) or signal.SIG_DFL

  def _notice(self, signum, frame):
    """Only sets a flag: a handler runs between any two instructions and may not log or save."""
    self._noticed = True

  def reached(self, step):
    """True once the run has to save and stop; call it once a step, with rising steps.

    Args:
      step: int, the step just finished.
    """
    if self._distributed:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._noticed

  def close(self):
    """Gives the former handler back; a second call does nothing."""
    if self._former is not None:
      signal.signal(signal.SIGTERM, self._former)
      self._former = None

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()

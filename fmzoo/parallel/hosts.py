"""What several processes must agree on: who writes, whether all went well, when to stop.

Everything here works unchanged in a single process, at no cost.
"""

import contextlib
import io
import logging
import signal
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

GATHERED = 2**26  # bytes of all processes that are on a device at a time


def is_main():
  """True in the one process that writes logs and moves files."""
  return jax.process_index() == 0


def count():
  """Returns how many processes there are."""
  return jax.process_count()


def share(total):
  """Returns the range of `total` things that is this process's: together all, in their order."""
  index, processes = jax.process_index(), jax.process_count()
  return range(total * index // processes, total * (index + 1) // processes)


def all_agree(holds):
  """True if `holds` is true in every process; all of them must call it, and all get one answer."""
  if jax.process_count() == 1:
    return bool(holds)
  return bool(np.all(multihost_utils.process_allgather(np.array(bool(holds)))))


@contextlib.contextmanager
def together(what):
  """Ends in all processes if one of them raises inside, where nothing may wait for the others.

  Args:
    what: is done inside, for the message of those that did not fail.

  Raises:
    ValueError: in a process that could have gone on; the others raise what they met.
  """
  problem = None
  try:
    yield
  except Exception as error:  # kept until the others know, and raised then
    problem = error
  if not all_agree(problem is None):
    raise problem or ValueError(f'{what}: another host cannot go on, its log says why')


def barrier(name):
  """Waits until every process is here; `name` tells barriers apart and must be the same in all."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def gather(tree):
  """Returns the trees of all processes in their order, the same list in each; all must call it.

  Nothing is rounded, while collectives of jax make float32 of float64, and leaves may be of other
  shapes in other processes. They travel as bytes, GATHERED at a time.

  Args:
    tree: of numpy arrays or numbers.
  """
  if jax.process_count() == 1:
    return [tree]
  leaves, structure = jax.tree.flatten(tree)
  stream = io.BytesIO()
  np.savez(stream, *leaves)
  data = np.frombuffer(stream.getvalue(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array(len(data), np.uint32))
  gathered, most = [[] for _ in sizes], max(GATHERED // len(sizes), 1)
  for first in range(0, int(sizes.max()), most):
    part = data[first : first + most]
    width = min(most, int(sizes.max()) - first)
    parts = multihost_utils.process_allgather(np.pad(part, (0, width - len(part))))
    for whole, piece in zip(gathered, parts):
      whole.append(piece)
  return [_tree(structure, np.concatenate(g)[:n].tobytes()) for g, n in zip(gathered, sizes)]


def _tree(structure, data):
  """Returns the tree whose leaves `gather` has turned into bytes."""
  with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
    return jax.tree.unflatten(structure, [arrays[name][()] for name in arrays.files])


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

  @property
  def noticed(self):
    """Whether SIGTERM came; never under `jax.distributed`, where hosts must ask together."""
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

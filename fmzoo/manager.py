"""Orbax, as fmzoo.checkpoint uses it: what is kept, how items are read, and how a save fails."""

import os
import re
import time

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from fmzoo.parallel import hosts

POLL = 0.05  # seconds between two looks at a save that several hosts wait for


def restore_args(leaves):
  """Returns how orbax reads one item: these leaves only, onto the shardings they name."""
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  abstract = {
    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or device)
    for name, leaf in leaves.items()
  }
  restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
  return ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)


def reason(error):
  """Says in the system's words, where it has any, why something could not be written."""
  code = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore's way to pass it on
  if code:
    return os.strerror(int(code[1]))
  words = isinstance(error, OSError) and error.strerror
  return words or f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'


class Manager(ocp.CheckpointManager):
  """Also tells that this host could not do its part of a save, for which orbax has all wait first.

  Args:
    directory: where the steps lie.
    keep_last: how many of the newest are kept.
    keep_steps: steps that are kept for ever.
    read_only: nothing on disk is changed.

  Attributes:
    failure: what was met here; None while all is well, and for what other hosts met.
  """

  failure = None

  def __init__(self, directory, *, keep_last, keep_steps, read_only):
    keep = [
      checkpoint_managers.LatestN(keep_last),
      checkpoint_managers.CustomSteps(tuple(keep_steps)),
    ]
    options = ocp.CheckpointManagerOptions(
      create=not read_only,
      cleanup_tmp_directories=not read_only,
      preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
    )
    super().__init__(directory, options=options)

  def _wait_for_checkpointers(self):
    """Waits for what this host writes, in the thread that then waits for the other hosts."""
    try:
      super()._wait_for_checkpointers()
    except Exception as error:
      if not isinstance(error.__cause__, jax.errors.JaxRuntimeError):  # of a barrier
        self.failure = error
      raise

  def expect_written(self):
    """Raises what this host met; waits for nobody."""
    if self.failure is not None:
      raise self.failure

  def wait_until_finished(self):
    """Waits for all hosts, but only as long as nothing goes wrong on this one."""
    while hosts.count() > 1 and self._is_finishing():
      self.expect_written()
      time.sleep(POLL)
    super().wait_until_finished()

  def _is_finishing(self):
    """Says whether the thread is alive that ends a save."""
    return self._finalize_thread.map(lambda thread: thread is not None and thread.is_alive())

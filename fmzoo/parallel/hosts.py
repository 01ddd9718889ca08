"""What several processes must agree on: where they meet, who writes, whether all went well, when to
stop.

Everything here works unchanged in a single process, at no cost.
"""

import contextlib
import importlib.util
import io
import logging
import os
import signal
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

from fmzoo.parallel import ends

GATHERED = 2**26  # bytes of all processes that are on a device at a time
HEARTBEAT = 60  # seconds without a sign of life after which a process counts as dead
WAIT = 300  # seconds that the first process at the meeting point waits for the last
GOODBYE = 86400  # and at the end: the main process may compute metrics long after the others
SLURM = (  # what a process that srun started finds in its environment, and jax asks for
  'SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID',
)
NO_CLUSTER = 'coordinator_address should be defined.'  # jax's words where it has found none

_log = logging.getLogger(__name__)


def start(
  *, coordinator=None, processes=None, process=None, stops_in_order=True, heartbeat=HEARTBEAT,
  wait=WAIT,
):
  """Joins the processes of this run; to be called before anything touches a device.

  Without arguments they find each other on Cloud TPU pods, under SLURM and in the indexed jobs of
  Kubernetes, as jax does it. On a lone machine nothing is started.

  Args:
    coordinator: 'HOST:PORT' of process 0, which all can reach; None lets the cluster tell.
    processes: how many there are; given with `coordinator`.
    process: index of this one; given with `coordinator`.
    stops_in_order: whether SIGTERM is for `Preemption` to notice; else it ends the process.
    heartbeat: seconds without a sign of life after which a process counts as dead; the others then
      end as well.
    wait: seconds for all of them to be there.

  Returns:
    Whether there are others to work with.

  Raises:
    ValueError: if they cannot meet.
  """
  if processes is None and not _finds_others(os.environ):
    return False
  if processes == 1:
    return False
  where = coordinator or 'the place that the cluster names'
  _log.info('waiting up to %d s for all processes at %s', wait, where)
  ends.watch()
  jax.config.update('jax_enable_preemption_service', stops_in_order)
  local = _slurm_devices(os.environ) if processes is None else None
  try:
    jax.distributed.initialize(
      coordinator, processes, process, local,
      cluster_detection_method=None if processes is None else 'deactivate',
      initialization_timeout=wait, heartbeat_timeout_seconds=heartbeat,
      shutdown_timeout_seconds=GOODBYE,
    )
  except Exception as error:  # of sockets, clusters and their packages: no common class
    ends.say_goodbye()
    if processes is None and _is_guess(os.environ) and str(error) == NO_CLUSTER:
      return False
    raise ValueError(
      f'the processes cannot meet at {where}: {" ".join(str(error).split())[:300]}; start them with'
      ' --coordinator=HOST:PORT --processes=N --process=I, or one alone with --processes=1'
    ) from error
  return jax.process_count() > 1


def _finds_others(environment):
  """Says whether a cluster may have started other processes beside this one.

  Raises:
    ValueError: if the environment names a meeting point and nothing else.
  """
  if all(name in environment for name in SLURM):
    return environment['SLURM_NTASKS'] != '1'
  names = environment.get('TPU_PROCESS_ADDRESSES', environment.get('TPU_WORKER_HOSTNAMES'))
  if names is not None:
    return ',' in names or environment.get('MEGASCALE_NUM_SLICES', '1') != '1'
  if 'KUBERNETES_SERVICE_HOST' in environment and 'JOB_COMPLETION_INDEX' in environment:
    return True
  if 'JAX_COORDINATOR_ADDRESS' in environment:
    raise ValueError(
      f'JAX_COORDINATOR_ADDRESS={environment["JAX_COORDINATOR_ADDRESS"]} says where processes meet,'
      ' but nothing says how many; give --coordinator, --processes and --process, or unset it'
    )
  return _is_guess(environment)


def _is_guess(environment):
  """Says whether this may be a host of a TPU pod, of which jax asks a server in its network.

  Where jax sees no TPU chips it says so in TPU_SKIP_MDS_QUERY as soon as it is imported.
  """
  named = ('TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES', 'TPU_SKIP_MDS_QUERY')
  is_named = any(name in environment for name in named)
  return not is_named and importlib.util.find_spec('libtpu') is not None


def _slurm_devices(environment):
  """Returns the devices of a task where jax would take the wrong ones, else None.

  It gives task i of a node the i-th GPU there. But a task that has a node for itself has all of
  them, and one that sees a single GPU has that one.
  """
  if not all(name in environment for name in SLURM) or 'JAX_LOCAL_DEVICE_IDS' in environment:
    return None
  visible = environment.get('CUDA_VISIBLE_DEVICES', '').split(',')
  alone = environment['SLURM_NTASKS'] == environment.get('SLURM_STEP_NUM_NODES')
  return list(range(len(visible))) if visible != [''] and (alone or len(visible) == 1) else None


def finish():
  """Ends what `start` has begun, when all processes are done; the first of them wait here."""
  if ends.is_watched():
    jax.distributed.shutdown()
    ends.say_goodbye()


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
      _log.warning('SIGTERM will not save: Preemption was made outside of the main thread')
      return
    self._former = signal.signal(signal.SIGTERM, self._notice) or signal.SIG_DFL

  def _notice(self, signum, frame):
    """Only sets a flag: a handler runs between any two instructions and may not log or save."""
    self._noticed = True

  def reached(self, step):
    """True once the run has to save and stop; call it once a step, without leaving one out.

    Args:
      step: int, the step just finished; several processes stop at the same.
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

"""One answer in all processes, and a signal that becomes a question asked once a step."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest
from jax._src import distributed

from fmzoo.parallel import ends, hosts

ROOT = pathlib.Path(hosts.__file__).parents[2]


def test_one_process_agrees_with_itself_and_waits_for_nobody():
  assert hosts.is_main()
  assert hosts.all_agree(True) is True
  assert hosts.all_agree(False) is False
  hosts.barrier('alone')


def test_sigterm_is_noticed_and_the_former_handler_comes_back():
  calls = []
  former = signal.signal(signal.SIGTERM, lambda *_: calls.append('former'))
  try:
    with hosts.Preemption() as preemption:
      assert not preemption.reached(1)
      os.kill(os.getpid(), signal.SIGTERM)
      assert preemption.reached(2)
      assert preemption.reached(3)
    assert calls == []
    os.kill(os.getpid(), signal.SIGTERM)
    assert calls == ['former']
    preemption.close()
    assert signal.getsignal(signal.SIGTERM) is not former
  finally:
    signal.signal(signal.SIGTERM, former)


def test_each_preemption_starts_unnoticed():
  with hosts.Preemption() as first:
    os.kill(os.getpid(), signal.SIGTERM)
    assert first.reached(1)
  with hosts.Preemption() as second:
    assert not second.reached(2)


def test_outside_of_the_main_thread_nothing_is_installed(caplog):
  former = signal.getsignal(signal.SIGTERM)
  seen = []

  def run():
    with hosts.Preemption() as preemption:
      seen.extend([signal.getsignal(signal.SIGTERM), preemption.reached(1)])

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert seen == [former, False]
  assert 'SIGTERM will not save' in caplog.text


WORKER = """
import os, signal, sys, time
import jax
import numpy as np
from jax.experimental import multihost_utils
from fmzoo.parallel import batch, hosts
from fmzoo.parallel import mesh as meshes

jax.distributed.initialize('localhost:' + sys.argv[1], 2, int(sys.argv[2]))
print('agree', hosts.all_agree(True), hosts.all_agree(hosts.is_main()), flush=True)
hosts.GATHERED, index = 100, jax.process_index()  # bytes: what follows takes several rounds
for tree in hosts.gather((np.arange(3 + 20 * index) / 3, {'n': 2**40 + index})):
  values, number = tree[0], tree[1]['n'] - 2**40
  print('gathered', len(values), values[2] == 2 / 3, values.dtype, number, flush=True)
for axes in ({'data': 2, 'segment': 1}, {'data': 1, 'segment': 2}):
  mesh = meshes.make(meshes.Config(**axes, fsdp=1, mode='jit'))
  own = meshes.places(mesh, 8)
  rows = multihost_utils.process_allgather(batch.to_devices(own, mesh, 'jit'), tiled=True)
  print('places', [places.tolist() for places in hosts.gather(own)], rows.tolist(), flush=True)
with hosts.Preemption() as preemption:
  hosts.barrier('ready')
  for step in range(1000):
    if step == 5 and hosts.is_main():
      os.kill(os.getpid(), signal.SIGTERM)
    if preemption.reached(step):
      print('stopped', step, flush=True)
      break
    time.sleep(0.01)
hosts.barrier('done')
"""


@pytest.fixture
def port():
  with socket.socket() as free:
    free.bind(('localhost', 0))
    return free.getsockname()[1]


def test_two_processes_agree_gather_and_stop_at_the_same_step(port):
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  environment.pop('XLA_FLAGS', None)
  workers = [
    subprocess.Popen(
      [sys.executable, '-c', WORKER, str(port), str(index)],
      cwd=ROOT,
      env=environment,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    for index in range(2)
  ]
  try:
    told = [worker.communicate(timeout=60) for worker in workers]
  finally:
    for worker in workers:
      worker.kill()
  assert [worker.returncode for worker in workers] == [0, 0], told
  lines = [[line for line in out.splitlines() if 'Gloo' not in line] for out, _ in told]
  assert lines[0] == lines[1]
  assert lines[0][0] == 'agree True False'
  assert lines[0][1:3] == ['gathered 3 True float64 0', 'gathered 23 True float64 1']
  assert lines[0][3:5] == ['places [[0, 1, 2, 3], [4, 5, 6, 7]] [0, 1, 2, 3, 4, 5, 6, 7]'] * 2
  assert lines[0][5].startswith('stopped ') and int(lines[0][5].split()[1]) >= 5


FAILING = """
import sys
from fmzoo import main
from fmzoo.parallel import hosts, mesh

def run(argv):
  port, index, what = argv[1:]
  hosts.start(
    coordinator='localhost:' + port, processes=2, process=int(index), heartbeat=4, wait=5
  )
  for step in range(10**6):
    hosts.barrier(str(step))
    if step == 5:
      print('met', file=sys.stderr, flush=True)
      if what == 'refuse' and not hosts.is_main():
        mesh.make(mesh.Config(data=-2, fsdp=1, segment=1, mode='jit'))

main.run = run
sys.exit(main.cli())
"""


@contextlib.contextmanager
def failing(port, indices, what=''):
  """Starts processes that meet at barriers without end; kills those that are left."""
  workers = [
    subprocess.Popen(
      [sys.executable, '-c', FAILING, str(port), str(index), what], cwd=ROOT, text=True,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'}, stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
    ) for index in indices
  ]
  try:
    yield workers
  finally:
    for worker in workers:
      worker.kill()
      worker.communicate()


def end(worker):
  """Returns the exit status of a process, and its lines on stderr."""
  lines = worker.communicate(timeout=60)[1].splitlines()
  return worker.returncode, lines


def test_a_process_whose_peer_is_silent_ends(port):
  """As if the network were gone: nothing is closed, and nothing comes."""
  with failing(port, range(2)) as (waiting, silent):
    assert any('met' in line for line in waiting.stderr)
    silent.send_signal(signal.SIGSTOP)
    begun = time.time()
    status, lines = end(waiting)
  assert status not in (0, None) and time.time() - begun < 45
  assert lines[-1] == ends.LAST_WORD


def test_a_process_that_cannot_go_on_leaves_nobody_waiting(port):
  with failing(port, range(2), 'refuse') as (waiting, refusing):
    status, lines = end(refusing)
    assert status == 2 and lines[-1].startswith('error: mesh.data=-2')
    status, lines = end(waiting)
    assert status not in (0, 2) and lines[-1] == ends.LAST_WORD


def test_a_process_that_meets_nobody_ends(port):
  with failing(port, [1]) as (lonely,):
    status, lines = end(lonely)
  assert status != 0 and lines[-1] == ends.LAST_WORD


SLURM = {
  'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'node[1-2]', 'SLURM_NTASKS': '2',
  'SLURM_PROCID': '0', 'SLURM_LOCALID': '0', 'SLURM_STEP_NUM_NODES': '2',
}


@pytest.fixture
def initialized(monkeypatch):
  """What jax.distributed.initialize was called with, in an environment of no cluster."""
  calls = []
  monkeypatch.setattr(
    jax.distributed, 'initialize', lambda *args, **options: calls.append((args, options))
  )
  monkeypatch.setattr(ends, 'watch', lambda: None)
  for name in os.environ:
    if name.startswith(('SLURM_', 'TPU_', 'KUBERNETES_', 'JOB_', 'CUDA_', 'JAX_COORD')):
      monkeypatch.delenv(name)
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')  # as jax does where there are no chips
  yield calls
  jax.config.update('jax_enable_preemption_service', True)


@pytest.mark.parametrize('environment', [
  {}, SLURM | {'SLURM_NTASKS': '1'}, {'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '4'},
  {'TPU_WORKER_HOSTNAMES': 'localhost'}, {'KUBERNETES_SERVICE_HOST': '10.0.0.1'},
])
def test_a_lone_machine_starts_nothing(environment, initialized, monkeypatch):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  assert not hosts.start()
  assert not initialized


@pytest.mark.parametrize('environment,devices', [
  (SLURM, None),
  (SLURM | {'CUDA_VISIBLE_DEVICES': '0,1,2,3'}, [0, 1, 2, 3]),  # one task has the whole node
  (SLURM | {'CUDA_VISIBLE_DEVICES': '0,1', 'SLURM_NTASKS': '4'}, None),  # jax gives each its own
  (SLURM | {'CUDA_VISIBLE_DEVICES': '3', 'SLURM_NTASKS': '8'}, [0]),  # it has but one
  ({'TPU_WORKER_HOSTNAMES': 'a,b'}, None),
  ({'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '2'}, None),
  ({'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '1'}, None),
])
def test_a_cluster_is_asked_where_its_processes_meet(
  environment, devices, initialized, monkeypatch
):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  hosts.start()
  ((arguments, options),) = initialized
  assert arguments == (None, None, None, devices) and options['cluster_detection_method'] is None


def test_processes_meet_where_flags_say(initialized):
  hosts.start(coordinator='a:1', processes=2, process=1)
  ((arguments, options),) = initialized
  assert arguments == ('a:1', 2, 1, None) and options['cluster_detection_method'] == 'deactivate'
  assert options['heartbeat_timeout_seconds'] <= 90  # two minutes are promised
  assert not hosts.start(coordinator='a:1', processes=1, process=0)
  assert len(initialized) == 1


def test_where_processes_meet_but_not_how_many_is_refused(initialized, monkeypatch):
  monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', 'a:1')
  with pytest.raises(ValueError, match='JAX_COORDINATOR_ADDRESS=a:1 .* nothing says how many'):
    hosts.start()


def test_a_cluster_that_cannot_tell_is_one_line(monkeypatch, initialized):
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *_, **__: int('x'))
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'a,b')
  with pytest.raises(ValueError, match='the cluster names: invalid literal .* --processes=1'):
    hosts.start()


@pytest.fixture
def guessed(initialized, monkeypatch):
  """A host of which only a server in its network says whether it is one of several."""
  monkeypatch.setattr(hosts, '_is_guess', lambda environment: True)


def test_a_host_for_which_jax_finds_no_cluster_is_alone(guessed, monkeypatch):
  """In jax's own words, which may change."""
  monkeypatch.setattr(
    jax.distributed, 'initialize', lambda *args, **options: distributed.State().initialize(
      *args, **options
    )
  )
  assert hosts.start() is False


@pytest.mark.parametrize('error', [
  RuntimeError('Getting metadata failed for 60 seconds'),
  ValueError('Number of processes must be defined.'),
  jax.errors.JaxRuntimeError('DEADLINE_EXCEEDED: Barrier timed out'),
])
def test_a_host_of_a_pod_that_cannot_meet_the_others_is_not_alone(error, guessed, monkeypatch):
  def fail(*args, **options):
    raise error

  monkeypatch.setattr(jax.distributed, 'initialize', fail)
  with pytest.raises(ValueError, match=f'cannot meet at the place .*: {error}; .* --processes=1'):
    hosts.start()

"""One answer in all processes, and a signal that becomes a question asked once a step."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import pytest

from fmzoo.parallel import hosts


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
from fmzoo.parallel import hosts

jax.distributed.initialize('localhost:' + sys.argv[1], 2, int(sys.argv[2]))
print('agree', hosts.all_agree(True), hosts.all_agree(hosts.is_main()), flush=True)
hosts.GATHERED, index = 100, jax.process_index()  # bytes: what follows takes several rounds
for tree in hosts.gather((np.arange(3 + 20 * index) / 3, {'n': 2**40 + index})):
  values, number = tree[0], tree[1]['n'] - 2**40
  print('gathered', len(values), values[2] == 2 / 3, values.dtype, number, flush=True)
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
  root = pathlib.Path(hosts.__file__).parents[2]
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  environment.pop('XLA_FLAGS', None)
  workers = [
    subprocess.Popen(
      [sys.executable, '-c', WORKER, str(port), str(index)],
      cwd=root,
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
  assert lines[0][3].startswith('stopped ') and int(lines[0][3].split()[1]) >= 5

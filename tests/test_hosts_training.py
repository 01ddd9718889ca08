"""Several processes train as one does, whatever ends them and however many go on."""

import contextlib
import functools
import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from fmzoo import build, command_line, train
from fmzoo.parallel import ends
from tests.test_resume import losses

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 40
TINY = (
  '--config=configs/sit_digits.py', '--config.model.width=32', '--config.model.heads=2',
  '--config.model.depth=1', '--config.model.unroll=1', '--config.data.batch_size=16',
  f'--config.run.steps={STEPS}', '--config.log.log_every_steps=1',
  '--config.log.checkpoint_every_steps=8', '--config.log.preview_every_steps=0',
  '--config.eval.name=none',
)
# The command line, but for how long a dead process is waited for.
WORKER = """
import functools, os, sys
from fmzoo import main
from fmzoo.parallel import hosts
hosts.start = functools.partial(hosts.start, heartbeat=int(os.environ['HEARTBEAT']))
sys.exit(main.cli())
"""


def free_port():
  with socket.socket() as free:
    free.bind(('localhost', 0))
    return free.getsockname()[1]


def slurm_environment(port, processes, index):
  """Returns what srun tells one of its tasks, all on this machine."""
  return {
    'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': str(processes),
    'SLURM_PROCID': str(index), 'SLURM_LOCALID': str(index), 'JAX_COORDINATOR_PORT': str(port),
  }


def limit_files(size):
  """Has the system refuse this process files larger than `size` bytes, as a full disk would."""
  if size is not None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


class Run:
  """Processes of one run, which do not outlive it.

  Args:
    *arguments: of the command line.
    processes: how many.
    devices: of each.
    slurm: whether they find each other as under SLURM, and not by flags.
    heartbeat: seconds, see hosts.start.
    small_files: {index of a process: bytes beyond which it cannot make a file larger}.
  """

  def __init__(
    self, *arguments, processes=1, devices=1, slurm=False, heartbeat=10, small_files=None
  ):
    port = free_port()
    meeting = (f'--coordinator=localhost:{port}', f'--processes={processes}')
    flags = (
      os.environ.get('XLA_FLAGS', ''), '--xla_cpu_multi_thread_eigen=false',
      f'--xla_force_host_platform_device_count={devices}',
    )
    self.processes = [
      subprocess.Popen(
        [sys.executable, '-c', WORKER, *arguments]
        + ([*meeting, f'--process={index}'] if processes > 1 and not slurm else []),
        cwd=ROOT, text=True, env={
          **os.environ, 'XLA_FLAGS': ' '.join(flags), 'HEARTBEAT': str(heartbeat),
          **(slurm_environment(port, processes, index) if slurm else {}),
        },
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=functools.partial(limit_files, (small_files or {}).get(index)),
      ) for index in range(processes)
    ]

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    for process in self.processes:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.communicate()

  def signal_at(self, step, index, signum):
    """Sends a signal to one process, once the main one has logged a step."""
    for line in self.processes[0].stderr:
      if f'step {step} of' in line:
        self.processes[index].send_signal(signum)
        return
    pytest.fail(f'step {step} was never reached')

  def end(self):
    """Returns (exit statuses, lines on stderr of each)."""
    told = [process.communicate(timeout=120)[1].splitlines() for process in self.processes]
    return [process.returncode for process in self.processes], told


def uninterrupted(workdir):
  """Trains in one process, this one; returns {step: loss}."""
  _, config, workdir, _ = command_line.parse(
    ['fmzoo', *TINY, f'--workdir={workdir}', '--config.mesh.data=1']
  )
  train.train(build.recipe(config), workdir)
  return losses(workdir)


def test_any_number_of_processes_goes_on_where_others_ended(tmp_path, monkeypatch):
  """kill -9 and SIGTERM of one of two, then one process alone, then four: one curve.

  It is that of one process that was never stopped, to 1e-5. Steps that two processes take again
  have the same losses to the last bit.
  """
  monkeypatch.chdir(ROOT)
  workdir = tmp_path / 'parts'
  arguments = [*TINY, f'--workdir={workdir}']
  with Run(*arguments, processes=2, devices=2) as two:
    two.signal_at(12, 1, signal.SIGKILL)
    begun = time.time()
    statuses, told = two.end()
    assert statuses[1] == -signal.SIGKILL and statuses[0] not in (0, -signal.SIGKILL), told
    assert time.time() - begun < 60 and told[0][-1] == ends.LAST_WORD, told
  with Run(*arguments, processes=2, devices=2, slurm=True) as two:
    two.signal_at(16, 1, signal.SIGTERM)
    begun = time.time()
    statuses, told = two.end()
    assert statuses == [143, 143] and time.time() - begun < 30, told
  reached = max(losses(workdir))
  for lines in told:
    assert any(f'stopped by SIGTERM after step {reached};' in line for line in lines), told
  assert not any(f' of {STEPS}: loss' in line for line in told[1])  # one tells for both
  assert (workdir / 'checkpoints' / str(reached)).is_dir() and 16 <= reached < STEPS - 4
  rows = map(json.loads, (workdir / 'metrics.cut.jsonl').read_text().splitlines())
  before = {row['step']: row['loss'] for row in rows}
  assert len(before) >= 4 and before.items() <= losses(workdir).items()
  with Run(*arguments) as one:
    one.signal_at(reached + 2, 0, signal.SIGTERM)
    assert one.end()[0] == [143]
  with Run(*arguments, processes=4) as four:
    statuses, told = four.end()
    assert statuses == [0] * 4, told
  expected, found = uninterrupted(tmp_path / 'whole'), losses(workdir)
  assert sorted(found) == sorted(expected) == list(range(1, STEPS + 1))
  np.testing.assert_allclose(
    [found[step] for step in expected], list(expected.values()), rtol=1e-5
  )


@pytest.mark.parametrize('full', [0, 1])
def test_a_disk_that_is_full_on_one_host_leaves_nobody_waiting(full, tmp_path):
  """Each writes its half of the state; both end within the two minutes that `end` gives them."""
  arguments = [*TINY, f'--workdir={tmp_path}', '--config.mesh.data=1', '--config.mesh.fsdp=2']
  with Run(*arguments, processes=2, heartbeat=5, small_files={full: 10_000}) as two:
    statuses, told = two.end()
  assert statuses[full] == 2, told
  assert told[full][-1].startswith(f'error: checkpoint {tmp_path}/checkpoints/8 cannot be written')
  assert '(File too large)' in told[full][-1] and told[full][-1].endswith('begins again')
  assert statuses[1 - full] not in (0, 2) and told[1 - full][-1] == ends.LAST_WORD, told

"""A process that is killed, or told to stop, goes on exactly where it was.

  python -m tests.test_killed FOLDER KILLS

kills a run that often, at random, and compares it with one that nobody kills.
"""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np

from fmzoo import build, checkpoint, command_line, train
from tests import tiny
from tests.test_resume import arrays, losses

ROOT = pathlib.Path(__file__).parent.parent
SAVE_EVERY = 5  # steps


def start(workdir, steps):
  """Starts to train, or to go on."""
  arguments = [
    sys.executable, '-m', 'fmzoo.main', '--config=configs/sit_digits.py', f'--workdir={workdir}',
    '--config.model.width=32', '--config.model.heads=2', '--config.model.depth=1',
    '--config.model.unroll=1', '--config.data.batch_size=16', f'--config.run.steps={steps}',
    '--config.log.log_every_steps=1', '--config.log.preview_every_steps=0',
    f'--config.log.checkpoint_every_steps={SAVE_EVERY}', '--config.log.keep_last=1',
    '--config.eval.name=none',
  ]
  flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_cpu_multi_thread_eigen=false'
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags.strip()}
  environment.pop('JAX_DISABLE_MOST_OPTIMIZATIONS', None)  # exact with programs as people run them
  return subprocess.Popen(
    arguments, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
  )


def await_step(process, step):
  """Reads the log up to a step, the run's own count of them; says whether it came."""
  return any(f'step {step} of' in line for line in process.stderr)


def await_save(process, workdir):
  """Waits until files of a checkpoint are being written; says whether that was seen."""
  while process.poll() is None:
    if any((workdir / 'checkpoints').glob('*.orbax-checkpoint-tmp/*')):
      return True
    time.sleep(0.0005)
  return False


def end(process, with_signal=None):
  """Sends a signal, if any, and returns the exit status."""
  if with_signal:
    process.send_signal(with_signal)
  process.communicate()
  return process.returncode


def kill_at_random(workdir, steps, kind, draw):
  """Kills a run during a save, after some steps or at any time; returns how far it had come."""
  done = max(losses(workdir), default=0) if (workdir / 'metrics.jsonl').exists() else 0
  process = start(workdir, steps)
  if kind == 'save':
    assert await_step(process, done - done % SAVE_EVERY + SAVE_EVERY - 1)
    assert await_save(process, workdir)
  elif kind == 'step':
    assert await_step(process, done + draw.randint(1, SAVE_EVERY))
  else:
    time.sleep(draw.uniform(0, 10))
  assert end(process, signal.SIGKILL) == -signal.SIGKILL
  folder = workdir / 'checkpoints'
  found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
  print(f'killed, {kind}: {found}', flush=True)
  return found


def final_state(workdir):
  """Returns the newest state of a workdir, on the host."""
  recipe = build.recipe(command_line.parse(['fmzoo', f'--workdir={workdir}'])[1])
  mesh = tiny.mesh(1)
  with checkpoint.Checkpoints(workdir / 'checkpoints', identity=recipe.identity) as checkpoints:
    return arrays(train.restore_or_init(recipe, mesh, checkpoints)[0])


def assert_same(whole, parts, steps):
  """Compares the curves and the states, bit for bit."""
  assert losses(whole) == losses(parts)
  assert sorted(losses(parts)) == list(range(1, steps + 1))
  states = [final_state(workdir) for workdir in (whole, parts)]
  assert int(states[0].step) == steps
  jax.tree.map(np.testing.assert_array_equal, *states)


def test_killed_process_goes_on_exactly(tmp_path):
  """kill -9 during a save, and SIGTERM of a real process; one checkpoint is always there.

  A kill between saves, after which steps are taken again, too, is in test_hosts_training.py.
  """
  whole, parts, steps = tmp_path / 'whole', tmp_path / 'parts', 60
  assert end(start(whole, steps)) == 0
  process = start(parts, steps)
  assert await_step(process, 3 * SAVE_EVERY) and await_save(process, parts)
  assert end(process, signal.SIGKILL) == -signal.SIGKILL
  left = {path.name for path in (parts / 'checkpoints').iterdir()}
  assert any(name.isdecimal() for name in left), left
  process = start(parts, steps)
  assert await_step(process, 20)
  begun = time.time()
  assert end(process, signal.SIGTERM) == 143
  assert time.time() - begun < 30
  assert 20 <= max(losses(parts)) < steps
  assert end(start(parts, steps)) == 0
  assert_same(whole, parts, steps)


def main(folder, kills):
  """Kills a run `kills` times and compares it with one that goes through."""
  folder, draw = pathlib.Path(folder), random.Random(1)
  steps = 10 * int(kills)
  assert end(start(folder / 'whole', steps)) == 0
  torn = 0
  for number in range(int(kills)):
    kind = ('save', 'step', 'time')[number % 3]
    found = kill_at_random(folder / 'parts', steps, kind, draw)
    torn += any(name.endswith('tmp') for name in found)
  assert end(start(folder / 'parts', steps)) == 0
  assert_same(folder / 'whole', folder / 'parts', steps)
  print(f'{kills} kills, {torn} of them during a save: the same curve and state, bit for bit')


if __name__ == '__main__':
  main(*sys.argv[1:])

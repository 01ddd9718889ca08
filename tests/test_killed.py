"""A process that is killed, or told to stop, goes on exactly where it was."""

import os
import pathlib
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


def test_killed_process_goes_on_exactly(tmp_path):
  """kill -9 and SIGTERM of a real process; the curve equals the uninterrupted one bit for bit."""
  arguments = [
    sys.executable, '-m', 'fmzoo.main', '--config=configs/sit_digits.py',
    '--config.model.width=32', '--config.model.heads=2', '--config.model.depth=1',
    '--config.model.unroll=1', '--config.data.batch_size=16', '--config.run.steps=60',
    '--config.log.log_every_steps=1', '--config.log.preview_every_steps=0',
    '--config.log.checkpoint_every_steps=5', '--config.eval.name=none',
  ]
  flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_cpu_multi_thread_eigen=false'
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags.strip()}

  def start(workdir):
    return subprocess.Popen(
      [*arguments, f'--workdir={workdir}'], cwd=ROOT, env=environment,
      stderr=subprocess.PIPE, text=True,
    )

  def stop(process, workdir, at_step, with_signal):
    """Sends a signal once the log has reached a step; the process has 60 steps to go."""
    for line in process.stderr:
      if f'step {at_step} of' in line:
        process.send_signal(with_signal)
        break
    process.communicate()
    return process.returncode

  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  assert stop(start(whole), whole, 10**9, signal.SIGTERM) == 0
  assert stop(start(parts), parts, 7, signal.SIGKILL) == -signal.SIGKILL
  begun = time.time()
  assert stop(start(parts), parts, 20, signal.SIGTERM) == 143
  assert time.time() - begun < 30
  assert 20 <= max(losses(parts)) < 60
  assert stop(start(parts), parts, 10**9, signal.SIGTERM) == 0
  assert losses(whole) == losses(parts)
  states = []
  for workdir in (whole, parts):
    recipe = build.recipe(_config_of(workdir))
    mesh = tiny.mesh(1)
    with checkpoint.Checkpoints(workdir / 'checkpoints', identity=recipe.identity) as checkpoints:
      states.append(arrays(train.restore_or_init(recipe, mesh, checkpoints)[0]))
  assert int(states[0].step) == 60
  jax.tree.map(np.testing.assert_array_equal, *states)


def _config_of(workdir):
  return command_line.parse(['fmzoo', f'--workdir={workdir}'])[1]

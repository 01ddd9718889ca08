"""The whole loop: it stops and goes on bit for bit, compiles once, and never waits in between."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from fmzoo import build, checkpoint, command_line, evaluate, pictures, sample, step, train
from fmzoo.parallel import mesh as meshes
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent


def arrays(state):
  """Returns every array of a state on the host, the key as its data."""
  return jax.device_get(state._replace(rng=jax.random.key_data(state.rng)))


def losses(workdir):
  """Returns {step: loss} of metrics.jsonl."""
  lines = (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
  return {row['step']: row['loss'] for row in map(json.loads, lines) if 'loss' in row}


@pytest.mark.parametrize('method', tiny.METHODS)
def test_stopped_and_resumed_equals_never_stopped(method, tmp_path):
  """Parameters, EMA, optimiser, key and the losses that follow, bit for bit."""
  changes = {'log__log_every_steps': 1, 'mesh__data': 1}
  if method == 'bfm_frn':
    train.train(tiny.recipe('bfm', run__steps=1, **changes), tmp_path / 'stage1')
    changes['run__init_from'] = str(tmp_path / 'stage1')
  whole = train.train(tiny.recipe(method, run__steps=4, **changes), tmp_path / 'whole')
  half = tiny.config(method, run__steps=4, **changes)
  half.method = {**half.method, 'total_steps': 4} if method == 'soflow' else half.method
  stopping = build.recipe(half)
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(train.hosts.Preemption, 'reached', lambda self, done: done >= 2)
    train.train(stopping, tmp_path / 'parts')
  resumed = train.train(stopping, tmp_path / 'parts')
  jax.tree.map(np.testing.assert_array_equal, arrays(whole), arrays(resumed))
  assert losses(tmp_path / 'whole') == losses(tmp_path / 'parts')
  assert sorted(losses(tmp_path / 'parts')) == [1, 2, 3, 4]


def test_killed_process_goes_on_exactly(tmp_path):
  """kill -9 and SIGTERM of a real process; the curve equals the uninterrupted one bit for bit."""
  arguments = [
    sys.executable, '-m', 'fmzoo.main', '--config=configs/sit_digits.py',
    '--config.model.width=32', '--config.model.heads=2', '--config.model.depth=1',
    '--config.model.unroll=1', '--config.data.batch_size=16', '--config.run.steps=60',
    '--config.log.log_every_steps=1', '--config.log.preview_every_steps=0',
    '--config.log.checkpoint_every_steps=5', '--config.eval.name=none',
  ]
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  environment['XLA_FLAGS'] = '--xla_cpu_multi_thread_eigen=false'

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
  assert start(whole).communicate() and (whole / 'metrics.jsonl').exists()
  assert stop(start(parts), parts, 7, signal.SIGKILL) == -signal.SIGKILL
  begun = time.time()
  assert stop(start(parts), parts, 20, signal.SIGTERM) == 0
  assert time.time() - begun < 30
  assert 20 <= max(losses(parts)) < 60
  assert stop(start(parts), parts, 10**9, signal.SIGTERM) == 0
  assert losses(whole) == losses(parts)
  states = []
  for workdir in (whole, parts):
    recipe = build.recipe(_config_of(workdir))
    mesh = meshes.make(meshes.Config(data=1, mode='jit'))
    with checkpoint.Checkpoints(workdir / 'checkpoints', identity=recipe.identity) as checkpoints:
      states.append(arrays(train.restore_or_init(recipe, mesh, checkpoints)[0]))
  assert int(states[0].step) == 60
  jax.tree.map(np.testing.assert_array_equal, *states)


def _config_of(workdir):
  return command_line.parse(['fmzoo', f'--workdir={workdir}'])[1]


def test_damaged_newest_checkpoint_falls_back_loudly(tmp_path, caplog):
  recipe = tiny.recipe('fm', mesh__data=1)
  train.train(recipe, tmp_path)
  newest = tmp_path / 'checkpoints' / '4'
  damaged = max((p for p in newest.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
  damaged.write_bytes(damaged.read_bytes()[:100])
  again = train.train(recipe, tmp_path)
  assert int(again.step) == 4
  assert any('damaged' in record.message for record in caplog.records)
  kept = [path.name for path in (tmp_path / 'checkpoints').iterdir()]
  assert '4' in kept and any(name.startswith('damaged-4') for name in kept)


class Opaque:
  """A value of the device that nobody may look at before a log step."""

  def __init__(self, value):
    self.value = value

  def __getattr__(self, name):
    raise AssertionError(f'.{name} of a device value was used between log steps')

  def _refuse(self, *_):
    raise AssertionError('a device value was converted between log steps')

  __array__ = __float__ = __int__ = __bool__ = __add__ = __radd__ = __mul__ = __iter__ = _refuse


@pytest.mark.parametrize('mode', ['jit', 'pmap'])
def test_one_compilation_one_dispatch_no_sync(mode, tmp_path, monkeypatch):
  """Between log steps the loop only calls the step: state and metrics are opaque to it.

  The method's loss is Python: it is traced once per compilation, so its calls count them.
  """
  recipe = tiny.recipe('fm', mesh__mode=mode, run__steps=7, log__log_every_steps=3)
  calls = {'trace': 0, 'step': 0}

  def counted(*args):
    calls['trace'] += 1
    return recipe.method.loss(*args)

  watched = dataclasses.replace(recipe, method=recipe.method._replace(loss=counted))
  compile_step, log_hook = meshes.compile_step, train.Hooks.log

  def compile_opaque(*args):
    run = compile_step(*args)

    def train_step(state, batch, frozen):
      calls['step'] += 1
      state = state.value if isinstance(state, Opaque) else state
      state, metrics = run(state, batch, frozen)
      return Opaque(state), Opaque(metrics)

    return train_step

  def log(self, done):
    assert done % 3 == 0 or done == 7
    self.pending = [metrics.value for metrics in self.pending]
    log_hook(self, done)

  monkeypatch.setattr(meshes, 'compile_step', compile_opaque)
  monkeypatch.setattr(train.Hooks, 'log', log)
  monkeypatch.setattr(
    checkpoint.Checkpoints, 'save', lambda self, done, state: calls.update(saved=done)
  )
  monkeypatch.setattr(train.Hooks, 'preview', lambda self, done, state: None)
  monkeypatch.setattr(step, 'ema_params', lambda state: None)
  monkeypatch.setattr(evaluate, 'evaluate_params', lambda *args: {})
  train.train(watched, tmp_path)
  assert calls == {'trace': 1, 'step': 7, 'saved': 7}


def test_train_sample_evaluate_leave_what_they_promise(tmp_path):
  recipe = tiny.recipe('soflow', log__preview_every_steps=2)
  train.train(recipe, tmp_path)
  assert (tmp_path / 'config.json').exists()
  assert list(tmp_path.glob('events.out.tfevents*'))
  assert {p.name for p in (tmp_path / 'samples').glob('*.png')} == {
    'step_0000002.png', 'step_0000004.png'}
  results = list((tmp_path / 'evaluations').rglob('protocol.json'))
  assert len(results) == 1
  path = sample.sample(recipe, tmp_path)
  images, labels = pictures.load_npz(path)
  assert images.shape == (10, 8, 8, 1) and images.dtype == np.uint8
  assert list(labels) == list(range(10)) and labels.dtype == np.int32
  assert path.with_suffix('.png').exists()
  from_checkpoint = evaluate.evaluate(recipe, tmp_path)
  assert set(from_checkpoint) == {'accuracy', 'frechet', 'gmac_per_image'}
  from_file = evaluate.evaluate(recipe, tmp_path, samples=path)
  assert set(from_file) == {'accuracy', 'frechet'}


def test_an_image_depends_on_its_index_and_not_on_the_batch(tmp_path):
  recipe = tiny.recipe('fm')
  params = tiny.warm(recipe.method.init(jax.random.key(0)))
  images = []
  for devices, size in ((1, 7), (8, 16), (1, 30)):
    mesh = meshes.make(meshes.Config(data=devices, mode='jit'))
    part = tiny.recipe('fm', sample__batch_size=size)
    images.append(sample.Sampler(part, mesh)(params, np.arange(30, dtype=np.int32) % 10, 3))
  np.testing.assert_allclose(images[1], images[0], rtol=0, atol=1e-5)
  np.testing.assert_allclose(images[2], images[0], rtol=0, atol=1e-5)
  assert np.abs(images[0][0] - images[0][10]).max() > 0.1


def test_long_descriptions_stay_distinct_and_short():
  names = []
  for last in '1', '2':
    names.append(sample.describe(tiny.recipe('fm', sample__labels='0,' * 200 + last)))
  assert names[0] != names[1] and max(map(len, names)) == sample.NAME


@pytest.mark.parametrize('labels,expected', [
  ('balanced', [0, 1, 2, 0, 1]), ('2,0', [2, 0, 2, 0, 2]), ('1', [1] * 5),
])
def test_labels(labels, expected):
  assert list(sample.choose_labels(labels, 5, 3, 0)) == expected


def test_random_labels_come_from_the_seed():
  first, again, other = (sample.choose_labels('random', 1000, 10, seed) for seed in (0, 0, 1))
  assert (first == again).all() and (first != other).any()
  assert set(first) == set(range(10))

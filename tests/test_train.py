"""The loop compiles once, never waits between log steps, and leaves what it promises."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmzoo import checkpoint, evaluate, hooks, sample, step, train
from fmzoo.parallel import mesh as meshes
from tests import tiny


def test_steps_in_a_row_that_are_not_finite_stop_the_run(tmp_path):
  """Also where the step before the log step was good again; good steps alone are averaged."""
  recipe = tiny.recipe('fm', mesh__data=1, run__steps=8, log__log_every_steps=4)
  recipe = dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, max_bad_steps=2))

  def bad_at(steps):
    def loss(params, batch, rng, step):
      value, metrics = recipe.method.loss(params, batch, rng, step)
      return value + jnp.where(jnp.isin(step, np.array(steps)), jnp.nan, 0.0), metrics

    return dataclasses.replace(recipe, method=recipe.method._replace(loss=loss))

  train.train(bad_at([1]), tmp_path / 'goes on')
  lines = (tmp_path / 'goes on' / 'metrics.jsonl').read_text().splitlines()
  first = json.loads(lines[0])
  assert first['bad_steps'] == 1 and np.isfinite(first['loss'])
  with pytest.raises(ValueError, match='2 steps in a row up to step 4'):
    train.train(bad_at([1, 2]), tmp_path / 'stops')


def test_a_part_without_gradient_is_told(tmp_path, monkeypatch):
  """Its name, once a log step from the second step on; other parts are not named."""
  recipe = tiny.recipe('fm', mesh__data=1, run__steps=3, log__log_every_steps=1)
  method = recipe.method._replace(
    grad_metrics=lambda grads: {'part_0/grad_norm': optax.tree.norm(grads), 'part_1/grad_norm': 0.0}
  )
  warnings = []
  monkeypatch.setattr(train.logging, 'warning', lambda text, *args: warnings.append(text % args))
  train.train(dataclasses.replace(recipe, method=method), tmp_path)
  assert len(warnings) == 2 and all(line.endswith(': part_1/grad_norm') for line in warnings)
  last = json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[-1])
  assert last['part_0/grad_norm'] == last['grad_norm'] > 0 == last['part_1/grad_norm']


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
  compile_ahead, log_hook = meshes.compile_ahead, hooks.Hooks.log

  def compile_opaque(*args):
    run = compile_ahead(*args)

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

  monkeypatch.setattr(meshes, 'compile_ahead', compile_opaque)
  monkeypatch.setattr(hooks.Hooks, 'log', log)
  monkeypatch.setattr(
    checkpoint.Checkpoints, 'save', lambda self, done, state: calls.update(saved=done)
  )
  monkeypatch.setattr(hooks.Hooks, 'preview', lambda self, done, state: None)
  monkeypatch.setattr(step, 'ema_params', lambda state: None)
  train.train(watched, tmp_path)
  assert calls == {'trace': 1, 'step': 7, 'saved': 7}


def test_train_sample_evaluate_leave_what_they_promise(tmp_path):
  recipe = tiny.recipe(
    'soflow', log__preview_every_steps=2, eval__name='digits', eval__num_images=10
  )
  train.train(recipe, tmp_path)
  assert (tmp_path / 'config.json').exists()
  assert list(tmp_path.glob('events.out.tfevents*'))
  assert {p.name for p in (tmp_path / 'samples').glob('*.png')} == {
    'step_0000002.png', 'step_0000004.png'}
  results = list((tmp_path / 'evaluations').rglob('protocol.json'))
  assert len(results) == 1
  path = sample.sample(recipe, tmp_path)
  with np.load(path) as arrays:
    images, labels = arrays['arr_0'], arrays['labels']
  assert images.shape == (10, 8, 8, 1) and images.dtype == np.uint8
  assert list(labels) == list(range(10)) and labels.dtype == np.int32
  assert path.with_suffix('.png').exists()
  from_checkpoint = evaluate.evaluate(recipe, tmp_path)
  assert set(from_checkpoint) == {'accuracy', 'frechet', 'gmac_per_image'}
  from_file = evaluate.evaluate(recipe, tmp_path, samples=path)
  assert set(from_file) == {'accuracy', 'frechet'}

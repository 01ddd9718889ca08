"""The train step: one program, the same numbers on any layout, nothing frozen moves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmzoo import inputs, rows, step
from fmzoo.parallel import batch as batches
from fmzoo.parallel import mesh as meshes
from fmzoo.parallel import rules
from tests import tiny

# Of the U-Net: the quotient's rounding, 1 / r times that of an output, stays below the tolerances.
SMALL = {'data__batch_size': 8, 'data__latent_size': 8, 'method__middle_final': 0.1}


def run(method, devices, mode, steps=3, tx=None, accumulate=1, fsdp=1, segment=1):
  """Trains a few steps and returns (state, losses, gradient norms) on the host.

  With dropout and augmentation where the recipe has them.
  """
  small = SMALL if method == 'soflow_unet' else {}
  recipe = tiny.recipe(method, run__steps=steps, mesh__segment=segment, **small)
  tx = tx or recipe.tx
  mesh = meshes.make(meshes.Config(data=devices, fsdp=fsdp, segment=segment, mode=mode))
  state = init_state(recipe, tx)
  state = state._replace(params=tiny.warm(state.params))
  shardings = rules.shardings(state, mesh)
  state = jax.device_put(state, shardings)
  train_step = meshes.compile_step(
    lambda axis: step.make(
      recipe.method, tx, inputs.make(1.0, augment=recipe.data.augment), ema_decay=0.9,
      ema_every=recipe.ema.every_steps, accumulate_steps=accumulate, axis_name=axis,
    ), mesh, mode, rules.abstract(state, mesh),
  )
  draw = functools.partial(tiny.pictures, side=8) if small else tiny.batch
  size = recipe.data.batch_size
  order = rows.order(size, recipe.method.period, recipe.method.groups)
  given = (jax.tree.map(lambda a: a[order], draw(size, seed=k)) for k in range(steps))
  metrics = []
  for batch in batches.ahead(given, mesh, mode):
    state, values = train_step(state, batch, ())
    metrics.append(jax.device_get(values))
  assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings or mode == 'pmap'
  keys = ('loss', 'grad_norm')
  return jax.device_get(state._replace(rng=0)), [[float(m[k]) for k in keys] for m in metrics]


def init_state(recipe, tx=None):
  """Returns the state before the first step, as one program."""
  init = functools.partial(step.init_state, recipe.method, tx or recipe.tx)
  return jax.jit(init)(jax.random.key(0))


@pytest.fixture(scope='module')
def reference(request):
  """One device, jit, plain SGD: (method, state, metrics)."""
  return request.param, *run(request.param, 1, 'jit', tx=optax.sgd(0.1))


@pytest.mark.parametrize('reference', tiny.EVERY, indirect=True)
@pytest.mark.parametrize('devices,mode', [(8, 'jit'), (2, 'pmap')])
def test_layout_changes_nothing(reference, devices, mode):
  """SGD shows the scale of the gradient, which Adam would hide; the other layouts are below."""
  method, state, metrics = reference
  other, values = run(method, devices, mode, tx=optax.sgd(0.1))
  np.testing.assert_allclose(values, metrics, rtol=1e-5)
  for name, a, b in zip(('params', 'ema'), state[2:4], other[2:4]):
    jax.tree.map(
      lambda x, y, name=name: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5, err_msg=name),
      a, b,
    )


@pytest.mark.parametrize('reference,axes', [
  ('fm', {'devices': 2, 'fsdp': 4}), ('soflow', {'devices': 1, 'fsdp': 8}),
  ('bfm', {'devices': 1, 'fsdp': 2, 'segment': 3, 'accumulate': 2}),
  ('bfm', {'devices': 2, 'segment': 3}),
  ('bfm', {'devices': 1, 'fsdp': 8}), ('bfm_frn', {'devices': 1, 'fsdp': 2, 'segment': 3}),
], indirect=['reference'], ids=str)
def test_cutting_the_state_changes_nothing(reference, axes, monkeypatch):
  """So that tiny arrays are cut, too."""
  monkeypatch.setattr(rules, 'SMALLEST', 2)
  method, state, metrics = reference
  other, values = run(method, mode='jit', tx=optax.sgd(0.1), **axes)
  np.testing.assert_allclose(values, metrics, rtol=1e-5)
  for name, a, b in zip(('params', 'ema'), state[2:4], other[2:4]):
    jax.tree.map(
      lambda x, y, name=name: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5, err_msg=name),
      a, b,
    )


@pytest.mark.parametrize('method', tiny.METHODS)
def test_twenty_steps_of_the_recipe_agree_on_every_layout(method):
  """Key biases have no true gradient: Adam turns its rounding noise into steps."""
  state, metrics = run(method, 1, 'jit', steps=20)
  for devices, mode in ((2, 'jit'), (8, 'pmap')):
    other, values = run(method, devices, mode, steps=20)
    np.testing.assert_allclose(np.array(values)[:, 0], np.array(metrics)[:, 0], rtol=1e-5)
    pairs = zip(jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(other.params))
    for (path, a), b in pairs:
      name = jax.tree_util.keystr(path)
      atol = 1e-4 if "['qkv']['bias']" in name else 1e-5
      np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize('reference', tiny.METHODS, indirect=True)
def test_micro_batches_give_the_gradient_of_the_batch(reference):
  method, state, metrics = reference
  other, values = run(method, 1, 'jit', tx=optax.sgd(0.1), accumulate=4)
  np.testing.assert_allclose(values, metrics, rtol=1e-5)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), state.params, other.params
  )


def test_frozen_leaves_do_not_move_and_are_not_averaged():
  recipe = tiny.recipe('bfm_frn')
  state = init_state(recipe)
  state = state._replace(params=tiny.warm(state.params))
  train_step = jax.jit(step.make(recipe.method, recipe.tx, inputs.make(1.0), ema_decay=0.9))
  after, _ = train_step(state, tiny.batch(96), ())
  mask = recipe.method.trainable(state.params)
  same = jax.tree.map(np.array_equal, *jax.device_get((state.params, after.params)))
  for use, equal in zip(jax.tree.leaves(mask), jax.tree.leaves(same)):
    assert use or equal
  assert not all(jax.tree.leaves(same['frn']))
  assert jax.tree.leaves({k: v for k, v in after.ema.items() if k != 'frn'}) == []


def test_a_bad_step_changes_nothing_and_is_counted():
  recipe = tiny.recipe('fm')
  state = init_state(recipe)
  train_step = jax.jit(step.make(recipe.method, recipe.tx, inputs.make(1.0), ema_decay=0.9))
  bad = tiny.batch(8)
  bad['latent'][3, 0, 0, 0] = np.nan
  first, metrics = train_step(state, bad, ())
  second, _ = train_step(first, bad, ())
  assert (int(first.bad_steps), int(second.bad_steps), int(second.step)) == (1, 2, 2)
  assert not np.isfinite(metrics['loss'])
  for name in ('params', 'ema', 'opt_state'):
    jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(second, name))
  third, _ = train_step(second, tiny.batch(8), ())
  assert int(third.bad_steps) == 0
  same = jax.tree.map(np.array_equal, *jax.device_get((state.params, third.params)))
  assert not all(jax.tree.leaves(same))


def test_ema_ramp_starts_near_the_parameters():
  recipe = tiny.recipe('fm')
  state = init_state(recipe, optax.sgd(0.1))
  make = functools.partial(step.make, recipe.method, optax.sgd(0.1), inputs.make(1.0))
  after, _ = jax.jit(make(ema_decay=0.999, ema_ramp=True))(state, tiny.batch(8), ())
  before, new = state.params['final']['bias'], after.params['final']['bias']
  np.testing.assert_allclose(
    after.ema['final']['bias'], before + 0.9 * (new - before), rtol=0, atol=1e-7
  )


def test_partition_and_merge_are_inverse():
  tree = {'a': {'x': jnp.ones(2), 'y': jnp.zeros(3)}, 'b': jnp.ones(())}
  mask = {'a': {'x': True, 'y': False}, 'b': True}
  chosen, others = step.partition(tree, mask)
  assert len(jax.tree.leaves(chosen)) == 2 and chosen['a']['y'] is None
  jax.tree.map(np.testing.assert_array_equal, step.merge(chosen, others), tree)


@pytest.mark.parametrize('period,count', [(1, 4), (3, 4), (6, 2)])
def test_micro_batches_keep_the_place_of_a_row_in_its_group(period, count):
  parts = np.asarray(rows.micro_batches(jnp.arange(48), count, period))
  assert parts.shape == (count, 48 // count)
  assert (parts % period == np.arange(48 // count) % period).all()
  assert sorted(np.ravel(parts)) == list(range(48))

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


STEPS = 20  # of the recipe's own optimiser
LAYOUTS = ((8, 'jit'), (2, 'pmap'))  # (devices, mode), against one device and jit


def switched(tx):
  """Plain SGD or `tx`, whichever the state names, so that one program takes steps of both."""

  def init(params):
    return {'sgd': jnp.zeros((), bool), 'tx': tx.init(params)}

  def update(grads, state, params):
    updates, inner = tx.update(grads, state['tx'], params)
    updates = jax.tree.map(lambda g, u: jnp.where(state['sgd'], -0.1 * g, u), grads, updates)
    return updates, {'sgd': state['sgd'], 'tx': inner}

  return optax.GradientTransformation(init, update)


@functools.cache
def recipe_of(method, segment=1):
  """Returns (recipe, its optimiser or SGD)."""
  small = {**SMALL, 'run__steps': 3} if method == 'soflow_unet' else {'run__steps': STEPS}
  recipe = tiny.recipe(method, mesh__segment=segment, **small)
  return recipe, switched(recipe.tx)


@functools.cache
def start(method):
  """Returns the state before the first step on the host, the key as its data."""
  recipe, tx = recipe_of(method)
  state = jax.jit(functools.partial(step.init_state, recipe.method, tx))(jax.random.key(0))
  return jax.device_get(
    state._replace(params=tiny.warm(state.params), rng=jax.random.key_data(state.rng))
  )


def begin(method, sgd):
  """Returns the state before the first step, which takes steps of SGD or of the recipe."""
  state = start(method)
  optimizer = {**state.opt_state, 'sgd': np.array(sgd)}
  return state._replace(rng=jax.random.wrap_key_data(state.rng), opt_state=optimizer)


@functools.cache
def step_of(method, segment, accumulate, axis):
  """Returns the step, one function for all meshes, so that it is traced once."""
  recipe, tx = recipe_of(method, segment)
  return step.make(
    recipe.method, tx, inputs.make(1.0, augment=recipe.data.augment), ema_decay=0.9,
    ema_every=recipe.ema.every_steps, accumulate_steps=accumulate, axis_name=axis,
  )


@functools.cache
def program(method, devices=1, mode='jit', accumulate=1, fsdp=1, segment=1):
  """Returns (mesh, shardings of the state, compiled step)."""
  mesh = meshes.make(meshes.Config(data=devices, fsdp=fsdp, segment=segment, mode=mode))
  state = begin(method, sgd=False)
  make_step = functools.partial(step_of, method, segment, accumulate)
  train_step = meshes.compile_step(make_step, mesh, mode, rules.abstract(state, mesh))
  return mesh, rules.shardings(state, mesh), train_step


def run(method, devices=1, mode='jit', *, sgd=True, **axes):
  """Trains three steps of SGD or all of the recipe: (state, losses, gradient norms) on the host.

  With dropout and augmentation where the recipe has them.
  """
  recipe, _ = recipe_of(method, axes.get('segment', 1))
  mesh, shardings, train_step = program(method, devices, mode, **axes)
  state = jax.device_put(begin(method, sgd), shardings)
  draw = functools.partial(tiny.pictures, side=8) if method == 'soflow_unet' else tiny.batch
  size = recipe.data.batch_size
  order = rows.order(size, recipe.method.period, recipe.method.groups)
  steps = 3 if sgd else STEPS
  given = (jax.tree.map(lambda a: a[order], draw(size, seed=k)) for k in range(steps))
  metrics = []
  for batch in batches.ahead(given, mesh, mode):
    state, values = train_step(state, batch, ())
    metrics.append(jax.device_get(values))
  assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings or mode == 'pmap'
  keys = ('loss', 'grad_norm')
  return jax.device_get(state._replace(rng=0)), [[float(m[k]) for k in keys] for m in metrics]


@functools.cache
def expected(method, sgd=True):
  """Returns what `run` does of one device and jit."""
  return run(method, sgd=sgd)


def assert_same_training(method, *layout, **axes):
  """SGD shows the scale of the gradient, which Adam would hide."""
  (state, metrics), (other, values) = expected(method), run(method, *layout, **axes)
  np.testing.assert_allclose(values, metrics, rtol=1e-5)
  for name, a, b in zip(('params', 'ema'), state[2:4], other[2:4]):
    jax.tree.map(
      lambda x, y, name=name: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5, err_msg=name),
      a, b,
    )


@pytest.mark.parametrize('method', tiny.EVERY)
@pytest.mark.parametrize('devices,mode', LAYOUTS)
def test_layout_changes_nothing(method, devices, mode):
  """The other layouts are below."""
  assert_same_training(method, devices, mode)


@pytest.mark.parametrize('method,axes', [
  ('fm', {'devices': 2, 'fsdp': 4}), ('soflow', {'devices': 1, 'fsdp': 8}),
  ('bfm', {'devices': 1, 'fsdp': 2, 'segment': 3, 'accumulate': 2}),
  ('bfm', {'devices': 2, 'segment': 3}),
  ('bfm', {'devices': 1, 'fsdp': 8}), ('bfm_frn', {'devices': 1, 'fsdp': 2, 'segment': 3}),
], ids=str)
def test_cutting_the_state_changes_nothing(method, axes, monkeypatch):
  """So that tiny arrays are cut, too, those of Adam's moments among them."""
  monkeypatch.setattr(rules, 'SMALLEST', 2)
  assert_same_training(method, **axes)


@pytest.mark.parametrize('method,layouts', [
  ('fm', (*LAYOUTS, (2, 'jit'), (8, 'pmap'))), ('soflow', LAYOUTS), ('bfm', LAYOUTS),
  ('bfm_frn', LAYOUTS),
], ids=tiny.METHODS)
def test_twenty_steps_of_the_recipe_agree_on_every_layout(method, layouts):
  """Key biases have no true gradient: Adam turns its rounding noise into steps."""
  state, metrics = expected(method, sgd=False)
  assert len(metrics) == STEPS == 20
  for devices, mode in layouts:
    other, values = run(method, devices, mode, sgd=False)
    np.testing.assert_allclose(np.array(values)[:, 0], np.array(metrics)[:, 0], rtol=1e-5)
    pairs = zip(jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(other.params))
    for (path, a), b in pairs:
      name = jax.tree_util.keystr(path)
      atol = 1e-4 if "['qkv']['bias']" in name else 1e-5
      np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize('method', tiny.METHODS)
def test_micro_batches_give_the_gradient_of_the_batch(method):
  assert_same_training(method, accumulate=4)


def test_frozen_leaves_do_not_move_and_are_not_averaged():
  recipe, _ = recipe_of('bfm_frn')
  before, (after, _) = start('bfm_frn'), expected('bfm_frn', sgd=False)
  mask = recipe.method.trainable(before.params)
  same = jax.tree.map(np.array_equal, before.params, after.params)
  for use, equal in zip(jax.tree.leaves(mask), jax.tree.leaves(same)):
    assert use or equal
  assert not all(jax.tree.leaves(same['frn']))
  assert jax.tree.leaves({k: v for k, v in after.ema.items() if k != 'frn'}) == []


def test_a_bad_step_changes_nothing_and_is_counted():
  _, shardings, train_step = program('fm')
  before = begin('fm', sgd=False)
  state, counts = jax.device_put(before, shardings), []
  bad = tiny.batch(96)
  bad['latent'][3, 0, 0, 0] = np.nan
  for _ in range(2):
    state, metrics = train_step(state, bad, ())
    assert not np.isfinite(metrics['loss'])
    counts.append(int(state.bad_steps))
  assert counts == [1, 2] and int(state.step) == 2
  for name in ('params', 'ema', 'opt_state'):
    jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(state, name))
  third, _ = train_step(state, tiny.batch(96), ())
  assert int(third.bad_steps) == 0
  same = jax.tree.map(np.array_equal, before.params, jax.device_get(third.params))
  assert not all(jax.tree.leaves(same))


def test_ema_ramp_starts_near_the_parameters():
  recipe, tx = recipe_of('fm')
  state = begin('fm', sgd=True)
  ramp = step.make(recipe.method, tx, inputs.make(1.0), ema_decay=0.999, ema_ramp=True)
  after, _ = jax.jit(ramp)(state, tiny.batch(8), ())
  before, new = state.ema['final']['bias'], after.params['final']['bias']
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

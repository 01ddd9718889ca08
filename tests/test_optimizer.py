"""Optimisers and their schedules, and the average that is taken of parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmzoo import inputs, optimizer, step
from fmzoo.methods import base
from tests import tiny


def test_schedule_warms_up_and_decays():
  """The first update is 1 / warmup of the highest rate, the last nearly none."""
  optim = tiny.recipe('fm').optim
  optim = dataclasses.replace(
    optim, learning_rate=1.0, warmup_steps=10, schedule='cosine', weight_decay=0.0, clip_norm=0.0,
    eps=1e-20,
  )
  tx = optimizer.make(optim, 100)
  params = jnp.zeros(())
  state, moves = tx.init(params), []
  for _ in range(100):
    update, state = tx.update(jnp.ones(()), state, params)
    moves.append(-float(update))
  np.testing.assert_allclose(moves[:10], np.arange(1, 11) / 10, rtol=1e-4)
  assert moves[10] > 0.99 and moves[55] == pytest.approx(0.5, abs=0.02) and moves[99] < 1e-3


def test_clipping_limits_the_gradient():
  optim = tiny.recipe('bfm').optim
  assert optim.clip_norm == 1.0
  tx = optimizer.make(optim, 10)
  params = {'w': jnp.zeros(4)}
  for size, norm in ((1e6, 1.0), (0.25, 0.5)):
    _, state = tx.update({'w': jnp.full(4, size)}, tx.init(params), params)
    mean = optax.tree_utils.tree_get(state, 'mu')
    np.testing.assert_allclose(optax.tree.norm(mean), (1 - optim.b1) * norm, rtol=1e-5)


def test_weight_decay_of_radam_is_refused():
  optim = dataclasses.replace(tiny.recipe('fm').optim, name='radam', weight_decay=0.1)
  with pytest.raises(ValueError, match="optim.weight_decay=0.1 must be 0 for optim.name='radam'"):
    optimizer.make(optim, 10)


@pytest.mark.parametrize('b2', [0.0, 0.6, 1.0])
def test_decay_that_radam_cannot_rectify_is_refused(b2):
  optim = dataclasses.replace(tiny.recipe('fm').optim, name='radam', b2=b2)
  with pytest.raises(ValueError, match=f'optim.b2={b2} must be above 0.6 and below 1'):
    optimizer.make(optim, 10)


def test_radam_without_momentum():
  """The first updates are the gradient itself."""
  tx = optimizer.scale_by_radam(0.0, 0.999, 1e-8)
  updates, _ = tx.update(jnp.float32([3.0, -2.0]), tx.init(jnp.zeros(2)))
  np.testing.assert_allclose(updates, [3.0, -2.0])


@pytest.mark.parametrize('b2', [0.99, 0.999, 0.9999])
def test_rectification_length_in_float32(b2):
  """Against float64, over the steps where it decides and far beyond them."""
  k = np.unique(np.concatenate([np.arange(1, 200), np.geomspace(200, 1e6, 300)]).astype(np.int32))
  power = b2 ** k.astype(np.float64)
  exact = 2 / (1 - b2) - 1 - 2 * k * power / (1 - power)
  ours = jax.jit(lambda k: optimizer.rectification_length(b2, k))(k)
  np.testing.assert_allclose(ours, exact, rtol=2e-6)


def radam(grads, lr, b1, b2, eps):
  """Returns the moves of RAdam in float64, after every update, from the definition."""
  end, m, v, moved, moves = 2 / (1 - b2) - 1, 0.0, 0.0, 0.0, []
  for k, grad in enumerate(grads.astype(np.float64), 1):
    m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
    rho = end - 2 * k * b2**k / (1 - b2**k)
    update = m / (1 - b1**k)
    if rho > 5:
      update *= np.sqrt(1 - b2**k) / (np.sqrt(v) + eps) * np.sqrt(
        (rho - 4) * (rho - 2) * end / ((end - 4) * (end - 2) * rho)
      )
    moved = moved - lr * update
    moves.append(moved)
  return np.array(moves)


def test_radam_is_its_definition_for_large_and_tiny_gradients():
  rng = np.random.default_rng(0)
  grads = (rng.standard_normal((40, 3)) * [1.0, 1e-4, 1e-8]).astype(np.float32)
  optim = dataclasses.replace(
    tiny.recipe('fm').optim, name='radam', learning_rate=0.01, warmup_steps=0, schedule='constant',
    b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=0.0,
  )
  tx = optimizer.make(optim, 40)
  state, moves, params = tx.init(jnp.zeros(3)), [], np.zeros(3)
  update = jax.jit(tx.update)
  for grad in grads:
    updates, state = update(grad, state, jnp.zeros(3))
    params = params + np.float64(updates)
    moves.append(params)
  exact = radam(grads, 0.01, 0.9, 0.999, 1e-8)
  unit = np.abs(exact).max(axis=0)
  np.testing.assert_allclose(moves / unit, exact / unit, rtol=0, atol=2e-6)


def averages(targets, start, **ema):
  """Returns the step's averages while the parameters are `targets`, one after the other."""
  tx = optax.GradientTransformation(
    lambda params: jnp.zeros((), jnp.int32),
    lambda grads, k, params: ({'w': targets[k] - params['w']}, k + 1),
  )
  method = base.Method(
    lambda rng: {'w': jnp.asarray(start)},
    lambda params, batch, rng, k: (0 * jnp.sum(params['w']), {}),
    None, lambda params: {'w': True}, (), 1,
  )
  state = step.init_state(method, tx, jax.random.key(0))
  train_step = jax.jit(step.make(method, tx, inputs.make(1.0), **ema))
  found = []
  for _ in targets:
    state, _ = train_step(state, {'latent': jnp.zeros((1, 1))}, ())
    found.append(state.ema['w'])
  return np.array(found)


def test_average_of_every_third_step():
  """It moves at steps 0, 3, 6, ..., with the decay of three steps, and not between them."""
  rng = np.random.default_rng(0)
  targets = jnp.asarray(rng.standard_normal((9, 4)), jnp.float32)
  found = averages(targets, np.zeros(4, np.float32), ema_decay=0.9, ema_every=3)
  expected, average = [], np.zeros(4)
  for k, target in enumerate(targets):
    average = 0.9**3 * average + (1 - 0.9**3) * np.float64(target) if k % 3 == 0 else average
    expected.append(average)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)


def test_a_float32_average_is_the_float64_one_rounded():
  """400 updates of a slow average: as near as float64 arithmetic that is stored as float32."""
  rng = np.random.default_rng(0)
  start = rng.standard_normal(500).astype(np.float32)
  targets = start + 1e-3 * rng.standard_normal((400, 500)).cumsum(axis=0).astype(np.float32)
  found = averages(jnp.asarray(targets), start, ema_decay=0.9999, ema_every=16)
  keep, average = 0.9999**16, start
  for target in targets[::16]:
    average = (keep * np.float64(average) + (1 - keep) * np.float64(target)).astype(np.float32)
  np.testing.assert_array_max_ulp(found[-1], average, maxulp=4)

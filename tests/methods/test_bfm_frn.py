"""Stage 2 of BFM: its loss, what it costs and trains, and sampling with cached features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmzoo import cost
from fmzoo.methods import bfm, bfm_frn, bfm_sampler, flow
from tests import tiny

CONFIG = bfm_frn.Config(path='linear', edges=(), label_dropout=0.1)
SHAPE, CLASSES, SEGMENTS = (8, 8, 1), 10, 3
EDGES = bfm_sampler.segment_edges(SEGMENTS)


@pytest.fixture(scope='module')
def net():
  """The tiny network of the recipe with noise on every parameter: (network, params)."""
  made = tiny.blockwise_net()
  return made, tiny.warm(made.init(jax.random.key(0)))


def keys_of(size, seed=0):
  return jax.random.split(jax.random.key(seed), size)


def stage_two_batch(size):
  """Returns a batch with what stage 2 asks for and nothing else."""
  return {k: v for k, v in tiny.batch(size).items() if k in ('latent', 'label')}


def feature_error(made, params, x, noise, label, t, edges):
  """Returns ((f_hat - target)^2 averaged, target) of one row by the definition, pass by pass."""
  start, end = edges

  def at(t, network):
    t = jnp.full(1, t, jnp.float32)
    c = made.condition(params, t, label)
    return network(params, flow.interpolate('linear', x, noise, t), c)

  target = at(t, made.features)
  f_hat = at(start, made.features) + (start - t) / (start - end) * at(t, made.residual)
  return jnp.mean((f_hat - target) ** 2), target


def errors_of_rows(made, params, rows):
  """Returns (errors [B], targets [B, N, D]), one row at a time; row i is of segment i mod S."""
  found = []
  for i, t in enumerate(rows.t):
    segment, row = i % SEGMENTS, slice(i, i + 1)
    found.append(feature_error(
      made, params, rows.x[row], rows.noise[row], rows.labels[row], t, EDGES[segment : segment + 2]
    ))
  errors, targets = zip(*found)
  return np.array(errors), np.concatenate(targets)


@pytest.mark.parametrize('size', [2, 7])
def test_loss_is_the_mean_of_its_rows(net, size):
  """Also where the segments do not divide the batch or outnumber it."""
  made, params = net
  method = bfm_frn.make(CONFIG, made, SHAPE, CLASSES)
  batch, keys = stage_two_batch(size), keys_of(size)
  loss, metrics = jax.jit(method.loss)(params, batch, keys, 0)
  rows = bfm.draw_rows(CONFIG, EDGES, CLASSES, batch, rng=keys, step=0)
  errors, target = errors_of_rows(made, params, rows)
  np.testing.assert_allclose(loss, errors.mean(), rtol=2e-5)
  spread = ((target - target.mean(axis=(0, 1), keepdims=True)) ** 2).mean()
  np.testing.assert_allclose(metrics['feature/unexplained'], errors.mean() / spread, rtol=5e-5)
  for segment in range(SEGMENTS):
    own = errors[segment::SEGMENTS]
    expected = own.mean() if own.size else np.nan
    np.testing.assert_allclose(metrics[f'segment_{segment}/mse'], expected, rtol=2e-5)


def test_dropped_labels_are_dropped_in_every_pass(net):
  made, params = net
  batch, keys = stage_two_batch(6), keys_of(6)

  def loss(rate, labels):
    config = bfm_frn.Config(path='linear', edges=(), label_dropout=rate)
    method = bfm_frn.make(config, made, SHAPE, CLASSES)
    return float(method.loss(params, {**batch, 'label': labels}, keys, 0)[0])

  null = np.full(6, CLASSES, np.int32)
  np.testing.assert_allclose(loss(1.0, batch['label']), loss(0.0, null), rtol=1e-6)
  assert abs(loss(0.0, batch['label']) / loss(0.0, null) - 1) > 1e-4


def test_only_the_residual_network_is_paid_for_backward(net):
  """Forward: the frozen feature network at two times; backward: the residual network alone."""
  made, params = net
  method = bfm_frn.make(CONFIG, made, SHAPE, CLASSES)
  batch, keys = stage_two_batch(6), keys_of(6)
  x, c = jnp.zeros((6, *SHAPE)), jnp.zeros((6, 32))
  condition = cost.matmul_flops(made.condition, params, jnp.zeros(6), jnp.zeros(6, jnp.int32))
  features = cost.matmul_flops(made.features, params, x, c)
  residual = cost.matmul_flops(made.residual, params, x, c)

  def loss(frn):
    return method.loss({**params, 'frn': frn}, batch, keys, 0)[0]

  forward = cost.matmul_flops(loss, params['frn'])
  both = cost.matmul_flops(jax.value_and_grad(loss), params['frn'])
  assert forward == 2 * (condition + features) + residual
  assert residual < both - forward <= 2 * residual


def test_what_stage_two_asks_for(net):
  method = bfm_frn.make(CONFIG, net[0], SHAPE, CLASSES)
  assert method.inputs == ('latent', 'label') and method.period == SEGMENTS
  assert 'frn' in jax.eval_shape(method.init, jax.random.key(0))


def euler_with_cache(made, params, x, labels, *, num_steps, guidance, interval):
  """The FRN sampler by its definition: a Python loop, a cache of features for either label."""
  halves = (labels, jnp.full_like(labels, CLASSES))
  for segment in range(SEGMENTS):
    times = np.linspace(EDGES[segment], EDGES[segment + 1], num_steps + 1, dtype=np.float32)
    for step, t in enumerate(times[:-1]):
      conditions = [made.condition(params, jnp.full(half.shape, t), half) for half in halves]
      if step == 0:
        cache = features = [made.features(params, x, c) for c in conditions]
      else:
        kappa = (times[0] - t) / (times[0] - times[-1])
        residuals = [made.residual(params, x, c) for c in conditions]
        features = [f + kappa * residual for f, residual in zip(cache, residuals)]
      v, v_null = (
        made.velocity(params, x, c, f, jnp.int32(segment)) for c, f in zip(conditions, features)
      )
      if interval[0] <= t <= interval[1]:
        v = v_null + guidance * (v - v_null)
      x = x + (times[step + 1] - t) * v
  return x


@pytest.mark.parametrize('interval', [(0.0, 1.0), (0.4, 0.6), (0.2, 0.8)])
def test_guidance_may_begin_and_end_inside_a_segment(net, interval):
  """The official sampler crashes there; the features of both halves are those of its start."""
  made, params = net
  labels = jnp.arange(2, dtype=jnp.int32)
  x = jax.random.normal(jax.random.key(3), (2, *SHAPE))
  steps = bfm_sampler.plan_steps(
    EDGES, (3, 3, 3), guidance=4.0, guidance_interval=interval, sampler='ode_frn',
    sde_end='corrected',
  )
  calls = bfm_sampler.make_calls(made, params, labels, CLASSES, guidance=4.0, guided=steps.guided)
  out = jax.jit(lambda x: bfm_sampler.integrate(
    'linear', calls, EDGES, steps, x, sampler='ode_frn', noise_at=None
  ))(x)
  expected = euler_with_cache(
    made, params, x, labels, num_steps=3, guidance=4.0, interval=interval
  )
  np.testing.assert_allclose(out, expected, rtol=0, atol=5e-5 * np.abs(expected).max())


def test_frn_at_the_segment_start_is_exact(net):
  """kappa = 0: the approximation is the feature itself, and half-way it is not."""
  made, params = net
  given = bfm.draw_rows(CONFIG, EDGES, CLASSES, stage_two_batch(6), rng=keys_of(6), step=0)
  given = given._replace(t=np.resize(EDGES[:3], 6))
  f_hat, target = bfm_frn.approximate(CONFIG, made, params, given)
  np.testing.assert_allclose(f_hat, target, rtol=0, atol=1e-5)
  f_hat, target = bfm_frn.approximate(CONFIG, made, params, given._replace(t=given.t - 0.1))
  assert np.abs(f_hat - target).max() > 1e-2


def test_stage_two_trains_the_residual_network_alone(net):
  made, params = net
  method = bfm_frn.make(CONFIG, made, (8, 8, 1), 10)
  mask = method.trainable(params)
  assert all(all(jax.tree.leaves(mask[k])) == (k == 'frn') for k in params)
  keys = jax.random.split(jax.random.key(0), 6)
  grads = jax.grad(lambda p: method.loss(p, tiny.batch(6), keys, 0)[0])(params)
  for name, tree in grads.items():
    assert any(np.any(leaf) for leaf in jax.tree.leaves(tree)) == (name == 'frn'), name


def test_stage_two_without_a_residual_network_is_refused():
  with pytest.raises(ValueError, match='frn_depth'):
    tiny.recipe('bfm_frn', model__frn_depth=0, sample__sampler='ode')

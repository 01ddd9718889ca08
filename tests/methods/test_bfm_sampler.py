"""Sampling with BFM: time grids, routing, guidance, network calls, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmzoo import cost
from fmzoo.methods import bfm, bfm_sampler
from fmzoo.models import blockwise
from tests import tiny

STAGE1 = bfm.Config(path='linear', edges=(), alignment_weight=0.05, label_dropout=0.1)
EDGES = bfm_sampler.segment_edges(3)
OPTIONS = {
  'num_steps': 3, 'segment_steps': (), 'guidance': 1.0, 'guidance_interval': (0.0, 1.0),
  'sampler': 'ode', 'sde_end': 'corrected',
}


@pytest.fixture(scope='module')
def net():
  """The tiny network of the recipe with FRN and noise on every parameter: (network, params)."""
  made = tiny.blockwise_net()
  return made, tiny.warm(made.init(jax.random.key(0)))


def make_sampler(net, **changes):
  """Returns the sampler of a network, options static."""
  config = bfm.Config(**{**STAGE1.__dict__, **changes})
  return jax.jit(
    bfm_sampler.make(config, net, (8, 8, 1), 10), static_argnames=tuple(OPTIONS)
  )


def plan(counts=(3, 3, 3), edges=EDGES, **changes):
  """Returns Steps of OPTIONS with changes."""
  options = {k: v for k, v in OPTIONS.items() if k not in ('num_steps', 'segment_steps')}
  return bfm_sampler.plan_steps(edges, counts, **{**options, **changes})


def test_an_edge_belongs_to_the_segment_that_starts_there():
  for edges in (bfm_sampler.segment_edges(6), bfm_sampler.segment_edges(4, (0.95, 0.5, 0.2))):
    segments = len(edges) - 1
    expected = [*range(segments), segments - 1]
    assert list(bfm_sampler.segment_of(edges, edges)) == expected
    assert int(bfm_sampler.segment_of(edges[2] + np.float32(1e-6), edges)) == 1


@pytest.mark.parametrize('inner', [(0.5,), (0.2, 0.4), (1.0, 0.5), (0.5, 0.0), (0.5, 0.5)])
def test_edges_must_fall_from_one_to_zero(inner):
  with pytest.raises(ValueError, match='method.edges=.* 2 falling times'):
    bfm_sampler.segment_edges(3, inner)


def sampled_flops(net, **options):
  """FLOPs of sampling two images."""
  keys, labels = jax.random.split(jax.random.key(1), 2), jnp.zeros(2, jnp.int32)
  return cost.matmul_flops(
    lambda p: make_sampler(net[0])(p, keys, labels, **{**OPTIONS, **options}), net[1]
  )


def test_cost_of_the_samplers(net):
  """S n evaluations; time and null label once a batch; the feature network once a segment."""
  made, params = net
  x, t = jnp.zeros((2, 8, 8, 1)), jnp.zeros(1)

  def evaluation(network, conditions=2):
    c, f = jnp.zeros((conditions, 32)), jnp.zeros((2 if conditions == 2 else 4, 16, 32))
    labels = jnp.zeros(conditions, jnp.int32)
    return sum((
      cost.matmul_flops(made.condition, params, t, labels),
      cost.matmul_flops(network, params, x, c),
      cost.matmul_flops(made.velocity, params, x, c, f, jnp.int32(0)),
    ))

  full, cached = evaluation(made.features), evaluation(made.residual)
  guided = evaluation(made.features, conditions=3)
  assert cached < full < guided < 2 * full
  assert sampled_flops(net) == 9 * full
  assert sampled_flops(net, num_steps=1) == 3 * full
  assert sampled_flops(net, sampler='ode_frn') == 3 * full + 6 * cached
  assert sampled_flops(net, sampler='ode_frn', segment_steps=(1, 4, 2)) == 3 * full + 4 * cached
  assert sampled_flops(net, segment_steps=(1, 4, 2)) == 7 * full
  assert sampled_flops(net, guidance=3.0) == 9 * guided
  assert sampled_flops(net, sampler='sde') == 9 * full
  assert sampled_flops(net, sampler='sde', sde_end='official') == 10 * full


def test_one_step_a_segment_needs_no_residual_network(net):
  sample = make_sampler(net[0])
  keys, labels = jax.random.split(jax.random.key(1), 2), jnp.arange(2, dtype=jnp.int32)
  ode, frn = (
    sample(net[1], keys, labels, **{**OPTIONS, 'num_steps': 1, 'sampler': name})
    for name in ('ode', 'ode_frn')
  )
  np.testing.assert_allclose(ode, frn, rtol=0, atol=1e-6)


def euler_step_by_step(net, keys, labels, edges, counts):
  """The ODE by its definition: a Python loop over the steps of each segment."""
  made, params = net
  rng = jax.vmap(lambda key: jax.random.split(key, 2)[0])(keys)
  x = jax.vmap(lambda key: jax.random.normal(key, (8, 8, 1)))(rng)
  for segment, count in enumerate(counts):
    times = np.linspace(edges[segment], edges[segment + 1], count + 1, dtype=np.float32)
    for t, t_next in zip(times[:-1], times[1:]):
      c = made.condition(params, jnp.full(labels.shape, t), labels)
      v = made.velocity(params, x, c, made.features(params, x, c), jnp.int32(segment))
      x = x + (t_next - t) * v
  return x


@pytest.mark.parametrize('inner,segment_steps', [
  ((0.9, 0.3), ()), ((), (1, 4, 2)), ((0.6, 0.5), (3, 1, 2))
])
def test_segments_of_any_length_and_budget(net, inner, segment_steps):
  keys, labels = jax.random.split(jax.random.key(1), 2), jnp.arange(2, dtype=jnp.int32)
  options = {**OPTIONS, 'num_steps': 2, 'segment_steps': segment_steps}
  out = make_sampler(net[0], edges=inner)(net[1], keys, labels, **options)
  expected = euler_step_by_step(
    net, keys, labels, bfm_sampler.segment_edges(3, inner), segment_steps or (2, 2, 2)
  )
  np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize('segment_steps', [(1, 2), (1, 2, 0), (1, 2, 1.5)])
def test_budgets_must_be_one_a_segment(segment_steps):
  with pytest.raises(ValueError, match='sample.segment_steps=.* must be 3 numbers'):
    bfm_sampler.step_counts(3, 8, segment_steps)


@pytest.mark.parametrize('sampler', ['ode', 'ode_frn'])
def test_guidance_interval_acts_inside_only(net, sampler):
  """An interval over everything is full guidance, one over nothing is none."""
  sample = make_sampler(net[0])
  keys, labels = jax.random.split(jax.random.key(1), 2), jnp.arange(2, dtype=jnp.int32)

  def run(guidance, interval):
    options = {**OPTIONS, 'sampler': sampler, 'guidance': guidance, 'guidance_interval': interval}
    return sample(net[1], keys, labels, **options)

  free, full, part = run(1.0, (0.0, 1.0)), run(4.0, (0.0, 1.0)), run(4.0, (0.25, 0.5))
  np.testing.assert_allclose(run(4.0, (0.01, 1.0)), full, rtol=0, atol=1e-5)
  np.testing.assert_allclose(run(4.0, (1.5, 2.0)), free, rtol=0, atol=1e-6)
  assert np.abs(part - free).max() > 1e-3 and np.abs(part - full).max() > 1e-3
  steps = plan(sampler=sampler, guidance=4.0, guidance_interval=(0.25, 0.5))
  inside = (steps.t >= 0.25) & (steps.t <= 0.5)
  assert (steps.guided == inside).all() and inside.any() and not inside.all()


def test_sde_adds_noise_but_at_the_end():
  corrected, official = (
    plan((4, 4, 4), sampler='sde', sde_end=end) for end in ('corrected', 'official')
  )
  assert corrected.noisy.tolist() == [True] * 11 + [False]
  assert official.noisy.tolist() == [True] * 12 + [False]
  np.testing.assert_allclose(corrected.t_next[:-1], corrected.t[1:])
  for steps in (corrected, official):
    np.testing.assert_allclose((steps.t[-1], steps.t_next[-1]), (0.04, 0.0))
  np.testing.assert_allclose((official.t[-2], official.t_next[-2]), (0.04, 0.0))


@pytest.mark.parametrize('changes,word', [
  ({'sampler': 'rk9'}, 'rk9'), ({'sde_end': 'never'}, 'never'), ({'num_steps': 0}, '0'),
  ({'sampler': 'sde', 'num_steps': 1}, 'num_steps'), ({'sampler': 'ode_frn'}, 'stage 2'),
])
def test_samplers_refuse_what_they_cannot_do(net, changes, word):
  made, params = net
  stage1 = {k: v for k, v in params.items() if k != 'frn'}
  sample = make_sampler(made)
  with pytest.raises(ValueError, match=word):
    sample(stage1, jax.random.split(jax.random.key(0), 1), jnp.zeros(1, jnp.int32),
           **{**OPTIONS, **changes})


def recording_net(calls):
  """Returns a network that does nothing but write down (part, rows, segment) of its calls."""
  def part(name):
    def run(params, x, c, f=None, segment=-1):
      size = x.shape[0] * (1 if c.shape[0] == x.shape[0] else 2)
      jax.debug.callback(
        lambda segment: calls.append((name, size, int(segment))), segment, ordered=True
      )
      return jnp.zeros((size, *x.shape[1:])) if name == 'velocity' else jnp.zeros((size, 1, 1))

    return run

  return blockwise.Blockwise(
    segments=3, groups=1, init=None,
    condition=lambda params, t, labels: jnp.zeros((labels.shape[0], 1)),
    features=part('features'), project=None, residual=part('residual'), velocity=part('velocity'),
    velocity_by_row=None,
  )


@pytest.mark.parametrize('sampler,sde_end', [
  ('ode', 'corrected'), ('ode_frn', 'corrected'), ('sde', 'official')
])
@pytest.mark.parametrize('interval', [(0.0, 1.0), (0.4, 0.6), (0.2, 0.8), (1.5, 2.0)])
def test_network_calls_of_a_run(sampler, sde_end, interval):
  """An unguided step has one row an image; only the FRN asks for features it will need later."""
  calls, expected = [], []
  options = {
    **OPTIONS, 'guidance': 3.0, 'guidance_interval': interval, 'sampler': sampler,
    'sde_end': sde_end,
  }
  sample = bfm_sampler.make(STAGE1, recording_net(calls), (8, 8, 1), 10)
  run = jax.jit(lambda keys, labels: sample({'frn': None}, keys, labels, **options))
  run(jax.random.split(jax.random.key(0), 1), jnp.zeros(1, jnp.int32)).block_until_ready()
  jax.effects_barrier()
  t = plan(sampler=sampler, guidance=3.0, guidance_interval=interval, sde_end=sde_end).t[:9]
  rows_of = np.where((interval[0] <= t) & (t <= interval[1]), 2, 1).reshape(3, 3)
  for segment, rows_of_steps in enumerate(rows_of):
    for step, count in enumerate(rows_of_steps):
      cached = sampler == 'ode_frn'
      expected += [
        ('residual', count, -1) if cached and step else
        ('features', max(rows_of_steps) if cached else count, -1),
        ('velocity', count, segment),
      ]
  assert calls == expected + (expected[-2:] if sde_end == 'official' else [])


def test_an_image_depends_on_its_own_key_and_label(net):
  sample = make_sampler(net[0])
  keys, labels = jax.random.split(jax.random.key(5), 2), jnp.asarray([3, 7], jnp.int32)
  options = {**OPTIONS, 'sampler': 'sde', 'guidance': 2.0}
  both = sample(net[1], keys, labels, **options)
  swapped = sample(net[1], keys[::-1], labels[::-1], **options)
  np.testing.assert_allclose(both, swapped[::-1], rtol=0, atol=1e-4)
  assert np.abs(both[0] - both[1]).max() > 0.1

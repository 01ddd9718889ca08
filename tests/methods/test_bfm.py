"""Segments: times, grouping, routing, samplers and what they cost; the residual stage."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmzoo import cost
from fmzoo.methods import bfm, bfm_frn, flow, fm
from fmzoo.models import blockwise, layers
from tests import tiny

STAGE1 = bfm.Config(path='linear', alignment_weight=0.05, label_dropout=0.1)
STAGE2 = bfm_frn.Config(path='linear', label_dropout=0.1)
OPTIONS = {
  'num_steps': 3, 'guidance': 1.0, 'guidance_interval': (0.0, 1.0), 'sampler': 'ode',
  'sde_end': 'corrected',
}


@pytest.fixture(scope='module')
def net():
  """The tiny network of the recipe with FRN and noise on every parameter: (network, params)."""
  config = tiny.config('bfm_frn')
  made = blockwise.make(
    blockwise.Config(**{k: v for k, v in config.model.items() if k != 'name'}), (8, 8, 1), 10
  )
  parts = {name: jax.jit(part) for name, part in made._asdict().items() if callable(part)}
  made = made._replace(**parts)  # eagerly every call would compile its scan anew
  return made, tiny.warm(made.init(jax.random.key(0)))


def rows(size, seed=0):
  """Returns Rows of the tiny network, times in their segments."""
  batch = tiny.batch(size, seed=seed)
  keys = jax.random.split(jax.random.key(seed), size)
  return bfm.draw_rows(STAGE1, bfm.segment_edges(3), 10, batch, keys)


def take(tree, index):
  return jax.tree.map(lambda a: a[index], tree)


@pytest.mark.parametrize('segments', [1, 2, 3, 6, 7])
def test_times_stay_in_their_segment(segments):
  edges = bfm.segment_edges(segments)
  assert len(edges) == segments + 1 and edges[0] == 1 and edges[-1] == 0
  t = np.asarray(bfm.segment_times(jax.random.split(jax.random.key(0), 700), edges))
  for s in range(segments):
    part = t[s::segments]
    assert (edges[s + 1] <= part).all() and (part <= edges[s]).all()
    assert part.max() - part.min() > 0.8 * (edges[s] - edges[s + 1])


def test_an_edge_belongs_to_the_segment_that_starts_there():
  edges = bfm.segment_edges(6)
  assert list(bfm.segment_of(edges, edges)) == [0, 1, 2, 3, 4, 5, 5]
  assert int(bfm.segment_of(edges[2] + np.float32(1e-6), edges)) == 1


def test_grouped_training_forward_equals_the_switch(net):
  made, params = net
  given = rows(6)
  c = made.condition(params, given.t, given.labels)
  f = made.features(params, given.x, c)
  together = made.velocity_by_row(params, given.x, c, f)
  switch = jax.jit(made.velocity)
  for i in range(6):
    part = slice(i, i + 1)
    alone = switch(params, given.x[part], c[part], f[part], jnp.int32(i % 3))
    np.testing.assert_allclose(together[part], alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize('size', [1, 2, 4, 7])
def test_any_batch_is_the_mean_of_its_rows(net, size):
  """A batch that segments do not divide has no bias: it equals its rows computed one by one."""
  made, params = net
  given = rows(size)
  loss, _ = bfm.loss_of_rows(STAGE1, made, params, given)
  alone = []
  for i in range(size):
    group = take(given, np.full(3, i))
    v = _row_velocity(made, params, group, i % 3)
    target = flow.velocity_target('linear', group.x, group.noise, group.t)[:1]
    c = made.condition(params, group.t, group.labels)
    x_t = flow.interpolate('linear', group.x, group.noise, group.t)
    z = made.project(params, made.features(params, x_t, c))
    cosine = bfm.cosine_similarity(z, group.feature)[0]
    alone.append(jnp.mean((v - target) ** 2) - STAGE1.alignment_weight * cosine)
  np.testing.assert_allclose(loss, np.mean(alone), rtol=2e-5)


def _row_velocity(made, params, group, segment):
  x_t = flow.interpolate('linear', group.x, group.noise, group.t)
  c = made.condition(params, group.t, group.labels)
  f = made.features(params, x_t, c)
  return made.velocity(params, x_t[:1], c[:1], f[:1], segment)


def test_each_segment_gets_its_gradient_from_its_own_rows(net):
  made, params = net
  given = rows(6)

  def loss_of_segment(params, segment):
    v_all, target = _velocities(made, params, given)
    return jnp.sum(((v_all - target) ** 2)[segment::3])

  for segment in range(3):
    grads = jax.grad(loss_of_segment)(params, segment)['segments']
    moved = [any(np.any(leaf[s]) for leaf in jax.tree.leaves(grads)) for s in range(3)]
    assert moved == [s == segment for s in range(3)]


def _velocities(made, params, given):
  x_t = flow.interpolate('linear', given.x, given.noise, given.t)
  c = made.condition(params, given.t, given.labels)
  v = made.velocity_by_row(params, x_t, c, made.features(params, x_t, c))
  return v, flow.velocity_target('linear', given.x, given.noise, given.t)


def test_the_velocity_loss_trains_the_feature_network(net):
  made, params = net
  config = dataclasses.replace(STAGE1, alignment_weight=0.0)
  grads = jax.grad(lambda p: bfm.loss_of_rows(config, made, p, rows(6))[0])(params)
  assert max(np.abs(g).max() for g in jax.tree.leaves(grads['feature_blocks'])) > 0
  assert max(np.abs(g).max() for g in jax.tree.leaves(grads['projector'])) == 0


def test_segment_metrics_are_means_over_their_rows():
  error = jnp.asarray([1.0, 2, 3, 4, 5, 6, 7, 99, 99])
  means = bfm.segment_means(error, 7, 3)
  assert [float(means[f'segment_{s}/mse']) for s in range(3)] == [4.0, 3.5, 4.5]


@pytest.mark.parametrize('segments', [1, 2, 3, 6])
def test_training_pays_for_no_block_twice(segments):
  """Forward FLOPs of a batch are the same for any number of segments."""
  def flops(segments):
    config = tiny.config('bfm', model__segments=segments)
    made = blockwise.make(
      blockwise.Config(**{k: v for k, v in config.model.items() if k != 'name'}), (8, 8, 1), 10
    )
    params = jax.eval_shape(made.init, jax.random.key(0))
    x, c, f = jnp.zeros((12, 8, 8, 1)), jnp.zeros((12, 32)), jnp.zeros((12, 16, 32))
    by_row = cost.matmul_flops(made.velocity_by_row, params, x, c, f)
    switched = cost.matmul_flops(made.velocity, params, x, c, f, jnp.int32(0))
    assert by_row == switched
    return by_row

  assert flops(segments) == flops(1)


def sampled_flops(net, **options):
  """FLOPs of sampling one image."""
  sample = bfm.make_sampler(STAGE1, net[0], (8, 8, 1), 10)
  keys, labels = jax.random.split(jax.random.key(1), 1), jnp.zeros(1, jnp.int32)
  return cost.matmul_flops(
    lambda p: sample(p, keys, labels, **{**OPTIONS, **options}), net[1]
  )


def test_cost_of_the_samplers(net):
  """S n evaluations; guidance doubles; the FRN saves the feature network but once a segment."""
  made, params = net
  x, c, f = jnp.zeros((1, 8, 8, 1)), jnp.zeros((1, 32)), jnp.zeros((1, 16, 32))
  condition = cost.matmul_flops(made.condition, params, jnp.zeros(1), jnp.zeros(1, jnp.int32))
  full = cost.matmul_flops(made.features, params, x, c)
  residual = cost.matmul_flops(made.residual, params, x, c)
  velocity = cost.matmul_flops(made.velocity, params, x, c, f, jnp.int32(0))
  evaluation = 2 * condition + full + velocity  # features and velocity each embed time and label
  saved = full - residual
  assert sampled_flops(net) == 9 * evaluation
  assert sampled_flops(net, num_steps=1) == 3 * evaluation
  assert sampled_flops(net, sampler='ode_frn') == 9 * evaluation - 6 * saved
  assert sampled_flops(net, guidance=3.0) == 18 * evaluation
  assert sampled_flops(net, sampler='sde') == 9 * evaluation
  assert sampled_flops(net, sampler='sde', sde_end='official') == 10 * evaluation


def test_one_step_a_segment_needs_no_residual_network(net):
  sample = bfm.make_sampler(STAGE1, net[0], (8, 8, 1), 10)
  keys, labels = jax.random.split(jax.random.key(1), 2), jnp.arange(2, dtype=jnp.int32)
  ode, frn = (
    sample(net[1], keys, labels, **{**OPTIONS, 'num_steps': 1, 'sampler': name})
    for name in ('ode', 'ode_frn')
  )
  np.testing.assert_allclose(ode, frn, rtol=0, atol=1e-6)


@pytest.mark.parametrize('sampler', ['ode', 'ode_frn'])
def test_guidance_interval_acts_inside_only(net, sampler):
  """An interval over everything is full guidance, one over nothing is none."""
  sample = jax.jit(
    bfm.make_sampler(STAGE1, net[0], (8, 8, 1), 10), static_argnames=tuple(OPTIONS)
  )
  keys, labels = jax.random.split(jax.random.key(1), 2), jnp.arange(2, dtype=jnp.int32)

  def run(guidance, interval):
    options = {**OPTIONS, 'sampler': sampler, 'guidance': guidance, 'guidance_interval': interval}
    return sample(net[1], keys, labels, **options)

  free, full, part = run(1.0, (0.0, 1.0)), run(4.0, (0.0, 1.0)), run(4.0, (0.25, 0.5))
  np.testing.assert_allclose(run(4.0, (0.01, 1.0)), full, rtol=0, atol=1e-5)
  np.testing.assert_allclose(run(4.0, (1.5, 2.0)), free, rtol=0, atol=1e-6)
  assert np.abs(part - free).max() > 1e-3 and np.abs(part - full).max() > 1e-3
  plan = bfm.plan_steps(bfm.segment_edges(3), 3, 4.0, (0.25, 0.5), sampler, 'corrected')
  inside = (plan.t >= 0.25) & (plan.t <= 0.5)
  assert (plan.guided == inside).all() and inside.any() and not inside.all()


def test_sde_adds_noise_but_at_the_end():
  edges = bfm.segment_edges(3)
  corrected, official = (
    bfm.plan_steps(edges, 4, 1.0, (0.0, 1.0), 'sde', end) for end in ('corrected', 'official')
  )
  assert corrected.noisy.sum() == 11 and not corrected.noisy[-1, -1] and corrected.extra is None
  assert official.noisy.all()
  np.testing.assert_allclose(official.extra, (0.04, 0.0))
  np.testing.assert_allclose(corrected.t_next.ravel()[:-1], corrected.t.ravel()[1:])


@pytest.mark.parametrize('changes,word', [
  ({'sampler': 'rk9'}, 'rk9'), ({'sde_end': 'never'}, 'never'), ({'num_steps': 0}, '0'),
  ({'sampler': 'sde', 'num_steps': 1}, 'num_steps'), ({'sampler': 'ode_frn'}, 'stage 2'),
])
def test_samplers_refuse_what_they_cannot_do(net, changes, word):
  made, params = net
  stage1 = {k: v for k, v in params.items() if k != 'frn'}
  sample = bfm.make_sampler(STAGE1, made, (8, 8, 1), 10)
  with pytest.raises(ValueError, match=word):
    sample(stage1, jax.random.split(jax.random.key(0), 1), jnp.zeros(1, jnp.int32),
           **{**OPTIONS, **changes})


def test_frn_at_the_segment_start_is_exact(net):
  """kappa = 0: the approximation is the feature itself, and half-way it is not."""
  made, params = net
  given = rows(6)._replace(t=np.resize(bfm.segment_edges(3)[:3], 6), feature=None)
  f_hat, target = bfm_frn.approximate(STAGE2, made, params, given)
  np.testing.assert_allclose(f_hat, target, rtol=0, atol=1e-5)
  f_hat, target = bfm_frn.approximate(STAGE2, made, params, given._replace(t=given.t - 0.1))
  assert np.abs(f_hat - target).max() > 1e-2


def test_stage_two_trains_the_residual_network_alone(net):
  made, params = net
  method = bfm_frn.make(STAGE2, made, (8, 8, 1), 10)
  mask = method.trainable(params)
  assert all(all(jax.tree.leaves(mask[k])) == (k == 'frn') for k in params)
  keys = jax.random.split(jax.random.key(0), 6)
  grads = jax.grad(lambda p: method.loss(p, tiny.batch(6), keys, 0)[0])(params)
  for name, tree in grads.items():
    assert any(np.any(leaf) for leaf in jax.tree.leaves(tree)) == (name == 'frn'), name


def test_stage_two_without_a_residual_network_is_refused():
  with pytest.raises(ValueError, match='frn_depth'):
    tiny.recipe('bfm_frn', model__frn_depth=0, sample__sampler='ode')


def test_one_segment_is_plain_flow_matching():
  """With the same keys, to the last draw: the same times, noise, dropped labels and loss."""
  config = tiny.config('bfm', model__segments=1)
  made = blockwise.make(
    blockwise.Config(**{k: v for k, v in config.model.items() if k != 'name'}), (8, 8, 1), 10
  )
  params = tiny.warm(jax.jit(made.init)(jax.random.key(0)))

  def apply(params, x, t, duration, labels):
    c = made.condition(params, t, labels)
    return made.velocity(params, x, c, made.features(params, x, c), jnp.int32(0))

  plain = fm.make(
    fm.Config(path='linear', time_mean=0.0, time_std=0.0, label_dropout=0.1),
    layers.Network(made.init, apply, None), (8, 8, 1), 10,
  )
  blocks = bfm.make(dataclasses.replace(STAGE1, alignment_weight=0.0), made, (8, 8, 1), 10)
  keys = jax.random.split(jax.random.key(0), 5)
  losses = [jax.jit(method.loss)(params, tiny.batch(5), keys, 0)[0] for method in (plain, blocks)]
  np.testing.assert_allclose(*losses, rtol=1e-5)


def recording_net(calls):
  """Returns a network that does nothing but write down (part, rows, segment) of its calls."""
  def part(name):
    def run(params, x, *args):
      segment = args[2] if name == 'velocity' else jnp.int32(-1)
      jax.debug.callback(
        lambda segment: calls.append((name, x.shape[0], int(segment))), segment, ordered=True
      )
      return x if name == 'velocity' else jnp.zeros((x.shape[0], 1, 1))

    return run

  return blockwise.Blockwise(
    segments=3, init=None, condition=lambda params, t, labels: jnp.zeros((t.shape[0], 1)),
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
    'num_steps': 3, 'guidance': 3.0, 'guidance_interval': interval, 'sampler': sampler,
    'sde_end': sde_end,
  }
  sample = bfm.make_sampler(STAGE1, recording_net(calls), (8, 8, 1), 10)
  run = jax.jit(lambda keys, labels: sample({'frn': None}, keys, labels, **options))
  run(jax.random.split(jax.random.key(0), 1), jnp.zeros(1, jnp.int32)).block_until_ready()
  jax.effects_barrier()
  plan = bfm.plan_steps(bfm.segment_edges(3), 3, 3.0, interval, sampler, sde_end)
  rows_of = np.where((interval[0] <= plan.t) & (plan.t <= interval[1]), 2, 1)
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
  sample = jax.jit(bfm.make_sampler(STAGE1, net[0], (8, 8, 1), 10), static_argnames=tuple(OPTIONS))
  keys, labels = jax.random.split(jax.random.key(5), 2), jnp.asarray([3, 7], jnp.int32)
  options = {**OPTIONS, 'sampler': 'sde', 'guidance': 2.0}
  both = sample(net[1], keys, labels, **options)
  swapped = sample(net[1], keys[::-1], labels[::-1], **options)
  np.testing.assert_allclose(both, swapped[::-1], rtol=0, atol=1e-4)
  assert np.abs(both[0] - both[1]).max() > 0.1

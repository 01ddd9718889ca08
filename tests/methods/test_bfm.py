"""The loss of stage 1: segments and their times, grouping, weights of segments, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmzoo import cost
from fmzoo.methods import bfm, bfm_sampler, flow, fm
from fmzoo.models import layers
from tests import tiny

STAGE1 = bfm.Config(path='linear', edges=(), alignment_weight=0.05, label_dropout=0.1)
EDGES = bfm_sampler.segment_edges(3)


@pytest.fixture(scope='module')
def net():
  """The tiny network of the recipe with FRN and noise on every parameter: (network, params)."""
  made = tiny.blockwise_net()
  return made, tiny.warm(made.init(jax.random.key(0)))


def rows(size, seed=0, step=0):
  """Returns Rows of the tiny network, times in their segments."""
  keys = jax.random.split(jax.random.key(seed), size)
  return bfm.draw_rows(STAGE1, EDGES, 10, tiny.batch(size, seed=seed), rng=keys, step=step)


def take(tree, index):
  return jax.tree.map(lambda a: a[index], tree._replace(first=None))


@pytest.mark.parametrize('edges', [
  bfm_sampler.segment_edges(segments) for segments in (1, 2, 3, 6, 7)
] + [bfm_sampler.segment_edges(3, (0.9, 0.25))])
def test_times_stay_in_their_segment(edges):
  segments = len(edges) - 1
  assert edges[0] == 1 and edges[-1] == 0
  segment = np.arange(700) % segments
  t = np.asarray(bfm.segment_times(jax.random.split(jax.random.key(0), 700), edges, segment))
  for s in range(segments):
    part = t[s::segments]
    assert (edges[s + 1] <= part).all() and (part <= edges[s]).all()
    assert part.max() - part.min() > 0.8 * (edges[s] - edges[s + 1])


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


@pytest.mark.parametrize('size,step', [(1, 0), (2, 1), (4, 0), (4, 1), (7, 2)])
def test_any_batch_is_the_mean_of_its_rows(net, size, step):
  """A batch that segments do not divide equals its rows computed one by one."""
  made, params = net
  given = rows(size, step=step)
  loss, metrics = jax.jit(lambda p, given: bfm.loss_of_rows(STAGE1, made, p, given))(params, given)
  alone, errors = [], {0: [], 1: [], 2: []}
  for i in range(size):
    row, segment = take(given, slice(i, i + 1)), (step * size + i) % 3
    x_t = flow.interpolate('linear', row.x, row.noise, row.t)
    c = made.condition(params, row.t, row.labels)
    f = made.features(params, x_t, c)
    v = made.velocity(params, x_t, c, f, jnp.int32(segment))
    assert EDGES[segment + 1] <= row.t[0] <= EDGES[segment]
    target = flow.velocity_target('linear', row.x, row.noise, row.t)
    errors[segment].append(np.mean((v - target) ** 2))
    cosine = bfm.cosine_similarity(made.project(params, f), row.feature)[0]
    alone.append(errors[segment][-1] - STAGE1.alignment_weight * cosine)
  np.testing.assert_allclose(loss, np.mean(alone), rtol=2e-5)
  for segment, own in errors.items():
    expected = np.mean(own) if own else np.nan
    np.testing.assert_allclose(metrics[f'segment_{segment}/mse'], expected, rtol=2e-5)


@pytest.mark.parametrize('size', [1, 2, 4, 5, 6, 7])
def test_every_segment_gets_its_share(size):
  """Over S steps each of 3 segments gets `size` rows, whether or not 3 divides it."""
  counts = np.zeros(3, int)
  for step in range(10, 13):
    first = bfm.first_segment(step, size, 3)
    counts += np.bincount(np.asarray(bfm.segments_of(first, size, 3)), minlength=3)
  assert counts.tolist() == [size] * 3


def test_batches_of_whole_groups_have_a_static_layout():
  """So they are grouped by a reshape, without a gap."""
  assert bfm.first_segment(jnp.int32(5), 6, 3) == 0
  assert isinstance(bfm.first_segment(jnp.int32(5), 6, 3), int)


def test_each_segment_gets_its_gradient_from_its_own_rows(net):
  made, params = net
  given = rows(6)

  def loss_of_segment(params, segment):
    v_all, target = _velocities(made, params, given)
    return jnp.sum(((v_all - target) ** 2)[segment::3])

  for segment in range(3):
    grads = jax.grad(loss_of_segment)(params, segment)['segments']
    moved = [any(np.any(leaf[:, s]) for leaf in jax.tree.leaves(grads)) for s in range(3)]
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
  error = jnp.asarray([1.0, 2, 3, 4, 5, 6, 7])
  means = bfm.segment_means(error, 0, 3)
  assert [float(means[f'segment_{s}/mse']) for s in range(3)] == [4.0, 3.5, 4.5]
  means = bfm.segment_means(error[:1], 2, 3)
  values = [float(means[f'segment_{s}/mse']) for s in range(3)]
  np.testing.assert_equal(values, [np.nan, np.nan, 1.0])


def test_gradient_norms_of_segments(net):
  """A segment without rows has none; together they are the norm of the velocity blocks."""
  made, params = net
  given = rows(2)
  grads = jax.jit(jax.grad(lambda p: bfm.loss_of_rows(STAGE1, made, p, given)[0]))(params)
  norms = bfm.segment_gradient_norms(grads)
  assert list(norms) == [f'segment_{s}/grad_norm' for s in range(3)]
  assert norms['segment_0/grad_norm'] > 0 < norms['segment_1/grad_norm']
  assert norms['segment_2/grad_norm'] == 0
  whole = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(grads['segments'])))
  np.testing.assert_allclose(np.linalg.norm(list(norms.values())), whole, rtol=1e-5)


@pytest.mark.parametrize('segments', [1, 2, 3, 6])
def test_training_pays_for_no_block_twice(segments):
  """Forward FLOPs of a batch are the same for any number of segments."""
  def flops(segments):
    made = tiny.blockwise_net('bfm', model__segments=segments)
    params = jax.eval_shape(made.init, jax.random.key(0))
    x, c, f = jnp.zeros((12, 8, 8, 1)), jnp.zeros((12, 32)), jnp.zeros((12, 16, 32))
    by_row = cost.matmul_flops(made.velocity_by_row, params, x, c, f)
    switched = cost.matmul_flops(made.velocity, params, x, c, f, jnp.int32(0))
    assert by_row == switched
    return by_row

  assert flops(segments) == flops(1)


def test_one_segment_is_plain_flow_matching():
  """With the same keys, to the last draw: the same times, noise, dropped labels and loss."""
  made = tiny.blockwise_net('bfm', model__segments=1)
  params = tiny.warm(made.init(jax.random.key(0)))

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

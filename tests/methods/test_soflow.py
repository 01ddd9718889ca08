"""SoFlow's mathematics, and what a training step costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmzoo import cost
from fmzoo.methods import flow, soflow
from fmzoo.models import layers
from tests import tiny

CONFIG = soflow.Config(
  path='linear', solution='euler', velocity_ratio=0.75, total_steps=100,
  time_mean=(-0.2, -1.0, 0.2), time_std=(1.0, 0.8, 0.8), guidance=1.0, mix_ratio=1.0,
  guidance_decay_time=1.0, label_dropout=0.0, weight_power=1.0, weight_eps=0.01,
  middle_schedule='exponent', middle_initial=0.1, middle_final=0.002,
)
GUIDED = dataclasses.replace(
  CONFIG, guidance=3.0, mix_ratio=0.25, guidance_decay_time=0.8, label_dropout=0.1
)


def rows(size, seed=0):
  """Returns Rows with times in order and a fifth of the labels dropped."""
  rng = np.random.default_rng(seed)
  batch = tiny.batch(size, seed=seed)
  s, t_mid, t = np.sort(rng.uniform(0.05, 0.95, (3, size)).astype(np.float32), axis=0)
  return soflow.Rows(
    batch['latent'], rng.standard_normal(batch['latent'].shape).astype(np.float32),
    batch['label'], rng.random(size) < 0.2, t, s, t_mid,
  )


@pytest.fixture(scope='module')
def net():
  """The tiny DiT of the recipe with noise on every parameter: (network, params)."""
  from fmzoo.models import dit

  config = tiny.config('soflow')
  made = dit.make(
    dit.Config(**{k: v for k, v in config.model.items() if k != 'name'}), (8, 8, 1), 10
  )
  return made, tiny.warm(made.init(jax.random.key(0)))


@pytest.mark.parametrize('solution', soflow.SOLUTIONS)
def test_a_point_moved_to_its_own_time_stays(net, solution):
  x, t = rows(5).x, rows(5).t
  moved = soflow.solve(*net, solution, x, t, t, jnp.zeros(5, jnp.int32))
  np.testing.assert_allclose(moved, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize('solution', soflow.SOLUTIONS)
def test_velocity_is_the_derivative_of_the_solution(net, solution):
  x, t, labels = rows(5).x, rows(5).t, jnp.zeros(5, jnp.int32)
  h = 1e-2

  def solve(s):
    return soflow.solve(*net, solution, x, t, s, labels)

  difference = (solve(t + h) - solve(t - h)) / (2 * h)
  made, params = net
  velocity = soflow.velocity_scale(solution) * made.apply(params, x, t, 0 * t, labels)
  np.testing.assert_allclose(difference, velocity, rtol=0, atol=2e-3)


@pytest.mark.parametrize('solution', soflow.SOLUTIONS)
@pytest.mark.parametrize('path', flow.PATHS)
def test_derivatives_of_the_coefficients(path, solution):
  t, s = jnp.float32(0.7), jnp.float32(0.3)
  a, b, a_t, a_s, b_t, b_s = soflow.solution_coefficients(solution, t, s)
  for index, (by_t, by_s) in ((0, (a_t, a_s)), (1, (b_t, b_s))):
    exact = jax.grad(
      lambda t, s, i=index: soflow.solution_coefficients(solution, t, s)[i], argnums=(0, 1)
    )(t, s)
    np.testing.assert_allclose((by_t, by_s), exact, atol=1e-6)
  alpha, beta, d_alpha, d_beta = flow.path_coefficients(path, t)
  exact = [jax.grad(lambda t, i=i: flow.path_coefficients(path, t)[i])(t) for i in (0, 1)]
  np.testing.assert_allclose((d_alpha, d_beta), exact, atol=1e-6)


def test_the_exact_operator_of_one_image_has_zero_loss():
  """One image x: v = (x_t - x) / t and f(x_t, t, s) = x_t + (s - t) v solve both losses."""
  image = tiny.batch(1)['latent']

  def apply(params, x_t, t, duration, labels):
    return (x_t - image) / flow.expand_as(t, x_t) * params

  net = layers.Network(None, apply, None)
  given = rows(8)._replace(x=np.repeat(image, 8, axis=0))
  compute = jax.value_and_grad(
    lambda p: soflow.loss_of_rows(CONFIG, net, 10, p, given), has_aux=True
  )
  (loss, metrics), gradient = compute(jnp.float32(1.0))
  np.testing.assert_allclose(
    (loss, metrics['flow/mse'], metrics['consistency/mse'], gradient), 0, atol=5e-5
  )
  (_, metrics), gradient = compute(jnp.float32(0.9))
  assert metrics['flow/mse'] > 1e-3 and metrics['consistency/mse'] > 1e-3 and gradient < -0.01


@pytest.mark.parametrize('ratio', [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize('size', [1, 2, 3, 4, 7, 8, 12, 17])
def test_row_groups_keep_the_ratio(size, ratio):
  groups, count = soflow.row_groups(size, ratio)
  assert size % groups == 0
  assert size - groups * count == int(ratio * size + 1e-6)


def test_a_batch_is_the_mean_of_its_two_losses(net):
  """The joint loss on mixed rows equals the two losses on their own rows, gradients too."""
  given = rows(8)
  is_flow = np.arange(8) % 4 != 0

  def loss(config, chosen):
    part = jax.tree.map(lambda a: a[chosen], given)
    return jax.value_and_grad(
      lambda p: soflow.loss_of_rows(config, net[0], 10, p, part)[0]
    )(net[1])

  joint = loss(GUIDED, np.arange(8))
  alone = [
    loss(dataclasses.replace(GUIDED, velocity_ratio=ratio), chosen)
    for ratio, chosen in ((1.0, is_flow), (0.0, ~is_flow))
  ]
  mixed = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, *alone)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), joint, mixed)


@pytest.mark.parametrize('config,no_grad', [(GUIDED, [10, 2]), (CONFIG, [2]),
                                             (dataclasses.replace(GUIDED, mix_ratio=1.0), [8, 2])])
def test_rows_that_can_share_a_pass_do(net, config, no_grad):
  """Of 8 rows: all once with gradient; 8 null + 2 own and 2 middle rows without."""
  calls = []

  def apply(params, x, *args):
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params))
    calls.append(x.shape[0])
    assert traced
    return net[0].apply(params, x, *args)

  watched = net[0]._replace(apply=apply)
  jax.make_jaxpr(lambda p: soflow.loss_of_rows(config, watched, 10, p, rows(8)))(net[1])
  assert sorted(calls) == sorted([8, *no_grad])


def test_flops_of_a_guided_step_are_four_and_a_half_forward_units(net):
  """Backward counts two; a network as wide as deep hides the layers that need less."""
  made, params = net
  given = rows(16)

  def step(params):
    return jax.value_and_grad(lambda p: soflow.loss_of_rows(GUIDED, made, 10, p, given)[0])(params)

  one = cost.matmul_flops(
    lambda p: made.apply(p, given.x, given.t, given.t, given.labels), params
  )
  assert 4.35 < cost.matmul_flops(step, params) / one <= 4.5


@pytest.mark.parametrize('schedule', soflow.SCHEDULES)
def test_middle_ratio_in_float32(schedule):
  total = 1_200_000
  for k in (0, 1, 999, 600_000, 1_199_999, 1_200_000):
    exact = soflow.middle_ratio(schedule, 0.1, 0.002, k, total)
    traced = jax.jit(
      lambda k: soflow.middle_ratio(schedule, 0.1, 0.002, k, total)
    )(jnp.int32(k))
    np.testing.assert_allclose(traced, exact, rtol=1e-6)
  if schedule != 'const':
    ends = [soflow.middle_ratio(schedule, 0.1, 0.002, k, total) for k in (0, total)]
    np.testing.assert_allclose(ends, [0.1, 0.002], rtol=1e-12)


def test_guidance_decay_values():
  """Values that the specification quotes for tau = 0.8."""
  t = jnp.float32([0.1, 0.8, 0.801, 0.805, 0.82, 0.9, 1.0])
  np.testing.assert_allclose(
    soflow.guidance_decay(t, 0.8), [1, 1, 0.993, 0.62, 0.20, 0.025, 0], atol=5e-3
  )
  np.testing.assert_array_equal(soflow.guidance_decay(t, 1.0), 1)


def test_dropped_rows_are_trained_without_guidance(net):
  """A dropped row's loss is that of an unguided row with the null label."""
  config = dataclasses.replace(GUIDED, velocity_ratio=1.0)
  given = rows(4)._replace(dropped=np.ones(4, bool))
  guided = soflow.loss_of_rows(config, net[0], 10, net[1], given)[0]
  plain = soflow.loss_of_rows(config, net[0], 10, net[1], given._replace(labels=None))[0]
  np.testing.assert_allclose(guided, plain, rtol=1e-6)


@pytest.mark.parametrize('renoise', [True, False])
@pytest.mark.parametrize('num_steps', [1, 2, 4])
def test_one_network_call_a_step(renoise, num_steps):
  recipe = tiny.recipe('soflow', sample__num_steps=num_steps, sample__renoise=renoise)
  params = recipe.method.init(jax.random.key(0))
  keys, labels = jax.random.split(jax.random.key(1), 4), jnp.zeros(4, jnp.int32)

  def flops(steps):
    return cost.matmul_flops(
      lambda p: recipe.method.sample(p, keys, labels, num_steps=steps, renoise=renoise), params
    )

  assert flops(num_steps) == num_steps * flops(1)


def test_chained_sampling_with_exact_velocity_is_exact():
  """With f of one image, one call and a chain of calls both end at the image."""
  image = tiny.batch(1)['latent']

  def apply(params, x_t, t, duration, labels):
    return (x_t - image) / flow.expand_as(t, x_t)

  net, noise = layers.Network(None, apply, None), rows(3).noise
  for renoise in (1, 4, jnp.asarray(np.stack([rows(3, seed=i).noise for i in (1, 2)]))):
    out = soflow.few_step_sample(net, None, CONFIG, noise, jnp.zeros(3, jnp.int32), renoise)
    np.testing.assert_allclose(out, np.repeat(image, 3, axis=0), rtol=0, atol=1e-5)


@pytest.mark.parametrize('changes,word', [
  ({'path': 'cubic'}, 'method.path'), ({'solution': 'heun'}, 'method.solution'),
  ({'middle_schedule': 'step'}, 'middle_schedule'), ({'velocity_ratio': 1.2}, '1.2'),
  ({'guidance': 2.0}, 'label_dropout'), ({'label_dropout': 0.1}, 'guidance'),
  ({'mix_ratio': 0.5}, 'mix_ratio'), ({'middle_final': 0.0}, 'middle_final'),
])
def test_contradictions_are_refused(changes, word):
  with pytest.raises(ValueError, match=word):
    soflow.make(dataclasses.replace(CONFIG, **changes), None, (8, 8, 1), 10)

"""SoFlow's mathematics, and what a training step costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmzoo import cost
from fmzoo.methods import flow, soflow, soflow_rows, soflow_sampler, soflow_times
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
  return soflow_rows.Rows(
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
  # Eagerly every call would compile its scan anew.
  made = made._replace(apply=jax.jit(made.apply), apply_pairs=jax.jit(made.apply_pairs))
  return made, tiny.warm(jax.jit(made.init)(jax.random.key(0)))


@pytest.mark.parametrize('solution', soflow_times.SOLUTIONS)
def test_a_point_moved_to_its_own_time_stays(net, solution):
  x, t = rows(5).x, rows(5).t
  moved = soflow_sampler.solve(
    *net, x, solution=solution, t=t, s=t, labels=jnp.zeros(5, jnp.int32)
  )
  np.testing.assert_allclose(moved, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize('solution', soflow_times.SOLUTIONS)
def test_velocity_is_the_derivative_of_the_solution(net, solution):
  x, t, labels = rows(5).x, rows(5).t, jnp.zeros(5, jnp.int32)
  h = 1e-2

  def solve(s):
    return soflow_sampler.solve(*net, x, solution=solution, t=t, s=s, labels=labels)

  difference = (solve(t + h) - solve(t - h)) / (2 * h)
  made, params = net
  velocity = soflow_times.velocity_scale(solution) * made.apply(params, x, t, 0 * t, labels)
  np.testing.assert_allclose(difference, velocity, rtol=0, atol=2e-3)


@pytest.mark.parametrize('solution', soflow_times.SOLUTIONS)
@pytest.mark.parametrize('path', flow.PATHS)
def test_derivatives_of_the_coefficients(path, solution):
  t, s = jnp.float32(0.7), jnp.float32(0.3)
  a, b, a_t, a_s, b_t, b_s = soflow_times.solution_coefficients(solution, t, s)
  for index, (by_t, by_s) in ((0, (a_t, a_s)), (1, (b_t, b_s))):
    exact = jax.grad(
      lambda t, s, i=index: soflow_times.solution_coefficients(solution, t, s)[i], argnums=(0, 1)
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

  net = layers.Network(None, apply, None, apply)
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


@pytest.mark.parametrize('ratio', [0.0, 0.25, 0.29, 0.5, 0.6, 0.75, 1.0])
def test_every_batch_size_keeps_the_ratio(ratio):
  for size in (*range(1, 18), 100):
    chosen = soflow_rows.consistency_rows(size, ratio)
    assert chosen.shape == (size,)
    assert size - chosen.sum() == int(ratio * size + 1e-6)
    of_consistency, of_flow = soflow_rows.split_batch(np.arange(size), ratio)
    np.testing.assert_array_equal(of_consistency, np.flatnonzero(chosen))
    np.testing.assert_array_equal(of_flow, np.flatnonzero(~chosen))


@pytest.mark.parametrize('size', [4, 7, 8, 17])
def test_the_use_of_a_row_depends_on_its_index_in_the_period(size):
  np.testing.assert_array_equal(soflow_rows.consistency_rows(size, 0.75), np.arange(size) % 4 == 0)
  assert soflow_rows.row_period(0.75) == (4, 1)
  assert [soflow_rows.row_period(r)[0] for r in (0.0, 1.0)] == [1, 1]


def bend(params, x, t, duration, labels):
  """A cheap network that depends on every input and not linearly on its two parameters."""
  scale = (1 + t + 2 * duration) * (1 + 0.1 * labels)
  return jnp.tanh(params[0] * x * flow.expand_as(scale, x)) * params[1]


BEND = layers.Network(None, bend, None, bend)


def test_no_row_moves_to_another_device():
  """A step on a batch cut over eight devices sums gradients and exchanges nothing else."""
  mesh = jax.sharding.Mesh(jax.devices(), ('data',))
  cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  given = jax.tree.map(lambda a: jax.device_put(a, cut), rows(32))
  step = jax.jit(jax.grad(lambda p, r: soflow.loss_of_rows(GUIDED, BEND, 10, p, r)[0]))
  program = step.lower(jnp.float32([0.5, 0.8]), given).compile().as_text()
  assert 'all-reduce' in program
  for word in ('all-gather', 'all-to-all', 'collective-permute'):
    assert word not in program


@pytest.mark.parametrize('size', [7, 8])
@pytest.mark.parametrize('config', [CONFIG, GUIDED])
def test_a_batch_is_the_mean_of_its_two_losses(config, size):
  """The joint loss on mixed rows equals the two losses on their own rows, gradients too."""
  given, is_consistency = rows(size), soflow_rows.consistency_rows(size, 0.75)

  def loss(ratio, keep):
    part = jax.tree.map(lambda a: a[keep], given)
    one = dataclasses.replace(config, velocity_ratio=ratio)
    return jax.jit(jax.value_and_grad(
      lambda p: soflow.loss_of_rows(one, BEND, 10, p, part)[0]
    ))(jnp.float32([0.5, 0.8]))

  share = is_consistency.mean()
  alone = loss(0.0, is_consistency), loss(1.0, ~is_consistency)
  for joint, first, second in zip(loss(0.75, np.ones(size, bool)), *alone):
    np.testing.assert_allclose(joint, share * first + (1 - share) * second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('ratio,empty', [(0.0, 'flow/'), (1.0, 'consistency/')])
def test_a_loss_without_rows_reports_zeros(ratio, empty):
  config = dataclasses.replace(GUIDED, velocity_ratio=ratio)
  _, metrics = soflow.loss_of_rows(config, BEND, 10, jnp.float32([0.5, 0.8]), rows(5))
  assert set(metrics) == set(soflow.METRICS)
  for name, value in metrics.items():
    assert value.shape == () and (value == 0) == name.startswith(empty), name


def test_the_mask_of_dropped_labels_is_ignored_without_guidance():
  given, params = rows(8), jnp.float32([0.5, 0.8])

  def loss(config, dropped):
    changed = given._replace(dropped=np.full(8, dropped))
    return float(soflow.loss_of_rows(config, BEND, 10, params, changed)[0])

  assert loss(CONFIG, True) == loss(CONFIG, False)
  assert loss(GUIDED, True) != loss(GUIDED, False)


@pytest.mark.parametrize('solution', soflow_times.SOLUTIONS)
def test_difference_quotient_is_its_definition(solution):
  config = dataclasses.replace(CONFIG, solution=solution)
  given = rows(6)
  x, n_t, n_mid, velocity = (rows(6, seed=i).noise for i in range(4))
  t, s, t_mid = (np.float64(a)[:, None, None, None] for a in (given.t, given.s, given.t_mid))

  def solved(x, n, t):
    u = np.pi / 2 * (s - t)
    return x + (s - t) * n if solution == 'euler' else np.cos(u) * x + np.sin(u) * n

  exact = (solved(x, n_t, t) - solved(x + velocity * (t_mid - t), n_mid, t_mid)) / (t - t_mid)
  ours = soflow.difference_quotient(
    config, x, n_t=n_t, n_mid=n_mid, velocity=velocity, t=given.t, s=given.s, t_mid=given.t_mid
  )
  np.testing.assert_allclose(ours, exact, rtol=0, atol=2e-5 * np.abs(exact).max())


@pytest.mark.parametrize('solution', soflow_times.SOLUTIONS)
def test_consistency_gradient_is_that_of_the_squared_distance(solution):
  """The gradient of mean over rows of w |f_t - f_mid|^2 / (2 |b| (t - t_mid)), f_mid constant."""
  config = dataclasses.replace(CONFIG, solution=solution, velocity_ratio=0.0)
  given, params = rows(6), jnp.float32([0.5, 0.8])
  x_t = flow.interpolate('linear', given.x, given.noise, given.t)
  gap = given.t - given.t_mid
  x_mid = x_t - (given.noise - given.x) * flow.expand_as(gap, x_t)

  def solve(p, x, t):
    return soflow_sampler.solve(
      BEND, p, x, solution=solution, t=t, s=given.s, labels=given.labels
    )

  def distance(p):
    f_t, f_mid = solve(p, x_t, given.t), jax.lax.stop_gradient(solve(params, x_mid, given.t_mid))
    square = flow.row_mean((f_t - f_mid) ** 2)
    weight = jax.lax.stop_gradient(1 / (square / gap**2 + 0.01))
    b = soflow_times.solution_coefficients(solution, given.t, given.s)[1]
    return jnp.mean(weight * square / (2 * jnp.abs(b) * gap))

  ours = jax.grad(lambda p: soflow.loss_of_rows(config, BEND, 10, p, given)[0])(params)
  # d|f|^2/dp carries b, the surrogate sign(b): both are N_t's gradient times q w.
  np.testing.assert_allclose(ours, jax.grad(distance)(params), rtol=1e-4)


@pytest.mark.parametrize('config,free', [
  (GUIDED, [10]), (CONFIG, []), (dataclasses.replace(GUIDED, mix_ratio=1.0), [8]),
])
def test_rows_that_can_share_a_pass_do(net, config, free):
  """Of 8 rows: 8 null + 2 own without gradient, 6 of flow matching, 2 at both their times."""
  calls = []

  def watch(apply):
    def watched(params, x, *args):
      calls.append((apply, x.shape[0]))
      return apply(params, x, *args)
    return watched

  made, params = net
  watched = made._replace(apply=watch(made.apply), apply_pairs=watch(made.apply_pairs))
  jax.make_jaxpr(lambda p: soflow.loss_of_rows(config, watched, 10, p, rows(8)))(params)
  assert sorted(n for apply, n in calls if apply is made.apply) == sorted([*free, 6])
  assert [n for apply, n in calls if apply is made.apply_pairs] == [4]


def test_flops_of_a_guided_step_are_four_and_a_half_forward_units(net):
  """Backward counts two; a network as wide as deep hides the layers that need less.

  Attention multiplies rows by rows: there a middle row takes four products and not two.
  """
  made, params = net
  given = rows(16)

  def step(params):
    return jax.value_and_grad(lambda p: soflow.loss_of_rows(GUIDED, made, 10, p, given)[0])(params)

  one = cost.matmul_flops(
    lambda p: made.apply(p, given.x, given.t, given.t, given.labels), params
  )
  depth, _, width = params['blocks']['core']['attn']['proj']['kernel'].shape
  middle_rows, tokens = 4, params['pos_embed'].shape[1]
  attention = 2 * middle_rows * depth * 2 * tokens**2 * width
  assert 4.35 < (cost.matmul_flops(step, params) - attention) / one <= 4.5


@pytest.mark.parametrize('schedule', soflow_times.SCHEDULES)
@pytest.mark.parametrize('initial,final,total', [
  (0.1, 0.002, 1_200_000), (1.0, 0.0003125, 800_000),
])
def test_middle_ratio_in_float32(schedule, initial, final, total):
  """The traced ratio against float64, over both official schedules and all their length."""
  steps = np.unique(np.linspace(0, total, 5000).astype(np.int32))
  traced = jax.jit(jax.vmap(
    lambda k: soflow_times.middle_ratio(schedule, initial, final, k, total) * jnp.ones(())
  ))(steps)
  exact = [soflow_times.middle_ratio(schedule, initial, final, int(k), total) for k in steps]
  np.testing.assert_allclose(traced, exact, rtol=1e-6)
  if schedule != 'const':
    np.testing.assert_allclose((exact[0], exact[-1]), (initial, final), rtol=1e-12)


def test_middle_time_stays_below_t():
  t = jnp.float32([0.9, 0.5, 1e-4])
  s = jnp.float32([0.1, 0.4999, 0.0])
  np.testing.assert_allclose(soflow_times.middle_time(t, s, 0.1), [0.82, 0.4999, 0.0], atol=1e-6)
  t, s = soflow_times.consistency_times(jnp.float32([0.7, 0.2, 0.0]), jnp.float32([0.5, 0.6, 0.0]))
  np.testing.assert_allclose(t, [0.5, 0.6, 1e-4], atol=1e-7)
  np.testing.assert_allclose(s, [0.4999, 0.2, 0.0], atol=1e-7)


def test_guidance_decay_values():
  """Values that the specification quotes for tau = 0.8."""
  t = jnp.float32([0.1, 0.8, 0.801, 0.805, 0.82, 0.9, 1.0])
  np.testing.assert_allclose(
    soflow_times.guidance_decay(t, 0.8), [1, 1, 0.993, 0.62, 0.20, 0.025, 0], atol=5e-3
  )
  np.testing.assert_array_equal(soflow_times.guidance_decay(t, 1.0), 1)


def test_dropped_rows_are_trained_without_guidance():
  """A dropped row's loss is that of an unguided row with the null label."""
  config = dataclasses.replace(GUIDED, velocity_ratio=1.0)
  given = rows(4)._replace(dropped=np.ones(4, bool))
  params = jnp.float32([0.5, 0.8])
  guided = soflow.loss_of_rows(config, BEND, 10, params, given)[0]
  plain = soflow.loss_of_rows(config, BEND, 10, params, given._replace(labels=None))[0]
  np.testing.assert_allclose(guided, plain, rtol=1e-6)


@pytest.mark.parametrize('renoise', [True, False])
@pytest.mark.parametrize('num_steps', [1, 2, 4])
def test_one_network_call_a_step(renoise, num_steps):
  recipe = tiny.recipe('soflow', sample__num_steps=num_steps, sample__renoise=renoise)
  params = jax.eval_shape(recipe.method.init, jax.random.key(0))
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

  net, noise = layers.Network(None, apply, None, apply), rows(3).noise
  fresh = jnp.asarray(np.stack([rows(3, seed=i).noise for i in (1, 2)]))
  for steps, renoise in ((1, None), (4, None), (3, fresh)):
    out = soflow_sampler.few_step_sample(
      net, None, noise, jnp.zeros(3, jnp.int32), config=CONFIG, steps=steps,
      renoise=renoise,
    )
    np.testing.assert_allclose(out, np.repeat(image, 3, axis=0), rtol=0, atol=1e-5)


@pytest.mark.parametrize('changes,word', [
  ({'path': 'cubic'}, 'method.path'), ({'solution': 'heun'}, 'method.solution'),
  ({'middle_schedule': 'step'}, 'middle_schedule'), ({'velocity_ratio': 1.2}, '1.2'),
  ({'guidance': 2.0}, 'label_dropout'), ({'label_dropout': 0.1}, 'guidance'),
  ({'mix_ratio': 0.5}, 'mix_ratio'), ({'middle_final': 0.0}, 'middle_final'),
  ({'mix_ratio': 0.0}, 'mix_ratio=0.0'), ({'guidance': 0.5}, 'guidance=0.5'),
  ({'time_mean': (0.0,)}, 'time_mean'), ({'time_std': (1.0, 1.0)}, 'time_std'),
  ({'time_std': (1.0, 0.0, 1.0)}, 'time_std'), ({'total_steps': 0}, 'total_steps=0'),
  ({'weight_eps': 0.0}, 'weight_eps=0.0'), ({'weight_power': -1.0}, 'weight_power=-1.0'),
  ({'label_dropout': 1.0}, 'label_dropout=1.0'),
  ({'velocity_ratio': 0.005}, 'velocity_ratio=0.005 must be a fraction of at most 64 parts'),
  ({'guidance_decay_time': 1.5}, '1.5'),
  ({'middle_initial': 2.0}, 'middle_initial=2.0'),
])
def test_contradictions_are_refused(changes, word):
  with pytest.raises(ValueError, match=word):
    soflow.make(dataclasses.replace(CONFIG, **changes), None, (8, 8, 1), 10)


def test_guidance_of_a_network_without_labels_is_refused():
  with pytest.raises(ValueError, match='method.guidance=3.0 must be 1.0 for a network without'):
    soflow.make(GUIDED, BEND._replace(has_labels=False), (8, 8, 1), 10)

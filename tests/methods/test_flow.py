"""Paths, random rows, integrators and the plain flow-matching loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmzoo import cost
from fmzoo.methods import flow, fm, ode
from fmzoo.models import layers
from tests import tiny


@pytest.mark.parametrize('path', flow.PATHS)
def test_path_ends_at_data_and_noise(path):
  x, noise = tiny.batch(3)['latent'], tiny.batch(3, seed=1)['latent']
  np.testing.assert_allclose(flow.interpolate(path, x, noise, jnp.zeros(3)), x, atol=1e-6)
  np.testing.assert_allclose(flow.interpolate(path, x, noise, jnp.ones(3)), noise, atol=1e-6)


@pytest.mark.parametrize('path', flow.PATHS)
def test_velocity_target_is_the_derivative_of_the_path(path):
  x, noise = tiny.batch(3)['latent'], tiny.batch(3, seed=1)['latent']
  t = jnp.float32([0.2, 0.5, 0.8])
  _, exact = jax.jvp(lambda t: flow.interpolate(path, x, noise, t), (t,), (jnp.ones(3),))
  np.testing.assert_allclose(flow.velocity_target(path, x, noise, t), exact, atol=1e-5)


def test_unknown_path_is_refused():
  with pytest.raises(ValueError, match='cubic'):
    flow.path_coefficients('cubic', jnp.ones(1))


def test_logit_normal_times_have_the_given_median_and_spread():
  t = flow.logit_normal_times(jax.random.split(jax.random.key(0), 20_000), -0.4, 1.2)
  z = np.log(t / (1 - t))
  np.testing.assert_allclose((z.mean(), z.std()), (-0.4, 1.2), atol=0.03)


def test_split_rows_gives_independent_keys():
  first, second = flow.split_rows(jax.random.split(jax.random.key(0), 4000), 2)
  a, b = flow.uniform(first), flow.uniform(second)
  assert abs(np.corrcoef(a, b)[0, 1]) < 0.06
  assert abs(float(flow.draw_dropped(first, 0.1).mean()) - 0.1) < 0.02


def test_guidance_of_one_is_the_conditional_velocity():
  a, b = jnp.float32([3.0]), jnp.float32([1.0])
  assert [float(flow.guide(a, b, g)[0]) for g in (0.0, 1.0, 2.0)] == [1.0, 3.0, 5.0]


@pytest.mark.parametrize('name,order,tolerance', [('euler', 1, 0.1), ('heun', 2, 0.1)])
def test_order_of_the_integrators(name, order, tolerance):
  """dx/dt = x (1/2 + t) from t = 1 to 0 takes 1 to 1 / e."""
  counts = np.array([4, 8, 16, 32])
  errors = [
    abs(float(ode.INTEGRATORS[name](
      lambda x, t: x * (0.5 + t), jnp.ones(()), np.linspace(1, 0, n + 1)
    )) - np.exp(-1))
    for n in counts
  ]
  slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
  assert abs(-slope - order) < tolerance


@pytest.mark.parametrize('guidance,passes', [(1.0, 1), (2.0, 2)])
@pytest.mark.parametrize('solver,calls', [('euler', 1), ('heun', 2)])
def test_evaluations_of_the_sampler(guidance, passes, solver, calls):
  recipe = tiny.recipe('fm')
  params = jax.eval_shape(recipe.method.init, jax.random.key(0))
  keys, labels = jax.random.split(jax.random.key(1), 4), jnp.zeros(4, jnp.int32)

  def flops(**options):
    return cost.matmul_flops(lambda p: recipe.method.sample(p, keys, labels, **options), params)

  one = flops(num_steps=1, guidance=1.0, solver='euler')
  assert flops(num_steps=3, guidance=guidance, solver=solver) == 3 * passes * calls * one


@pytest.mark.parametrize('key,value', [('solver', 'rk9'), ('num_steps', 0)])
def test_what_the_sampler_cannot_do_is_refused_before_training(key, value):
  with pytest.raises(ValueError, match=str(value)):
    tiny.recipe('fm', **{f'sample__{key}': value})


def test_the_velocity_of_one_image_has_zero_loss_and_leads_to_it():
  image = tiny.batch(1)['latent']

  def apply(params, x_t, t, duration, labels):
    return (x_t - image) / flow.expand_as(t, x_t)

  net = layers.Network(None, apply, None)
  config = fm.Config(path='linear', time_mean=0.0, time_std=1.0, label_dropout=0.1)
  method = fm.make(config, net, (8, 8, 1), 10)
  keys = jax.random.split(jax.random.key(0), 6)
  batch = {'latent': np.repeat(image, 6, axis=0), 'label': np.zeros(6, np.int32)}
  assert float(method.loss(None, batch, keys, 0)[0]) < 1e-8
  batch['latent'] = batch['latent'] + 0.1
  assert float(method.loss(None, batch, keys, 0)[0]) > 1e-3
  options = {'num_steps': 3, 'guidance': 1.0, 'solver': 'euler'}
  out = method.sample(None, keys, jnp.zeros(6, jnp.int32), **options)
  np.testing.assert_allclose(out, np.repeat(image, 6, axis=0), rtol=0, atol=1e-5)


def test_labels_are_dropped_at_the_given_rate():
  seen = []

  def apply(params, x_t, t, duration, labels):
    seen.append(labels)
    return x_t

  config = fm.Config(path='linear', time_mean=0.0, time_std=0.0, label_dropout=0.3)
  method = fm.make(config, layers.Network(None, apply, None), (8, 8, 1), 10)
  batch = {'latent': np.zeros((4000, 8, 8, 1), np.float32), 'label': np.full(4000, 7, np.int32)}
  method.loss(None, batch, jax.random.split(jax.random.key(0), 4000), 0)
  assert set(np.unique(seen[0])) == {7, 10}
  assert abs(np.mean(np.asarray(seen[0]) == 10) - 0.3) < 0.03

"""What a step of BFM-XL costs, in multiply-adds per image, against the table of the official code.

The table (G, 256 tokens): feature network 84.6163, velocity network 29.9819, FRN 16.9480, projector
2.0804. Three exact savings are not in it: the concatenation of condition and feature is split
(3.130 less), rows of the null label share their condition, calls of the FRN skip modulation g1.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from configs import bfm_xl, bfm_xl_frn, sit
from fmzoo import build, cost

SPLIT = 3.130
FULL, CACHED = 114.5999 - SPLIT, 46.9395 - SPLIT - 0.0080
SIT = 118.62


@functools.cache
def recipe(name):
  """Returns the recipe, everything recomputed (remat) counted once."""
  config = {
    'bfm': bfm_xl.get_config, 'frn': bfm_xl_frn.get_config, 'sit': lambda: sit.get_config('xl')
  }[name]()
  config.model.remat = False
  return build.recipe(config)


def abstract_keys(count):
  return jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))


def sampling(name, count=8, **options):
  """Returns GMAC per image of a whole run."""
  made = recipe(name)
  params = jax.eval_shape(made.method.init, jax.random.key(0))
  options = {**made.sample_options, **options}
  labels = jax.ShapeDtypeStruct((count,), jnp.int32)
  flops = cost.matmul_flops(
    lambda *args: made.method.sample(*args, **options), params, abstract_keys(count), labels
  )
  return flops / 2e9 / count


def training(name, count=6):
  """Returns GMAC per image of loss and gradient of the trained parameters."""
  made = recipe(name)
  params = jax.eval_shape(made.method.init, jax.random.key(0))
  trained = {k for k, use in made.method.trainable(params).items() if all(jax.tree.leaves(use))}
  batch = {
    'latent': jax.ShapeDtypeStruct((count, 32, 32, 4), jnp.float32),
    'label': jax.ShapeDtypeStruct((count,), jnp.int32),
    'feature': jax.ShapeDtypeStruct((count, 256, 768), jnp.float32),
  }
  frozen = {k: v for k, v in params.items() if k not in trained}

  def loss(own, frozen, batch, rng):
    return made.method.loss({**frozen, **own}, batch, rng, 0)

  flops = cost.matmul_flops(
    jax.value_and_grad(loss, has_aux=True), {k: params[k] for k in trained}, frozen, batch,
    abstract_keys(count),
  )
  return flops / 2e9 / count


def close(found, expected):
  assert abs(found / expected - 1) < 1e-3, f'{found:.4f} GMAC, expected {expected:.4f}'


def test_a_sampler_step_costs_what_the_table_says():
  plain = {'guidance': 1.0, 'sde_end': 'corrected'}
  close(sampling('bfm', sampler='ode', num_steps=8, **plain), 48 * FULL)
  close(sampling('bfm', sampler='sde', num_steps=41, **plain), 246 * FULL)
  close(sampling('frn', sampler='ode_frn', num_steps=8, **plain), 6 * FULL + 42 * CACHED)
  close(sampling('sit', num_steps=48, guidance=1.0), 48 * SIT)


def test_sampling_with_the_residual_network_costs_less_than_half_of_sit():
  frn = sampling('frn', sampler='ode_frn', num_steps=8, guidance=1.0)
  assert frn / sampling('sit', num_steps=48, guidance=1.0) <= 0.46


@pytest.mark.parametrize('sampler,expected,shared', [
  ('ode', 48 * FULL, 48 * 0.068), ('ode_frn', 6 * FULL + 42 * CACHED, 6 * 0.068 + 42 * 0.046)
])
def test_the_null_half_shares_condition_and_patches(sampler, expected, shared):
  """Of 256 null rows 255 need no layers of the condition, of 512 rows 256 no patch embedding."""
  count, patches = 256, 48 * 2 * 0.0047
  name = 'frn' if sampler == 'ode_frn' else 'bfm'
  guided = sampling(
    name, count, sampler=sampler, num_steps=8, guidance=4.0, guidance_interval=(0.0, 1.0)
  )
  # 1.6 M of the time embedding once a batch, not once an image.
  expected -= 48 * 0.0016
  found = 2 * expected - guided
  assert abs(found / (shared * (count - 1) / count + patches) - 1) < 0.03, found


def test_a_training_step_costs_three_forward_passes():
  """Forward, and the same products for the gradients of inputs and of parameters."""
  close(training('bfm'), 3 * (FULL + 2.0804))


def test_a_step_of_stage_two_pays_backward_for_the_residual_network_alone():
  """Two frozen passes of the feature network, and the FRN forward and backward."""
  close(training('frn'), 2 * (84.6163 + 0.0016) + 3 * 16.9480)

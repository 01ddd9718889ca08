"""What the autoencoder takes and gives; its numbers are in test_vae_golden.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmzoo.models import vae
from tests import programs, tiny

NET = vae.make(tiny.VAE)


@pytest.fixture(scope='module')
def params():
  return tiny.random_vae()


def test_sizes_follow_the_factor(params):
  images = jax.ShapeDtypeStruct((2, 24, 16, 3), 'float32')
  moments = jax.eval_shape(NET.encode, params, images)
  assert vae.SD_VAE.factor == 8 and moments.shape == (2, 12, 8, 8)
  decoded = jax.eval_shape(NET.decode, params, jax.ShapeDtypeStruct((2, 12, 8, 4), 'float32'))
  assert decoded.shape == images.shape and decoded.dtype == moments.dtype == jnp.float32


def test_each_direction_reads_its_own_parameters(params):
  images = jax.ShapeDtypeStruct((1, 8, 8, 3), 'float32')
  latents = jax.ShapeDtypeStruct((1, 4, 4, 4), 'float32')
  jax.eval_shape(NET.encode, {'encoder': params['encoder']}, images)
  jax.eval_shape(NET.decode, {'decoder': params['decoder']}, latents)


def test_stored_spread_is_a_standard_deviation():
  """Half the log-variance in the exponent, bounded; the mean is not touched."""
  outputs = jnp.array([[[[5.0, -50.0, 2.0, 100.0], [1.0, 2.0, -90.0, 0.0]]]])
  mean, log_variance = vae.posterior(outputs)
  np.testing.assert_array_equal(mean[0, 0], [[5, -50], [1, 2]])
  np.testing.assert_array_equal(log_variance[0, 0], [[2, 20], [-30, 0]])


@pytest.mark.parametrize('dtype,precision', [('float32', 'highest'), ('bfloat16', 'default')])
@pytest.mark.parametrize('direction,shape', [('encode', (1, 8, 8, 3)), ('decode', (1, 4, 4, 4))])
def test_products_are_of_the_numerics_asked_for(params, direction, shape, dtype, precision):
  """One for every kernel, and two of the attention; what comes out is float32."""
  net = vae.make(dataclasses.replace(tiny.VAE, dtype=dtype, precision=precision))
  function, x = getattr(net, direction), jax.ShapeDtypeStruct(shape, 'float32')
  count = sum(leaf.ndim > 1 for leaf in jax.tree.leaves(params[f'{direction}r'])) + 2
  assert programs.products(function, params, x) == [(dtype, precision.upper())] * count
  assert jax.eval_shape(function, params, x).dtype == jnp.float32


@pytest.mark.parametrize('function,shape,message', [
  (NET.encode, (2, 8, 8, 4), r'images has shape \(2, 8, 8, 4\), expected \(any, any, any, 3\)'),
  (NET.decode, (8, 8, 4), r'latents has shape \(8, 8, 4\), expected \(any, any, any, 4\)'),
])
def test_other_arrays_are_refused(params, function, shape, message):
  with pytest.raises(ValueError, match=message):
    function(params, np.zeros(shape, np.float32))

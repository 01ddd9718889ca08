"""What DINOv2 takes and gives, resizing on its own; its numbers are in test_dinov2_golden.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmzoo.models import dinov2
from tests import programs, tiny

NET = dinov2.make(tiny.DINOV2)


@pytest.fixture(scope='module')
def params():
  return tiny.random_dinov2()


def table(grid=5, width=2, seed=0):
  """Returns a random position table."""
  return np.random.default_rng(seed).standard_normal((1, 1 + grid**2, width)).astype('float32')


def test_features_are_the_tokens_of_patches_in_reading_order(params):
  """The class token is left out; a patch at row 1, column 2 is feature 3 x 1 + 2 of a 3 x 3 grid.

  Without blocks' answers a token depends on its own patch alone.
  """
  silent = jax.tree.map(np.copy, params)
  for name in ('ls1', 'ls2'):
    silent['blocks'][name]['gamma'][:] = 0
  images = np.zeros((1, 42, 42, 3), np.float32)
  marked = images.copy()
  marked[0, 14:28, 28:, 1] = np.random.default_rng(0).standard_normal((14, 14))
  run = jax.jit(lambda params, x: (NET.tokens(params, x), NET.features(params, x)))
  (before, _), (after, features) = (run(silent, x) for x in (images, marked))
  assert np.flatnonzero(np.any(before != after, axis=(0, 2))).tolist() == [1 + 5]
  np.testing.assert_array_equal(features, after[:, 1:])


def test_images_need_not_be_square(params):
  config = dataclasses.replace(tiny.DINOV2, grid=(1, 9))
  images = jax.ShapeDtypeStruct((2, 14, 126, 3), 'float32')
  tokens = jax.eval_shape(dinov2.make(config).tokens, params, images)
  assert tokens.shape == (2, 10, 32) and tokens.dtype == jnp.float32


def test_program_does_not_grow_with_depth():
  def size(depth):
    """Returns the lines of the network's program."""
    net = dinov2.make(dataclasses.replace(tiny.DINOV2, depth=depth))
    images = jax.ShapeDtypeStruct((1, 42, 42, 3), 'float32')
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    return len(jax.jit(net.tokens).lower(shapes, images).as_text().splitlines())

  assert size(2) == size(7)


@pytest.mark.parametrize('dtype,precision', [('float32', 'highest'), ('bfloat16', 'default')])
def test_products_are_of_the_numerics_asked_for(params, dtype, precision):
  """All seven kinds of product: patches, four of attention, two of the MLP."""
  net = dinov2.make(dataclasses.replace(tiny.DINOV2, dtype=dtype, precision=precision))
  images = jax.ShapeDtypeStruct((1, 42, 42, 3), 'float32')
  assert programs.products(net.tokens, params, images) == [(dtype, precision.upper())] * 7


def test_constant_pixels_stay_constant():
  """Weights of every row of both matrices add up to one, borders included."""
  colour = np.array([10, 128, 255], np.uint8)
  pixels = np.broadcast_to(colour, (2, 32, 48, 3))
  want = (colour / 255 - np.array(dinov2.MEAN)) / np.array(dinov2.STD)
  got = jax.jit(dinov2.preprocess, static_argnums=1)(pixels, 28)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, np.broadcast_to(want, (2, 28, 28, 3)), rtol=1e-5, atol=1e-5)


def test_pixels_are_resized_along_their_own_axis():
  """Brightness that rises to the right or downwards does so in the result, image by image."""
  ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (64, 64, 3))
  right, down = np.asarray(dinov2.preprocess(np.stack([ramp, ramp.transpose(1, 0, 2)]), 56))
  np.testing.assert_allclose(right, np.broadcast_to(right[:1], right.shape), atol=1e-5)
  np.testing.assert_allclose(down, right.transpose(1, 0, 2), atol=1e-5)
  want = ((np.arange(56) + 0.5) * 64 / 56 - 0.5) / 255
  inner = slice(3, -3)  # away from the border the kernel keeps straight lines, nearly
  np.testing.assert_allclose(
    right[0, inner, 0], (want[inner] - dinov2.MEAN[0]) / dinov2.STD[0], atol=1e-2
  )


@pytest.mark.parametrize('method', dinov2.METHODS)
def test_positions_of_the_same_grid_stay_as_they_are(method):
  np.testing.assert_array_equal(dinov2.resample_positions(table(), (5, 5), method), table())


@pytest.mark.parametrize('method', ['hf', 'hub'])
def test_positions_of_as_many_patches_in_another_shape_are_resampled(method):
  square = table(grid=4)
  found = dinov2.resample_positions(square, (2, 8), method)
  assert found.shape == square.shape and np.abs(found - square)[:, 1:].max() > 0.1
  np.testing.assert_array_equal(found[:, 0], square[:, 0])


@pytest.mark.parametrize('shrinks', [True, False])
def test_timm_is_the_antialiased_cubic_of_jax(shrinks):
  """An independent implementation, square and not."""
  n, grid = (9, (4, 6)) if shrinks else (4, (9, 7))
  positions = table(n, 3)
  want = jax.image.resize(positions[0, 1:].reshape(n, n, 3), (*grid, 3), 'cubic', antialias=True)
  found = dinov2.resample_positions(positions, grid, 'timm')
  np.testing.assert_allclose(found[0, 1:].reshape(*grid, 3), want, atol=2e-6)
  np.testing.assert_array_equal(found[:, 0], positions[:, 0])


@pytest.mark.parametrize('function,message', [
  (lambda: dinov2.resample_positions(table(), (4, 4), 'torch'),
   "method='torch' resamples no positions; use one of timm, hf, hub"),
  (lambda: dinov2.resample_positions(table(), (0, 4), 'hf'), r'grid=\(0, 4\) has no patches; use'),
  (lambda: dinov2.resample_positions(table()[:, 1:], (4, 4), 'hf'),
   r'position table has shape \(1, 25, 2\), expected \(1, 1 \+ n n, width\)'),
  (lambda: dinov2.make(dataclasses.replace(tiny.DINOV2, heads=5)),
   'width=32 must be a multiple of heads=5'),
  (lambda: dinov2.preprocess(np.zeros((2, 8, 8, 4), np.uint8), 14),
   r'pixels has shape \(2, 8, 8, 4\), expected \(any, any, any, 3\)'),
  (lambda: NET.tokens(tiny.random_dinov2(), np.zeros((1, 42, 28, 3), np.float32)),
   r'images has shape \(1, 42, 28, 3\), expected \(any, 42, 42, 3\)'),
])
def test_what_does_not_fit_is_refused(function, message):
  with pytest.raises(ValueError, match=message):
    function()

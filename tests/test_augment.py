"""Augmentation: what warps do to pictures, that rows keep to themselves, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmzoo import augment, cost
from fmzoo.parallel import mesh as meshes
from tests import tiny

SIDE = 16
STEP_FLOPS = 174e12  # of a training step of SoFlow on CIFAR-10, 1024 pictures
warped = jax.jit(augment.augment)


def draws(size=1, **changes):
  """Returns Draws that touch nothing but what is given."""
  numbers = {
    name: np.zeros((size, 2) if name == 'shift' else size, np.float32)
    for name in augment.Draws._fields
  }
  numbers |= {'flip': np.zeros(size, bool), 'rotate_uniform': np.ones(size, np.float32)}
  for name, value in changes.items():
    numbers[name] = np.broadcast_to(value, numbers[name].shape).astype(numbers[name].dtype)
  return augment.Draws(**numbers)


def pictures(size=1, side=SIDE, seed=0):
  """Returns white noise, the hardest to interpolate."""
  return np.random.default_rng(seed).uniform(-1, 1, (size, side, side, 3)).astype(np.float32)


@jax.jit
def drawn(images, keys):
  """Augments with the numbers of keys, probability 1."""
  return augment.augment(images, augment.draw(keys), 1.0)


def turned(angle):
  """Returns the draws that make a stretch's direction an angle."""
  return {'angle_uniform': (angle / np.pi + 1) / 2, 'rotate_uniform': 0}


@pytest.mark.parametrize('side', [7, 16])
def test_untouched_pictures_stay_as_they_are(side):
  images = pictures(2, side)
  out, labels = warped(images, draws(2, angle_uniform=0.2, rotate_uniform=0), 1.0)
  np.testing.assert_allclose(out, images, rtol=0, atol=1e-5)
  np.testing.assert_array_equal(labels, np.zeros((2, 6)))


def test_a_flip_mirrors_left_and_right():
  images = pictures()
  out, labels = warped(images, draws(flip=True), 1.0)
  np.testing.assert_allclose(out, images[:, :, ::-1], rtol=0, atol=1e-5)
  np.testing.assert_array_equal(labels, [[1, 0, 0, 0, 0, 0]])


def test_a_shift_moves_right_and_down_and_mirrors_at_the_edge():
  """By whole pixels: 3 to the right and 2 up."""
  images = pictures()
  shift = np.array([3, -2]) / (0.125 * SIDE)
  out, labels = warped(images, draws(shift=shift), 1.0)
  mirrored = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)), 'reflect')
  np.testing.assert_allclose(out, mirrored[:, 5 : 5 + SIDE, :SIDE], rtol=0, atol=1e-5)
  np.testing.assert_allclose(labels, [[0, 0, 0, 0, *shift]])


def test_the_flip_comes_before_the_shift():
  images = pictures()
  shift = np.array([3, 0]) / (0.125 * SIDE)
  out, _ = warped(images, draws(flip=True, shift=shift), 1.0)
  other, _ = warped(images[:, :, ::-1], draws(shift=shift), 1.0)
  np.testing.assert_array_equal(out, other)


def slopes(out):
  """Returns the slope in the middle of a picture of a ramp along x (red) and along y (green)."""
  middle = slice(SIDE // 2 - 2, SIDE // 2 + 2)
  centre = np.asarray(out)[0, middle, middle]
  return np.diff(centre[..., 0], axis=1).mean(), np.diff(centre[..., 1], axis=0).mean()


@pytest.mark.parametrize('changes,expected', [
  ({'scale': 5.0}, (0.5, 0.5)),  # twice as large
  ({'scale': -1.0}, (2**0.2, 2**0.2)),
  ({'stretch': 5.0}, (0.5, 2.0)),  # twice as wide, half as high
  ({'stretch': 5.0, **turned(np.pi / 2)}, (2.0, 0.5)),
])
def test_ramps_are_scaled_and_stretched(changes, expected):
  ramp = np.linspace(-1, 1, SIDE, dtype=np.float32)
  across, down = np.meshgrid(ramp, ramp)
  image = np.stack([across, down, 0 * down], axis=-1)[None]
  out, _ = warped(image, draws(**changes), 1.0)
  np.testing.assert_allclose(slopes(out) / (ramp[1] - ramp[0]), expected, rtol=0.01)


def test_labels_of_a_turned_stretch():
  _, labels = warped(pictures(), draws(scale=0.4, stretch=2.0, **turned(np.pi / 3)), 1.0)
  expected = [[0, 0.4, 1, np.sqrt(3), 0, 0]]
  np.testing.assert_allclose(labels, expected, rtol=0, atol=1e-5)


def test_matrix_is_the_product_of_its_parts():
  """In float64, from left to right as the docstring has it."""
  rng = np.random.default_rng(0)
  warp = augment.Warp(np.zeros(5, bool), *rng.standard_normal((3, 5)), rng.standard_normal((5, 2)))

  def scaling(x, y):
    return np.diag([x, y, 1.0])

  def rotation(angle):
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])

  for row, matrix in enumerate(np.asarray(augment.inverse_matrix(warp, 32))):
    shrink, q = 2 ** (-0.2 * warp.scale[row]), 2 ** (0.2 * warp.stretch[row])
    move = np.eye(3)
    move[:2, 2] = -0.125 * 32 * warp.shift[row]
    expected = (
      scaling(shrink, shrink) @ rotation(-warp.angle[row]) @ scaling(1 / q, q)
      @ rotation(warp.angle[row]) @ move
    )
    np.testing.assert_allclose(matrix, expected, rtol=0, atol=1e-5)


def test_probability_decides_what_is_kept():
  """Uniforms below it keep their normal; the flip and a direction's 0.5 do not depend on it."""
  given = draws(
    2, flip=True, scale=1.0, scale_uniform=[0.1, 0.2], stretch=2.0, stretch_uniform=[0.2, 0.1],
    shift=[3.0, 4.0], shift_uniform=[0.1, 0.2], angle_uniform=0.75, rotate_uniform=[0.4, 0.6],
  )
  warp = augment.warp_of(given, 0.15)
  np.testing.assert_array_equal(warp.flip, [True, True])
  np.testing.assert_array_equal(warp.scale, [1, 0])
  np.testing.assert_array_equal(warp.stretch, [0, 2])
  np.testing.assert_array_equal(warp.shift, [[3, 4], [0, 0]])
  np.testing.assert_allclose(warp.angle, [np.pi / 2, 0], rtol=1e-6)


def test_draws_have_their_distributions():
  """Means and spreads of 20,000 rows, to about five standard errors, and no two alike."""
  found = jax.jit(augment.draw)(jax.random.split(jax.random.key(0), 20_000))
  assert found.flip.dtype == bool and abs(found.flip.mean() - 0.5) < 0.02
  normals = np.column_stack([found.scale, found.stretch, found.shift])
  uniforms = np.column_stack([getattr(found, f) for f in found._fields if f.endswith('uniform')])
  assert normals.shape == (20_000, 4) and uniforms.shape == (20_000, 5)
  np.testing.assert_allclose(normals.mean(axis=0), 0, atol=0.035)
  np.testing.assert_allclose(normals.std(axis=0), 1, atol=0.03)
  np.testing.assert_allclose(uniforms.mean(axis=0), 0.5, atol=0.011)
  np.testing.assert_allclose(uniforms.std(axis=0), 12**-0.5, atol=0.006)
  columns = np.column_stack([found.flip, normals, uniforms])
  np.testing.assert_allclose(np.corrcoef(columns.T), np.eye(10), atol=0.04)


def test_a_row_depends_on_its_key_and_picture_alone():
  keys, images = jax.random.split(jax.random.key(3), 5), pictures(5, side=8)
  out, labels = drawn(images, keys)
  few, few_labels = drawn(images[3:], keys[3:])
  np.testing.assert_allclose(few, out[3:], rtol=0, atol=1e-5)
  np.testing.assert_allclose(few_labels, labels[3:], rtol=0, atol=1e-6)


def test_devices_change_nothing_and_exchange_nothing():
  mesh = tiny.mesh(8)
  rows = meshes.rows_sharded(mesh)
  keys, images = jax.random.split(jax.random.key(3), 8), pictures(8, side=8)
  compiled = jax.jit(drawn, in_shardings=rows, out_shardings=rows).lower(images, keys).compile()
  text = compiled.as_text()
  assert 'num_partitions=8' in text
  for word in ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute'):
    assert word not in text
  out, labels = compiled(*jax.device_put((images, keys), rows))
  alone, alone_labels = drawn(images, keys)
  np.testing.assert_allclose(out, alone, rtol=0, atol=1e-5)
  np.testing.assert_allclose(labels, alone_labels, rtol=0, atol=1e-6)


def test_matrix_products_are_a_small_part_of_a_step():
  """Under 0.3 % of it, and no gather, which a TPU is slow at."""
  images = jax.ShapeDtypeStruct((1024, 32, 32, 3), jnp.float32)
  numbers = jax.eval_shape(lambda: augment.draw(jax.random.split(jax.random.key(0), 1024)))
  assert 0 < cost.matmul_flops(augment.augment, images, numbers, 0.12) < 0.003 * STEP_FLOPS
  assert 'gather' not in str(jax.make_jaxpr(augment.augment)(images, numbers, 0.12))


def test_a_picture_that_is_not_square_is_refused():
  with pytest.raises(ValueError, match=r'images has shape \(1, 8, 6, 3\), expected \(1, 8, 8, any'):
    augment.augment(np.zeros((1, 8, 6, 3), np.float32), draws(), 1.0)

"""Geometric augmentation of pictures on the device, and labels that tell the network of it.

The pipe of EDM, as SoFlow uses it on CIFAR-10: flip, scale, stretch along any direction, shift.
Colours, vertical flips and plain rotations are off there and not here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmzoo import shapes

SCALE_STD, STRETCH_STD = 0.2, 0.2  # of the factor's logarithm to base 2
ROTATE_PROBABILITY = 0.5  # that the stretch is along another direction than x
SHIFT_STD = 0.125  # of the side
LOW_PASS = np.array([  # symlet-6, sum sqrt(2)
  0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
  0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
  -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
])


class Draws(NamedTuple):
  """Random numbers of one batch: normals, and uniforms in [0, 1) that say which of them count."""

  flip: jax.Array  # [B] bool, fair
  scale: jax.Array  # [B] normal
  scale_uniform: jax.Array  # [B], compared with the probability, as are the next two
  stretch: jax.Array  # [B] normal
  stretch_uniform: jax.Array  # [B]
  shift: jax.Array  # [B, 2] normal, along x and y
  shift_uniform: jax.Array  # [B], of both
  angle_uniform: jax.Array  # [B], mapped to -pi .. pi
  rotate_uniform: jax.Array  # [B], compared with ROTATE_PROBABILITY


class Warp(NamedTuple):
  """What is done to each picture; zeros leave it as it is."""

  flip: jax.Array  # [B] bool, mirrored left to right, before all else
  scale: jax.Array  # [B], grows by 2^(SCALE_STD scale)
  stretch: jax.Array  # [B], 2^(STRETCH_STD stretch) times longer along a direction, as much thinner
  angle: jax.Array  # [B], of that direction, in radians
  shift: jax.Array  # [B, 2], along x and y, in SHIFT_STD sides


def draw(rng):
  """Draws the numbers of each row from its key alone: keys [B] -> Draws."""

  def one(key):
    """Draws for one row."""
    rng_flip, rng_normal, rng_uniform = jax.random.split(key, 3)
    normal = jax.random.normal(rng_normal, (4,), jnp.float32)
    uniform = jax.random.uniform(rng_uniform, (5,), jnp.float32)
    return Draws(
      jax.random.bernoulli(rng_flip), normal[0], uniform[0], normal[1], uniform[1], normal[2:],
      uniform[2], uniform[3], uniform[4],
    )

  return jax.vmap(one)(rng)


def warp_of(draws, probability):
  """Keeps each of scale, stretch and shift with a probability; flips are kept always.

  Source: the official xflip = 1e8 times any probability is above 1.

  Args:
    draws: Draws of B rows.
    probability: 0 to 1; of the flip and of the stretch's direction it changes nothing.

  Returns:
    Warp of B rows.
  """

  def kept(value, uniform, chance):
    """Returns `value` where its uniform number is below the chance, else 0."""
    return jnp.where(uniform < chance, value, 0.0)

  angle = jnp.pi * (2 * draws.angle_uniform - 1)
  return Warp(
    flip=draws.flip,
    scale=kept(draws.scale, draws.scale_uniform, probability),
    stretch=kept(draws.stretch, draws.stretch_uniform, probability),
    angle=kept(angle, draws.rotate_uniform, ROTATE_PROBABILITY),
    shift=kept(draws.shift, draws.shift_uniform[:, None], probability),
  )


def labels_of(warp):
  """Returns the numbers a network is told, [B, 6] float32; zeros for an untouched picture.

    (flip, scale, stretch cos(angle), stretch sin(angle), shift x, shift y)
  """
  columns = (
    warp.flip.astype(jnp.float32), warp.scale, warp.stretch * jnp.cos(warp.angle),
    warp.stretch * jnp.sin(warp.angle), warp.shift[:, 0], warp.shift[:, 1],
  )
  return jnp.stack(columns, axis=-1)


def inverse_matrix(warp, side):
  """Returns where each pixel of the result comes from, flips apart.

    G = S(2^(-0.2 scale)) R(-angle) S(1 / q, q) R(angle) T(-0.125 side shift),  q = 2^(0.2 stretch)

  with S scaling, R(a) = [[cos a, -sin a], [sin a, cos a]] and T moving columns (x, y, 1).

  Args:
    warp: Warp of B rows.
    side: W = H, in pixels.

  Returns:
    [B, 3, 3] float32; coordinates are in pixels, the origin is the middle of the picture.
  """
  shrink, q = jnp.exp2(-SCALE_STD * warp.scale), jnp.exp2(STRETCH_STD * warp.stretch)
  cos, sin = jnp.cos(warp.angle), jnp.sin(warp.angle)
  xx = shrink * (cos**2 / q + sin**2 * q)
  xy = shrink * (q - 1 / q) * cos * sin  # = yx, a turn there and back
  yy = shrink * (sin**2 / q + cos**2 * q)
  move_x, move_y = -SHIFT_STD * side * warp.shift[:, 0], -SHIFT_STD * side * warp.shift[:, 1]
  zero, one = jnp.zeros_like(xx), jnp.ones_like(xx)
  rows = (
    (xx, xy, xx * move_x + xy * move_y), (xy, yy, xy * move_x + yy * move_y), (zero, zero, one)
  )
  return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def augment(images, draws, probability):
  """Flips and warps pictures: twice the pixels, bilinear samples of them, half the pixels again.

  The picture goes on beyond its edges as in a mirror, W - 1 pixels on every side, and is 0 beyond
  those. The official code mirrors as many pixels as the largest warp of the batch needs, so that a
  row depends on its neighbours (by up to 3e-4); here it depends on itself.
  There is no gather: a bilinear sample is a weighted sum of a row and a column of pixels, with
  weights that mirroring, interpolation and filter make a product of matrices.

  Source: EDM, arXiv:2206.00364, appendix F.2, with the settings of SoFlow, arXiv:2512.15657.

  Args:
    images: [B, W, W, C] float32 in [-1, 1].
    draws: Draws of B rows.
    probability: see `warp_of`.

  Returns:
    images: [B, W, W, C] float32; the filters overshoot [-1, 1] by a little.
    labels: [B, 6] float32, `labels_of` the warp.
  """
  side = images.shape[1]
  shapes.expect_shape('images', images, len(draws.flip), side, side, None)
  warp = warp_of(draws, probability)
  images = jnp.where(warp.flip[:, None, None, None], images[:, :, ::-1], images)
  x, y = _sources(inverse_matrix(warp, side), side)
  table = _upsampling(side)
  fine = _samples(images, _weights(y, table), _weights(x, table))
  half = _downsampling(side)
  grid = fine.reshape(-1, half.shape[1], half.shape[1], fine.shape[-1])
  return _product('rh,bhvc,qv->brqc', half, grid, half), labels_of(warp)


def _product(equation, *operands):
  """Returns an einsum in full float32; pictures and coordinates are no place for bfloat16."""
  return jnp.einsum(equation, *operands, precision='highest')


def _sources(matrix, side):
  """Returns where samples are taken: x and y [B, Q] in pixels of the mirrored, doubled picture.

  The Q = (2 W + 10)^2 samples, row by row, are those that the filter of `_downsampling` reaches.
  """
  count, doubled = 2 * side + 10, 2 * (3 * side - 2)
  steps = np.arange(count, dtype=np.float32) - (count - 1) / 2
  column, row = (axis.reshape(1, -1) for axis in np.meshgrid(steps, steps))
  # T(-1/2) S(2) G S(1/2) T(1/2): the grid twice as fine has its middle half a fine pixel away.
  column, row = (column + 0.5) / 2, (row + 0.5) / 2
  x, y = (
    2 * (matrix[:, i, :1] * column + matrix[:, i, 1:2] * row + matrix[:, i, 2:]) - 0.5
    for i in (0, 1)
  )
  return x + (doubled - 1) / 2, y + (doubled - 1) / 2


def _upsampling(side):
  """Returns the matrix [2 (3 W - 2), W] from a line of pixels to its mirrored, doubled one."""
  mirrored = np.abs(np.arange(1 - side, 2 * side - 1))
  mirrored = np.where(mirrored < side, mirrored, 2 * (side - 1) - mirrored)
  table = np.zeros((2 * len(mirrored), side), np.float32)
  for index, pixel in enumerate(mirrored):
    for tap, weight in enumerate(LOW_PASS, start=2 * index - 5):
      if 0 <= tap < len(table):
        table[tap, pixel] += weight
  return table


def _downsampling(side):
  """Returns the matrix [W, 2 W + 10] from a line of samples to pixels, two samples to a pixel."""
  table = np.zeros((side, 2 * side + 10), np.float32)
  for pixel in range(side):
    table[pixel, 2 * pixel : 2 * pixel + len(LOW_PASS)] = LOW_PASS
  return table


def _weights(position, table):
  """Interpolates rows of a table [N, W] at positions [B, Q], 0 outside: [B, Q, W]."""
  nodes = np.arange(len(table), dtype=np.float32)
  near = jnp.maximum(1 - jnp.abs(position[..., None] - nodes[None, None]), 0)
  return _product('bqn,nw->bqw', near, table)


def _samples(images, down, across):
  """Returns sum_hw down[q, h] across[q, w] images[h, w]: [B, Q, C]."""
  size, side, _, channels = images.shape
  lines = images.swapaxes(2, 3).reshape(size, side, channels * side)
  lines = _product('bqh,bhv->bqv', down, lines).reshape(size, -1, channels, side)
  return jnp.sum(lines * across[:, :, None], axis=-1)

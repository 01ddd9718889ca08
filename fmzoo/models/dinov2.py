"""DINOv2, a frozen vision transformer: the features of images that methods align with.

Without registers. Images are 0..255 and go through `preprocess`; the position table of the weights
goes through `resample_positions` once, where they are loaded (convert/dinov2.py).

Source: Oquab et al., arXiv:2304.07193.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fmzoo import shapes
from fmzoo.models import layers

IMAGE_CHANNELS = 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1], RGB
SIZES = {384: (12, 6), 768: (12, 12), 1024: (24, 16)}  # width of S, B, L: depth, heads
PATCH, MLP_RATIO = 14, 4  # of all sizes
CUBIC, CUBIC_ANTIALIASED = -0.75, -0.5  # slope of the cubic kernel at distance 1, as in PyTorch
HUB_OFFSET = 0.1  # that the official code adds to the size it resamples positions to
METHODS = ('timm', 'hf', 'hub')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Sizes and numerics of a DINOv2."""

  patch: int  # side of a square patch, pixels
  width: int  # D, channels of a token
  depth: int  # L, blocks
  heads: int  # A; width must be a multiple
  mlp_ratio: float  # hidden width of the MLP over D
  grid: tuple  # (rows, columns) of patches in an image and in the position table
  # Of the large matrix products: 'float32' or 'bfloat16'. The latter moves patch features of the
  # ViT-B/14 of tests/golden by 0.6 % of their rms, the one that moves most by 3 %.
  dtype: str
  precision: str  # of float32 products: 'default', 'high' (TF32 / three bfloat16 passes), 'highest'


class DINOv2(NamedTuple):
  """The network as pure functions; images are [B, rows P, columns P, 3], from `preprocess`."""

  init: Callable  # (rng) -> params, float32
  tokens: Callable  # (params, images) -> [B, 1 + N, D] float32, normalised; the class token first
  features: Callable  # (params, images) -> [B, N, D] float32, those of the patches, row by row


def norm(name):
  """Returns a layer norm; the mean is taken off before squares are summed, to keep digits."""
  return nn.LayerNorm(epsilon=layers.NORM_EPS, use_fast_variance=False, name=name)


class LayerScale(nn.Module):
  """x times a factor per channel."""

  @nn.compact
  def __call__(self, x):
    gamma = self.param('gamma', nn.initializers.ones, (x.shape[-1],), jnp.float32)
    return layers.wide(x) * gamma[None, None]


class MLP(nn.Module):
  """Linear, GELU (exact form, float32), linear: [B, N, D] -> [B, N, D]."""

  hidden: int
  numerics: layers.Numerics

  @nn.compact
  def __call__(self, x):
    h = layers.wide(layers.Linear(self.hidden, self.numerics, name='fc1')(x))
    return layers.Linear(x.shape[-1], self.numerics, name='fc2')(nn.gelu(h, approximate=False))


class Block(nn.Module):
  """A pre-norm transformer block with LayerScale; body of the scan over depth.

    x <- x + scale1 Attn(LN(x))
    x <- x + scale2 MLP(LN(x))
  """

  config: Config

  @nn.compact
  def __call__(self, x):
    config, numerics = self.config, layers.Numerics(self.config.dtype)
    attention = layers.Attention(config.heads, numerics, name='attn')
    mlp = MLP(int(config.width * config.mlp_ratio), numerics, name='mlp')
    x = x + LayerScale(name='ls1')(attention(norm('norm1')(x)))
    return x + LayerScale(name='ls2')(mlp(norm('norm2')(x))), None


class Embedding(nn.Module):
  """Images to tokens with positions added, the class token first: [B, 1 + N, D] float32."""

  config: Config

  @nn.compact
  def __call__(self, images):
    config = self.config
    patches = layers.patchify(images, config.patch)
    linear = layers.Linear(config.width, layers.Numerics(config.dtype), name='patches')
    tokens = layers.wide(linear(patches))  # [B, N, D]
    first = self.param('cls_token', layers.small_normal, (1, 1, config.width), jnp.float32)
    # Stands for patches hidden in the official training; kept so that weights can be written back.
    self.param('mask_token', layers.zeros, (1, config.width), jnp.float32)
    positions = self.param(
      'pos_embed', layers.small_normal, (1, 1 + math.prod(config.grid), config.width), jnp.float32
    )
    first = jnp.broadcast_to(first, (tokens.shape[0], 1, config.width))
    return jnp.concatenate([first, tokens], axis=1) + positions


class Transformer(nn.Module):
  """The network; see `make` for the pure functions."""

  config: Config

  @nn.compact
  def __call__(self, images):
    tokens = Embedding(self.config, name='embed')(images)
    blocks = nn.scan(
      Block,
      variable_axes={'params': 0, 'intermediates': 0},  # the latter when a caller captures them
      split_rngs={'params': True},
      length=self.config.depth,
    )
    tokens, _ = blocks(self.config, name='blocks')(tokens)
    return norm('norm')(tokens)


def make(config):
  """Builds the pure functions of a DINOv2.

  Args:
    config: Config.

  Returns:
    DINOv2. Parameters of the blocks are stacked on a first axis.

  Raises:
    ValueError: if a size does not divide.
  """
  if config.width % config.heads:
    raise ValueError(f'width={config.width} must be a multiple of heads={config.heads}')
  net = Transformer(config)
  sides = tuple(count * config.patch for count in config.grid)

  def init(rng):
    """See DINOv2."""
    return net.init(rng, jnp.zeros((1, *sides, IMAGE_CHANNELS)))['params']

  def tokens(params, images):
    """See DINOv2."""
    shapes.expect_shape('images', images, None, *sides, IMAGE_CHANNELS)
    with jax.default_matmul_precision(config.precision):
      return net.apply({'params': params}, images)

  def features(params, images):
    """See DINOv2."""
    return tokens(params, images)[:, 1:]

  return DINOv2(init, tokens, features)


def preprocess(pixels, side):
  """Makes the network's images of pixels: ImageNet's mean and spread, then bicubic resizing.

  The order is that of REPA and BFM. Values overshoot at edges and are not clipped; where images
  shrink nothing is averaged.

  Args:
    pixels: [B, H, W, 3] uint8 or float, 0..255, RGB.
    side: of the result; a multiple of the patch.

  Returns:
    [B, side, side, 3] float32.
  """
  shapes.expect_shape('pixels', pixels, None, None, None, IMAGE_CHANNELS)
  mean, std = (np.asarray(value, np.float32)[None, None, None] for value in (MEAN, STD))
  x = (pixels.astype(jnp.float32) / 255 - mean) / std
  rows, columns = (cubic(n, side, n / side).astype(np.float32) for n in x.shape[1:3])
  with jax.default_matmul_precision('highest'):
    x = jnp.einsum('ih,bhwc->biwc', rows, x)
    return jnp.einsum('jw,biwc->bijc', columns, x)


def resample_positions(table, grid, method):
  """Resamples a position table to another grid of patches, as one of three official codes does.

  'timm': antialiased, what BFM and REPA do. 'hf': what transformers does while it runs. 'hub':
  what facebookresearch/dinov2 does while it runs, with steps that miss the last patch by a little.
  The results differ by tens of percent; 'hf' and 'hub' are never antialiased.

  Args:
    table: [1, 1 + n n, D], the row of the class token first.
    grid: (rows, columns).
    method: one of METHODS.

  Returns:
    [1, 1 + rows columns, D] float32, computed in float64; the table as it is if it has this grid.

  Raises:
    ValueError: if the table is not that of a square grid, or there is no such grid or method.
  """
  n, (rows, columns) = table_side(table), grid
  if method not in METHODS:
    raise ValueError(f"method='{method}' resamples no positions; use one of {', '.join(METHODS)}")
  if min(grid) < 1:
    raise ValueError(f'grid={grid} has no patches; use (rows, columns), such as (16, 16)')
  if (rows, columns) == (n, n):
    return np.asarray(table)
  matrices = {
    'timm': cubic_antialiased,
    'hf': lambda n, m: cubic(n, m, n / m),
    'hub': lambda n, m: cubic(n, m, n / (m + HUB_OFFSET)),
  }
  down, across = (matrices[method](n, m) for m in (rows, columns))
  table = np.asarray(table, np.float64)
  square = table[0, 1:].reshape(n, n, -1)
  patches = np.einsum('ih,jw,hwd->ijd', down, across, square, optimize=True)
  patches = patches.reshape(1, rows * columns, -1)
  return np.concatenate([table[:, :1], patches], axis=1).astype(np.float32)


def table_side(table):
  """Returns n of a position table [1, 1 + n n, D], or refuses it."""
  shape = tuple(table.shape)
  side = math.isqrt(max(shape[1] - 1, 0)) if len(shape) == 3 else 0
  if not side or shape[:2] != (1, 1 + side**2):
    raise ValueError(
      f'position table has shape {shape}, expected (1, 1 + n n, width) with a row for the class'
      ' token and no registers'
    )
  return side


def keys(distance, slope):
  """Keys' cubic kernel, whose derivative at distance 1 is `slope`: array -> array."""
  t = np.abs(distance)
  near = (slope + 2) * t**3 - (slope + 3) * t**2 + 1
  far = slope * (t**3 - 5 * t**2 + 8 * t - 4)
  return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


def cubic(n, m, step):
  """Returns the matrix [m, n], float64, of bicubic resizing along one axis, as PyTorch's.

  Result i is read at (i + 1/2) step - 1/2 from four neighbours; those beyond the border count as
  the nearest on it.
  """
  position = (np.arange(m) + 0.5) * step - 0.5
  matrix = np.zeros((m, n))
  for offset in range(-1, 3):
    tap = np.floor(position).astype(int) + offset
    weight = keys(position - tap, CUBIC)
    np.add.at(matrix, (np.arange(m), np.clip(tap, 0, n - 1)), weight)
  return matrix


def cubic_antialiased(n, m):
  """Returns the matrix [m, n], float64, of antialiased bicubic resizing along one axis.

  The kernel is widened where the axis shrinks; weights beyond the border are left out and the
  others divided by their sum.
  """
  step = n / m
  widened = max(step, 1.0)
  centre = (np.arange(m)[:, None] + 0.5) * step
  taps = np.arange(n)[None]
  first, end = (np.trunc(centre + side * 2 * widened + 0.5) for side in (-1, 1))
  weights = keys((taps - centre + 0.5) / widened, CUBIC_ANTIALIASED)
  weights = np.where((taps >= first) & (taps < end), weights, 0.0)
  return weights / weights.sum(axis=1, keepdims=True)

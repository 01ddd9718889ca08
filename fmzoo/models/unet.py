"""The U-Net of SoFlow's CIFAR-10 model: residual blocks on a ladder of resolutions.

Unconditional; besides the time it takes the duration and the labels of geometric augmentation.
Source: Song et al., arXiv:2011.13456 (DDPM++); SoFlow, arXiv:2512.15657 (duration embedding).
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fmzoo import shapes
from fmzoo.models import layers

FILTER = (1, 3, 3, 1)  # of both resamplings along one axis, before normalisation
HALF = math.sqrt(0.5)  # keeps the variance of a sum of two
QKV_GAIN, LAST_GAIN = math.sqrt(0.2), 1e-5  # on Xavier: attention inputs, ends of residual branches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Sizes and numerics of a U-Net."""

  width: int  # channels of the first convolution; four times as many in the embedding
  multipliers: tuple[int, ...]  # channels of each resolution over width, the finest first
  blocks: int  # residual blocks of a resolution on the way down; one more on the way up
  attention_resolutions: tuple[int, ...]  # sides, in pixels, of the maps with attention
  dropout: float  # share of activations zeroed in training, in every block
  augment_dim: int  # width of the augmentation labels; 0 for a network without
  dtype: Any  # of convolutions and attention: 'float32' or 'bfloat16'
  precision: str  # of float32 products: 'default', 'high' (TF32 / three bfloat16 passes), 'highest'
  remat: bool  # recompute blocks in the backward pass: less memory, one more forward pass


class Layer(NamedTuple):
  """What one residual block is in the ladder."""

  name: str  # of its parameters
  inputs: int  # channels, those of the skip connection included
  features: int  # channels of its output
  attention: bool = False
  resample: str | None = None  # 'down' halves the sides, 'up' doubles them
  joins: bool = False  # whether it takes the newest skip connection, too


def plan(config, side):
  """Lists the residual blocks in the order in which they run.

  Every output of the way down, the first convolution's included, is one skip connection.

  Args:
    config: Config.
    side: H, of the images.

  Returns:
    (encoder, decoder), lists of Layer.
  """
  encoder, decoder, c = [], [], config.width
  for level, multiplier in enumerate(config.multipliers):
    size, features = side >> level, config.width * multiplier
    if level:
      encoder.append(Layer(f'encoder_{size}_down', c, c, resample='down'))
    for i in range(config.blocks):
      attends = size in config.attention_resolutions
      encoder.append(Layer(f'encoder_{size}_block{i}', c, features, attends))
      c = features
  skips = [config.width, *(layer.features for layer in encoder)]
  for level, multiplier in reversed(list(enumerate(config.multipliers))):
    size, features = side >> level, config.width * multiplier
    if level == len(config.multipliers) - 1:
      decoder.append(Layer(f'decoder_{size}_in0', c, c, attention=True))
      decoder.append(Layer(f'decoder_{size}_in1', c, c))
    else:
      decoder.append(Layer(f'decoder_{size}_up', c, c, resample='up'))
    for i in range(config.blocks + 1):
      attends = i == config.blocks and size in config.attention_resolutions
      inputs = c + skips.pop()
      decoder.append(Layer(f'decoder_{size}_block{i}', inputs, features, attends, joins=True))
      c = features
  return encoder, decoder


def sinusoid(t, width):
  """Returns [sin(t f_k), cos(t f_k)], f_k = 10000^(-k / (width / 2 - 1)): [B] -> [B, width].

  Unlike `layers.sinusoid`, sines come first and the last frequency is 1 / 10000 exactly. Official
  code: t in [0, 1] is not multiplied by 1000.
  """
  half = width // 2
  frequencies = (1e-4 ** (np.arange(half) / (half - 1))).astype(np.float32)
  angles = layers.wide(t)[:, None] * frequencies[None]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def resample(x, direction):
  """Halves or doubles the sides with the filter (1, 3, 3, 1): [B, H, W, C], C apart.

  'down' is a convolution of stride 2 and padding 1, 'up' the transpose of one with twice the
  weights per axis. Both are sums of shifted images: XLA has no fast convolution of single channels
  (on CPU this is 40 times faster), and sums stay float32 whatever the precision of products.
  """
  along = _halve if direction == 'down' else _double
  return along(along(x, 1), 2)


def _windows(x, axis):
  """Returns (i, length, stride) -> that part of x along the axis, one zero at either border."""
  padding = [(0, 0)] * x.ndim
  padding[axis] = (1, 1)
  padded = jnp.pad(x, padding)
  return lambda i, length, stride: jax.lax.slice_in_dim(padded, i, i + length, stride, axis)


def _halve(x, axis):
  """Filters along one axis and keeps every other value."""
  window, scale = _windows(x, axis), 1 / sum(FILTER)
  return sum(
    weight * scale * window(i, x.shape[axis] - 1, 2) for i, weight in enumerate(FILTER)
  )


def _double(x, axis):
  """Puts zeros between the values, then filters along one axis: even and odd places apart."""
  n, scale = x.shape[axis], 2 / sum(FILTER)
  before, here, after = (_windows(x, axis)(i, n, 1) for i in range(3))
  even = FILTER[0] * scale * before + FILTER[2] * scale * here
  odd = FILTER[1] * scale * here + FILTER[3] * scale * after
  shape = (*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])
  return jnp.stack([even, odd], axis=axis + 1).reshape(shape)


def drop(x, rng, layer, rate):
  """Zeroes a share of each row and scales the rest by 1 / (1 - rate).

  A row's mask is a function of its key and the layer alone, so neither the batch nor the devices
  change it, and the same keys give the same masks in another call.

  Args:
    x: [B, H, W, C].
    rng: keys [B].
    layer: number of the layer, so that no two of a network share masks.
    rate: share, in [0, 1).

  Returns:
    Array like x.
  """
  def keep(key):
    """The mask of one row."""
    # The share as float32: a float64 one, under x64, would draw other bits.
    return jax.random.bernoulli(jax.random.fold_in(key, layer), jnp.float32(1 - rate), x.shape[1:])

  return jnp.where(jax.vmap(keep)(rng), x / (1 - rate), 0.0)


def groups(channels):
  """Returns the number of groups of a norm: min(32, C / 4)."""
  return min(32, channels // 4)


def norm(channels, name):
  """Returns a group norm with scale and bias, in float32 (or wider), with the exact variance."""
  return nn.GroupNorm(
    groups(channels), epsilon=layers.NORM_EPS, use_fast_variance=False, name=name
  )


def _convolve(x, kernel, dtype):
  """x [B, H, W, I] with kernel [side, side, I, O], zeros at the borders: -> [B, H, W, O]."""
  if kernel.shape[0] == 1:  # XLA's CPU compiler is twice as fast with the product it is
    return jnp.einsum('bhwi,io->bhwo', x, kernel[0, 0], preferred_element_type=dtype)
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    preferred_element_type=dtype,
  )


class Conv(nn.Module):
  """Resampling if asked for, a convolution without stride, a bias; float32 in and out.

  Every product of the network but those of the embedding and inside attention.
  """

  features: int
  side: int  # of the kernel: 3, or 1 for a product at every pixel
  numerics: layers.Numerics
  resample: str | None = None  # 'down' or 'up', before the kernel
  gain: float = 1.0  # on the Xavier initialisation

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.variance_scaling(self.gain**2, 'fan_avg', 'uniform')
    shape = (self.side, self.side, x.shape[-1], self.features)
    kernel = self.param('kernel', init, shape, jnp.float32)
    bias = self.param('bias', layers.zeros, (self.features,), jnp.float32)
    if self.resample:
      x = resample(x, self.resample)
    out = layers.product(_convolve, x, kernel, self.numerics)
    return layers.wide(out) + bias[None, None, None]


class Attention(nn.Module):
  """Self-attention over pixels with one head, added to its input: [B, H, W, C] -> the same.

  Columns of the joint product are [q | k | v]; the official weights interleave them (converter).
  """

  numerics: layers.Numerics

  @nn.compact
  def __call__(self, x):
    b, h, w, c = x.shape
    qkv = Conv(3 * c, 1, self.numerics, gain=QKV_GAIN, name='qkv')(norm(c, 'norm')(x))
    q, k, v = jnp.split(qkv.reshape(b, h * w, 1, 3 * c), 3, axis=-1)
    out = layers.attend(q, k, v, self.numerics).reshape(b, h, w, c)
    return (Conv(c, 1, self.numerics, gain=LAST_GAIN, name='proj')(out) + x) * HALF


class Block(nn.Module):
  """A residual block: two convolutions around the condition, then attention in some.

    h = conv_in(SiLU(norm_in(x))) + condition(cond)
    h = (conv_out(dropout(SiLU(norm_out(h)))) + skip(x)) sqrt(1/2)

  The skip is the input itself where channels and sides stay, else a 1 x 1 convolution.
  """

  layer: Layer
  number: int  # in the network, see `drop`
  rate: float  # of the dropout
  numerics: layers.Numerics

  @nn.compact
  def __call__(self, x, cond, dropout):
    """x [B, H, W, C], cond [B, D], dropout keys [B] or None -> [B, H', W', features]."""
    features, change = self.layer.features, self.layer.resample
    h = nn.silu(norm(x.shape[-1], 'norm_in')(x))
    h = Conv(features, 3, self.numerics, change, name='conv_in')(h)
    h = h + layers.Linear(features, name='condition')(cond)[:, None, None]
    h = nn.silu(norm(features, 'norm_out')(h))
    if dropout is not None:
      h = drop(h, dropout, self.number, self.rate)
    h = Conv(features, 3, self.numerics, gain=LAST_GAIN, name='conv_out')(h)
    if change or features != x.shape[-1]:
      x = Conv(features, 1, self.numerics, change, name='skip')(x)
    h = (h + x) * HALF
    return Attention(self.numerics, name='attention')(h) if self.layer.attention else h


class Embedding(nn.Module):
  """The condition of time, duration and augmentation labels: [B] and [B, 6] -> [B, D] float32."""

  width: int  # of the network; D is four times as much

  @nn.compact
  def __call__(self, t, duration, augment):
    width = 4 * self.width
    h = jnp.concatenate([sinusoid(t, width // 2), sinusoid(duration, width // 2)], axis=-1)
    if augment is not None:
      h = h + layers.Linear(
        width, use_bias=False, kernel_init=layers.xavier, name='augment'
      )(augment)
    h = nn.silu(layers.Linear(width, name='in')(h))
    return nn.silu(layers.Linear(width, name='out')(h))


class UNet(nn.Module):
  """The network; see `make` for the pure functions that methods use."""

  config: Config
  pairs: str = ''  # as of layers.Numerics

  @nn.compact
  def __call__(self, x, t, duration, augment, dropout):
    config, (_, side, _, channels) = self.config, x.shape
    numerics = layers.Numerics(config.dtype, pairs=self.pairs)
    cond = Embedding(config.width, name='embedding')(t, duration, augment)
    h = Conv(config.width, 3, numerics, name=f'encoder_{side}_conv')(x)
    encoder, decoder = plan(config, side)
    skips, block_class = [h], nn.remat(Block) if config.remat else Block
    for number, layer in enumerate([*encoder, *decoder]):
      if layer.joins:
        h = jnp.concatenate([h, skips.pop()], axis=-1)
      block = block_class(layer, number, config.dropout, numerics, name=layer.name)
      h = block(h, cond, dropout)
      if number < len(encoder):
        skips.append(h)
    h = nn.silu(norm(h.shape[-1], f'decoder_{side}_norm')(h))
    last = Conv(channels, 3, numerics, gain=LAST_GAIN, name=f'decoder_{side}_conv')
    return last(h)


def make(config, latent_shape, num_classes, pairs=None):
  """Builds the pure functions of a U-Net.

  Args:
    config: Config.
    latent_shape: (H, W, C); H = W, a multiple of 2^(resolutions - 1).
    num_classes: not used, the network is unconditional: `apply` takes labels and ignores them.
    pairs: as of layers.Numerics, for `apply_pairs`; by default what layers.first_rows says.

  Returns:
    layers.Network.

  Raises:
    ValueError: if a setting is out of range or a size does not divide.
  """
  _check(config, latent_shape)
  net, of_pairs = UNet(config), UNet(config, pairs or layers.first_rows(config.dtype))

  def init(rng):
    """See layers.Network."""
    x, t = jnp.zeros((1, *latent_shape)), jnp.zeros((1,))
    augment = jnp.zeros((1, config.augment_dim)) if config.augment_dim else None
    return net.init(rng, x, t, t, augment, None)['params']

  def apply(net, params, x, t, duration, labels, *, augment=None, dropout=None):
    """See layers.Network; labels are ignored."""
    shapes.expect_shape('x', x, None, *latent_shape)
    shapes.expect_shape('t', t, x.shape[0])
    shapes.expect_shape('duration', duration, x.shape[0])
    if augment is not None:
      shapes.expect_shape('augment', augment, x.shape[0], config.augment_dim)
    if dropout is not None:
      shapes.expect_shape('dropout', dropout, x.shape[0])
    with jax.default_matmul_precision(config.precision):
      return net.apply({'params': params}, x, t, duration, augment, dropout)

  def trainable(params):
    """Every leaf is trained."""
    return jax.tree.map(lambda _: True, params)

  return layers.Network(
    init, functools.partial(apply, net), trainable, functools.partial(apply, of_pairs),
    has_dropout=config.dropout > 0, has_labels=False,
  )


def _check(config, latent_shape):
  """Refuses sizes that do not divide and settings out of range."""
  for key, fits, expected in (
    ('multipliers', config.multipliers and all(
      isinstance(factor, int) and factor >= 1 for factor in config.multipliers
    ), 'one whole number of at least 1 for each resolution'),
    ('blocks', config.blocks >= 1, 'at least 1'),
    ('dropout', 0 <= config.dropout < 1, 'at least 0 and below 1'),
    ('augment_dim', config.augment_dim >= 0, 'at least 0, which is no augmentation labels'),
  ):
    if not fits:
      raise ValueError(f'model.{key}={getattr(config, key)} must be {expected}')
  height, width, _ = latent_shape
  if height != width or height % 2 ** (len(config.multipliers) - 1):
    raise ValueError(
      f'model.multipliers={config.multipliers} halves the sides {len(config.multipliers) - 1}'
      f' times, which {height}x{width} do not allow; use equal sides that divide, or fewer'
      ' resolutions'
    )
  sides = [height >> level for level in range(len(config.multipliers))]
  if not set(config.attention_resolutions) <= set(sides):
    raise ValueError(
      f'model.attention_resolutions={config.attention_resolutions} must be among the resolutions'
      f' of model.multipliers={config.multipliers}, {tuple(sides)}'
    )
  for layer in sum(plan(config, height), []):
    for channels in (layer.inputs, layer.features):
      if channels < 4 or channels % groups(channels):
        raise ValueError(
          f'model.width={config.width} gives {layer.name} {channels} channels, which its norm'
          ' cannot group; use a multiple of 4 up to 128 channels and of 32 above'
        )

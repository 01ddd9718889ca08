"""The autoencoder of Stable Diffusion (AutoencoderKL): images to latents and back, frozen.

Latents here are unscaled; the scale is the recipe's (`data.latent_scale`). No loss and no training.

Source: Rombach et al., arXiv:2112.10752.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmzoo import shapes
from fmzoo.models import layers

IMAGE_CHANNELS = 3
NORM_EPS = 1e-6
LOG_VARIANCE = (-30.0, 20.0)  # bounds
BORDER = ((1, 1), (1, 1))  # of a 3 x 3 convolution that keeps height and width


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Sizes and numerics of an autoencoder."""

  widths: tuple  # channels of each resolution, the finest first
  layers_per_block: int  # residual blocks of a resolution; the decoder has one more
  groups: int  # of every group norm; divides all widths
  latent_channels: int  # C
  precision: str  # of products: 'default', 'high' (TF32 / three bfloat16 passes), 'highest'

  @property
  def factor(self):
    """Pixels along a side of a latent's pixel."""
    return 2 ** (len(self.widths) - 1)


SD_VAE = Config(
  widths=(128, 256, 512, 512), layers_per_block=2, groups=32, latent_channels=4,
  precision='highest',
)


class VAE(NamedTuple):
  """An autoencoder as pure functions over {'encoder': tree, 'decoder': tree}, float32."""

  init: Callable  # (rng) -> params
  encode: Callable  # (params, images [B, H, W, 3] in [-1, 1]) -> moments [B, h, w, 2 C]
  decode: Callable  # (params, latents [B, h, w, C], unscaled) -> images [B, H, W, 3], not clipped


def group_norm(groups, name):
  """Returns a group norm; the mean is taken off before squares are summed, to keep digits."""
  return nn.GroupNorm(groups, epsilon=NORM_EPS, use_fast_variance=False, name=name)


def convolution(width, name):
  """Returns a 3 x 3 convolution that keeps height and width."""
  return nn.Conv(width, (3, 3), padding=BORDER, name=name)


class Residual(nn.Module):
  """x + two convolutions of x, each behind norm and SiLU: [B, h, w, C_in] -> [B, h, w, width]."""

  width: int
  groups: int

  @nn.compact
  def __call__(self, x):
    h = convolution(self.width, 'conv1')(nn.silu(group_norm(self.groups, 'norm1')(x)))
    h = convolution(self.width, 'conv2')(nn.silu(group_norm(self.groups, 'norm2')(h)))
    if x.shape[-1] != self.width:
      x = nn.Conv(self.width, (1, 1), name='shortcut')(x)
    return x + h


class Attention(nn.Module):
  """x + self-attention over all pixels, one head as wide as x: [B, h, w, C] -> the same."""

  groups: int

  @nn.compact
  def __call__(self, x):
    b, h, w, c = x.shape
    tokens = group_norm(self.groups, 'norm')(x).reshape(b, h * w, c)  # row by row
    q, k, v = (layers.Linear(c, name=name)(tokens)[:, :, None] for name in 'qkv')  # [B, N, 1, C]
    out = layers.Linear(c, name='proj')(layers.attend(q, k, v, layers.Numerics())[:, :, 0])
    return x + out.reshape(x.shape)


class Middle(nn.Module):
  """Residual, attention, residual, at the coarsest resolution."""

  width: int
  groups: int

  @nn.compact
  def __call__(self, x):
    x = Residual(self.width, self.groups, name='residual_0')(x)
    x = Attention(self.groups, name='attention')(x)
    return Residual(self.width, self.groups, name='residual_1')(x)


class Level(nn.Module):
  """The residual blocks of one resolution, then the step to the next one."""

  width: int
  blocks: int
  groups: int
  resize: Callable | None  # `halve`, `double`, or None where there is no next resolution

  @nn.compact
  def __call__(self, x):
    for i in range(self.blocks):
      x = Residual(self.width, self.groups, name=f'residual_{i}')(x)
    return x if self.resize is None else self.resize(x, self.width)


def halve(x, width):
  """Convolves with stride 2; zeros are added below and to the right only, as in the original."""
  x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
  return nn.Conv(width, (3, 3), strides=2, padding='VALID', name='resize')(x)


def double(x, width):
  """Repeats every row and column, then convolves."""
  return convolution(width, 'resize')(x.repeat(2, axis=1).repeat(2, axis=2))


class Encoder(nn.Module):
  """Images [B, H, W, 3] to mean and log-variance [B, h, w, 2 C], not yet bounded."""

  config: Config

  @nn.compact
  def __call__(self, images):
    config = self.config
    x = convolution(config.widths[0], 'conv_in')(images)
    for i, width in enumerate(config.widths):
      resize = halve if i + 1 < len(config.widths) else None
      x = Level(width, config.layers_per_block, config.groups, resize, name=f'level_{i}')(x)
    x = Middle(config.widths[-1], config.groups, name='middle')(x)
    x = nn.silu(group_norm(config.groups, 'norm_out')(x))
    x = convolution(2 * config.latent_channels, 'conv_out')(x)
    return nn.Conv(2 * config.latent_channels, (1, 1), name='quant')(x)


class Decoder(nn.Module):
  """Latents [B, h, w, C] to images [B, H, W, 3]; level 0 is the coarsest resolution."""

  config: Config

  @nn.compact
  def __call__(self, latents):
    config = self.config
    widths = config.widths[::-1]
    x = nn.Conv(config.latent_channels, (1, 1), name='post_quant')(latents)
    x = convolution(widths[0], 'conv_in')(x)
    x = Middle(widths[0], config.groups, name='middle')(x)
    for i, width in enumerate(widths):
      resize = double if i + 1 < len(widths) else None
      x = Level(width, config.layers_per_block + 1, config.groups, resize, name=f'level_{i}')(x)
    x = nn.silu(group_norm(config.groups, 'norm_out')(x))
    return convolution(IMAGE_CHANNELS, 'conv_out')(x)


def posterior(outputs):
  """Cuts what the encoder gives into the two halves of a normal distribution.

  Args:
    outputs: [B, h, w, 2 C], mean and then log-variance.

  Returns:
    mean, log-variance within LOG_VARIANCE: [B, h, w, C] each.
  """
  mean, log_variance = jnp.split(outputs, 2, axis=-1)
  return mean, jnp.clip(log_variance, *LOG_VARIANCE)


def make(config):
  """Builds the pure functions of an autoencoder.

  Moments are the mean and then the standard deviation of every latent, on the channels, as latents
  are stored (data/latents.py). The networks have no size of their own: h = H / config.factor,
  rounded down. Every product is of `config.precision`.

  Args:
    config: Config.

  Returns:
    VAE. `decode` reads params['decoder'] alone, `encode` params['encoder'].
  """
  encoder, decoder = Encoder(config), Decoder(config)

  def init(rng):
    """Returns random parameters."""
    rng_encoder, rng_decoder = jax.random.split(rng)
    images = jnp.zeros((1, config.factor, config.factor, IMAGE_CHANNELS))
    latents = jnp.zeros((1, 1, 1, config.latent_channels))
    return {
      'encoder': encoder.init(rng_encoder, images)['params'],
      'decoder': decoder.init(rng_decoder, latents)['params'],
    }

  def encode(params, images):
    """Returns the moments of images."""
    shapes.expect_shape('images', images, None, None, None, IMAGE_CHANNELS)
    with jax.default_matmul_precision(config.precision):
      outputs = encoder.apply({'params': params['encoder']}, images)
    mean, log_variance = posterior(outputs)
    return jnp.concatenate([mean, jnp.exp(log_variance / 2)], axis=-1)

  def decode(params, latents):
    """Returns the images of latents."""
    shapes.expect_shape('latents', latents, None, None, None, config.latent_channels)
    with jax.default_matmul_precision(config.precision):
      return decoder.apply({'params': params['decoder']}, latents)

  return VAE(init, encode, decode)

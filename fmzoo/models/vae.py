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
PIXELWISE = {'kernel_size': (1, 1), 'padding': 'VALID'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Sizes and numerics of an autoencoder."""

  widths: tuple  # channels of each resolution, the finest first
  layers_per_block: int  # residual blocks of a resolution; the decoder has one more
  groups: int  # of every group norm; divides all widths
  latent_channels: int  # C
  # Of products: 'float32' or 'bfloat16'. The latter moves, in the SD_VAE of tests/golden, means of
  # latents by 1.2 % of their rms (4.6 % at most) and images by 1.1 % (6.2 % at most).
  dtype: str
  precision: str  # of float32 products: 'default', 'high' (TF32 / three bfloat16 passes), 'highest'

  @property
  def factor(self):
    """Pixels along a side of a latent's pixel."""
    return 2 ** (len(self.widths) - 1)


SD_VAE = Config(
  widths=(128, 256, 512, 512), layers_per_block=2, groups=32, latent_channels=4,
  dtype='float32', precision='highest',
)


class VAE(NamedTuple):
  """An autoencoder as pure functions over {'encoder': tree, 'decoder': tree}, float32."""

  init: Callable  # (rng) -> params
  encode: Callable  # (params, images [B, H, W, 3] in [-1, 1]) -> moments [B, h, w, 2 C]
  decode: Callable  # (params, latents [B, h, w, C], unscaled) -> images [B, H, W, 3], not clipped


def group_norm(groups, name):
  """Returns a group norm; the mean is taken off before squares are summed, to keep digits."""
  return nn.GroupNorm(groups, epsilon=NORM_EPS, use_fast_variance=False, name=name)


def convolve(x, width, config, name, **options):
  """Returns the convolution of x to `width` channels, float32, from operands of config.dtype.

  3 x 3 and of the same height and width, unless the options of nn.Conv say otherwise.
  """
  options = {'kernel_size': (3, 3), 'padding': BORDER, **options}
  return layers.wide(nn.Conv(width, dtype=config.dtype, name=name, **options)(x))


class Residual(nn.Module):
  """x + two convolutions of x, each behind norm and SiLU: [B, h, w, C_in] -> [B, h, w, width]."""

  width: int
  config: Config

  @nn.compact
  def __call__(self, x):
    width, config = self.width, self.config
    h = convolve(nn.silu(group_norm(config.groups, 'norm1')(x)), width, config, 'conv1')
    h = convolve(nn.silu(group_norm(config.groups, 'norm2')(h)), width, config, 'conv2')
    if x.shape[-1] != width:
      x = convolve(x, width, config, 'shortcut', **PIXELWISE)
    return x + h


class Attention(nn.Module):
  """x + self-attention over all pixels, one head as wide as x: [B, h, w, C] -> the same."""

  config: Config

  @nn.compact
  def __call__(self, x):
    b, h, w, c = x.shape
    numerics = layers.Numerics(self.config.dtype)
    tokens = group_norm(self.config.groups, 'norm')(x).reshape(b, h * w, c)  # row by row
    q, k, v = (
      layers.Linear(c, numerics, name=name)(tokens)[:, :, None] for name in 'qkv'
    )  # [B, N, 1, C]
    out = layers.Linear(c, numerics, name='proj')(layers.attend(q, k, v, numerics)[:, :, 0])
    return x + out.reshape(x.shape)


class Middle(nn.Module):
  """Residual, attention, residual, at the coarsest resolution."""

  width: int
  config: Config

  @nn.compact
  def __call__(self, x):
    x = Residual(self.width, self.config, name='residual_0')(x)
    x = Attention(self.config, name='attention')(x)
    return Residual(self.width, self.config, name='residual_1')(x)


class Level(nn.Module):
  """The residual blocks of one resolution, then the step to the next one."""

  width: int
  blocks: int
  config: Config
  resize: Callable | None  # `halve`, `double`, or None where there is no next resolution

  @nn.compact
  def __call__(self, x):
    for i in range(self.blocks):
      x = Residual(self.width, self.config, name=f'residual_{i}')(x)
    return x if self.resize is None else self.resize(x, self.width, self.config)


def halve(x, width, config):
  """Convolves with stride 2; zeros are added below and to the right only, as in the original."""
  x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
  return convolve(x, width, config, 'resize', strides=2, padding='VALID')


def double(x, width, config):
  """Repeats every row and column, then convolves."""
  return convolve(x.repeat(2, axis=1).repeat(2, axis=2), width, config, 'resize')


class Encoder(nn.Module):
  """Images [B, H, W, 3] to mean and log-variance [B, h, w, 2 C], not yet bounded."""

  config: Config

  @nn.compact
  def __call__(self, images):
    config = self.config
    x = convolve(images, config.widths[0], config, 'conv_in')
    for i, width in enumerate(config.widths):
      resize = halve if i + 1 < len(config.widths) else None
      x = Level(width, config.layers_per_block, config, resize, name=f'level_{i}')(x)
    x = Middle(config.widths[-1], config, name='middle')(x)
    x = nn.silu(group_norm(config.groups, 'norm_out')(x))
    x = convolve(x, 2 * config.latent_channels, config, 'conv_out')
    return convolve(x, 2 * config.latent_channels, config, 'quant', **PIXELWISE)


class Decoder(nn.Module):
  """Latents [B, h, w, C] to images [B, H, W, 3]; level 0 is the coarsest resolution."""

  config: Config

  @nn.compact
  def __call__(self, latents):
    config = self.config
    widths = config.widths[::-1]
    x = convolve(latents, config.latent_channels, config, 'post_quant', **PIXELWISE)
    x = convolve(x, widths[0], config, 'conv_in')
    x = Middle(widths[0], config, name='middle')(x)
    for i, width in enumerate(widths):
      resize = double if i + 1 < len(widths) else None
      x = Level(width, config.layers_per_block + 1, config, resize, name=f'level_{i}')(x)
    x = nn.silu(group_norm(config.groups, 'norm_out')(x))
    return convolve(x, IMAGE_CHANNELS, config, 'conv_out')


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
  rounded down. Every product is of `config.dtype` and `config.precision`; norms, softmax and what
  blocks add up are float32.

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

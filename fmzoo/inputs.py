"""What happens to a batch on the device, before the loss."""

import jax
import jax.numpy as jnp

from fmzoo import augment as augmentation
from fmzoo.methods import flow


def sample_moments(moments, noise, scale):
  """Returns a latent of stored posterior moments: (mean + std noise) scale.

  Args:
    moments: [B, H, W, 2 C], mean and standard deviation, unscaled.
    noise: [B, H, W, C], standard normal.
    scale: latent scale of the VAE, 0.18215 for Stable Diffusion's.

  Returns:
    [B, H, W, C] float32.
  """
  mean, std = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
  return (mean + std * noise) * scale


def from_pixels(pixels):
  """Returns (pixels / 255 - 0.5) / 0.5: any shape, 0 .. 255 -> float32 in [-1, 1]."""
  return (pixels.astype(jnp.float32) / 255 - 0.5) / 0.5


def make(latent_scale, encode=None, augment=0.0):
  """Builds inputs(frozen, batch, rng [B]) -> batch with 'latent' and, given an encoder, 'feature'.

  Without an encoder, a 'feature' that the batch brings along (stored with its latents) stays, in
  float32. Pictures may come as 'pixels' in place of 'latent'; with augmentation a batch also gets
  'augment' [B, 6], what `augment.labels_of` says of it.

  Args:
    latent_scale: see `sample_moments`; used when a batch holds 'moments' in place of 'latent'.
    encode: (frozen, latent [B, H, W, C]) -> features [B, N, F] of a frozen encoder, or None.
    augment: probability of `augment.augment`, applied to 'pixels'; 0 leaves them as they are.

  Returns:
    A pure function; `frozen` are the encoder's parameters.
  """

  def inputs(frozen, batch, rng):
    """Returns the batch that the method's loss sees."""
    batch = dict(batch)
    if 'moments' in batch:
      moments = batch.pop('moments')
      noise = flow.normal_like(rng, moments[..., : moments.shape[-1] // 2])
      batch['latent'] = sample_moments(moments, noise, latent_scale)
    if 'pixels' in batch:
      batch['latent'] = from_pixels(batch.pop('pixels'))
      if augment > 0:
        batch['latent'], batch['augment'] = augmentation.augment(
          batch['latent'], augmentation.draw(rng), augment
        )
    if encode is not None:
      batch['feature'] = jax.lax.stop_gradient(encode(frozen, batch['latent']))
    if 'feature' in batch:
      batch['feature'] = batch['feature'].astype(jnp.float32)
    return batch

  return inputs

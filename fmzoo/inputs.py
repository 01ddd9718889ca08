"""What happens to a batch on the device, before the loss."""

import jax
import jax.numpy as jnp

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


def make(latent_scale, encode=None):
  """Builds inputs(frozen, batch, rng [B]) -> batch with 'latent' and, given an encoder, 'feature'.

  Without an encoder, a 'feature' that the batch brings along (stored with its latents) stays, in
  float32.

  Args:
    latent_scale: see `sample_moments`; used when a batch holds 'moments' in place of 'latent'.
    encode: (frozen, latent [B, H, W, C]) -> features [B, N, F] of a frozen encoder, or None.

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
    if encode is not None:
      batch['feature'] = jax.lax.stop_gradient(encode(frozen, batch['latent']))
    if 'feature' in batch:
      batch['feature'] = batch['feature'].astype(jnp.float32)
    return batch

  return inputs

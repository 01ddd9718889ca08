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


def mirror(images, chosen):
  """Returns images [B, H, W, C], left and right exchanged where `chosen` [B] is true."""
  return jnp.where(chosen[:, None, None, None], images[:, :, ::-1], images)


def make(latent_scale, encode=None, augment=0.0, flip=False):
  """Builds inputs(frozen, batch, rng [B]) -> batch with 'latent' and, given an encoder, 'feature'.

  Without an encoder, a 'feature' that the batch brings along (stored with its latents) stays, in
  float32. Pictures may come as 'pixels' in place of 'latent'; with augmentation a batch also gets
  'augment' [B, 6], what `augment.labels_of` says of it. Where half of the rows are mirrored,
  'moments' are those of the image and of its mirror image, [B, 2, H, W, 2 C]; an 'image' that the
  encoder sees is mirrored with its latent.

  Args:
    latent_scale: see `sample_moments`; used when a batch holds 'moments' in place of 'latent'.
    encode: (frozen, batch) -> features [B, N, F] of a frozen encoder, or None; the batch has its
      'latent', and its 'image' [B, h, w, 3] uint8 where images are stored.
    augment: probability of `augment.augment`, applied to 'pixels'; 0 leaves them as they are.
    flip: True mirrors each row with probability 1/2.

  Returns:
    A pure function; `frozen` are the encoder's parameters.
  """

  def inputs(frozen, batch, rng):
    """Returns the batch that the method's loss sees."""
    batch = dict(batch)
    rng_flip, rng_noise, rng_augment = jnp.moveaxis(
      jax.vmap(lambda key: jax.random.split(key, 3))(rng), 1, 0
    )
    chosen = jax.vmap(jax.random.bernoulli)(rng_flip) if flip else None  # [B]
    if 'moments' in batch:
      moments = batch.pop('moments')
      if flip:
        moments = jnp.where(chosen[:, None, None, None], moments[:, 1], moments[:, 0])
      noise = flow.normal_like(rng_noise, moments[..., : moments.shape[-1] // 2])
      batch['latent'] = sample_moments(moments, noise, latent_scale)
    for name in ('pixels', 'image') if flip else ():
      if name in batch:
        batch[name] = mirror(batch[name], chosen)
    if 'pixels' in batch:
      batch['latent'] = from_pixels(batch.pop('pixels'))
      if augment > 0:
        batch['latent'], batch['augment'] = augmentation.augment(
          batch['latent'], augmentation.draw(rng_augment), augment
        )
    if encode is not None:
      batch['feature'] = jax.lax.stop_gradient(encode(frozen, batch))
    batch.pop('image', None)
    if 'feature' in batch:
      batch['feature'] = batch['feature'].astype(jnp.float32)
    return batch

  return inputs

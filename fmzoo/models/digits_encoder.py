"""A small convolutional classifier of 8x8 digits whose patch features stand in for DINOv2's."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmzoo.models import layers

WIDTH = 64  # F, feature width


class DigitsEncoder(nn.Module):
  """Three convolutions, one of stride 2: a 4 x 4 map of features, and class logits from its mean."""

  num_classes: int

  @nn.compact
  def __call__(self, images):
    """images [B, 8, 8, 1] in [-1, 1] -> (features [B, 16, F], logits [B, num_classes])."""
    h = nn.gelu(nn.Conv(WIDTH // 2, (3, 3), name='conv1')(images))
    h = nn.gelu(nn.Conv(WIDTH, (3, 3), strides=2, name='conv2')(h))
    h = nn.gelu(nn.Conv(WIDTH, (3, 3), name='conv3')(h))  # [B, 4, 4, F]
    features = layers.layer_norm(h.reshape(h.shape[0], -1, WIDTH))
    return features, nn.Dense(self.num_classes, name='logits')(jnp.mean(features, axis=1))


def init(rng, num_classes):
  """Returns float32 parameters."""
  net = DigitsEncoder(num_classes)
  return jax.jit(net.init)(rng, jnp.zeros((1, 8, 8, 1)))['params']


def apply(params, images):
  """Returns (features [B, 16, F], logits [B, num_classes]) of images [B, 8, 8, 1] in [-1, 1]."""
  return DigitsEncoder(params['logits']['bias'].shape[0]).apply({'params': params}, images)

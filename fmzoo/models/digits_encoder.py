"""A small convolutional classifier of 8x8 digits whose patch features stand in for DINOv2's."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmzoo.models import layers

TOKENS, WIDTH = 16, 64  # N, F of the features


def neighbourhoods(x):
  """Gathers 3 x 3 pixels around each, zeros outside: [B, H, W, C] -> [B, H, W, 9 C].

  A convolution is this and a linear layer; XLA's CPU compiler is slow at convolutions in a loop.
  """
  height, width = x.shape[1:3]
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  shifts = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
  return jnp.concatenate(shifts, axis=-1)


class DigitsEncoder(nn.Module):
  """Three 3 x 3 convolutions, one of stride 2: a 4 x 4 feature map, class logits of its mean."""

  num_classes: int

  @nn.compact
  def __call__(self, images):
    """images [B, 8, 8, 1] in [-1, 1] -> (features [B, 16, F], logits [B, num_classes])."""
    h = nn.gelu(layers.Linear(WIDTH // 2, name='conv1')(neighbourhoods(images)))
    h = nn.gelu(layers.Linear(WIDTH, name='conv2')(neighbourhoods(h)[:, ::2, ::2]))
    h = nn.gelu(layers.Linear(WIDTH, name='conv3')(neighbourhoods(h)))  # [B, 4, 4, F]
    features = layers.layer_norm(h.reshape(h.shape[0], -1, WIDTH))
    return features, layers.Linear(self.num_classes, name='logits')(jnp.mean(features, axis=1))


def init(rng, num_classes):
  """Returns float32 parameters."""
  net = DigitsEncoder(num_classes)
  return jax.jit(net.init)(rng, jnp.zeros((1, 8, 8, 1)))['params']


def apply(params, images):
  """Returns (features [B, 16, F], logits [B, num_classes]) of images [B, 8, 8, 1] in [-1, 1]."""
  return DigitsEncoder(params['logits']['bias'].shape[0]).apply({'params': params}, images)

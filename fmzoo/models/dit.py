"""The diffusion transformer (DiT): of SiT with one time, of SoFlow with a second time embedding.

Source: Peebles and Xie, arXiv:2212.09748; SoFlow, arXiv:2512.15657 (duration embedding).
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmzoo import shapes
from fmzoo.models import layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Sizes and numerics of a DiT."""

  patch: int  # side of a square patch, latent pixels
  width: int  # D, channels of a token
  depth: int  # L, blocks
  heads: int  # A; width must be a multiple
  mlp_ratio: float  # hidden width of the MLP over D
  duration: bool  # whether a second embedding takes t - s (SoFlow)
  dtype: Any  # of the large matrix products: 'float32' or 'bfloat16'
  precision: str  # of float32 products: 'default', 'high' (TF32 / three bfloat16 passes), 'highest'
  attention: str  # 'xla', or 'cudnn' (GPU and bfloat16 only)
  remat: bool  # recompute blocks in the backward pass: less memory, one more forward pass
  unroll: int  # blocks a loop iteration holds: 1 compiles fastest, all of them run faster on CPU


class Block(nn.Module):
  """A transformer block modulated by the condition (adaLN-zero); body of the scan over depth."""

  config: Config
  numerics: layers.Numerics

  @nn.compact
  def __call__(self, x, cond):
    config = self.config
    modulation = layers.Linear(6 * config.width, kernel_init=layers.zeros, name='modulation')
    block = layers.TransformerBlock(config.heads, config.mlp_ratio, self.numerics, name='core')
    return block(x, modulation(nn.silu(cond))[:, None]), None


class DiT(nn.Module):
  """The network; see `make` for the pure functions that methods use."""

  config: Config
  num_classes: int
  pairs: str = ''  # as of layers.Numerics

  @nn.compact
  def __call__(self, x, t, duration, labels):
    config = self.config
    numerics = layers.Numerics(config.dtype, config.attention, self.pairs)
    _, h, w, c = x.shape
    tokens = layers.wide(layers.Linear(config.width, numerics, name='patches')(
      layers.patchify(x, config.patch)
    ))  # [B, N, D]
    positions = self.param(
      'pos_embed', lambda _: jnp.asarray(layers.position_table(h // config.patch, config.width))
    )
    tokens = tokens + jax.lax.stop_gradient(positions)
    cond = layers.TimeEmbedding(config.width, name='time')(t)
    if config.duration:
      # Xavier and not N(0, 0.02): the official initialiser leaves this embedder out of its special
      # cases, and training from scratch depends on it.
      cond += layers.TimeEmbedding(config.width, layers.xavier, name='duration')(duration)
    cond += layers.LabelEmbedding(self.num_classes, config.width, name='labels')(labels)
    block = nn.remat(Block, prevent_cse=False) if config.remat else Block
    blocks = nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=nn.broadcast,
      length=config.depth,
      unroll=config.unroll,
    )
    tokens, _ = blocks(config, numerics, name='blocks')(tokens, cond)
    modulation = layers.Linear(2 * config.width, kernel_init=layers.zeros, name='final_modulation')
    shift, scale = jnp.split(modulation(nn.silu(cond))[:, None], 2, axis=-1)
    out = layers.Linear(config.patch**2 * c, numerics, layers.zeros, name='final')(
      layers.modulate(layers.layer_norm(tokens), shift, scale)
    )
    return layers.unpatchify(layers.wide(out), config.patch, h, w)


def make(config, latent_shape, num_classes, pairs=None):
  """Builds the pure functions of a DiT.

  Args:
    config: Config.
    latent_shape: (H, W, C); H = W, a multiple of the patch.
    num_classes: the label table has one more row, for the null label.
    pairs: as of layers.Numerics, for `apply_pairs`; by default what layers.first_rows says.

  Returns:
    layers.Network. Its position table is a parameter that is never trained.

  Raises:
    ValueError: if a size does not divide.
  """
  if latent_shape[0] != latent_shape[1] or latent_shape[0] % config.patch:
    raise ValueError(
      f'model.patch={config.patch} does not divide the latent {latent_shape[0]}x{latent_shape[1]};'
      ' use a divisor of its (equal) sides'
    )
  if config.width % config.heads or config.width % 4:
    raise ValueError(
      f'model.width={config.width} must be a multiple of 4 and of model.heads={config.heads}'
    )
  net = DiT(config, num_classes)
  of_pairs = DiT(config, num_classes, pairs or layers.first_rows(config.dtype))

  def init(rng):
    """See layers.Network."""
    x, t = jnp.zeros((1, *latent_shape)), jnp.zeros((1,))
    return net.init(rng, x, t, t, jnp.zeros((1,), jnp.int32))['params']

  def apply(net, params, x, t, duration, labels, *, augment=None, dropout=None):
    """See layers.Network."""
    for name, value in (('augment', augment), ('dropout', dropout)):
      if value is not None:
        raise ValueError(
          f'{name} of shape {value.shape} was given to a DiT, which has none; pass None, or use'
          " model.name='unet'"
        )
    shapes.expect_shape('x', x, None, *latent_shape)
    shapes.expect_shape('t', t, x.shape[0])
    shapes.expect_shape('labels', labels, x.shape[0])
    with jax.default_matmul_precision(config.precision):
      return net.apply({'params': params}, x, t, duration, labels)

  def trainable(params):
    """See layers.Network."""
    trained = jax.tree.map(lambda _: True, params)
    return {**trained, 'pos_embed': False}

  return layers.Network(
    init, functools.partial(apply, net), trainable, functools.partial(apply, of_pairs)
  )

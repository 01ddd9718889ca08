"""Parts that the networks share: patches, embeddings, modulation, rotary, attention, MLP, block.

Parameters are float32. `dtype` is the dtype of the large matrix products (attention, MLP, patches);
norms, modulation, softmax, conditioning and the residual stream stay float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

NORM_EPS = 1e-6  # of every norm of both papers' networks
FREQUENCIES = 256  # width of the sinusoidal time features, in both papers


class Network(NamedTuple):
  """A velocity-like network as pure functions."""

  init: Callable  # (rng) -> params, float32
  # (params, x [B, H, W, C], t [B], duration [B] | None, labels [B] int32, *, augment=None,
  # dropout=None) -> like x; augment [B, 6] labels, None is zeros; dropout keys [B], None is no
  # dropout. A network without one of them refuses it.
  apply: Callable
  trainable: Callable  # (params) -> tree of bool


xavier = nn.initializers.xavier_uniform()
small_normal = nn.initializers.normal(0.02)
zeros = nn.initializers.zeros


class Linear(nn.Dense):
  """A linear layer that sees tokens as rows of one matrix.

  XLA's CPU compiler turns a kernel gradient that sums over two axes into a slow transposition;
  with one axis the whole backward pass of an MLP is 2.6 times faster. Elsewhere it costs nothing.
  """

  def __call__(self, x):
    return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.features)


def dense(width, dtype=jnp.float32, kernel_init=xavier, name=None):
  """Returns a linear layer with float32 parameters and a zero bias."""
  return Linear(
    width, dtype=dtype, param_dtype=jnp.float32, kernel_init=kernel_init, name=name
  )


def patchify(x, patch):
  """Cuts images into patches: [B, H, W, C] -> [B, N, P P C], order (row, column, channel)."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // patch, patch, w // patch, patch, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(tokens, patch, height, width):
  """Inverts `patchify`: [B, N, P P C] -> [B, H, W, C]."""
  b, rows, columns = tokens.shape[0], height // patch, width // patch
  x = tokens.reshape(b, rows, columns, patch, patch, -1)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, height, width, -1)


def sinusoid(t, width=FREQUENCIES):
  """Returns [cos(t f_k), sin(t f_k)], f_k = 10000^(-k / (width / 2)): [B] -> [B, width].

  Source: official BFM and SoFlow. t in [0, 1] is not multiplied by 1000.
  """
  half = width // 2
  frequencies = jnp.exp(-np.log(10000.0) / half * jnp.arange(half, dtype=jnp.float32))
  angles = t[:, None].astype(jnp.float32) * frequencies[None, :]
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nn.Module):
  """Sinusoid, linear, SiLU, linear: [B] -> [B, D] float32."""

  width: int
  kernel_init: Callable = small_normal

  @nn.compact
  def __call__(self, t):
    h = dense(self.width, kernel_init=self.kernel_init, name='in')(sinusoid(t))
    return dense(self.width, kernel_init=self.kernel_init, name='out')(nn.silu(h))


class LabelEmbedding(nn.Module):
  """A table of num_classes + 1 rows, the last for the null label: [B] int32 -> [B, D] float32."""

  num_classes: int
  width: int

  @nn.compact
  def __call__(self, labels):
    table = self.param('table', small_normal, (self.num_classes + 1, self.width), jnp.float32)
    return jnp.take(table, labels, axis=0)


def position_table(grid, width):
  """Returns the fixed 2-D sine-cosine table [1, N, D] float32 of a grid x grid token map.

  The first half of the channels encodes the column, the second the row; each half is
  [sin(p w_j), cos(p w_j)], w_j = 10000^(-j / (D / 4)). Source: DiT, as in official SoFlow.
  """
  omega = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width / 4))

  def encode(position):
    angles = position.reshape(-1, 1) * omega[None]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

  rows, columns = np.meshgrid(np.arange(grid), np.arange(grid), indexing='ij')
  table = np.concatenate([encode(columns), encode(rows)], axis=1)
  return table[None].astype(np.float32)


def rotary_table(grid, head_width, theta=10000.0):
  """Returns (cos, sin), each [N, E / 2] float32, of the 2-D rotary embedding.

  The first E / 4 pairs turn with the row, the others with the column, at theta^(-2 i / (E / 2)).
  Source: official BFM.
  """
  frequencies = theta ** (-2.0 * np.arange(head_width // 4) / (head_width // 2))
  rows, columns = np.meshgrid(np.arange(grid), np.arange(grid), indexing='ij')
  angles = np.concatenate(
    [rows.reshape(-1, 1) * frequencies, columns.reshape(-1, 1) * frequencies], axis=1
  )
  return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x, table):
  """Turns adjacent channel pairs (2i, 2i + 1) of x [B, N, A, E] by the angles of `rotary_table`."""
  cos, sin = (jnp.asarray(part)[None, :, None, :] for part in table)
  even, odd = x[..., 0::2], x[..., 1::2]
  return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)


def layer_norm(x):
  """Normalises the last axis without learned scale or bias, in float32, biased variance."""
  x = x.astype(jnp.float32)
  mean = jnp.mean(x, axis=-1, keepdims=True)
  centred = x - mean
  variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
  return centred * jax.lax.rsqrt(variance + NORM_EPS)


def modulate(x, shift, scale):
  """Returns x (1 + scale) + shift; all rank 3."""
  return x * (1 + scale) + shift


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) * weight over the last axis, float32; rounded before the weight."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    weight = self.param('weight', nn.initializers.ones, (x.shape[-1],), jnp.float32)
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + NORM_EPS)
    return x.astype(self.dtype).astype(jnp.float32) * weight.reshape((1,) * (x.ndim - 1) + (-1,))


def attend(q, k, v, implementation='xla'):
  """Softmax attention softmax(q k^T / sqrt(E)) v: [B, N, A, E] each -> [B, N, A, E].

  Args:
    q: queries; k: keys; v: values.
    implementation: 'xla' (softmax in float32), or 'cudnn' (GPU, bfloat16 only).

  Returns:
    Array like v.
  """
  if implementation == 'cudnn':
    return jax.nn.dot_product_attention(q, k, v, implementation='cudnn')
  logits = jnp.einsum('bqae,bkae->baqk', q, k, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(logits / np.sqrt(q.shape[-1]), axis=-1).astype(v.dtype)
  return jnp.einsum('baqk,bkae->bqae', weights, v)


class Attention(nn.Module):
  """Multi-head self-attention with one fused qkv product; output columns are [q | k | v]."""

  heads: int
  dtype: Any
  qk_norm: bool = False
  implementation: str = 'xla'

  @nn.compact
  def __call__(self, x, rotary=None):
    b, n, width = x.shape
    qkv = dense(3 * width, self.dtype, name='qkv')(x)
    q, k, v = jnp.moveaxis(qkv.reshape(b, n, 3, self.heads, width // self.heads), 2, 0)
    if self.qk_norm:
      q = RMSNorm(self.dtype, name='q_norm')(q)
      k = RMSNorm(self.dtype, name='k_norm')(k)
    if rotary is not None:
      q, k = rotate(q, rotary), rotate(k, rotary)
    q, k = q.astype(self.dtype), k.astype(self.dtype)
    out = attend(q, k, v, self.implementation).reshape(b, n, width)
    return dense(width, self.dtype, name='proj')(out)


class MLP(nn.Module):
  """Linear, GELU (tanh form), linear: [B, N, D] -> [B, N, D]."""

  hidden: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    h = nn.gelu(dense(self.hidden, self.dtype, name='fc1')(x), approximate=True)
    return dense(x.shape[-1], self.dtype, name='fc2')(h)


class TransformerBlock(nn.Module):
  """Pre-norm attention and MLP, each shifted, scaled and gated by a given modulation.

    h <- h + gate1 Attn(LN(h) (1 + scale1) + shift1)
    h <- h + gate2 MLP (LN(h) (1 + scale2) + shift2)

  Where the modulation comes from is the only difference between the blocks of all networks here.
  """

  heads: int
  mlp_ratio: float
  dtype: Any
  qk_norm: bool = False
  attention: str = 'xla'

  @nn.compact
  def __call__(self, x, modulation, rotary=None):
    """x [B, N, D] float32, modulation [B, 1 or N, 6 D] float32 -> [B, N, D] float32."""
    attention = Attention(self.heads, self.dtype, self.qk_norm, self.attention, name='attn')
    mlp = MLP(int(x.shape[-1] * self.mlp_ratio), self.dtype, name='mlp')
    shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
    x = x + gate1 * attention(modulate(layer_norm(x), shift1, scale1), rotary)
    return x + gate2 * mlp(modulate(layer_norm(x), shift2, scale2))

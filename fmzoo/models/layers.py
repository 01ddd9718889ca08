"""Parts that the networks share: patches, embeddings, modulation, rotary, attention, MLP, block.

Parameters are float32. `Numerics` says how the large matrix products (attention, MLP, patches) are
computed; norms, modulation, softmax, conditioning and the residual stream stay float32, or float64
where x64 is on and parameters and inputs are float64.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

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
  # Like apply, where rows 2i and 2i + 1 are near points whose difference matters, see `product`;
  # the gradient of the second is not whole. None for a network that no such method uses.
  apply_pairs: Callable | None = None
  has_dropout: bool = False  # whether training wants `dropout` keys
  has_labels: bool = True  # False where labels are ignored


class Numerics(NamedTuple):
  """How the large products of a network are computed: operands of these dtypes, see `product`.

  A dtype is 'float32', 'float64', 'bfloat16', or one of DTYPES.
  """

  dtype: str = 'float32'
  attention: str = 'xla'  # or 'cudnn' (GPU and bfloat16 only); pairs are always 'xla'
  pairs: str = ''  # dtype of first rows, if rows 2i and 2i + 1 are near points; '' if they are not


xavier = nn.initializers.xavier_uniform()
small_normal = nn.initializers.normal(0.02)
zeros = nn.initializers.zeros


def first_rows(dtype):
  """Returns Numerics.pairs for a network of this dtype: a rounding below bfloat16's."""
  return 'high' if dtype == 'bfloat16' else dtype


def wide(x):
  """Returns x in float32, or in float64 if it is."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _high(op, a, b, out):
  """float32 operands in three bfloat16 passes on a TPU, in TF32 on a GPU, as they are on a CPU."""
  with jax.default_matmul_precision('high'):
    return op(a.astype(jnp.float32), b.astype(jnp.float32), out)


def _tf32(op, a, b, out):
  """What a GPU does with float32 operands, anywhere: 10 bits of mantissa."""
  a, b = (jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10) for x in (a, b))
  return op(a, b, out)


def _three_passes(op, a, b, out):
  """What a TPU does at 'high', anywhere: each operand is the sum of two bfloat16 numbers."""
  (a, a_rest), (b, b_rest) = (
    (x.astype(jnp.bfloat16), (x - x.astype(jnp.bfloat16).astype(x.dtype)).astype(jnp.bfloat16))
    for x in (a, b)
  )
  return op(a_rest, b, out) + op(a, b_rest, out) + op(a, b, out)


DTYPES = {'high': _high, 'tf32': _tf32, 'bfloat16_3x': _three_passes}


def product(op, a, b, numerics, *, has_rows=False, widen=False):
  """Returns op(a, b), computed as `numerics` says.

  In pairs the second rows are computed from the first, by what they differ in:

    y_first = op(a_first, b),  y_second = y_first + op(a_second - a_first, b)

  and, where b has rows of its own, + op(a_first, b_second - b_first), with a_second before it. So
  both rows see the same roundings, which cancel in y_second - y_first: that is accurate to the
  rounding of the difference, however small it is, also with bfloat16 operands. What is left of
  rounding in both rows is not divided by their distance; numerics.pairs says how large it may be.
  For a kernel b it costs as many products as two plain rows. Second rows have no gradient here.

  Args:
    op: (a, b, dtype of the result) -> bilinear function of a and b, row by row.
    a: [R, ...].
    b: a kernel, or rows like a.
    numerics: Numerics.
    has_rows: whether b has rows [R, ...].
    widen: whether the result is float32 (or wider) in any case.

  Returns:
    [R, ...] of numerics.dtype, float32 (or wider) in pairs. Products of the backward pass have
    operands of numerics.dtype, those with gradients included.
  """
  if not numerics.pairs:
    out = _result(numerics.dtype)
    out = jnp.promote_types(out, jnp.float32) if widen else out
    return rounded_product(op, a, b, numerics.dtype, numerics.dtype, out)
  wide_out, fixed = wide(a).dtype, jax.lax.stop_gradient
  (first, step), (b, b_step) = _pair(a), _pair(b) if has_rows else (b, None)
  y = rounded_product(op, first, b, numerics.pairs, numerics.dtype, wide_out)

  def add(a, b):
    """Returns a product that has no gradient."""
    return rounded_product(op, fixed(a), fixed(b), numerics.dtype, numerics.dtype, wide_out)

  difference = add(step, b + b_step) + add(first, b_step) if has_rows else add(step, b)
  y = jnp.stack([y, fixed(y) + difference], axis=1)
  return y.reshape(-1, *y.shape[2:])


def _result(dtype):
  """The dtype of a product that nobody widens."""
  return jnp.dtype('float32' if dtype in DTYPES else dtype)


def _pair(rows):
  """Returns the first rows of pairs and second - first: [R / 2, ...] each."""
  rows = rows.reshape(-1, 2, *rows.shape[1:])
  return rows[:, 0], rows[:, 1] - rows[:, 0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 3, 4, 5))
def rounded_product(op, a, b, dtype, grad_dtype, out):
  """Returns op(a, b) of operands rounded to `dtype`, as `out`; its tangents round to `grad_dtype`.

  By itself the gradient of a product with a wider result has one wide operand and costs, on most
  accelerators, what wide products cost.
  """
  if dtype in DTYPES:
    return DTYPES[dtype](op, a, b, out)
  return op(a.astype(dtype), b.astype(dtype), out)


@functools.partial(rounded_product.defjvp, symbolic_zeros=True)
def _rounded_product_jvp(op, dtype, grad_dtype, out, primals, tangents):
  """The product rule; a product with a tangent that is zero is left out."""
  y = rounded_product(op, *primals, dtype, grad_dtype, out)
  (a, b), (a_dot, b_dot) = primals, tangents
  terms = [(a_dot, b), (a, b_dot)]
  zero = jax.custom_derivatives.SymbolicZero
  products = [
    rounded_product(op, *term, grad_dtype, grad_dtype, _result(grad_dtype)).astype(y.dtype)
    for term in terms if not any(isinstance(part, zero) for part in term)
  ]
  return y, sum(products[1:], products[0])


def _matmul(x, kernel, dtype):
  """x [R, ..., I] times kernel [I, O]."""
  # Tokens as rows of one matrix: XLA's CPU compiler turns a kernel gradient that sums over two axes
  # into a slow transposition; with one axis an MLP's backward pass is 2.6 times faster.
  rows = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel, preferred_element_type=dtype)
  return rows.reshape(*x.shape[:-1], -1)


def whole(weight):
  """Asks for the whole of a weight that devices share, rather than for parts of the product.

  Left to itself XLA may keep the weight where it is and send every device's rows around.
  """
  mesh = jax.typeof(weight).sharding.mesh
  if mesh.shape.get('fsdp', 1) == 1:
    return weight
  return jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, PartitionSpec()))


class Linear(nn.Module):
  """A linear layer, [R, ..., I] -> [R, ..., width]; without numerics as wide as its input."""

  width: int
  numerics: Numerics | None = None
  kernel_init: Callable = xavier
  use_bias: bool = True

  @nn.compact
  def __call__(self, x):
    kernel = self.param('kernel', self.kernel_init, (x.shape[-1], self.width), jnp.float32)
    numerics = self.numerics or Numerics(str(jnp.promote_types(x.dtype, kernel.dtype)))
    y = product(_matmul, x, whole(kernel), numerics)
    if not self.use_bias:
      return y
    bias = self.param('bias', zeros, (self.width,), jnp.float32)
    return y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


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
  half, t = width // 2, wide(t)
  frequencies = jnp.exp(-np.log(10000.0) / half * jnp.arange(half, dtype=t.dtype))
  angles = t[:, None] * frequencies[None, :]
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nn.Module):
  """Sinusoid, linear, SiLU, linear: [B] -> [B, D] float32."""

  width: int
  kernel_init: Callable = small_normal

  @nn.compact
  def __call__(self, t):
    h = Linear(self.width, kernel_init=self.kernel_init, name='in')(sinusoid(t))
    return Linear(self.width, kernel_init=self.kernel_init, name='out')(nn.silu(h))


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
    """Returns waves of one coordinate."""
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
  """Turns adjacent channel pairs (2i, 2i + 1) of x [B, N, A, E] by the angles of `rotary_table`.

  Returns:
    [B, N, A, E], the first of all pairs before the second of all: a product of q and k that are
    both turned so is the same in any order of channels, so pairs need not be put back.
  """
  cos, sin = (jnp.asarray(part)[None, :, None, :] for part in table)
  even, odd = x[..., 0::2], x[..., 1::2]
  return jnp.concatenate([even * cos - odd * sin, odd * cos + even * sin], axis=-1)


def layer_norm(x):
  """Normalises the last axis without learned scale or bias, in float32, biased variance."""
  x = wide(x)
  mean = jnp.mean(x, axis=-1, keepdims=True)
  centred = x - mean
  variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
  return centred * jax.lax.rsqrt(variance + NORM_EPS)


def modulate(x, shift, scale):
  """Returns x (1 + scale) + shift; all rank 3."""
  return x * (1 + scale) + shift


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) * weight over the last axis; rounded to `dtype` before the weight."""

  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x):
    weight = self.param('weight', nn.initializers.ones, (x.shape[-1],), jnp.float32)
    x = wide(x)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + NORM_EPS)
    return wide(x.astype(self.dtype)) * weight.reshape((1,) * (x.ndim - 1) + (-1,))


def attend(q, k, v, numerics):
  """Softmax attention softmax(q k^T / sqrt(E)) v: [B, N, A, E] each -> [B, N, A, E].

  Args:
    q: queries; k: keys; v: values.
    numerics: Numerics; the softmax is float32 (or wider).

  Returns:
    Array like v.
  """
  if numerics.attention == 'cudnn' and not numerics.pairs:
    q, k, v = (array.astype(numerics.dtype) for array in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, implementation='cudnn')
  logits = product(_query_key, q, k, numerics, has_rows=True, widen=True)
  weights = jax.nn.softmax(logits / np.sqrt(q.shape[-1]), axis=-1)
  return product(_weight_value, weights, v, numerics, has_rows=True)


def _query_key(q, k, dtype):
  """[B, N, A, E] twice -> [B, A, N, N]."""
  return jnp.einsum('bqae,bkae->baqk', q, k, preferred_element_type=dtype)


def _weight_value(weights, v, dtype):
  """[B, A, N, N] and [B, N, A, E] -> [B, N, A, E]."""
  return jnp.einsum('baqk,bkae->bqae', weights, v, preferred_element_type=dtype)


class Attention(nn.Module):
  """Multi-head self-attention with one fused qkv product; output columns are [q | k | v]."""

  heads: int
  numerics: Numerics = Numerics()
  qk_norm: bool = False

  @nn.compact
  def __call__(self, x, rotary=None):
    b, n, width = x.shape
    qkv = Linear(3 * width, self.numerics, name='qkv')(x)
    q, k, v = jnp.moveaxis(qkv.reshape(b, n, 3, self.heads, width // self.heads), 2, 0)
    if self.qk_norm:
      q = RMSNorm(self.numerics.dtype, name='q_norm')(q)
      k = RMSNorm(self.numerics.dtype, name='k_norm')(k)
    if rotary is not None:
      q, k = rotate(q, rotary), rotate(k, rotary)
    out = attend(q, k, v, self.numerics).reshape(b, n, width)
    return Linear(width, self.numerics, name='proj')(out)


class MLP(nn.Module):
  """Linear, GELU (tanh form), linear: [B, N, D] -> [B, N, D]."""

  hidden: int
  numerics: Numerics

  @nn.compact
  def __call__(self, x):
    h = nn.gelu(Linear(self.hidden, self.numerics, name='fc1')(x), approximate=True)
    return Linear(x.shape[-1], self.numerics, name='fc2')(h)


class TransformerBlock(nn.Module):
  """Pre-norm attention and MLP, each shifted, scaled and gated by a given modulation.

    h <- h + gate1 Attn(LN(h) (1 + scale1) + shift1)
    h <- h + gate2 MLP (LN(h) (1 + scale2) + shift2)

  Where the modulation comes from is the only difference between the blocks of all networks here.
  """

  heads: int
  mlp_ratio: float
  numerics: Numerics = Numerics()
  qk_norm: bool = False

  @nn.compact
  def __call__(self, x, modulation, rotary=None):
    """x [B, N, D] float32, modulation [B, 1 or N, 6 D] float32 -> [B, N, D] float32."""
    attention = Attention(self.heads, self.numerics, self.qk_norm, name='attn')
    mlp = MLP(int(x.shape[-1] * self.mlp_ratio), self.numerics, name='mlp')
    shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
    x = x + gate1 * attention(modulate(layer_norm(x), shift1, scale1), rotary)
    return x + gate2 * mlp(modulate(layer_norm(x), shift2, scale2))

"""The network of BFM: one feature network, a small velocity network per time segment, and the
residual network (FRN) that stands in for the feature network inside a segment.

Source: arXiv:2510.21167 and its official code. Never materialised: the concatenation of condition
and feature that modulates every token; its linear layers are split into a part per sample and a
part per token, the same numbers for fewer products.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmzoo import shapes
from fmzoo.models import layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Sizes and numerics of the blockwise network."""

  patch: int  # side of a square patch, latent pixels
  width: int  # D, channels of a token
  heads: int  # A; width / A must be a multiple of 4
  mlp_ratio: float  # hidden width of an MLP over D
  segments: int  # S, time segments, each with its own velocity blocks
  segment_depth: int  # velocity blocks of a segment
  feature_depth: int  # blocks of the feature network
  frn_depth: int  # blocks of the residual network; 0 is none (stage 1)
  lora_width: int  # width between the two layers of a low-rank modulation
  rotary_theta: float  # base of the rotary frequencies; 10000 officially
  feature_dim: int  # F, feature width of the frozen encoder that the projector predicts
  projector_width: int  # hidden width of the projector; 2048 officially
  dtype: Any  # of the large matrix products: 'float32' or 'bfloat16'
  precision: str  # of float32 products: 'default', 'high', 'highest'
  attention: str  # 'xla', or 'cudnn' (GPU and bfloat16 only)
  remat: bool  # recompute blocks in the backward pass: less memory, one more forward pass
  unroll: int  # blocks a loop iteration holds: 1 compiles fastest, all of them run faster on CPU


class Blockwise(NamedTuple):
  """The network as pure functions.

  x [B, H, W, C] are images, c conditions, f [R, N, D] feature tokens. With c [B, D] there is one
  row an image, R = B. With c [B + 1, D] there are two, R = 2 B: the rows of a second half have
  the same images and all of them the last condition (that of the null label, in guidance), whose
  layers are then computed once, as the patch embeddings are.
  """

  segments: int  # S
  groups: int  # of devices, each with its own segments; rows stand in `rows.order`
  init: Callable  # (rng) -> params, float32
  condition: Callable  # (params, t [1 or like labels], labels) -> c
  features: Callable  # (params, x, c) -> f
  project: Callable  # (params, f) -> [R, N, F], what aligns with the frozen encoder
  residual: Callable  # (params, x, c) -> [R, N, D], what the FRN adds to a segment's first f
  velocity: Callable  # (params, x, c, f, segment []) -> [R, H, W, C]; one block, by lax.switch
  velocity_by_row: Callable  # (params, x, c, f, first=0) -> like x; segment: first + index mod S


def _spread(per_condition, rows):
  """Hands conditions out to `rows` rows, see `Blockwise`: [B or B + 1, W] -> [R, 1, W]."""
  if per_condition.shape[0] != rows:  # no gather, which would gather sharded rows on every device
    own, last = per_condition[:-1], per_condition[-1:]
    per_condition = jnp.concatenate([own, jnp.broadcast_to(last, own.shape)])
  return per_condition[:, None]


class JointLinear(nn.Module):
  """A linear layer on the concatenation of a, the same for all tokens, and b: a W_a + b W_b + bias.

  Args of the call: a like c of `Blockwise`, b [R, N, D]. Returns [R, N, width].
  """

  width: int
  dtype: Any = jnp.float32
  kernel_init: Callable = layers.xavier

  @nn.compact
  def __call__(self, a, b):
    split = a.shape[-1]
    kernel = self.param(
      'kernel', self.kernel_init, (split + b.shape[-1], self.width), jnp.float32
    )
    bias = self.param('bias', layers.zeros, (self.width,), jnp.float32)
    kernel = layers.whole(kernel)
    a, b, kernel, bias = (array.astype(self.dtype) for array in (a, b, kernel, bias))
    per_condition = a @ kernel[:split] + bias[None]
    per_token = b.reshape(-1, b.shape[-1]) @ kernel[split:]
    per_token = per_token.reshape(*b.shape[:-1], self.width)
    return _spread(per_condition, b.shape[0]) + per_token


def _numerics(config):
  """Returns how the large products are computed."""
  return layers.Numerics(config.dtype, config.attention)


def _core(config):
  """Returns a block's attention and MLP."""
  numerics = _numerics(config)
  return layers.TransformerBlock(config.heads, config.mlp_ratio, numerics, True, name='core')


class FeatureBlock(nn.Module):
  """Modulated per sample: low-rank of the block plus the share of all feature blocks."""

  config: Config

  @nn.compact
  def __call__(self, x, active, shared, rotary):
    low = layers.Linear(self.config.lora_width, name='down')(active)
    own = layers.Linear(6 * self.config.width, kernel_init=layers.zeros, name='up')(low)
    return _core(self.config)(x, _spread(own + shared, x.shape[0]), rotary), None


class VelocityBlock(nn.Module):
  """Modulated per token, by condition and feature: low-rank plus the share of all segments."""

  config: Config

  @nn.compact
  def __call__(self, x, active, active_feature, shared, rotary):
    low = JointLinear(self.config.lora_width, name='down')(active, active_feature)
    own = layers.Linear(6 * self.config.width, kernel_init=layers.zeros, name='up')(low)
    return _core(self.config)(x, own + shared, rotary), None


class ResidualBlock(nn.Module):
  """Modulated per sample by a full layer, which the official code does not initialise to zero."""

  config: Config

  @nn.compact
  def __call__(self, x, active, rotary):
    modulation = layers.Linear(6 * self.config.width, name='modulation')(active)
    return _core(self.config)(x, _spread(modulation, x.shape[0]), rotary), None


class Stack(nn.Module):
  """`depth` equal blocks, one after the other; parameters stacked on a first axis."""

  block: Any
  config: Config
  depth: int

  @nn.compact
  def __call__(self, x, *conditions):
    block = nn.remat(self.block, prevent_cse=False) if self.config.remat else self.block
    scanned = nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=nn.broadcast,
      length=self.depth,
      unroll=min(self.config.unroll, self.depth),
    )
    x, _ = scanned(self.config, name='blocks')(x, *conditions)
    return x


class Final(nn.Module):
  """Norm, modulation per token, linear to patches of the velocity."""

  config: Config
  channels: int

  @nn.compact
  def __call__(self, x, active, active_feature):
    config = self.config
    modulation = JointLinear(2 * config.width, kernel_init=layers.zeros, name='modulation')
    shift, scale = jnp.split(modulation(active, active_feature), 2, axis=-1)
    linear = layers.Linear(
      config.patch**2 * self.channels, _numerics(config), kernel_init=layers.zeros, name='linear'
    )
    return linear(layers.modulate(layers.layer_norm(x), shift, scale)).astype(jnp.float32)


class Projector(nn.Module):
  """Linear, SiLU, linear, SiLU, linear: feature tokens to the frozen encoder's width."""

  config: Config

  @nn.compact
  def __call__(self, f):
    h = nn.silu(layers.Linear(self.config.projector_width, _numerics(self.config), name='in')(f))
    h = nn.silu(layers.Linear(self.config.projector_width, _numerics(self.config), name='mid')(h))
    return layers.Linear(self.config.feature_dim, _numerics(self.config), name='out')(h)


class _Parts(NamedTuple):
  """The Linen modules; each owns the subtree of its name in the parameters."""

  time: Any
  labels: Any
  feature_patches: Any
  feature_shared: Any  # g1, the modulation that all feature blocks share
  feature_blocks: Any
  projector: Any
  velocity_patches: Any
  velocity_shared: Any  # g2, the modulation that all velocity blocks share
  segments: Any  # parameters stacked over blocks and, second, over S: training scans the blocks
  final: Any
  frn: Any


class _Network(NamedTuple):
  """What the functions below need to know beside their arguments."""

  config: Config
  latent_shape: tuple  # (H, W, C)
  rotary: tuple  # layers.rotary_table
  parts: _Parts
  groups: int  # see Blockwise

  def run(self, name, params, *args):
    """Calls a part with its subtree of the parameters."""
    with jax.default_matmul_precision(self.config.precision):
      return getattr(self.parts, name).apply({'params': params[name]}, *args)


def make(config, latent_shape, num_classes, groups=1):
  """Builds the pure functions of the blockwise network.

  Args:
    config: Config.
    latent_shape: (H, W, C); H = W, a multiple of the patch.
    num_classes: the label table has one more row, for the null label.
    groups: of devices, a divisor of S; each has the velocity blocks of S / groups segments.

  Returns:
    Blockwise.

  Raises:
    ValueError: if a size does not divide.
  """
  _check(config, latent_shape)
  rotary = layers.rotary_table(
    latent_shape[0] // config.patch, config.width // config.heads, config.rotary_theta
  )
  parts = _parts(config, latent_shape[-1], num_classes)
  network = _Network(config, latent_shape, rotary, parts, groups)
  functions = (_init, _condition, _features, _project, _residual, _velocity, _velocity_by_row)
  return Blockwise(config.segments, groups, *(functools.partial(f, network) for f in functions))


def _parts(config, channels, num_classes):
  """Returns the Linen modules of a network."""
  width, numerics = config.width, _numerics(config)
  return _Parts(
    time=layers.TimeEmbedding(width),
    labels=layers.LabelEmbedding(num_classes, width),
    feature_patches=layers.Linear(width, numerics),
    feature_shared=layers.Linear(6 * width, numerics, kernel_init=layers.zeros),
    feature_blocks=Stack(FeatureBlock, config, config.feature_depth),
    projector=Projector(config),
    velocity_patches=layers.Linear(width, numerics),
    velocity_shared=JointLinear(6 * width, config.dtype, kernel_init=layers.zeros),
    segments=Stack(VelocityBlock, config, config.segment_depth),
    final=Final(config, channels),
    frn=Stack(ResidualBlock, config, config.frn_depth),
  )


def _init(network, rng):
  """Returns the parameters of all parts, {part: tree}."""
  config, (height, width, channels), rotary, parts, _ = network
  patches = jnp.zeros((1, height * width // config.patch**2, config.patch**2 * channels))
  c, f = jnp.zeros((1, config.width)), jnp.zeros((1, patches.shape[1], config.width))
  shared = jnp.zeros((1, 6 * config.width))
  inputs = {
    'time': (jnp.zeros(1),),
    'labels': (jnp.zeros(1, jnp.int32),),
    'feature_patches': (patches,),
    'feature_shared': (c,),
    'feature_blocks': (f, c, shared, rotary),
    'projector': (f,),
    'velocity_patches': (patches,),
    'velocity_shared': (c, f),
    'segments': (f, c, f, shared[:, None], rotary),
    'final': (f, c, f),
    'frn': (f, c, rotary),
  }
  keys = dict(zip(inputs, jax.random.split(rng, len(inputs))))
  if not config.frn_depth:
    del inputs['frn']

  def init(name, key):
    """Returns the parameters of one part."""
    return getattr(parts, name).init(key, *inputs[name])['params']

  params = {name: init(name, keys[name]) for name in inputs if name != 'segments'}
  of_segments = jax.random.split(keys['segments'], config.segments)
  stacked = jax.vmap(lambda key: init('segments', key), out_axes=1)(of_segments)
  return params | {'segments': stacked}


def _condition(network, params, t, labels):
  """c = time embedding + label embedding, no activation: [B, D]."""
  return network.run('time', params, t) + network.run('labels', params, labels)


def _embed(network, name, params, x, c):
  """Tokens [R, N, D] of images x."""
  shapes.expect_shape('x', x, None, *network.latent_shape)
  patches = layers.patchify(x, network.config.patch)
  tokens = network.run(name, params, patches).astype(jnp.float32)
  return tokens if len(c) == len(x) else jnp.concatenate([tokens, tokens])


def _features(network, params, x, c):
  """The feature network: f [R, N, D], used raw."""
  active = nn.silu(c)
  shared = network.run('feature_shared', params, active).astype(jnp.float32)
  tokens = _embed(network, 'feature_patches', params, x, c)
  return network.run('feature_blocks', params, tokens, active, shared, network.rotary)


def _project(network, params, f):
  """The projector, of training only: [R, N, F] float32."""
  return network.run('projector', params, f).astype(jnp.float32)


def _residual(network, params, x, c):
  """The end of the FRN's residual stream, which still holds the embedded image: [R, N, D]."""
  tokens = _embed(network, 'feature_patches', params, x, c)
  return network.run('frn', params, tokens, nn.silu(c), network.rotary)


def _velocity(network, params, x, c, f, segment):
  """The velocity by the blocks of one segment, chosen by `lax.switch`."""

  def block(index, *args):
    """Runs the blocks of segment `index`."""
    # Cut out inside the branch: outside it, every call would copy the blocks of all segments.
    own = {'segments': jax.tree.map(lambda leaf: leaf[:, index], params['segments'])}
    return network.run('segments', own, *args, network.rotary)

  blocks = [functools.partial(block, index) for index in range(network.config.segments)]
  return _velocity_around(
    network, lambda *args: jax.lax.switch(segment, blocks, *args), params, x, c=c, f=f
  )


def _velocity_by_row(network, params, x, c, f, first=0):
  """The velocity of every row by its own segment's blocks; no row passes another's."""

  def block(own, *args):
    """Runs the blocks of one segment on its group of rows."""
    return network.run('segments', {'segments': own}, *args, network.rotary)

  def stack(*args):
    """Runs every group through its own blocks."""
    groups = (_group(network, array, first) for array in args)
    out = jax.vmap(block, in_axes=(1, 0, 0, 0, 0))(params['segments'], *groups)
    return _ungroup(network, out, first, x.shape[0])

  return _velocity_around(network, stack, params, x, c=c, f=f)


def _velocity_around(network, stack, params, x, *, c, f):
  """The velocity network around `stack`: (tokens, SiLU c, SiLU f, shared) -> tokens."""
  tokens = _embed(network, 'velocity_patches', params, x, c)
  active, active_feature = nn.silu(c), nn.silu(f)
  shared = network.run('velocity_shared', params, active, active_feature).astype(jnp.float32)
  tokens = stack(tokens, active, active_feature, shared)
  out = network.run('final', params, tokens, active, active_feature)
  return layers.unpatchify(out, network.config.patch, *network.latent_shape[:2])


def _group(network, rows, first):
  """Sorts rows by segment, first + index mod S: [B, ...] -> [S, G, ...].

  Where whole groups do not come out, row 0 fills the gaps. Rows stay on their device.
  """
  segments, groups = network.config.segments, network.groups
  slots = -(-rows.shape[0] // segments)
  if not (isinstance(first, int) and first == 0):
    slots = -(-(rows.shape[0] + segments - 1) // segments)
  size = slots * segments
  if size != rows.shape[0]:
    gaps = jnp.broadcast_to(rows[:1], (size, *rows.shape[1:]))
    rows = jax.lax.dynamic_update_slice_in_dim(gaps, rows, first, axis=0)
  rows = rows.reshape(groups, slots, segments // groups, *rows.shape[1:])
  return jnp.swapaxes(rows, 1, 2).reshape(segments, slots, *rows.shape[3:])


def _ungroup(network, sorted_rows, first, size):
  """Inverts `_group`: [S, G, ...] -> [B, ...]."""
  slots, shape = sorted_rows.shape[1], sorted_rows.shape[2:]
  rows = sorted_rows.reshape(network.groups, -1, slots, *shape)
  rows = jnp.swapaxes(rows, 1, 2).reshape(-1, *shape)
  return jax.lax.dynamic_slice_in_dim(rows, first, size) if len(rows) != size else rows


def _check(config, latent_shape):
  """Refuses sizes that do not divide."""
  height, width, _ = latent_shape
  if height != width or height % config.patch:
    raise ValueError(
      f'model.patch={config.patch} does not divide the latent {height}x{width}; use a divisor of'
      ' its (equal) sides'
    )
  if config.width % config.heads or config.width // config.heads % 4:
    raise ValueError(
      f'model.width={config.width} over model.heads={config.heads} must be a multiple of 4, for the'
      ' rotary embedding of two axes'
    )
  for key in ('segments', 'segment_depth', 'feature_depth'):
    if getattr(config, key) < 1:
      raise ValueError(f'model.{key}={getattr(config, key)} must be at least 1')

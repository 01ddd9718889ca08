"""The DiT of SoFlow in float64 NumPy, with its stages; see tests/soflow_reference.py.

A is the number of heads, E the width of one, G the number of patches along a side.
"""

import numpy as np

from tests import bfm_reference
from tests import soflow_reference as ref

TIME_WAVES = 128  # frequencies of the time features


def time_waves(t):
  """[cos(t f), sin(t f)] with f_i = 10000^(-i / 128), [B] -> [B, 256]."""
  angles = ref.wide(t)[:, None] * ref.PERIOD ** (-np.arange(TIME_WAVES) / TIME_WAVES)
  return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


def position_table(width, side):
  """[side^2, width]: the column in the first half of the channels, the row in the second."""
  waves = ref.PERIOD ** (-np.arange(width // 4) / (width // 4))
  row, col = np.divmod(np.arange(side * side), side)
  parts = [f(place[:, None] * waves) for place in (col, row) for f in (np.sin, np.cos)]
  return np.concatenate(parts, axis=-1)


def chunks(x, count):
  """Cuts the last axis into equal parts."""
  size = x.shape[-1] // count
  return [x[..., i * size : (i + 1) * size] for i in range(count)]


def modulate(x, shift, scale):
  """LN(x) (1 + scale) + shift for tokens [B, G G, D] under [B, D] each."""
  x = x - x.mean(-1, keepdims=True)
  normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + ref.NORM_EPS)
  return normed * (1 + scale[:, None]) + shift[:, None]


def attention(model, key, x):
  """ref.softmax(q k^T / sqrt(E)) v, [B, G G, D] -> [B, G G, D]."""
  batch, count, width = x.shape
  heads = model.config['heads']
  q, k, v = (
    part.reshape(batch, count, heads, width // heads).transpose(0, 2, 1, 3)
    for part in chunks(ref.linear(model, f'{key}.qkv', x), 3)
  )
  mixed = ref.softmax(q @ k.swapaxes(-1, -2) / np.sqrt(width // heads)) @ v
  return ref.linear(model, f'{key}.proj', mixed.transpose(0, 2, 1, 3).reshape(batch, count, width))


def modulation(model, key, cond, count):
  """`count` parts of Linear(SiLU(c)), [B, D] each."""
  return chunks(ref.linear(model, f'{key}.adaLN_modulation.1', ref.silu(cond)), count)


def block(model, key, h, cond):
  """(tokens after a block, its attention branch before the gate), [B, G G, D] each."""
  shift1, scale1, gate1, shift2, scale2, gate2 = modulation(model, key, cond, 6)
  branch = attention(model, f'{key}.attn', modulate(h, shift1, scale1))
  h = h + gate1[:, None] * branch
  hidden = bfm_reference.gelu(ref.linear(model, f'{key}.mlp.fc1', modulate(h, shift2, scale2)))
  return h + gate2[:, None] * ref.linear(model, f'{key}.mlp.fc2', hidden), branch


def embedded(model, key, t):
  """Two layers over the waves of a time, [B] -> [B, D]."""
  hidden = ref.silu(ref.linear(model, f'{key}.mlp.0', time_waves(t)))
  return ref.linear(model, f'{key}.mlp.2', hidden)


def patch_tokens(model, x):
  """The patch convolution, [B, C, H, W] -> [B, G G, D] by row."""
  p, (batch, channels, side, _) = model.config['patch'], x.shape
  parts = ref.wide(x).reshape(batch, channels, side // p, p, side // p, p)
  parts = parts.transpose(0, 2, 4, 1, 3, 5)
  kernel = model.weights['network.x_embedder.proj.weight']
  flat = parts.reshape(batch, (side // p) ** 2, channels * p * p)
  tokens = flat @ kernel.reshape(kernel.shape[0], channels * p * p).T
  return tokens + model.weights['network.x_embedder.proj.bias']


def stages(model, x, t, s, labels):
  """The DiT: 'net' [B, C, H, W] and, by the names of the debug arrays, what is on the way."""
  c, weights = model.config, model.weights
  labels = np.full(len(x), c['num_classes']) if labels is None else labels
  cond = embedded(model, 'network.t_embedder', t)
  cond = cond + embedded(model, 'network.s_embedder', ref.wide(t) - ref.wide(s))
  cond = cond + weights['network.y_embedder.embedding_table.weight'][labels]
  tokens = patch_tokens(model, x)
  found, h = {'patch_tokens': tokens, 'cond_c': cond}, tokens + weights['network.pos_embed']
  for i in range(c['depth']):
    h, branch = block(model, f'network.blocks.{i}', h, cond)
    found |= {f'block{i}_out': h} | ({'block0_attn_out': branch} if i == 0 else {})
  shift, scale = modulation(model, 'network.final_layer', cond, 2)
  out = ref.linear(model, 'network.final_layer.linear', modulate(h, shift, scale))
  p, side = c['patch'], c['data_size'] // c['patch']
  pixels = out.reshape(len(x), side, side, p, p, c['channels']).transpose(0, 5, 1, 3, 2, 4)
  image = pixels.reshape(len(x), c['channels'], c['data_size'], c['data_size'])
  return {**found, 'final_tokens': out, 'net': image}


def dit(model):
  """Returns the Network of a DiT, which has no augmentation labels."""
  def run(x, t, s, labels, augment=None):
    """The network's output."""
    assert augment is None, 'a DiT has no augmentation labels'
    return stages(model, x, t, s, labels)['net']

  return ref.Network(run, model.config['num_classes'])

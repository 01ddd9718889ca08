"""The U-Net of SoFlow in float64 NumPy, with its stages; see tests/soflow_reference.py.

Channels of a level are model_channels times its multiplier. Layers have the names of the official
checkpoint. Dropout is left out: every recorded array was made without it.
"""

from typing import NamedTuple

import numpy as np

from tests import soflow_reference as ref

COLORS, AUGMENT, NOISE_MULT, EMBED_MULT, EPS = 3, 6, 2, 4, 1e-6
FILTER = np.array([1, 3, 3, 1]) / 8


class Layer(NamedTuple):
  """A layer of the encoder or decoder."""

  key: str  # as 'network.enc.16x16_block0'
  kind: str  # 'conv', 'block', 'down' or 'up'
  inputs: int  # channels
  outputs: int
  attends: bool
  joins: bool  # whether it takes an encoder output beside its input


def layers(config):
  """Returns ([encoder Layer], [decoder Layer]) in the order in which they run."""
  levels = [
    (config['data_size'] >> i, config['model_channels'] * m)
    for i, m in enumerate(config['channel_mult'])
  ]
  attends, count = config['attn_resolutions'], config['num_blocks']
  encoder, width = [], COLORS
  for i, (side, channels) in enumerate(levels):
    name = f'network.enc.{side}x{side}'
    if i == 0:
      encoder.append(Layer(f'{name}_conv', 'conv', width, config['model_channels'], False, False))
    else:
      encoder.append(Layer(f'{name}_down', 'down', width, width, False, False))
    for j in range(count):
      width = encoder[-1].outputs
      block = Layer(f'{name}_block{j}', 'block', width, channels, side in attends, False)
      encoder.append(block)
    width = channels
  skips, decoder = [layer.outputs for layer in encoder], []
  for i, (side, channels) in reversed(list(enumerate(levels))):
    name = f'network.dec.{side}x{side}'
    if i == len(levels) - 1:
      decoder += [
        Layer(f'{name}_in{j}', 'block', width, width, j == 0, False) for j in range(2)
      ]
    else:
      decoder.append(Layer(f'{name}_up', 'up', width, width, False, False))
    for j in range(count + 1):
      last = j == count and side in attends
      block = Layer(f'{name}_block{j}', 'block', width + skips.pop(), channels, last, True)
      decoder.append(block)
      width = channels
  return encoder, decoder


def output_key(config):
  """The start of the names of the last norm and convolution."""
  return f'network.dec.{config["data_size"]}x{config["data_size"]}_aux'


def time_waves(t, width, swapped=True):
  """[sin(t f), cos(t f)], or [cos, sin] unswapped, f from 1 to 1 / 10000: [B] -> [B, width]."""
  half = width // 2
  angles = ref.wide(t)[:, None] * ref.PERIOD ** (-np.arange(half) / (half - 1))
  parts = [np.sin(angles), np.cos(angles)]
  return np.concatenate(parts if swapped else parts[::-1], axis=-1)


def group_norm(model, key, x):
  """Over groups of C / min(32, C / 4) channels with their pixels, then scale and bias."""
  batch, channels, *sides = x.shape
  grouped = x.reshape(batch, min(32, channels // 4), -1)
  grouped = grouped - grouped.mean(-1, keepdims=True)
  grouped = grouped / np.sqrt((grouped * grouped).mean(-1, keepdims=True) + EPS)
  scale, bias = (
    model.weights[f'{key}.{name}'].reshape(1, channels, 1, 1) for name in ('weight', 'bias')
  )
  return grouped.reshape(batch, channels, *sides) * scale + bias


def convolve(model, key, x):
  """A convolution that keeps the size, [B, C, H, W] -> [B, C', H, W]."""
  kernel = model.weights[f'{key}.weight']
  batch, channels, rows, columns = x.shape
  outputs, _, size, _ = kernel.shape
  margin = size // 2
  padded = np.pad(x, ((0, 0), (0, 0), (margin, margin), (margin, margin)))
  out = model.weights[f'{key}.bias'].reshape(outputs, 1)
  for i, j in np.ndindex(size, size):
    window = padded[:, :, i : i + rows, j : j + columns].reshape(batch, channels, rows * columns)
    out = out + kernel[:, :, i, j] @ window
  return out.reshape(batch, outputs, rows, columns)


def resampling_matrix(kind, side):
  """M of M x M^T, which halves ('down') or doubles ('up') the sides of an image: [out, side]."""
  out = side // 2 if kind == 'down' else side * 2
  o, i = np.indices((out, side))
  tap = i - 2 * o + 1 if kind == 'down' else 2 * i - o + 2
  gain = 1 if kind == 'down' else 2
  return np.where((tap >= 0) & (tap < 4), gain * FILTER[np.clip(tap, 0, 3)], 0.0)


def resample(layer, x):
  """x at the resolution of the layer's output."""
  if layer.kind == 'block':
    return x
  matrix = resampling_matrix(layer.kind, x.shape[-1])
  return matrix @ x @ matrix.T


def attention(model, key, x):
  """One head over pixels, [B, C, H, W] -> [B, C, H, W]; channel 3 c + j of qkv is q, k, v of c."""
  batch, channels, *sides = x.shape
  parts = convolve(model, f'{key}.qkv', group_norm(model, f'{key}.norm2', x))
  parts = parts.reshape(batch, channels, 3, -1)
  q, k, v = (parts[:, :, j] for j in range(3))
  scores = ref.softmax(q.swapaxes(1, 2) @ k / np.sqrt(channels))
  mixed = (v @ scores.swapaxes(1, 2)).reshape(batch, channels, *sides)
  return convolve(model, f'{key}.proj', mixed)


def block(model, layer, x, embedding):
  """A residual block under an embedding [B, 4 model_channels]."""
  key, half = layer.key, np.sqrt(0.5)
  h = resample(layer, ref.silu(group_norm(model, f'{key}.norm0', x)))
  h = convolve(model, f'{key}.conv0', h)
  h = h + ref.linear(model, f'{key}.affine', embedding)[:, :, None, None]
  h = convolve(model, f'{key}.conv1', ref.silu(group_norm(model, f'{key}.norm1', h)))
  skip = resample(layer, x)
  if f'{key}.skip.weight' in model.weights:
    skip = convolve(model, f'{key}.skip', skip)
  h = (h + skip) * half
  return (h + attention(model, key, h)) * half if layer.attends else h


def embed(model, t, s, augment):
  """The embedding of times [B] and augmentation labels [B, 6] or None: [B, 4 model_channels]."""
  width = NOISE_MULT * model.config['model_channels']
  e = np.concatenate([time_waves(t, width), time_waves(ref.wide(t) - ref.wide(s), width)], axis=-1)
  if augment is not None:
    e = e + augment @ model.weights['network.map_augment.weight'].T
  for i in range(2):
    e = ref.silu(ref.linear(model, f'network.map_layer{i}', e))
  return e


def stages(model, x, t, s, augment=None):
  """The U-Net: 'net' [B, 3, H, W], 'emb', and the output of every layer by its key."""
  encoder, decoder = layers(model.config)
  out = {'emb': embed(model, t, s, augment)}
  h, skips = ref.wide(x), []
  for layer in encoder:
    conv = layer.kind == 'conv'
    h = convolve(model, layer.key, h) if conv else block(model, layer, h, out['emb'])
    skips.append(h)
    out[layer.key] = h
  for layer in decoder:
    h = np.concatenate([h, skips.pop()], axis=1) if layer.joins else h
    h = out[layer.key] = block(model, layer, h, out['emb'])
  key = output_key(model.config)
  normed = group_norm(model, f'{key}_norm', h)
  net = convolve(model, f'{key}_conv', ref.silu(normed))
  return {**out, f'{key}_norm': normed, f'{key}_conv': net, 'net': net}


def unet(model):
  """Returns the Network of a U-Net, which has no class labels."""
  def run(x, t, s, labels=None, augment=None):
    """The network's output."""
    assert labels is None, 'a U-Net has no class labels'
    return stages(model, x, t, s, augment)['net']

  return ref.Network(run, None)

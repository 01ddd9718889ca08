"""The synthetic weights of tests/golden/encoders: each tensor drawn from its own official key."""

import csv
import zlib

import numpy as np

LAYER_SCALES = ('gamma', 'lambda1')
TOKENS = ('cls_token', 'mask_token')
POSITIONS = ('pos_embed', 'position_embeddings')


def tensor(key, shape, salt=''):
  """Returns the tensor of an official key, float32; a counter is an int64 zero."""
  leaf = key.rpartition('.')[2]
  if leaf == 'num_batches_tracked':
    return np.zeros(shape, np.int64)
  draw = np.random.default_rng(zlib.crc32((salt + key).encode())).standard_normal(shape)
  if leaf == 'running_var':
    draw = np.abs(draw)
  offset, spread = _law(key, leaf, shape)
  return np.asarray(offset + spread * draw, np.float32)


def _law(key, leaf, shape):
  """Returns mean and standard deviation; the first rule that fits holds."""
  parent = key.rpartition('.')[0].rpartition('.')[2]
  is_norm = 'norm' in parent or parent == 'bn'
  by_leaf = {
    'running_mean': (0, 0.05), 'running_var': (1, 0.1), **dict.fromkeys(LAYER_SCALES, (0.5, 0.1)),
    **dict.fromkeys(TOKENS, (0, 0.02)), **dict.fromkeys(POSITIONS, (0, 0.2)),
  }
  if leaf in by_leaf:
    return by_leaf[leaf]
  if leaf == 'bias':
    return (0, 0.05 if is_norm else 0.02)
  if leaf != 'weight':
    raise ValueError(f"key '{key}' has no rule; expected a weight, a bias or one of {by_leaf}")
  if is_norm:
    return (1, 0.1)
  gain = 2 if key.endswith('.conv.weight') else 1
  return (0, np.sqrt(gain / np.prod(shape[1:])))


def table(path):
  """Returns {official key: shape} of a table of keys, with shapes as '512x512x3x3' or 'scalar'."""
  with open(path, newline='') as lines:
    return {
      row['key']: () if row['shape'] == 'scalar' else tuple(map(int, row['shape'].split('x')))
      for row in csv.DictReader(lines)
    }


def tensors(path, salt=''):
  """Returns {official key: tensor} of a table of keys."""
  return {key: tensor(key, shape, salt) for key, shape in table(path).items()}

"""The FID Inception in float64 and plain numpy, from official tensors; and a folder it writes.

Written after the description of the network, independently of fmzoo/models/inception.py. Of the
official network it gives the recorded arrays to 2e-7 of their rms, in a second or ten; no test
repeats that.
"""

import csv
import json

import numpy as np

from tests import golden_weights

NAME, RESIZED = 'inception.npz', 'inception_resize.npz'
SALT, CLASSES, KEYS = 'second', 13, 'second_inception_keys.csv'
SIZES, OTHER = (299, 61), 350  # of images, the latter resized and no more
NORM = ('bn.weight', 'bn.bias', 'bn.running_mean', 'bn.running_var')


class Network:
  """The network, whose tensors are drawn when their shapes are known; these are kept."""

  def __init__(self, width, classes, salt):
    self.width, self.classes, self.salt = width, classes, salt  # width: a unit's name -> channels
    self.shapes, self._tensors = {}, {}

  def tensor(self, key, shape):
    """Draws a tensor, once."""
    if key not in self._tensors:
      self.shapes[key] = shape
      self._tensors[key] = golden_weights.tensor(key, shape, self.salt).astype(np.float64)
    return self._tensors[key]

  def unit(self, x, name, kernel=(1, 1), stride=1, pad=(0, 0)):
    """Convolution, batch norm, ReLU."""
    width = self.width(name)
    weight = self.tensor(f'{name}.conv.weight', (width, x.shape[-1], *kernel))
    gamma, beta, mean, variance = (self.tensor(f'{name}.{leaf}', (width,)) for leaf in NORM)
    y = sum(cut @ weight[:, :, i, j].T for i, j, cut in windows(x, kernel, stride, pad, 0))
    return np.maximum((y - mean) / np.sqrt(variance + 1e-3) * gamma + beta, 0)

  def chain(self, x, name, *kernels, stride=1):
    """Units name_1, name_2, ... that keep the size, but for the last one if it has a stride."""
    for i, kernel in enumerate(kernels, start=1):
      last = i == len(kernels) and stride > 1
      pad = (0, 0) if last else (kernel[0] // 2, kernel[1] // 2)
      x = self.unit(x, f'{name}_{i}', kernel, stride if last else 1, pad)
    return x

  def stem(self, x, stages):
    """299 x 299 -> 35 x 35."""
    for name, kernel, stride, pad in (
      ('Conv2d_1a_3x3', 3, 2, 0), ('Conv2d_2a_3x3', 3, 1, 0), ('Conv2d_2b_3x3', 3, 1, 1),
      ('Conv2d_3b_1x1', 1, 1, 0), ('Conv2d_4a_3x3', 3, 1, 0),
    ):
      x = stages[name] = self.unit(x, name, (kernel, kernel), stride, (pad, pad))
      if name in ('Conv2d_2b_3x3', 'Conv2d_4a_3x3'):
        x = largest(x, 2, 0)
    return x

  def block_a(self, x, n):
    """35 x 35 pixels."""
    return np.concatenate([
      self.unit(x, f'{n}.branch1x1'), self.chain(x, f'{n}.branch5x5', (1, 1), (5, 5)),
      self.chain(x, f'{n}.branch3x3dbl', (1, 1), (3, 3), (3, 3)),
      self.unit(average(x), f'{n}.branch_pool'),
    ], axis=-1)

  def block_b(self, x, n):
    """35 x 35 -> 17 x 17."""
    double = self.chain(x, f'{n}.branch3x3dbl', (1, 1), (3, 3), (3, 3), stride=2)
    single = self.unit(x, f'{n}.branch3x3', (3, 3), 2)
    return np.concatenate([single, double, largest(x, 2, 0)], axis=-1)

  def block_c(self, x, n):
    """17 x 17 pixels."""
    return np.concatenate([
      self.unit(x, f'{n}.branch1x1'), self.chain(x, f'{n}.branch7x7', (1, 1), (1, 7), (7, 1)),
      self.chain(x, f'{n}.branch7x7dbl', (1, 1), (7, 1), (1, 7), (7, 1), (1, 7)),
      self.unit(average(x), f'{n}.branch_pool'),
    ], axis=-1)

  def block_d(self, x, n):
    """17 x 17 -> 8 x 8."""
    first = self.chain(x, f'{n}.branch3x3', (1, 1), (3, 3), stride=2)
    second = self.chain(x, f'{n}.branch7x7x3', (1, 1), (1, 7), (7, 1), (3, 3), stride=2)
    return np.concatenate([first, second, largest(x, 2, 0)], axis=-1)

  def block_e(self, x, n):
    """8 x 8 pixels."""
    single = self.unit(x, f'{n}.branch3x3_1')
    double = self.chain(x, f'{n}.branch3x3dbl', (1, 1), (3, 3))
    pooled = average(x) if n == 'Mixed_7b' else largest(x, 1, 1)
    return np.concatenate([
      self.unit(x, f'{n}.branch1x1'),
      self.unit(single, f'{n}.branch3x3_2a', (1, 3), pad=(0, 1)),
      self.unit(single, f'{n}.branch3x3_2b', (3, 1), pad=(1, 0)),
      self.unit(double, f'{n}.branch3x3dbl_3a', (1, 3), pad=(0, 1)),
      self.unit(double, f'{n}.branch3x3dbl_3b', (3, 1), pad=(1, 0)),
      self.unit(pooled, f'{n}.branch_pool'),
    ], axis=-1)

  def run(self, x):
    """Returns ({name of an output: array}, {stage: [B, h, w, C]}) of images in [-1, 1]."""
    stages = {}
    x = self.stem(x.astype(np.float64), stages)
    for kind, letters in zip('abcde', ('5bcd', '6a', '6bcde', '7a', '7bc')):
      for letter in letters[1:]:
        name = f'Mixed_{letters[0]}{letter}'
        x = stages[name] = getattr(self, f'block_{kind}')(x, name)
    pool = x.mean((1, 2))
    logits = pool @ self.tensor('fc.weight', (self.classes, pool.shape[1])).T
    biased = logits + self.tensor('fc.bias', (self.classes,))
    spatial = stages['Mixed_6d'][..., :min(7, self.width('Mixed_6d.branch1x1'))]
    return {
      'pool3': pool, 'spatial': np.stack([image.ravel() for image in spatial]), 'logits': biased,
      'logits_nobias': logits, 'probs': softmax(biased), 'probs_nobias': softmax(logits),
    }, stages


def windows(x, kernel, stride, pad, value):
  """Yields (row, column, what that cell of a window sees) of images with a border of `value`."""
  pads = ((0, 0), (pad[0], pad[0]), (pad[1], pad[1]), (0, 0))
  x = np.pad(x, pads, constant_values=value)
  rows, columns = ((x.shape[1 + k] - kernel[k]) // stride * stride + 1 for k in (0, 1))
  for i in range(kernel[0]):
    for j in range(kernel[1]):
      yield i, j, x[:, i : i + rows : stride, j : j + columns : stride]


def average(x):
  """3 x 3 around each pixel, of those inside."""
  total, count = (
    sum(cut for _, _, cut in windows(array, (3, 3), 1, (1, 1), 0))
    for array in (x, np.ones_like(x))
  )
  return total / count


def largest(x, stride, pad):
  """Largest of 3 x 3."""
  return np.max([cut for _, _, cut in windows(x, (3, 3), stride, (pad, pad), -np.inf)], axis=0)


def softmax(x):
  """Softmax over the last axis."""
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def resize(x, axis, method):
  """Resizes an axis of float32 images to 299, a line at a time."""
  n, f, lines = x.shape[axis], np.float32, []
  step = f(n) / f(299)
  for i in range(299):
    p = f(i) * step if method == 'tf1' else max((f(i) + f(0.5)) * step - f(0.5), f(0))
    low = int(p)
    a, b = x.take(low, axis), x.take(min(low + 1, n - 1), axis)
    lines.append(a + (b - a) * (p - f(low)))
  return np.stack(lines, axis)


def inputs(pixels, method):
  """Returns (resized images, those in [-1, 1]); columns are made first, then rows."""
  f = np.float32
  x = pixels.astype(f) if method == 'tf1' else pixels / f(255)
  x = resize(resize(x, 2, method), 1, method)
  return x, (x - f(128)) / f(128) if method == 'tf1' else 2 * x - 1


def write_folder(folder):
  """Writes a folder like tests/golden/encoders, of a small network with its own weights."""
  folder.mkdir(parents=True)
  settings = {'keys': KEYS, 'bn_eps': 1e-3, 'classes': CLASSES}
  (folder / 'config.json').write_text(json.dumps({'salt': SALT, NAME: settings}))
  network = Network(lambda name: 5 + 7 * sum(map(ord, name)) % 9, CLASSES, SALT)
  rng, rows = np.random.default_rng(0), np.array([0, 1, 150, 298])
  arrays, resized = {}, {'rows': rows}
  for size in (*SIZES, OTHER):
    pixels = rng.integers(0, 256, (2, size, size, 3), np.uint8)
    (resized if size == OTHER else arrays)[f'image{size}_u8'] = pixels
    for method in ('tf1', 'ptfid'):
      shown, images = inputs(pixels, method)
      resized[f'{method}/{size}'] = shown[:, rows]
      if size in SIZES:
        outputs, stages = network.run(images)
        arrays |= {f'{size}/{method}/{name}': value for name, value in outputs.items()}
        if (size, method) == (299, 'tf1'):
          for name, value in stages.items():
            arrays[f'stage/{name}/mean'] = value.mean((1, 2))
            arrays[f'stage/{name}/corner'] = value[:, 0, 0, :8]
  for path, values in ((NAME, arrays), (RESIZED, resized)):
    np.savez(folder / path, **{
      name: value.astype(np.float32) if value.dtype == np.float64 else value
      for name, value in values.items()
    })
  with open(folder / KEYS, 'w', newline='') as file:
    rows = [(key, 'x'.join(map(str, shape))) for key, shape in network.shapes.items()]
    csv.writer(file).writerows([('key', 'shape'), *rows])

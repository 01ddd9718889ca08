"""Reading a golden folder: every array must be checked or be an input, else the test fails."""

import json

import numpy as np


class Arrays:
  """The arrays of an io.npz that remember which of them were looked at."""

  def __init__(self, path):
    with np.load(path) as arrays:
      self._arrays = dict(arrays)
    self.used = set()

  def __getitem__(self, name):
    self.used.add(name)
    return self._arrays[name]

  def __contains__(self, name):
    return name in self._arrays

  def names(self, prefix=''):
    return [name for name in self._arrays if name.startswith(prefix)]

  def unused(self):
    return sorted(set(self._arrays) - self.used)


def config(folder):
  """Returns config.json of a folder."""
  return json.loads((folder / 'config.json').read_text())


def close(actual, expected, limit, name=''):
  """Compares with the largest absolute value of the reference as the unit."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape, f'{name}: {actual.shape} is not {expected.shape}'
  worst = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)
  assert worst <= limit, f'{name}: {worst:.2e} of the largest value, limit {limit:.0e}'
  return worst


def close_by_rms(actual, expected, limit, name=''):
  """Compares with the rms of the reference as the unit."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape, f'{name}: {actual.shape} is not {expected.shape}'
  worst = np.abs(actual - expected).max() / np.sqrt(np.mean(expected**2))
  assert worst <= limit, f'{name}: {worst:.2e} of the rms, limit {limit:.0e}'
  return worst


def channels_last(x):
  """[..., C, H, W] -> [..., H, W, C]."""
  return np.moveaxis(x, -3, -1)


def channels_first(x):
  """[..., H, W, C] -> [..., C, H, W]."""
  return np.moveaxis(np.asarray(x), -1, -3)

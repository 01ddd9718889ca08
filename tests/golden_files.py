"""Reading a golden folder: every array must be checked or be an input, else the test fails."""

import json
import pathlib

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


def networks(metafunc, prefix):
  """Returns the names of config.json of the encoders' folder that begin with a prefix.

  A folder without any gives a name that is not there, which makes the tests fail.
  """
  path = pathlib.Path(metafunc.config.getoption('--golden-root')) / 'encoders' / 'config.json'
  known = json.loads(path.read_text()) if path.exists() else {}
  return [name for name in known if name.startswith(prefix)] or [f'{prefix}small.npz']


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

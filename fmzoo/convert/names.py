"""A name map: which official tensor is which leaf of our tree, and how its axes lie.

An `Entry` turns one official tensor into one leaf (or one slice of a stacked leaf) and back, by
transposing and permuting only, so both directions are equal bit for bit.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Entry(NamedTuple):
  """One official tensor."""

  official: str  # its key
  path: tuple  # of the leaf in our tree
  index: tuple  # of the slice, for leaves stacked over blocks or segments; () is the whole leaf
  ours: Callable  # official array -> ours
  theirs: Callable  # ours -> official array


def same(array):
  """Returns the array as it is."""
  return array


def transpose(array):
  """Turns a PyTorch linear weight [out, in] into a kernel [in, out], and back."""
  return array.T


def linear(official, path, index=()):
  """Returns the entries of a linear layer: weight and bias."""
  return [
    Entry(f'{official}.weight', (*path, 'kernel'), index, transpose, transpose),
    Entry(f'{official}.bias', (*path, 'bias'), index, same, same),
  ]


def from_official(entries, tensors):
  """Builds our tree.

  Args:
    entries: of every tensor.
    tensors: {official key: array}.

  Returns:
    Tree of arrays with the tensors' dtypes.

  Raises:
    ValueError: names every key that is missing or not expected.
  """
  _check({entry.official for entry in entries}, set(tensors))
  slices = {}
  for entry in entries:
    slices.setdefault(entry.path, {})[entry.index] = entry.ours(np.asarray(tensors[entry.official]))
  tree = {}
  for path, parts in slices.items():
    node = tree
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = _stack(parts)
  return tree


def to_official(entries, tree):
  """Takes our tree apart: the inverse of `from_official`."""
  tensors = {}
  for entry in entries:
    leaf = tree
    for name in entry.path:
      leaf = leaf[name]
    tensors[entry.official] = np.ascontiguousarray(entry.theirs(np.asarray(leaf)[entry.index]))
  return tensors


def _stack(parts):
  """Stacks {index: array} into one array; the index () is the array itself."""
  if set(parts) == {()}:
    return np.ascontiguousarray(parts[()])
  shape = tuple(1 + max(index) for index in zip(*parts))
  first = next(iter(parts.values()))
  leaf = np.empty((*shape, *first.shape), first.dtype)
  for index, part in parts.items():
    leaf[index] = part
  return leaf


def _check(expected, found):
  missing, extra = sorted(expected - found), sorted(found - expected)
  if missing or extra:
    raise ValueError(
      f'weights do not fit: missing {", ".join(missing) or "nothing"}; not expected'
      f' {", ".join(extra) or "nothing"}'
    )

"""A name map: which official tensor is which leaf of our tree, and how its axes lie.

An `Entry` turns one official tensor into one leaf (or one slice of a stacked leaf) and back, by
transposing and permuting only, so both directions are equal bit for bit. Tensors are read one at a
time: anything with `shape` and `dtype` that numpy can read will do, such as weights.Tensor.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

MAX_KEYS = 8  # that a list in a message has


class Misfit(ValueError):
  """Weights are not those of the network asked for."""


class Entry(NamedTuple):
  """One official tensor."""

  official: str  # its key
  path: tuple  # of the leaf in our tree
  index: tuple  # of the part, for leaves stacked over blocks or segments; () is the whole leaf
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


def listed(words):
  """Returns the first words with commas between them, and how many more there are."""
  words = list(words)
  more = [f'and {len(words) - MAX_KEYS} more'] if len(words) > MAX_KEYS else []
  return ', '.join([*words[:MAX_KEYS], *more])


def clean(tensors, prefix=''):
  """Drops what wrappers put into keys: '_orig_mod.' anywhere, then a leading 'module.', `prefix`.

  Args:
    tensors: {official key: array}.
    prefix: of the keys of a module inside another; keys without it are taken, too.

  Returns:
    {clean key: array}.

  Raises:
    Misfit: if two keys become one.
  """
  cleaned = {}
  for key, tensor in tensors.items():
    name = key.replace('_orig_mod.', '').removeprefix('module.').removeprefix(prefix)
    if name in cleaned:
      raise Misfit(
        f"weights do not fit: '{_shown(key)}' is one of two keys for {_shown(name)}; keep one"
      )
    cleaned[name] = tensor
  return cleaned


def from_official(entries, tensors, abstract):
  """Builds our tree.

  Args:
    entries: of every tensor.
    tensors: {official key: array, or what stands for one and is read when it is its turn}.
    abstract: our tree with a shape and dtype at every leaf.

  Returns:
    Tree of numpy arrays.

  Raises:
    Misfit: names the keys that are missing or not expected and the tensors of another shape or
      dtype, the first MAX_KEYS of each.
  """
  _check(entries, tensors, abstract)
  tree = {}
  for entry in entries:
    node = tree
    for name in entry.path[:-1]:
      node = node.setdefault(name, {})
    name = entry.path[-1]
    if name not in node:
      leaf = _leaf(abstract, entry.path)
      node[name] = np.empty(leaf.shape, leaf.dtype)
    node[name][entry.index] = entry.ours(np.asarray(tensors[entry.official]))
  return tree


def to_official(entries, tree):
  """Takes our tree apart: the inverse of `from_official`."""
  return {
    entry.official: np.ascontiguousarray(
      entry.theirs(np.asarray(_leaf(tree, entry.path))[entry.index])
    )
    for entry in entries
  }


def _leaf(tree, path):
  """Returns the leaf at a path."""
  for name in path:
    tree = tree[name]
  return tree


def _check(entries, tensors, abstract):
  """Compares keys, shapes and dtypes without reading a tensor."""
  expected = {entry.official: _official_spec(entry, abstract) for entry in entries}
  found = {key: _spec(tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
  problems = []
  if missing := sorted(expected.keys() - found.keys()):
    problems.append(f'missing {listed(missing)}')
  if extra := sorted(found.keys() - expected.keys()):
    problems.append(f'not expected {listed(map(_shown, extra))}')
  if wrong := sorted(k for k in expected.keys() & found.keys() if expected[k] != found[k]):
    specs = (f'{key} is {found[key]}, expected {expected[key]}' for key in wrong)
    problems.append(f'of another shape or dtype {listed(specs)}')
  if problems:
    raise Misfit(
      f'weights do not fit this network: {"; ".join(problems)}; use the recipe of these weights,'
      ' and the float32 weights of the whole network'
    )


def _official_spec(entry, abstract):
  """Returns shape and dtype of an official tensor, from a stand-in that takes no memory."""
  leaf = _leaf(abstract, entry.path)
  part = np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)[entry.index]
  return _spec(entry.theirs(part).shape, leaf.dtype)


def _shown(key):
  """Returns a key of a file as a message can hold it: printable and not endless."""
  return key if key.isprintable() and len(key) <= 200 else ascii(key[:200])


def _spec(shape, dtype):
  """'float32[4,8]'."""
  return f'{dtype}[{",".join(map(str, shape))}]'

"""What the arrays of a state are called, where in a checkpoint they lie, and their checksums."""

import json
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np

ITEMS = ('params', 'ema', 'opt_state')  # every other field of the state goes into `run`


def checksum(leaf):
  """Sums mix(word_i + i 0x9e3779b9) over the 32-bit words of an array, modulo 2^32.

  Integers only, so neither the sharding nor the order of the sum matters. The mixing (the finaliser
  of murmur3) is a bijection, so one changed word always changes the sum; without it, flipping the
  sign of two numbers would not.

  Args:
    leaf: array of any shape, bool or of 1, 2, 4 or 8 bytes, or typed keys.

  Returns:
    [] uint32.
  """
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  if leaf.dtype == bool:
    leaf = leaf.astype(jnp.uint8)
  unsigned = jnp.dtype(f'uint{8 * min(leaf.dtype.itemsize, 4)}')
  words = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)  # 8 bytes: [..., 2]
  for axis in range(words.ndim):  # The flat index without a reshape, which could gather shards.
    stride = math.prod(words.shape[axis + 1 :]) * 0x9E3779B9 % 2**32
    words += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride)
  words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
  words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
  return jnp.sum(words ^ (words >> 16), dtype=jnp.uint32)


@jax.jit
def _sums(leaves):
  """Returns checksums of a list of arrays, [len(leaves)] uint32: one program, one transfer."""
  return jnp.stack([checksum(leaf) for leaf in leaves])


def named(tree):
  """Returns {dotted path: leaf} of a tree, in the order in which jax.tree flattens."""
  pairs = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in pairs}


def item(name):
  """Returns the item of a checkpoint that holds a leaf."""
  root = name.split('.')[0]
  return root if root in ITEMS else 'run'


def by_item(leaves):
  """Returns {item: {name: leaf}} of {name: leaf}, without empty items, which orbax refuses."""
  items = {}
  for name, leaf in leaves.items():
    items.setdefault(item(name), {})[name] = leaf
  return items


def subtree(name):
  """Returns 'params.blocks' of 'params.blocks.qkv.kernel'."""
  return '.'.join(name.split('.')[:2])


def sums(leaves):
  """Returns {name: int} of {name: array}; one program per item, which may lie on other devices."""
  found = {}
  for part in by_item(leaves).values():
    found.update(zip(part, jax.device_get(_sums(list(part.values()))).tolist()))
  return found


def spec(leaf):
  """Returns shape and dtype as 'float32[4,8]'."""
  return f'{leaf.dtype}[{",".join(map(str, leaf.shape))}]'


def crc32(values):
  """Returns the checksum of plain values, an int."""
  return zlib.crc32(json.dumps(values, sort_keys=True).encode())

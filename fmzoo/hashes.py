"""SHA-256 of trees of arrays and of files, by which records say what they are about."""

import hashlib

import jax
import numpy as np


def tree_sha256(tree):
  """Returns the SHA-256 of a tree of arrays: path, dtype, shape and bytes of every leaf.

  It is the same for arrays of the host and of devices, on one of them or replicated over many.

  Args:
    tree: of numpy or jax arrays.

  Returns:
    64 hexadecimal digits.

  Raises:
    ValueError: names a leaf of which this process holds a part only.
  """
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    array = _on_host(name, leaf)
    digest.update(f'{name} {array.dtype.name} {list(array.shape)}\n'.encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
  return digest.hexdigest()


def _on_host(name, leaf):
  """Returns a leaf as a numpy array of little-endian numbers."""
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    if not leaf.is_fully_replicated:
      raise ValueError(
        f"leaf '{name}' is spread over hosts ({leaf.sharding}), expected a copy on each of them;"
        ' replicate it first'
      )
    leaf = leaf.addressable_data(0)
  array = np.asarray(leaf)
  return array.astype(array.dtype.newbyteorder('<'), copy=False)


def file_sha256(path):
  """Returns the SHA-256 of a file, 64 hexadecimal digits."""
  with open(path, 'rb') as content:
    return hashlib.file_digest(content, 'sha256').hexdigest()


def passing(batches, digest):
  """Yields batches of arrays, whose bytes are added to a hash on their way."""
  for batch in batches:
    digest.update(np.ascontiguousarray(batch))
    yield batch

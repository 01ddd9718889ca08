"""A tree's hash is that of its names and numbers, wherever they lie."""

import hashlib

import jax
import numpy as np
import pytest

from fmzoo import hashes
from fmzoo.parallel import mesh as meshes
from tests import tiny

TREE = {'a': {'b': np.arange(6, dtype=np.float32).reshape(2, 3)}, 'c': np.array([1, 2], np.int32)}


def test_the_hash_is_of_names_dtypes_shapes_and_bytes():
  expected = hashlib.sha256(
    b'a.b float32 [2, 3]\n' + TREE['a']['b'].tobytes() + b'c int32 [2]\n' + TREE['c'].tobytes()
  )
  assert hashes.tree_sha256(TREE) == expected.hexdigest()


@pytest.mark.parametrize('devices', [1, 4])
def test_the_hash_is_the_same_on_devices(devices):
  mesh = tiny.mesh(devices)
  assert hashes.tree_sha256(jax.device_put(TREE, meshes.replicated(mesh))) == (
    hashes.tree_sha256(TREE)
  )


@pytest.mark.parametrize('change', [
  lambda tree: {**tree, 'd': tree['c']},
  lambda tree: {'a': {'x': tree['a']['b']}, 'c': tree['c']},
  lambda tree: {**tree, 'c': tree['c'].view(np.float32)},
  lambda tree: {**tree, 'c': tree['c'][None]},
  lambda tree: {**tree, 'c': np.array([1, 3], np.int32)},
])
def test_any_change_changes_the_hash(change):
  assert hashes.tree_sha256(change(TREE)) != hashes.tree_sha256(TREE)

"""Compilation before allocation: what the devices have no memory for is refused in one line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmzoo.parallel import mesh as meshes
from tests import tiny


def doubled(x):
  return jnp.sin(x) @ jnp.cos(x)


def test_what_fits_is_compiled():
  compiled = meshes.compile_ahead(
    jax.jit(doubled), tiny.mesh(1), jax.ShapeDtypeStruct((4, 4), 'float32')
  )
  assert compiled(jnp.zeros((4, 4))).shape == (4, 4)
  with pytest.raises(TypeError):  # compiled once, for these shapes
    compiled(jnp.zeros((5, 5)))


def test_what_does_not_fit_is_refused(monkeypatch):
  """640,000 bytes in and as many out."""
  monkeypatch.setattr(meshes, '_free_bytes', lambda mesh: 1_000_000)
  with pytest.raises(ValueError, match='a step needs .* has 0.0 GB free; use devices'):
    meshes.compile_ahead(
      jax.jit(doubled), tiny.mesh(1), jax.ShapeDtypeStruct((400, 400), 'float32')
    )


def test_simulated_devices_share_the_memory_of_the_machine():
  one, all_devices = (
    meshes._free_bytes(tiny.mesh(count)) for count in (1, -1)
  )
  assert 0 < all_devices < one
  assert abs(one / all_devices / jax.device_count() - 1) < 0.5  # others use the machine, too


@pytest.mark.parametrize('at_most,size', [(1, 1), (3, 3), (9, 4)])
def test_trees_are_copied_to_some_devices_of_a_mesh(at_most, size):
  mesh = tiny.mesh(4)
  own = meshes.of_this_host(mesh, at_most)
  assert list(own.devices) == jax.devices()[:size]
  tree = jax.device_put({'x': np.arange(3.0)}, meshes.replicated(mesh))
  copied = meshes.on_own_devices(own, tree)['x']
  assert copied.sharding == meshes.replicated(own)
  np.testing.assert_array_equal(copied, [0, 1, 2])


def test_hosts_that_share_devices_unevenly_are_refused(monkeypatch):
  mesh = tiny.mesh(3)
  meshes.check_hosts(mesh)
  monkeypatch.setattr(meshes.hosts, 'count', lambda: 2)
  with pytest.raises(ValueError, match='mesh of 3 devices takes 3, 0 of 2 hosts.*mesh.data=-1'):
    meshes.check_hosts(mesh)

"""Host rows to global device arrays, copied ahead of time."""

import collections
import itertools

import jax

from fmzoo.parallel import mesh as meshes


def to_devices(batch, mesh, mode):
  """Copies this process's rows of a global batch to its devices.

  Args:
    batch: tree of numpy arrays [B / processes, ...].
    mesh: as `meshes.make` returns it.
    mode: 'jit' gives arrays [B, ...]; 'pmap' gives [devices, B / devices, ...].

  Returns:
    Tree of jax arrays, cut over the first axis.
  """
  sharding = meshes.rows_sharded(mesh)
  local_devices = len(mesh.local_devices)

  def put(rows):
    """Sends one array on its way."""
    if mode == 'pmap':
      rows = rows.reshape(local_devices, -1, *rows.shape[1:])
    return jax.make_array_from_process_local_data(sharding, rows)

  return jax.tree.map(put, batch)


def abstract(row, batch_size, mesh, mode):
  """Returns the shapes of what `to_devices` gives, for rows like `row`."""
  lead = (batch_size,) if mode == 'jit' else (mesh.size, batch_size // mesh.size)
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype), row
  )


def ahead(batches, mesh, mode, depth=2):
  """Yields device batches, up to `depth` of them copied or under way at a time."""
  source = (to_devices(batch, mesh, mode) for batch in batches)
  queue = collections.deque(itertools.islice(source, depth))
  while queue:
    yield queue.popleft()
    queue.extend(itertools.islice(source, 1))

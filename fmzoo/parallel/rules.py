"""Which mesh axes cut which array of the training state, as data: path -> PartitionSpec."""

import math
import re

import jax
from jax.sharding import NamedSharding, PartitionSpec

RULES = (  # the first pattern found in an array's dotted path: axes of its leading dimensions
  (r'(^|\.)segments\.blocks\.', (None, 'segment')),  # [blocks, S, ...], of each segment its own
  (r'(^|\.)blocks\.', (None,)),  # [blocks, ...], scanned: a cut would gather all at every block
  (r'', ()),
)
SMALLEST = 2**16  # elements of an array that 'fsdp' cuts; a smaller one is not worth a collective


def spec(path, shape, axes):
  """Returns the PartitionSpec of one array.

  RULES say how leading dimensions are cut, 'fsdp' cuts the largest of the others that it divides.

  Args:
    path: dotted, such as 'opt_state.1.0.mu.segments.blocks.up.kernel'.
    shape: of the array.
    axes: {axis of the mesh: devices along it}.
  """
  leading = next(names for pattern, names in RULES if re.search(pattern, path))
  dims = [name if axes.get(name, 1) > 1 else None for name in leading]
  dims += [None] * (len(shape) - len(dims))
  devices = axes.get('fsdp', 1)
  free = [i for i in range(len(leading), len(shape)) if shape[i] % devices == 0]
  if devices > 1 and free and math.prod(shape) >= SMALLEST:
    dims[max(free, key=lambda i: shape[i])] = 'fsdp'
  return PartitionSpec(*dims)


def shardings(tree, mesh):
  """Returns the NamedSharding of every array of a state, or of its parameters.

  Args:
    tree: of arrays or jax.ShapeDtypeStruct; the names on its paths are those of RULES.
    mesh: as `mesh.make` returns it.
  """

  def of(path, leaf):
    """Returns the sharding of one array."""
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    return NamedSharding(mesh, spec(name, leaf.shape, mesh.shape))

  return jax.tree_util.tree_map_with_path(of, tree)


def abstract(tree, mesh):
  """Returns the shapes of a tree with the shardings of its arrays over a mesh."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    tree, shardings(tree, mesh),
  )

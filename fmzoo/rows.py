"""Rows of a batch: which one stands where, its random keys, its micro-batch.

A row's index in the global batch decides all that happens to it (row mod period), its place only
which device it is on. Where devices form groups of their own segments, a batch is ordered so that
each group has the rows of its segments, and no row ever moves.
"""

import jax
import jax.numpy as jnp
import numpy as np


def order(size, period, groups):
  """Returns the global index of the row at each place of a batch.

    place (g, j, s) -> index j period + g period / groups + s,  s < period / groups

  Args:
    size: B, a multiple of the period if there are several groups.
    period: a row's use depends on (index mod period).
    groups: of devices, each with its share of every period; 1 keeps all in their order.

  Returns:
    numpy int32 [B].
  """
  indices = np.arange(size, dtype=np.int32)
  if groups == 1:
    return indices
  return indices.reshape(-1, groups, period // groups).swapaxes(0, 1).ravel()


def keys(rng, indices):
  """Folds one key with global row indices [B], so that no layout changes a row's numbers."""
  return jax.vmap(lambda index: jax.random.fold_in(rng, index))(indices)


def micro_batches(batch, count, together):
  """Splits rows [B, ...] into [count, B / count, ...] so that row mod period is kept.

  Whole groups of neighbours are dealt in turn: every micro-batch keeps the mix of segments or
  losses of the batch, and on several devices no row has to move.

  Args:
    batch: tree of arrays [B, ...].
    count: of micro-batches.
    together: neighbours that stay together, period / groups of `order`.
  """

  def split(rows):
    """Deals one array."""
    groups = rows.reshape(-1, count, together, *rows.shape[1:])
    return jnp.moveaxis(groups, 1, 0).reshape(count, -1, *rows.shape[1:])

  return jax.tree.map(split, batch)

"""SoFlow's rows: what a step draws for each, which loss it trains, how a batch is split by that.

A row's use depends on its index alone, every device has its share of both kinds, and splitting is
slicing: no row moves to another device.
"""

import fractions
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmzoo.methods import flow, soflow_times

MOST_PARTS = 64  # rows of which a ratio is kept


class Rows(NamedTuple):
  """All that a loss needs to know about its rows; s and t_mid matter in consistency rows only."""

  x: jax.Array  # [B, H, W, C] data
  noise: jax.Array  # [B, H, W, C]
  labels: jax.Array | None  # [B] int32; None is the null label everywhere, and no guidance
  dropped: jax.Array  # [B] bool, rows trained with the null label; ignored without guidance
  t: jax.Array  # [B]
  s: jax.Array  # [B], s <= t_mid < t
  t_mid: jax.Array  # [B]
  augment: jax.Array | None = None  # [B, 6] augmentation labels of the network
  dropout: jax.Array | None = None  # keys [B]; both passes of a consistency row share its masks

  def options(self):
    """Returns the network's keywords that are given."""
    given = {'augment': self.augment, 'dropout': self.dropout}
    return {name: value for name, value in given.items() if value is not None}


def row_period(velocity_ratio):
  """Returns (period, consistency rows in it), the smallest whole numbers in this ratio.

  A ratio that is no fraction of at most MOST_PARTS parts is replaced by the nearest one.
  """
  ratio = fractions.Fraction(velocity_ratio).limit_denominator(MOST_PARTS)
  return ratio.denominator, ratio.denominator - ratio.numerator


def row_blocks(size, velocity_ratio):
  """Returns [(groups, rows in a group, consistency rows at its head)] of a batch.

  First all whole groups of `row_period`, then what is left over as one short group. So a row's use
  depends on its index alone and every device has its share. With a ratio that is a fraction of at
  most 64 parts, floor(ratio size + 1e-6) rows are for flow matching.
  """
  period, head = row_period(velocity_ratio)
  rest = size % period
  rest_head = rest - math.floor(velocity_ratio * rest + 1e-6)
  blocks = [(size // period, period, head), (1, rest, rest_head)]
  return [block for block in blocks if block[0] * block[1]]


def consistency_rows(size, velocity_ratio):
  """Returns which rows train the consistency loss: numpy bool [B]; the others flow matching."""
  return np.concatenate([
    np.tile(np.arange(rows) < head, groups)
    for groups, rows, head in row_blocks(size, velocity_ratio)
  ])


def cut(a, sizes):
  """Cuts rows [B, ...] into one array [groups, rows, ...] for each (groups, rows) of `sizes`."""
  ends = np.cumsum([groups * rows for groups, rows in sizes])
  return [
    part.reshape(*size, *a.shape[1:]) for part, size in zip(jnp.split(a, ends[:-1]), sizes)
  ]


def join(blocks):
  """Inverts `cut`: a list of [groups, rows, ...] -> [B, ...]."""
  rows = [block.reshape(-1, *block.shape[2:]) for block in blocks]
  return rows[0] if len(rows) == 1 else jnp.concatenate(rows)


def split_batch(a, velocity_ratio):
  """Returns the (consistency, flow) rows of a [B, ...]; slices alone, so none changes device."""
  blocks = row_blocks(a.shape[0], velocity_ratio)
  parts = cut(a, [block[:2] for block in blocks])
  heads = [head for _, _, head in blocks]
  return (
    join([part[:, :head] for part, head in zip(parts, heads)]),
    join([part[:, head:] for part, head in zip(parts, heads)]),
  )


def draw_rows(config, net, batch, rng, step):
  """Draws all that is random in a training step, per row.

  Args:
    config: Config; net: models.layers.Network.
    batch: {'latent': [B, H, W, C], 'label': [B]}, and 'augment' [B, 6] where images were augmented.
    rng: keys [B].
    step: k, int32.

  Returns:
    (Rows, ratio r(k, K) of the middle time).
  """
  rng_noise, rng_flow, rng_s, rng_t, rng_drop, rng_dropout = flow.split_rows(rng, 6)
  x = batch['latent']
  is_consistency = consistency_rows(x.shape[0], config.velocity_ratio)
  drawn = [
    flow.logit_normal_times(key, mean, std)
    for key, mean, std in zip((rng_flow, rng_s, rng_t), config.time_mean, config.time_std)
  ]
  t, s = soflow_times.consistency_times(*drawn[1:])
  t = jnp.where(is_consistency, t, drawn[0])
  ratio = soflow_times.middle_ratio(
    config.middle_schedule, config.middle_initial, config.middle_final, step, config.total_steps
  )
  return Rows(
    x, flow.normal_like(rng_noise, x), batch['label'],
    flow.draw_dropped(rng_drop, config.label_dropout), t, s, soflow_times.middle_time(t, s, ratio),
    augment=batch.get('augment'), dropout=rng_dropout if net.has_dropout else None,
  ), ratio

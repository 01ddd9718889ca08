"""Blockwise flow matching: the path is cut into segments, each with its own small velocity network.

A feature network, aligned with a frozen pretrained encoder, conditions all of them (semantic
feature guidance). Source: arXiv:2510.21167 and its official code. Sampling is in `bfm_sampler.py`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmzoo import rows as row_order
from fmzoo import shapes
from fmzoo.methods import base, bfm_sampler, flow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Settings of BFM, stage 1."""

  path: str  # noising path: 'linear' or 'trig'
  edges: tuple[float, ...]  # S - 1 times between the segments, falling; () is equal segments
  alignment_weight: float  # lambda of the alignment loss
  label_dropout: float  # probability that a row is trained with the null label


class Rows(NamedTuple):
  """All that the loss needs to know about its rows; `segments_of` tells their segments."""

  x: jax.Array  # [B, H, W, C] data
  noise: jax.Array  # [B, H, W, C]
  labels: jax.Array  # [B] int32, the null label where dropped
  t: jax.Array  # [B], in the row's segment
  feature: jax.Array | None  # [B, N, F] of the frozen encoder
  first: Any = 0  # segment of row 0: 0, or [] int32


def first_segment(step, size, segments):
  """Returns the segment of a batch's row 0: the rows of all steps take the segments in turn.

  So every segment gets its share where S does not divide the batch of `size` rows; where it does,
  this is 0 at every step.
  """
  return step * (size % segments) % segments if size % segments else 0


def segments_of(first, size, segments, groups=1):
  """Returns the segments of a batch's rows, (first + index) mod S at each place: [B] int32."""
  return (first + jnp.asarray(row_order.order(size, segments, groups))) % segments


def segment_times(rng, edges, segment):
  """Draws t uniform in [e_{s+1}, e_s): keys [B], edges [S + 1], segment [B] -> [B] float32."""
  start, end = jnp.asarray(edges)[segment], jnp.asarray(edges)[segment + 1]
  return end + flow.uniform(rng) * (start - end)


def draw_rows(config, edges, num_classes, batch, *, rng, step, groups=1):
  """Draws the random numbers of a batch: keys [B] -> Rows; `step` are finished steps."""
  rng_time, rng_noise, rng_drop = flow.split_rows(rng, 3)
  dropped = flow.draw_dropped(rng_drop, config.label_dropout)
  size, segments = rng.shape[0], len(edges) - 1
  first = first_segment(step, size, segments)
  return Rows(
    batch['latent'],
    flow.normal_like(rng_noise, batch['latent']),
    jnp.where(dropped, num_classes, batch['label']),
    segment_times(rng_time, edges, segments_of(first, size, segments, groups)),
    batch.get('feature'),
    first,
  )


def cosine_similarity(a, b):
  """Returns the mean over tokens of the cosine between a and b: [B, N, F] twice -> [B], float32."""
  def normalise(x):
    """Returns x / max(||x||, 1e-12) over the last axis."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

  return jnp.mean(jnp.sum(normalise(a) * normalise(b), axis=-1), axis=-1)


def loss_of_rows(config, net, params, rows):
  """The loss of a batch whose every random number is given, for any number of rows.

    mean (v(x_t, t, y) - v_t)^2 - lambda mean cos(projector(f), feature)

  Args:
    config: Config; net: models.blockwise.Blockwise; params: tree.
    rows: Rows.

  Returns:
    (loss [], {metric: []}).
  """
  x_t = flow.interpolate(config.path, rows.x, rows.noise, rows.t)
  c = net.condition(params, rows.t, rows.labels)
  f = net.features(params, x_t, c)
  v = net.velocity_by_row(params, x_t, c, f, rows.first)
  error = flow.row_mean((v - flow.velocity_target(config.path, rows.x, rows.noise, rows.t)) ** 2)
  predicted = net.project(params, f)
  shapes.expect_shape('feature', rows.feature, *predicted.shape)
  cosine = jnp.mean(cosine_similarity(predicted, rows.feature))
  velocity_loss = jnp.mean(error)
  return velocity_loss - config.alignment_weight * cosine, {
    'velocity/mse': velocity_loss,
    'alignment/cosine': cosine,
    **segment_means(error, rows.first, net.segments, net.groups),
  }


def segment_means(error, first, segments, groups=1):
  """Returns {'segment_<s>/mse': mean of the errors [B] of segment s's rows, nan without any}."""
  of_rows = segments_of(first, error.shape[0], segments, groups)
  own = jnp.arange(segments)[:, None] == of_rows[None]
  sums = jnp.sum(jnp.where(own, error[None], 0.0), axis=1)
  means = sums / jnp.sum(own, axis=1)
  return {f'segment_{s}/mse': means[s] for s in range(segments)}


def segment_gradient_norms(grads):
  """Returns {'segment_<s>/grad_norm': L2 norm of the gradient of segment s's velocity blocks}."""
  squares = sum(
    jnp.sum(leaf**2, axis=(0, *range(2, leaf.ndim)))  # [blocks, S, ...]
    for leaf in jax.tree.leaves(grads['segments'])
  )
  return {f'segment_{s}/grad_norm': jnp.sqrt(square) for s, square in enumerate(squares)}


def make(config, net, latent_shape, num_classes):
  """Builds the method.

  Args:
    config: Config.
    net: models.blockwise.Blockwise.
    latent_shape: (H, W, C).
    num_classes: labels are 0 .. num_classes - 1; num_classes is the null label.

  Returns:
    base.Method.
  """
  edges = bfm_sampler.segment_edges(net.segments, config.edges)

  def loss(params, batch, rng, step):
    """See `loss_of_rows`; times, noise and dropped labels are drawn per row."""
    rows = draw_rows(
      config, edges, num_classes, batch, rng=rng, step=step, groups=net.groups
    )
    return loss_of_rows(config, net, params, rows)

  return base.Method(
    net.init, loss, bfm_sampler.make(config, net, latent_shape, num_classes),
    lambda params: jax.tree.map(lambda _: True, params),
    ('latent', 'label', 'feature'), period=net.segments, groups=net.groups,
    grad_metrics=segment_gradient_norms,
  )

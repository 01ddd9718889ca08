"""BFM, stage 2: the feature residual network learns to stand in for the feature network.

Source: arXiv:2510.21167 and its official code. Everything of stage 1 is frozen.
"""

import dataclasses

import jax
import jax.numpy as jnp

from fmzoo.methods import base, bfm, bfm_sampler, flow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Settings of BFM, stage 2."""

  path: str  # noising path: 'linear' or 'trig'
  edges: tuple[float, ...]  # as in stage 1
  label_dropout: float  # probability that a row is trained with the null label


def approximate(config, net, params, rows):
  """Returns the FRN's feature tokens and those that they should be.

    f_hat = f(x_start, t_start, y) + kappa FRN(x_t, t, y),  kappa = (t_start - t)/(t_start - t_end)
    target = f(x_t, t, y)

  x_start and x_t share data, noise and label; the two frozen feature passes run as one batch of
  2 B rows without gradient.

  Args:
    config: Config; net: models.blockwise.Blockwise; params: tree; rows: bfm.Rows.

  Returns:
    (f_hat [B, N, D] with gradient to params['frn'] only, target [B, N, D]).
  """
  edges = jnp.asarray(bfm_sampler.segment_edges(net.segments, config.edges))
  segment = bfm.segments_of(rows.first, rows.t.shape[0], net.segments, net.groups)
  t_start, t_end = edges[segment], edges[segment + 1]
  frozen = jax.lax.stop_gradient({k: v for k, v in params.items() if k != 'frn'})
  times = jnp.concatenate([t_start, rows.t])
  x, noise, labels = (jnp.concatenate([a, a]) for a in (rows.x, rows.noise, rows.labels))
  points = flow.interpolate(config.path, x, noise, times)
  c = net.condition(frozen, times, labels)
  f_start, target = jnp.split(net.features(frozen, points, c), 2)
  kappa = flow.expand_as((t_start - rows.t) / (t_start - t_end), f_start)
  size = rows.t.shape[0]
  residual = net.residual({**frozen, 'frn': params['frn']}, points[size:], c[size:])
  return f_start + kappa * residual, target


def make(config, net, latent_shape, num_classes):
  """Builds the method; `net` must have a residual network.

  Args:
    config: Config.
    net: models.blockwise.Blockwise.
    latent_shape: (H, W, C).
    num_classes: labels are 0 .. num_classes - 1; num_classes is the null label.

  Returns:
    base.Method, of which only the subtree 'frn' is trainable.

  Raises:
    ValueError: if the network has no residual network.
  """
  if 'frn' not in jax.eval_shape(net.init, jax.random.key(0)):
    raise ValueError(
      "model.frn_depth=0 has nothing to train for method.name='bfm_frn'; use 1 or more"
    )
  edges = bfm_sampler.segment_edges(net.segments, config.edges)

  def loss(params, batch, rng, step):
    """Mean over rows, tokens and channels of (f_hat - target)^2, see `approximate`."""
    rows = bfm.draw_rows(
      config, edges, num_classes, batch, rng=rng, step=step, groups=net.groups
    )
    f_hat, target = approximate(config, net, params, rows)
    error = flow.row_mean((f_hat - target) ** 2)
    spread = jnp.mean((target - jnp.mean(target, axis=(0, 1), keepdims=True)) ** 2)
    mean = jnp.mean(error)
    return mean, {
      'feature/unexplained': mean / spread,
      **bfm.segment_means(error, rows.first, net.segments, net.groups),
    }

  def trainable(params):
    """Returns True for the leaves of the residual network."""
    return {
      name: jax.tree.map(lambda _, name=name: name == 'frn', tree) for name, tree in params.items()
    }

  return base.Method(
    net.init, loss, bfm_sampler.make(config, net, latent_shape, num_classes), trainable,
    ('latent', 'label'), period=net.segments, groups=net.groups,
  )

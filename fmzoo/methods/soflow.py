"""SoFlow, solution flow models: one network learns where a point of the flow ends up.

f(x_t, t, s) moves a point from time t to time s along the velocity ODE in one call. Two losses, on
different rows of a batch: flow matching at s = t, and a consistency loss between f at t and at a
middle time, made of two plain forward calls. Source: arXiv:2512.15657 and its official code.
"""

import dataclasses
import fractions

import jax
import jax.numpy as jnp

from fmzoo.methods import base, flow, soflow_rows, soflow_sampler, soflow_times

METRICS = (
  'flow/mse', 'flow/weight', 'flow/mse_unscaled', 'consistency/mse', 'consistency/weight'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Settings of SoFlow; the official name in brackets where it is another."""

  path: str  # noising path: 'linear' or 'trig'
  solution: str  # a, b of f = a x + b NN: 'euler' or 'trig' (coefficient_type)
  velocity_ratio: float  # share of rows for flow matching, the rest for consistency, in [0, 1]
  total_steps: int  # K of the middle-time schedule; run.steps, and no key of its own
  time_mean: tuple[float, ...]  # of the logit-normal times: flow's t, consistency's s and t
  time_std: tuple[float, ...]  # the same three
  guidance: float  # omega, trained in; 1 is none (cfg_scale)
  mix_ratio: float  # m: share of the guided target that is not the network's own velocity
  guidance_decay_time: float  # tau: guidance fades for t > tau; 1 never (cfg_decay_time)
  label_dropout: float  # probability of the null label; above 0 if and only if guided
  weight_power: float  # p of the adaptive weight
  weight_eps: float  # eps of the adaptive weight
  middle_schedule: str  # r(k, K): 'const', 'linear', 'cosine', 'exponent' (l_schedule)
  middle_initial: float  # r at k = 0
  middle_final: float  # r at k = K


def guided_target(config, v_t, v_null, v_own, t):
  """Returns m (v_t + d (omega - 1)(v_t - v_null)) + (1 - m) v_own, d = guidance_decay(t).

  Guidance pushes the sample velocity, not a network output, away from the null velocity.
  """
  decay = flow.expand_as(soflow_times.guidance_decay(t, config.guidance_decay_time), v_t)
  guided = v_t + decay * (config.guidance - 1) * (v_t - v_null)
  return guided if config.mix_ratio == 1 else (
    config.mix_ratio * guided + (1 - config.mix_ratio) * v_own
  )


def adaptive_weight(config, error):
  """Returns 1 / (error + eps)^p without gradient: [B] -> [B]."""
  return jax.lax.stop_gradient((error + config.weight_eps) ** -config.weight_power)


def velocity_terms(config, v, target):
  """Flow matching: w |v - target|^2 per row, w = 1 / (|b_s| (e + eps)^p).

  Args:
    config: Config.
    v: predicted velocity [n, H, W, C], with gradient; target: the same shape, without.

  Returns:
    (terms [n], squared error e [n], weight [n]).
  """
  error = flow.row_mean((v - target) ** 2)
  weight = adaptive_weight(config, error) / soflow_times.velocity_scale(config.solution)
  return weight * error, error, weight


def difference_quotient(config, x_t, *, n_t, n_mid, velocity, t, s, t_mid):
  """Returns q = (f(x_t, t, s) - f(x_mid, t_mid, s)) / (t - t_mid), x_mid = x_t + V (t_mid - t).

  For 'euler' it is written as V - N_mid - (t - s) / (t - t_mid) (N_t - N_mid), in which the large
  terms in x have cancelled on paper and cannot lose digits.

  Args:
    config: Config.
    x_t: [n, H, W, C]; n_t, n_mid: the network at (x_t, t, s) and (x_mid, t_mid, s).
    velocity: V, like x_t; t, s, t_mid: [n].

  Returns:
    Array like x_t.
  """
  gap = flow.expand_as(t - t_mid, x_t)
  if config.solution == 'euler':
    return velocity - n_mid - flow.expand_as(t - s, x_t) / gap * (n_t - n_mid)
  a, b, *_ = soflow_times.solution_coefficients(config.solution, t, s)
  a_mid, b_mid, *_ = soflow_times.solution_coefficients(config.solution, t_mid, s)
  a, b, a_mid, b_mid = (flow.expand_as(c, x_t) for c in (a, b, a_mid, b_mid))
  x_mid = x_t - velocity * gap
  return (a * x_t + b * n_t - a_mid * x_mid - b_mid * n_mid) / gap


def consistency_terms(config, n_t, quotient, t, s):
  """Consistency: sign(b) mean(N_t q w) per row, w = 1 / (mean q^2 + eps)^p; gradient by N_t alone.

  A linear surrogate: its value means nothing, its gradient is that of w |f_t - f_mid|^2 /
  (2 |b| (t - t_mid)). The missing factor 2 against `velocity_terms` is the official code's.

  Returns:
    (terms [n], mean q^2 [n], weight [n]).
  """
  quotient = jax.lax.stop_gradient(quotient)
  error = flow.row_mean(quotient**2)
  weight = adaptive_weight(config, error)
  _, b, *_ = soflow_times.solution_coefficients(config.solution, t, s)
  return jnp.sign(b) * weight * flow.row_mean(n_t * quotient), error, weight


def free_velocities(config, net, num_classes, params, rows):
  """Predicts without gradient, in one call, the velocities that guided targets need.

  Args:
    config, net, num_classes, params: as in `loss_of_rows`.
    rows: Rows with the labels of the gradient pass.

  Returns:
    (null velocity of all rows [B, H, W, C], own velocity of the consistency rows, [n, H, W, C]);
    with mix_ratio = 1 nobody needs the second and n is 0.
  """
  blocks = soflow_rows.row_blocks(rows.x.shape[0], config.velocity_ratio)
  if config.mix_ratio == 1:
    blocks = [(groups, count, 0) for groups, count, _ in blocks]
  sizes = [block[:2] for block in blocks]

  def extend(a, again):
    """Extends every group by its consistency rows: no row moves to another device."""
    return soflow_rows.join([
      jnp.concatenate([one, two[:, :head]], axis=1)
      for one, two, (_, _, head) in zip(
        soflow_rows.cut(a, sizes), soflow_rows.cut(again, sizes), blocks
      )
    ])

  x_t = flow.interpolate(config.path, rows.x, rows.noise, rows.t)
  x_t, t = extend(x_t, x_t), extend(rows.t, rows.t)
  labels = extend(jnp.full_like(rows.labels, num_classes), rows.labels)
  v = net.apply(jax.lax.stop_gradient(params), x_t, t, jnp.zeros_like(t), labels)
  parts = soflow_rows.cut(
    soflow_times.velocity_scale(config.solution) * v,
    [(groups, count + head) for groups, count, head in blocks],
  )
  counts = [count for _, count in sizes]
  return (
    soflow_rows.join([part[:, :count] for part, count in zip(parts, counts)]),
    soflow_rows.join([part[:, count:] for part, count in zip(parts, counts)]),
  )


def target_velocity(config, rows, v_null, v_own):
  """Returns V, without gradient: `guided_target`, or v_t in rows without label or guidance.

  Args:
    config: Config; rows: Rows.
    v_null: [n, H, W, C], or None without guidance; v_own: like v_null.

  Returns:
    [n, H, W, C].
  """
  v_t = flow.velocity_target(config.path, rows.x, rows.noise, rows.t)
  if v_null is None:
    return v_t
  guided = guided_target(config, v_t, v_null, v_own, rows.t)
  return jax.lax.stop_gradient(jnp.where(flow.expand_as(rows.dropped, v_t), v_t, guided))


def flow_loss(config, net, params, rows, v_null):
  """Flow matching of rows, one call with gradient.

  Args:
    config: Config; net: models.layers.Network; params: tree; rows: Rows.
    v_null: as in `target_velocity`.

  Returns:
    (sum of `velocity_terms` [], {metric: [n]}).
  """
  x_t = flow.interpolate(config.path, rows.x, rows.noise, rows.t)
  out = net.apply(
    params, x_t, rows.t, jnp.zeros_like(rows.t), rows.labels, **rows.options()
  )
  v = soflow_times.velocity_scale(config.solution) * out
  terms, error, weight = velocity_terms(config, v, target_velocity(config, rows, v_null, v))
  # A guided row's target holds (1 - m) of the network itself, so its error is m times less.
  shrunk = 1.0 if v_null is None else jnp.where(rows.dropped, 1.0, config.mix_ratio)
  metrics = {'flow/mse': error, 'flow/weight': weight, 'flow/mse_unscaled': error / shrunk**2}
  return jnp.sum(terms), metrics


def near_outputs(net, params, first, second, options):
  """Runs the network at two near points of every row, so that their difference keeps its digits.

  Args:
    net: models.layers.Network; params: tree.
    first, second: (x [n, H, W, C], t [n], duration [n], labels [n]) each.
    options: the network's keywords, [n, ...] each, shared by both points: dropout masks, too.

  Returns:
    (network output at `first`, with gradient; at `second`, without): [n, H, W, C] each.
  """
  pairs = (jnp.stack(both, axis=1) for both in zip(first, second))
  out = net.apply_pairs(
    params, *(both.reshape(-1, *both.shape[2:]) for both in pairs),
    **{name: jnp.repeat(value, 2, axis=0) for name, value in options.items()},
  )
  out = out.reshape(-1, 2, *out.shape[1:])
  return out[:, 0], jax.lax.stop_gradient(out[:, 1])


def consistency_quotient(config, net, params, rows, *, v_null, v_own):
  """Runs the network at both times of consistency rows: (N_t with gradient, quotient) [n, ...].

  Args:
    config: Config; net: models.layers.Network; params: tree; rows: Rows.
    v_null, v_own: as in `target_velocity`.
  """
  t, s, t_mid = rows.t, rows.s, rows.t_mid
  x_t = flow.interpolate(config.path, rows.x, rows.noise, t)
  velocity = target_velocity(config, rows, v_null, v_own)
  x_mid = x_t + velocity * flow.expand_as(t_mid - t, x_t)
  n_t, n_mid = near_outputs(
    net, params, (x_t, t, t - s, rows.labels), (x_mid, t_mid, t_mid - s, rows.labels),
    rows.options(),
  )
  return n_t, difference_quotient(
    config, x_t, n_t=n_t, n_mid=n_mid, velocity=velocity, t=t, s=s, t_mid=t_mid
  )


def consistency_loss(config, net, params, rows, *, v_null, v_own):
  """Consistency of rows: two calls, of which the one at the middle time has no gradient.

  Args:
    config, net, params, rows, v_null, v_own: as in `consistency_quotient`.

  Returns:
    (sum of `consistency_terms` [], {metric: [n]}).
  """
  n_t, quotient = consistency_quotient(config, net, params, rows, v_null=v_null, v_own=v_own)
  terms, error, weight = consistency_terms(config, n_t, quotient, rows.t, rows.s)
  return jnp.sum(terms), {'consistency/mse': error, 'consistency/weight': weight}


def loss_of_rows(config, net, num_classes, params, rows):
  """Both losses of a batch whose every random number is given.

    loss = (sum of velocity_terms over flow rows + sum of consistency_terms over the others) / B

  Rows that can share a forward pass do: without gradient the null velocities of all rows and the
  network's own velocity of the consistency rows (1.25 B rows at the ratio 3/4); with gradient the
  flow rows (3/4 B); the consistency rows at both their times in one more call (1/2 B), which is
  computed in another way, see layers.product, and has gradient in half of its rows.

  Args:
    config: Config; net: models.layers.Network; num_classes: also the null label.
    params: tree; rows: Rows.

  Returns:
    (loss [], {metric: []}); the metrics of a loss without rows are 0.
  """
  size, ratio = rows.x.shape[0], config.velocity_ratio
  is_consistency = soflow_rows.consistency_rows(size, ratio)
  guided = rows.labels is not None and config.guidance > 1
  null = jnp.full((size,), num_classes, jnp.int32)
  labels = null if rows.labels is None else rows.labels
  # Without guidance the official code ignores the mask of dropped labels, too.
  rows = rows._replace(labels=jnp.where(rows.dropped, null, labels) if guided else labels)
  null_consistency = null_flow = v_own = None
  if guided:
    v_null, v_own = free_velocities(config, net, num_classes, params, rows)
    null_consistency, null_flow = soflow_rows.split_batch(v_null, ratio)
  split = [(None, None) if a is None else soflow_rows.split_batch(a, ratio) for a in rows]
  of_consistency, of_flow = (soflow_rows.Rows(*part) for part in zip(*split))
  total, metrics = 0.0, dict.fromkeys(METRICS, jnp.zeros(1))
  if not is_consistency.all():
    value, found = flow_loss(config, net, params, of_flow, null_flow)
    total, metrics = total + value, metrics | found
  if is_consistency.any():
    value, found = consistency_loss(
      config, net, params, of_consistency, v_null=null_consistency, v_own=v_own
    )
    total, metrics = total + value, metrics | found
  return total / size, {name: jnp.mean(value) for name, value in metrics.items()}


def make(config, net, latent_shape, num_classes):
  """Builds the method.

  Args:
    config: Config.
    net: models.layers.Network with a duration input.
    latent_shape: (H, W, C).
    num_classes: labels are 0 .. num_classes - 1; num_classes is the null label.

  Returns:
    base.Method.

  Raises:
    ValueError: if a setting is unknown or contradicts another.
  """
  _check(config)
  if config.guidance > 1 and not net.has_labels:
    raise ValueError(
      f'method.guidance={config.guidance} must be 1.0 for a network without labels; set it, or use'
      " model.name='dit'"
    )

  def loss(params, batch, rng, step):
    """See `loss_of_rows` and `draw_rows`."""
    rows, ratio = soflow_rows.draw_rows(config, net, batch, rng, step)
    value, metrics = loss_of_rows(config, net, num_classes, params, rows)
    return value, {**metrics, 'consistency/middle_ratio': ratio}

  def sample(params, rng, labels, *, num_steps, renoise):
    """Generates with num_steps network calls; guidance is in the weights, not in the sampler.

    Args:
      params: tree.
      rng: keys [B].
      labels: [B] int32.
      num_steps: T, network calls.
      renoise: whether to add new noise between calls (the paper) or to chain them.

    Returns:
      [B, H, W, C] float32.
    """
    if num_steps < 1:
      raise ValueError(f'sample.num_steps={num_steps} must be at least 1')
    keys = flow.split_rows(rng, num_steps)
    like = jnp.zeros((labels.shape[0], *latent_shape))
    noises = [flow.normal_like(key, like) for key in keys]
    fresh = jnp.stack(noises[1:]) if renoise and num_steps > 1 else None
    return soflow_sampler.few_step_sample(
      net, params, noises[0], labels, config=config, steps=num_steps, renoise=fresh
    )

  return base.Method(
    net.init, loss, sample, net.trainable, ('latent', 'label'),
    period=soflow_rows.row_period(config.velocity_ratio)[0],
  )


def _check(config):
  """Refuses settings that are unknown or that the loss would silently ignore."""
  for key, value, known in (
    ('path', config.path, flow.PATHS),
    ('solution', config.solution, soflow_times.SOLUTIONS),
    ('middle_schedule', config.middle_schedule, soflow_times.SCHEDULES),
  ):
    if value not in known:
      raise ValueError(f"method.{key}='{value}' is unknown; use one of {', '.join(known)}")
  for key, fits, expected in (
    ('velocity_ratio', 0 <= config.velocity_ratio <= 1, 'from 0 to 1'),
    ('total_steps', config.total_steps >= 1, 'at least 1'),
    ('time_mean', len(config.time_mean) == 3, '3 numbers: flow matching t, consistency s and t'),
    ('time_std', len(config.time_std) == 3 and min(config.time_std) > 0,
     '3 numbers above 0: flow matching t, consistency s and t'),
    ('guidance', config.guidance >= 1, 'at least 1, which is none'),
    ('mix_ratio', 0 < config.mix_ratio <= 1, 'above 0 and at most 1'),
    ('guidance_decay_time', 0 <= config.guidance_decay_time <= 1, 'from 0 to 1'),
    ('label_dropout', 0 <= config.label_dropout < 1, 'at least 0 and below 1'),
    ('weight_power', config.weight_power >= 0, 'at least 0'),
    ('weight_eps', config.weight_eps > 0, 'above 0'),
    ('middle_initial', 0 < config.middle_initial <= 1, 'above 0 and at most 1'),
    ('middle_final', 0 < config.middle_final <= 1, 'above 0 and at most 1'),
  ):
    if not fits:
      raise ValueError(f'method.{key}={getattr(config, key)} must be {expected}')
  nearest = fractions.Fraction(config.velocity_ratio).limit_denominator(soflow_rows.MOST_PARTS)
  if abs(nearest - config.velocity_ratio) > 1e-6:
    raise ValueError(
      f'method.velocity_ratio={config.velocity_ratio} must be a fraction of at most'
      f' {soflow_rows.MOST_PARTS} parts, so that every few rows keep it; use {float(nearest)}'
    )
  if (config.guidance > 1) != (config.label_dropout > 0):
    raise ValueError(
      f'method.guidance={config.guidance} with method.label_dropout={config.label_dropout}:'
      ' guidance above 1 needs dropped labels, and without guidance none are used; set'
      ' label_dropout to 0.1, or guidance to 1 and label_dropout to 0'
    )
  if config.guidance <= 1 and (config.mix_ratio != 1 or config.guidance_decay_time != 1):
    raise ValueError(
      f'method.mix_ratio={config.mix_ratio} and method.guidance_decay_time='
      f'{config.guidance_decay_time} do nothing without guidance; set both to 1.0, or'
      ' method.guidance above 1'
    )

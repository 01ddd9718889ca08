"""Blockwise flow matching: the path is cut into segments, each with its own small velocity network.

A feature network, aligned with a frozen pretrained encoder, conditions all of them (semantic
feature guidance). Source: arXiv:2510.21167 and its official code.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmzoo import shapes
from fmzoo.methods import base, flow

SAMPLERS = ('ode', 'ode_frn', 'sde')
SDE_ENDS = ('corrected', 'official')
LAST_SDE_TIME = 0.04  # from which the SDE goes to 0 in one step, official


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Settings of BFM, stage 1."""

  path: str  # noising path: 'linear' or 'trig'
  alignment_weight: float  # lambda of the alignment loss
  label_dropout: float  # probability that a row is trained with the null label


class Rows(NamedTuple):
  """All that the loss needs to know about its rows; row i belongs to segment i mod S."""

  x: jax.Array  # [B, H, W, C] data
  noise: jax.Array  # [B, H, W, C]
  labels: jax.Array  # [B] int32, the null label where dropped
  t: jax.Array  # [B], in the row's segment
  feature: jax.Array | None  # [B, N, F] of the frozen encoder


def linspace(start, stop, count):
  """Returns `count` float32 numbers from start to stop with PyTorch's rounding.

  Source: torch.linspace: multiples of a float32 step from the nearer end. So the same grids, and
  the same comparisons at segment edges, as in the official code.
  """
  start, stop = np.float32(start), np.float32(stop)
  if count == 1:
    return start[None]
  step = (stop - start) / np.float32(count - 1)
  index = np.arange(count)
  rising = start + step * index.astype(np.float32)
  falling = stop - step * (count - 1 - index).astype(np.float32)
  grid = np.where(index < count // 2, rising, falling).astype(np.float32)
  grid[0], grid[-1] = start, stop
  return grid


def segment_edges(segments):
  """Returns [S + 1] float32 falling from 1 (noise) to 0 (data); segment s is [e_{s+1}, e_s]."""
  return linspace(1.0, 0.0, segments + 1)


def segment_of(t, edges):
  """Returns the segment of a time, int32: an inner edge belongs to the segment that starts there.

  Args:
    t: any shape; edges: [S + 1] falling.

  Returns:
    int32 of t's shape, 0 (noisiest) .. S - 1.
  """
  inner = jnp.asarray(edges[1:-1]).reshape((-1,) + (1,) * jnp.ndim(t))
  return jnp.sum(jnp.asarray(t)[None] <= inner, axis=0, dtype=jnp.int32)


def segment_times(rng, edges):
  """Draws t uniform in [e_{s+1}, e_s) for row i of segment s = i mod S: keys [B] -> [B] float32."""
  segment = jnp.arange(rng.shape[0]) % (len(edges) - 1)
  start, end = jnp.asarray(edges)[segment], jnp.asarray(edges)[segment + 1]
  return end + flow.uniform(rng) * (start - end)


def cosine_similarity(a, b):
  """Returns the mean over tokens of the cosine between a and b: [B, N, F] twice -> [B], float32."""
  def normalise(x):
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

  return jnp.mean(jnp.sum(normalise(a) * normalise(b), axis=-1), axis=-1)


def pad_rows(tree, period):
  """Repeats row 0 behind [B, ...] leaves until whole groups of `period` rows are there."""
  def pad(rows):
    missing = -rows.shape[0] % period
    return jnp.concatenate([rows, jnp.repeat(rows[:1], missing, axis=0)]) if missing else rows

  return jax.tree.map(pad, tree)


def loss_of_rows(config, net, params, rows):
  """The loss of a batch whose every random number is given.

    mean (v(x_t, t, y) - v_t)^2 - lambda mean cos(projector(f), feature)

  Any number of rows works: what segments miss in the last group is computed and left out.

  Args:
    config: Config; net: models.blockwise.Blockwise; params: tree.
    rows: Rows.

  Returns:
    (loss [], {metric: []}).
  """
  size, segments = rows.x.shape[0], net.segments
  padded = pad_rows(rows, segments)
  x_t = flow.interpolate(config.path, padded.x, padded.noise, padded.t)
  c = net.condition(params, padded.t, padded.labels)
  f = net.features(params, x_t, c)
  v = net.velocity_by_row(params, x_t, c, f)
  target = flow.velocity_target(config.path, padded.x, padded.noise, padded.t)
  error = flow.row_mean((v - target) ** 2)
  predicted = net.project(params, f[:size])
  shapes.expect_shape('feature', rows.feature, *predicted.shape)
  cosine = jnp.mean(cosine_similarity(predicted, rows.feature))
  velocity_loss = jnp.mean(error[:size])
  return velocity_loss - config.alignment_weight * cosine, {
    'velocity/mse': velocity_loss,
    'alignment/cosine': cosine,
    **segment_means(error, size, segments),
  }


def segment_means(error, size, segments):
  """Returns {'segment_<s>/mse': mean of the first `size` errors [B] whose row is s modulo S}."""
  real = (jnp.arange(error.shape[0]) < size).reshape(-1, segments)
  sums = jnp.sum(jnp.where(real, error.reshape(-1, segments), 0.0), axis=0)
  means = sums / jnp.maximum(jnp.sum(real, axis=0), 1)
  return {f'segment_{s}/mse': means[s] for s in range(segments)}


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
  edges = segment_edges(net.segments)

  def loss(params, batch, rng, step):
    """See `loss_of_rows`; times, noise and dropped labels are drawn per row."""
    del step
    rows = draw_rows(config, edges, num_classes, batch, rng)
    return loss_of_rows(config, net, params, rows)

  return base.Method(
    net.init, loss, make_sampler(config, net, latent_shape, num_classes),
    lambda params: jax.tree.map(lambda _: True, params),
    ('latent', 'label', 'feature'), period=net.segments,
  )


def draw_rows(config, edges, num_classes, batch, rng):
  """Draws the random numbers of a batch: keys [B] -> Rows."""
  rng_time, rng_noise, rng_drop = flow.split_rows(rng, 3)
  dropped = flow.draw_dropped(rng_drop, config.label_dropout)
  return Rows(
    batch['latent'],
    flow.normal_like(rng_noise, batch['latent']),
    jnp.where(dropped, num_classes, batch['label']),
    segment_times(rng_time, edges),
    batch.get('feature'),
  )


class Plan(NamedTuple):
  """The steps of a sampler, numpy arrays [S, n] but for the last: known before anything runs."""

  t: np.ndarray  # time of the network call
  t_next: np.ndarray  # time stepped to
  guided: np.ndarray  # bool, whether guidance acts at t
  noisy: np.ndarray  # bool, whether the step adds noise (SDE)
  extra: tuple | None  # (t, t_next) of one more deterministic step (the official end of the SDE)


def plan_steps(edges, num_steps, guidance, guidance_interval, sampler, sde_end):
  """Lays out the time grid: n steps in each segment, as the official samplers do.

  Args:
    edges: [S + 1]; num_steps: n; guidance: scale; guidance_interval: (low, high), inclusive.
    sampler: 'ode', 'ode_frn' or 'sde'; sde_end: 'corrected' or 'official'.

  Returns:
    Plan.

  Raises:
    ValueError: if an option is unknown or leaves no sensible grid.
  """
  if sampler not in SAMPLERS or sde_end not in SDE_ENDS:
    raise ValueError(
      f"sample.sampler='{sampler}', sample.sde_end='{sde_end}': use one of {', '.join(SAMPLERS)}"
      f' and one of {", ".join(SDE_ENDS)}'
    )
  if num_steps < 1:
    raise ValueError(f'sample.num_steps={num_steps} must be at least 1')
  grids = [linspace(*pair, num_steps + 1) for pair in zip(edges[:-1], edges[1:])]
  if sampler == 'sde':
    if edges[-2] <= LAST_SDE_TIME or num_steps < 2:
      raise ValueError(
        f"sample.sampler='sde' steps from {LAST_SDE_TIME} to 0 at the end: it needs sample."
        f'num_steps of at least 2, found {num_steps}, and fewer than {1 / LAST_SDE_TIME:.0f}'
        f' segments, found {len(edges) - 1}'
      )
    grids[-1] = np.append(linspace(edges[-2], LAST_SDE_TIME, num_steps), np.float32(0))
  t, t_next = (np.stack([grid[part] for grid in grids]) for part in (slice(-1), slice(1, None)))
  if len(guidance_interval) != 2:
    raise ValueError(f'sample.guidance_interval={guidance_interval} must be two times: (low, high)')
  low, high = (np.float32(bound) for bound in guidance_interval)
  noisy = np.full(t.shape, sampler == 'sde')
  official = sampler == 'sde' and sde_end == 'official'
  noisy[-1, -1] &= official
  return Plan(
    t, t_next, (guidance > 1) & (low <= t) & (t <= high), noisy,
    (t[-1, -1], t_next[-1, -1]) if official else None,
  )


def score(path, v, x, t):
  """Returns the score of the marginal at t: (a / a' v - x) / (b^2 - a / a' b' b); t is a scalar.

  On the linear path -((1 - t) v + x) / t.
  """
  a, b, da, db = flow.path_coefficients(path, t)
  ratio = a / da
  return (ratio * v - x) / (b**2 - ratio * db * b)


def step_state(path, sampler, x, v, *, t, t_next, noise):
  """Moves the state one step: Euler, or Euler-Maruyama of the reverse SDE with diffusion w = 2 t.

    x <- x + (v - w score / 2) dt + sqrt(w |dt|) noise

  Args:
    path: noising path; sampler: as in `plan_steps`; x, v, noise: [B, H, W, C]; t, t_next: [].

  Returns:
    [B, H, W, C].
  """
  dt = t_next - t
  if sampler != 'sde':
    return x + dt * v
  drift = v - t * score(path, v, x, t)
  return x + dt * drift + jnp.sqrt(2 * t * jnp.abs(dt)) * noise


def integrate(config, net, params, plan, x, labels, num_classes, *, guidance, sampler, noise_at):
  """Runs a plan from noise to data: one program, a scan over segments and over their steps.

  The velocity block is picked by `lax.switch` on the timestep. 'ode_frn' calls the feature network
  once a segment; after that f = f_start + (t_start - t) / (t_start - t_end) FRN(x_t, t, y).

  Args:
    config: with the field `path`; net: models.blockwise.Blockwise; params: tree.
    plan: Plan.
    x: [B, H, W, C] at t = 1; labels: [B] int32; num_classes: the null label.
    guidance: scale; sampler: as in `plan_steps`.
    noise_at: (step [] int32) -> [B, H, W, C], noise of that step of the SDE.

  Returns:
    [B, H, W, C] float32.
  """
  size, edges = labels.shape[0], segment_edges(net.segments)
  ever, always = bool(plan.guided.any()), bool(plan.guided.all())
  both = jnp.concatenate([labels, jnp.full_like(labels, num_classes)])

  def choose(guided, call):
    """call(2) where guidance acts, else call(1); only what is needed runs."""
    if always or not ever:
      return call(2 if always else 1)
    return jax.lax.cond(guided, lambda: call(2), lambda: call(1))

  def features_at(x, t, guided, network):
    """[B or 2 B, N, D]: `network` on the conditional and, if any step needs it, the null half."""
    def call(halves):
      inputs = jnp.tile(x, (halves, 1, 1, 1))
      c = net.condition(params, jnp.full(halves * size, t), both[: halves * size])
      f = network(params, inputs, c)
      return jnp.pad(f, ((0, size * (2 if ever else 1) - f.shape[0]), (0, 0), (0, 0)))

    return choose(guided, call)

  def velocity_at(x, t, f, guided):
    def call(halves):
      c = net.condition(params, jnp.full(halves * size, t), both[: halves * size])
      v = net.velocity(
        params, jnp.tile(x, (halves, 1, 1, 1)), c, f[: halves * size], segment_of(t, edges)
      )
      return flow.guide(*jnp.split(v, 2), guidance) if halves == 2 else v

    return choose(guided, call)

  def advance(x, now, f):
    t, t_next, guided, noisy, index = now
    v = velocity_at(x, t, f, guided)
    noise = jnp.where(noisy, noise_at(index), 0.0) if sampler == 'sde' else None
    return step_state(config.path, sampler, x, v, t=t, t_next=t_next, noise=noise)

  def segment(x, steps):
    """First step with the full feature network; the others with it, too, or with the FRN."""
    t_start, t_end, any_guided, *steps = steps
    first, rest = [a[0] for a in steps], [a[1:] for a in steps]
    # The FRN's later steps build on these features: the null half is there if any of them needs it.
    both_halves = any_guided if sampler == 'ode_frn' else first[2]
    f_start = features_at(x, first[0], both_halves, net.features)
    x = advance(x, first, f_start)

    def step(x, now):
      t, guided = now[0], now[2]
      if sampler == 'ode_frn':
        kappa = (t_start - t) / (t_start - t_end)
        f = f_start + kappa * features_at(x, t, guided, net.residual)
      else:
        f = features_at(x, t, guided, net.features)
      return advance(x, now, f), None

    return jax.lax.scan(step, x, rest)[0], None

  steps = (plan.t, plan.t_next, plan.guided, plan.noisy, np.arange(plan.t.size, dtype=np.int32))
  steps = tuple(jnp.asarray(a).reshape(plan.t.shape) for a in steps)
  outer = (jnp.asarray(edges[:-1]), jnp.asarray(edges[1:]), jnp.asarray(plan.guided.any(axis=1)))
  x, _ = jax.lax.scan(segment, x, (*outer, *steps))
  if plan.extra is not None:
    t, t_next = (jnp.float32(value) for value in plan.extra)
    guided = jnp.asarray(plan.guided[-1, -1])
    v = velocity_at(x, t, features_at(x, t, guided, net.features), guided)
    x = step_state(
      config.path, sampler, x, v, t=t, t_next=t_next, noise=jnp.zeros_like(x)
    )
  return x


def make_sampler(config, net, latent_shape, num_classes):
  """Returns the `sample` of base.Method; both stages share it."""
  edges = segment_edges(net.segments)

  def sample(params, rng, labels, *, num_steps, guidance, guidance_interval, sampler, sde_end):
    """Generates with S num_steps evaluations (one more with the official end of the SDE).

    A guided evaluation is two passes in one batch; outside the interval it is one.

    Args:
      params: tree.
      rng: keys [B].
      labels: [B] int32.
      num_steps: n, evaluations per segment.
      guidance: classifier-free guidance scale; up to 1 there is none.
      guidance_interval: (low, high), inclusive, on t; guidance acts inside.
      sampler: 'ode'; 'ode_frn' (feature network once a segment, then the FRN); 'sde'.
      sde_end: 'corrected', last step without noise; 'official', it is taken twice.

    Returns:
      [B, H, W, C] float32. The state is float32; official is float64, which differs by about 1e-6.
    """
    if sampler == 'ode_frn' and 'frn' not in params:
      raise ValueError(
        "sample.sampler='ode_frn' needs the residual network of stage 2, these weights have none;"
        " use 'ode' or 'sde', or a workdir of method bfm_frn"
      )
    plan = plan_steps(edges, num_steps, guidance, guidance_interval, sampler, sde_end)
    rng_start, rng_steps = flow.split_rows(rng, 2)
    x = flow.normal_like(rng_start, jnp.zeros((labels.shape[0], *latent_shape)))

    def noise_at(index):
      keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(rng_steps)
      return flow.normal_like(keys, x)

    return integrate(
      config, net, params, plan, x, labels, num_classes,
      guidance=guidance, sampler=sampler, noise_at=noise_at,
    )

  return sample

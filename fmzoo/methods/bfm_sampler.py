"""From noise to data segment by segment: the samplers of both stages of BFM.

Source: arXiv:2510.21167 and its official code, whose SDE takes its last step twice (a choice here).
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmzoo.methods import flow

SAMPLERS = ('ode', 'ode_frn', 'sde')
SDE_ENDS = ('corrected', 'official')
LAST_SDE_TIME = 0.04  # from which the SDE goes to 0 in one step, official


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


def segment_edges(segments, inner=()):
  """Returns [S + 1] float32 falling from 1 (noise) to 0 (data); segment s is [e_{s+1}, e_s].

  Args:
    segments: S.
    inner: the S - 1 times between; () is equal segments, as official.

  Raises:
    ValueError: if `inner` has another length or does not fall between 1 and 0.
  """
  if not inner:
    return linspace(1.0, 0.0, segments + 1)
  edges = np.array([1.0, *inner, 0.0], np.float32)
  if len(edges) != segments + 1 or not (np.diff(edges) < 0).all():
    raise ValueError(
      f'method.edges={inner} must be {segments - 1} falling times between 1 and 0, one fewer than'
      f' model.segments={segments}; or () for equal segments'
    )
  return edges


def segment_of(t, edges):
  """Returns the segment of a time, int32: an inner edge belongs to the segment that starts there.

  Args:
    t: any shape; edges: [S + 1] falling.

  Returns:
    int32 of t's shape, 0 (noisiest) .. S - 1.
  """
  inner = jnp.asarray(edges[1:-1]).reshape((-1,) + (1,) * jnp.ndim(t))
  return jnp.sum(jnp.asarray(t)[None] <= inner, axis=0, dtype=jnp.int32)


class Steps(NamedTuple):
  """The steps of a sampler in order, numpy arrays [T]: known before anything runs."""

  t: np.ndarray  # float32, time of the network call
  t_next: np.ndarray  # float32, time stepped to
  guided: np.ndarray  # bool, whether guidance acts at t
  noisy: np.ndarray  # bool, whether the step adds noise (SDE)
  segment: np.ndarray  # int32


def plan_steps(edges, counts, *, guidance, guidance_interval, sampler, sde_end):
  """Lays out the time grid: equal steps inside each segment, as the official samplers do.

  The SDE ends with one step from 0.04 to 0, without noise; officially it is taken with noise and
  then, from where that led, once more without.

  Args:
    edges: [S + 1].
    counts: steps of each segment, S ints.
    guidance: scale.
    guidance_interval: (low, high), inclusive.
    sampler: 'ode', 'ode_frn' or 'sde'.
    sde_end: 'corrected' or 'official'.

  Returns:
    Steps.

  Raises:
    ValueError: if an option is unknown or leaves no sensible grid.
  """
  _check_plan(edges, counts, guidance_interval, sampler, sde_end)
  grids = [linspace(*pair, n + 1) for *pair, n in zip(edges[:-1], edges[1:], counts)]
  if sampler == 'sde':
    grids[-1] = np.append(linspace(edges[-2], LAST_SDE_TIME, counts[-1]), np.float32(0))
  t = np.concatenate([grid[:-1] for grid in grids])
  t_next = np.concatenate([grid[1:] for grid in grids])
  noisy = np.full(t.shape, sampler == 'sde')
  segment = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
  low, high = (np.float32(bound) for bound in guidance_interval)
  steps = Steps(t, t_next, (guidance > 1) & (low <= t) & (t <= high), noisy, segment)
  if sampler == 'sde' and sde_end == 'official':
    steps = Steps(*(np.append(values, values[-1:]) for values in steps))
  steps.noisy[-1] = False
  return steps


def _check_plan(edges, counts, guidance_interval, sampler, sde_end):
  """Refuses options of `plan_steps` that leave no sensible grid."""
  if sampler not in SAMPLERS or sde_end not in SDE_ENDS:
    raise ValueError(
      f"sample.sampler='{sampler}', sample.sde_end='{sde_end}': use one of {', '.join(SAMPLERS)}"
      f' and one of {", ".join(SDE_ENDS)}'
    )
  if len(guidance_interval) != 2:
    raise ValueError(f'sample.guidance_interval={guidance_interval} must be two times: (low, high)')
  if min(counts) < 1:
    raise ValueError(f'sample.num_steps={min(counts)} must be at least 1')
  if sampler == 'sde' and (edges[-2] <= LAST_SDE_TIME or counts[-1] < 2):
    raise ValueError(
      f"sample.sampler='sde' steps from {LAST_SDE_TIME} to 0 at the end: it needs at least 2 steps"
      f' in the last segment (sample.num_steps), found {counts[-1]}, and a last segment that starts'
      f' above {LAST_SDE_TIME}, found {edges[-2]:.3g}'
    )


def step_counts(segments, num_steps, segment_steps):
  """Returns the steps of each segment: `segment_steps`, or `num_steps` in each if it is empty."""
  if not segment_steps:
    return (num_steps,) * segments
  if len(segment_steps) != segments or not all(isinstance(n, int) and n > 0 for n in segment_steps):
    raise ValueError(
      f'sample.segment_steps={segment_steps} must be {segments} numbers of at least 1, one for each'
      ' of model.segments; or () for sample.num_steps in each'
    )
  return tuple(segment_steps)


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


class Calls(NamedTuple):
  """The network as a sampler calls it: the whole batch at one time, guidance inside.

  Conditions c and features f hold the null half behind the conditional one if any step is guided.
  """

  condition: Callable  # (t []) -> c
  features: Callable  # (x, c, guided []) -> f, by the feature network
  residual: Callable  # (x, c, guided) -> what the FRN adds to f
  velocity: Callable  # (x, c, f, segment [], guided) -> like x, guided


def make_calls(net, params, labels, null, *, guidance, guided):
  """Builds Calls.

  Both halves of a guided evaluation share image and time; the null half shares its condition, too:
  patches, time and the layers of the null condition are computed once.

  Args:
    net: models.blockwise.Blockwise; params: tree.
    labels: [B] int32; null: the null label.
    guidance: scale.
    guided: numpy bools of all steps; only what some step needs is compiled.
  """
  size, ever = labels.shape[0], bool(guided.any())

  def choose(flag, plain, both):
    """Calls both() where guidance acts, else plain(); what no step needs is not compiled."""
    if guided.all() or not ever:
      return both() if ever else plain()
    return jax.lax.cond(flag, both, plain)

  def condition(t):
    """Returns c of all labels at a time, [B, D], or [B + 1, D] with the null label."""
    return net.condition(params, t[None], jnp.append(labels, null) if ever else labels)

  def tokens(network):
    """Wraps the feature network or the FRN: both halves, or one half and room for the other."""

    def call(x, c, flag):
      """Returns [B, N, D] tokens, [2 B, N, D] if any step is guided."""

      def plain():
        """Computes the conditional half."""
        f = network(params, x, c[:size])
        return jnp.pad(f, ((0, size if ever else 0), (0, 0), (0, 0)))

      return choose(flag, plain, lambda: network(params, x, c))

    return call

  def velocity(x, c, f, segment, flag):
    """Returns the velocity of the segment, guided where guidance acts: like x."""

    def both():
      """Computes both halves in one batch."""
      v = net.velocity(params, x, c, f, segment)
      return flow.guide(*jnp.split(v, 2), guidance)

    return choose(flag, lambda: net.velocity(params, x, c[:size], f[:size], segment), both)

  return Calls(condition, tokens(net.features), tokens(net.residual), velocity)


def integrate(path, calls, edges, steps, x, *, sampler, noise_at):
  """Runs the steps from noise to data as one program.

  Args:
    path: noising path.
    calls: Calls.
    edges: [S + 1].
    steps: Steps.
    x: [B, H, W, C] at t = 1.
    sampler: as in `plan_steps`.
    noise_at: (step [] int32) -> [B, H, W, C], noise of that step of the SDE.

  Returns:
    [B, H, W, C] float32.
  """
  indexed = (steps, np.arange(len(steps.t), dtype=np.int32))

  def advance(x, now, c, f):
    """Takes the step `now` with given condition and features."""
    step, index = now
    v = calls.velocity(x, c, f, segment_of(step.t, edges), step.guided)
    noise = jnp.where(step.noisy, noise_at(index), 0.0) if sampler == 'sde' else None
    return step_state(path, sampler, x, v, t=step.t, t_next=step.t_next, noise=noise)

  if sampler == 'ode_frn':
    for run in _runs_of_segments(steps):
      x = _cached(calls, edges, advance, x, jax.tree.map(lambda a, run=run: a[run], indexed))
    return x

  def full(x, now):
    """Takes a step with the feature network."""
    c = calls.condition(now[0].t)
    return advance(x, now, c, calls.features(x, c, now[0].guided)), None

  return jax.lax.scan(full, x, jax.tree.map(jnp.asarray, indexed))[0]


def _runs_of_segments(steps):
  """Yields indices [segments, n] of neighbouring segments with equally many steps."""
  rows = [np.flatnonzero(steps.segment == s) for s in np.unique(steps.segment)]
  for _, run in itertools.groupby(rows, key=len):
    yield np.stack(list(run))


def _cached(calls, edges, advance, x, steps):
  """Runs segments of n steps each, the feature network in the first step of each alone.

    f = f_start + kappa FRN(x_t, t, y),  kappa = (t_start - t) / (t_start - t_end)

  Args:
    calls, edges, x: as in `integrate`; advance: (x, (Steps of one, index), c, f) -> x.
    steps: (Steps, index), numpy arrays [segments, n].
  """

  def segment(x, now):
    """Runs the steps of one segment."""
    first, rest = (jax.tree.map(lambda a, part=part: a[part], now) for part in (0, slice(1, None)))
    t_start, t_end = (jnp.asarray(edges)[first[0].segment + i] for i in (0, 1))
    c = calls.condition(first[0].t)
    # Later steps build on these features: the null half is there if any of them needs it.
    f_start = calls.features(x, c, now[0].guided.any())
    x = advance(x, first, c, f_start)

    def step(x, now):
      """Takes a later step, with the FRN."""
      c = calls.condition(now[0].t)
      kappa = (t_start - now[0].t) / (t_start - t_end)
      f = f_start + kappa * calls.residual(x, c, now[0].guided)
      return advance(x, now, c, f), None

    return jax.lax.scan(step, x, rest)[0], None

  return jax.lax.scan(segment, x, jax.tree.map(jnp.asarray, steps))[0]


def make(config, net, latent_shape, num_classes):
  """Returns the `sample` of base.Method; `config` has the fields `path` and `edges`."""
  edges = segment_edges(net.segments, config.edges)

  def sample(
    params, rng, labels, *, num_steps, segment_steps, guidance, guidance_interval, sampler, sde_end
  ):
    """Generates with S num_steps evaluations, or the sum of segment_steps.

    The official end of the SDE takes one more.

    A guided evaluation is two passes in one batch; outside the interval it is one.

    Args:
      params: tree.
      rng: keys [B].
      labels: [B] int32.
      num_steps: n, evaluations per segment.
      segment_steps: evaluations of each segment, S ints; () is num_steps in each.
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
    steps = plan_steps(
      edges, step_counts(net.segments, num_steps, segment_steps), guidance=guidance,
      guidance_interval=guidance_interval, sampler=sampler, sde_end=sde_end,
    )
    rng_start, rng_steps = flow.split_rows(rng, 2)
    x = flow.normal_like(rng_start, jnp.zeros((labels.shape[0], *latent_shape)))

    def noise_at(index):
      """Returns the noise of a step, from a key of its own."""
      keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(rng_steps)
      return flow.normal_like(keys, x)

    calls = make_calls(
      net, params, labels, num_classes, guidance=guidance, guided=steps.guided
    )
    return integrate(config.path, calls, edges, steps, x, sampler=sampler, noise_at=noise_at)

  return sample

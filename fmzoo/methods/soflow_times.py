"""SoFlow's functions of time: solution coefficients, guidance decay, middle time. No network.

Source: arXiv:2512.15657 and its official code.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

SOLUTIONS = ('euler', 'trig')
SCHEDULES = ('const', 'linear', 'cosine', 'exponent')
MIN_GAP = 1e-4  # least distance of t from s and from the middle time, official
DECAY_RATE = 0.025  # of the guidance decay, official


def solution_coefficients(solution, t, s):
  """Returns a, b of f(x, t, s) = a x + b NN(x, t, s), and their derivatives.

    euler: a = 1,       b = s - t
    trig:  a = cos(u),  b = sin(u),  u = pi (s - t) / 2

  Args:
    solution: 'euler' or 'trig'.
    t: times; s: target times, of the same shape.

  Returns:
    (a, b, da/dt, da/ds, db/dt, db/ds), each like t.
  """
  if solution == 'euler':
    one, zero = jnp.ones_like(t), jnp.zeros_like(t)
    return one, s - t, zero, zero, -one, one
  u, rate = jnp.pi / 2 * (s - t), jnp.pi / 2
  cos, sin = jnp.cos(u), jnp.sin(u)
  return cos, sin, rate * sin, -rate * sin, -rate * cos, rate * cos


def velocity_scale(solution):
  """Returns db/ds at s = t: the velocity is this times NN(x, t, 0)."""
  return 1.0 if solution == 'euler' else math.pi / 2


def guidance_decay(t, decay_time):
  """Returns the factor on the guidance at t: 1 up to decay_time, then 1 - exp(-0.025 q / (1 - q)).

  q = (1 - t) / (1 - decay_time), at most 1 - 1e-6; decay_time 1 gives 1 everywhere.

  Args:
    t: [B]; decay_time: tau.

  Returns:
    [B] in [0, 1].
  """
  if decay_time >= 1:
    return jnp.ones_like(t)
  q = jnp.clip((1 - t) / (1 - decay_time), 0.0, 1 - 1e-6)
  return jnp.where(t <= decay_time, 1.0, 1 - jnp.exp(-DECAY_RATE * q / (1 - q)))


def middle_ratio(schedule, initial, final, step, total_steps):
  """Returns r(k, K), the distance of the middle time from t in units of t - s.

    const: e     linear: i + (e - i) k/K     cosine: e + (i - e)(1 + cos(pi k/K)) / 2
    exponent: i (e / i)^(k/K), from the nearer end

  Args:
    schedule: one of SCHEDULES; initial: i; final: e.
    step: k, traced int32 or a plain int; total_steps: K.

  Returns:
    [] float32; float64 for a plain int.
  """
  traced = isinstance(step, jax.Array)
  xp, number = (jnp, jnp.float32) if traced else (np, np.float64)
  # Steps left are exact whole numbers; 1 - k / K would lose digits where r is smallest.
  done = xp.asarray(step, number) / total_steps
  left = xp.asarray(total_steps - step, number) / total_steps
  if schedule == 'const':
    return xp.asarray(final, number)
  if schedule == 'linear':
    return initial * left + final * done
  if schedule == 'cosine':
    return final + (initial - final) * xp.sin(xp.pi / 2 * left) ** 2
  # A float32 exponential loses digits in proportion to its exponent: half as many from either end.
  log = math.log(final / initial)
  return xp.where(done < left, initial * xp.exp(log * done), final * xp.exp(-log * left))


def middle_time(t, s, ratio):
  """Returns min(t + (s - t) r, t - 1e-4), between s and t: all [B]."""
  return jnp.minimum(t + (s - t) * ratio, t - MIN_GAP)


def consistency_times(s_drawn, t_drawn):
  """Orders a pair of drawn times: t = max(t, 1e-4), s = min(s, t - 1e-4); returns (t, s)."""
  t = jnp.maximum(t_drawn, MIN_GAP)
  return t, jnp.minimum(s_drawn, t - MIN_GAP)

"""SoFlow's solution operator and the sampler of a few calls of it."""

import functools

import jax
import jax.numpy as jnp

from fmzoo.methods import flow, soflow_times


def solve(net, params, x, *, solution, t, s, labels):
  """Moves points from t to s: f(x, t, s) = a x + b NN(x, t, t - s).

  Args:
    net: models.layers.Network with a duration input.
    params: tree.
    solution: 'euler' or 'trig'.
    x: [B, H, W, C] at t; t, s: [B], s <= t; labels: [B] int32.

  Returns:
    [B, H, W, C] at s.
  """
  a, b, *_ = (flow.expand_as(c, x) for c in soflow_times.solution_coefficients(solution, t, s))
  return a * x + b * net.apply(params, x, t, t - s, labels)


def few_step_sample(net, params, x, labels, *, config, steps, renoise=None):
  """Generates with T network calls on the grid 1, 1 - 1/T, ..., 1/T.

  With new noise (the paper): x <- f(x, t_i, 0), then a(t_{i+1}) x + b(t_{i+1}) noise_i, and at last
  f(x, t_{T-1}, 0). Without: x <- f(x, t_i, t_{i+1}) down to 0.

  Args:
    net, params, config: as elsewhere.
    x: [B, H, W, C] noise at t = 1.
    labels: [B] int32.
    steps: T.
    renoise: [T - 1, B, H, W, C] new noise, or None to chain the calls.

  Returns:
    [B, H, W, C].
  """
  times = jnp.asarray([1 - i / steps for i in range(steps + 1)], jnp.float32)

  def move(x, t, s):
    """Moves all rows from t to s."""
    full = functools.partial(jnp.full, labels.shape)
    return solve(
      net, params, x, solution=config.solution, t=full(t), s=full(s), labels=labels
    )

  def step(x, now):
    """One call, and the noise after it."""
    t, t_next, noise = now
    if renoise is None:
      return move(x, t, t_next), None
    a, b, _, _ = flow.path_coefficients(config.path, t_next)
    return a * move(x, t, 0.0) + b * noise, None

  xs = (times[:-2], times[1:-1], jnp.zeros(steps - 1) if renoise is None else renoise)
  x, _ = jax.lax.scan(step, x, xs)
  return move(x, times[-2], 0.0)

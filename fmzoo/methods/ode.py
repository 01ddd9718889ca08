"""Integrators for dx/dt = v(x, t) along a given time grid; each is one `lax.scan`."""

import jax
import jax.numpy as jnp


def _integrate(step, x, times):
  """Folds `step(x, t, t_next)` over consecutive pairs of `times` [T + 1]."""
  times = jnp.asarray(times, jnp.float32)
  pairs = jnp.stack([times[:-1], times[1:]], axis=1)  # [T, 2]
  x, _ = jax.lax.scan(lambda x, pair: (step(x, pair[0], pair[1]), None), x, pairs)
  return x


def euler(velocity, x, times):
  """Integrates with x <- x + (t' - t) v(x, t): first order, T evaluations.

  Args:
    velocity: (x, t []) -> array like x.
    x: state at times[0], any shape, float32.
    times: [T + 1] float32, in the order of integration.

  Returns:
    The state at times[-1], like x.
  """
  return _integrate(lambda x, t, t_next: x + (t_next - t) * velocity(x, t), x, times)


def heun(velocity, x, times):
  """Integrates with Heun's rule (explicit trapezoid): second order, 2 T evaluations.

    k1 = v(x, t);  k2 = v(x + dt k1, t');  x <- x + dt (k1 + k2) / 2

  Args and Returns as `euler`.
  """

  def step(x, t, t_next):
    """Returns x at t_next."""
    dt = t_next - t
    k1 = velocity(x, t)
    k2 = velocity(x + dt * k1, t_next)
    return x + dt * (k1 + k2) / 2

  return _integrate(step, x, times)


INTEGRATORS = {'euler': euler, 'heun': heun}

"""Optimisers as PyTorch defines them, with warm-up, schedule and gradient clipping."""

import math

import jax
import jax.numpy as jnp
import optax

NAMES = ('adamw', 'radam')


def make(optim, steps):
  """Returns the optimiser of section `optim`.

  Args:
    optim: build.Optim.
    steps: at which a cosine schedule ends.

  Returns:
    optax transformation.

  Raises:
    ValueError: if weight decay is asked of RAdam.
  """
  if optim.name == 'radam' and optim.weight_decay:
    raise ValueError(
      f"optim.weight_decay={optim.weight_decay} must be 0 for optim.name='radam'; use 'adamw'"
    )
  if optim.name == 'radam' and not 0.6 < optim.b2 < 1:
    raise ValueError(
      f"optim.b2={optim.b2} must be above 0.6 and below 1 for optim.name='radam', whose"
      " rectification has no meaning elsewhere; use 'adamw'"
    )

  def rate(count):
    """Returns the learning rate of update `count`."""
    warmup = jnp.minimum(1.0, (count + 1) / max(optim.warmup_steps, 1))
    done = jnp.clip((count - optim.warmup_steps) / max(steps - optim.warmup_steps, 1), 0.0, 1.0)
    decay = (1 + jnp.cos(jnp.pi * done)) / 2 if optim.schedule == 'cosine' else 1.0
    return optim.learning_rate * warmup * decay

  if optim.name == 'radam':
    adam = optax.chain(
      scale_by_radam(optim.b1, optim.b2, optim.eps), optax.scale_by_learning_rate(rate)
    )
  else:
    adam = optax.adamw(
      rate, b1=optim.b1, b2=optim.b2, eps=optim.eps, weight_decay=optim.weight_decay
    )
  return optax.chain(optax.clip_by_global_norm(optim.clip_norm), adam) if optim.clip_norm else adam


def scale_by_radam(b1, b2, eps):
  """Rectified Adam as torch.optim.RAdam has it.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   m_hat = m / (1 - b1^k)
    u = m_hat sqrt(1 - b2^k) / (sqrt(v) + eps) sqrt((rho - 4)(rho - 2) rho_inf /
        ((rho_inf - 4)(rho_inf - 2) rho))   where rho = `rectification_length`(k) > 5, else m_hat

  Source: arXiv:1908.03265. optax.radam adds eps after the bias correction of v, and its rho in
  float32 is 0.03 off.

  Args:
    b1, b2: decay of the first and second moment.
    eps: beside sqrt(v).

  Returns:
    optax transformation; its updates are to be subtracted.
  """
  end = 2 / (1 - b2) - 1

  def init(params):
    """Returns zero moments."""
    return optax.ScaleByAdamState(
      jnp.zeros((), jnp.int32), *(jax.tree.map(jnp.zeros_like, params) for _ in range(2))
    )

  def update(grads, state, params=None):
    """Returns (updates, state)."""
    del params
    k = state.count + 1
    mu = optax.tree.update_moment(grads, state.mu, b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2)
    rho = rectification_length(b2, k)
    rectified = (rho - 4) * (rho - 2) * end / ((end - 4) * (end - 2) * rho)
    scale = jnp.sqrt(_one_minus_power(b2, k) * jnp.maximum(rectified, 0.0))
    updates = jax.tree.map(
      lambda m, v: m / _one_minus_power(b1, k) * jnp.where(
        rho > 5, scale / (jnp.sqrt(v) + eps), 1.0
      ),
      mu, nu,
    )
    return updates, optax.ScaleByAdamState(k, mu, nu)

  return optax.GradientTransformation(init, update)


def rectification_length(b2, k):
  """Returns rho_inf - 2 k b2^k / (1 - b2^k), rho_inf = 2 / (1 - b2) - 1, of step k: [] float32.

  Early on the two terms nearly cancel. With u = -k ln b2 and 2 k b2^k / (1 - b2^k) =
  (2 / -ln b2) u / (e^u - 1), the difference is written as the series of u / (e^u - 1) less its 1.
  """
  decay = -math.log(b2)
  end = 2 / (1 - b2) - 1
  u = k * jnp.float32(decay)
  series = u / 2 - u**2 / 12 + u**4 / 720 - u**6 / 30240 + u**8 / 1209600
  early = (end - 2 / decay) + 2 / decay * series
  late = end - 2 / decay * u / jnp.expm1(jnp.minimum(u, 80.0))
  return jnp.where(u < 0.5, early, late)


def _one_minus_power(base, k):
  """1 - base^k without cancellation."""
  if base == 0:
    return jnp.float32(1)
  return -jnp.expm1(k * jnp.float32(math.log(base)))

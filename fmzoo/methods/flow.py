"""The mathematics that flow methods share: path, times, guidance, labels. One equation a function.

Times are [B] float32, images [B, H, W, C]; `expand_as` is the only way a time meets an image.
"""

import jax
import jax.numpy as jnp

PATHS = ('linear', 'trig')


def expand_as(t, x):
  """Returns t [B] as [B, 1, ..., 1] with the rank of x."""
  return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def path_coefficients(path, t):
  """Returns the noising path and its derivatives at t.

    linear: a = 1 - t,           b = t
    trig:   a = cos(pi t / 2),   b = sin(pi t / 2)

  Source: SoFlow, arXiv:2512.15657, and BFM, arXiv:2510.21167 (their 'Trig' and 'cosine' paths are
  the same one).

  Args:
    path: 'linear' or 'trig'.
    t: times in [0, 1], any shape.

  Returns:
    (a, b, da/dt, db/dt), each with the shape and dtype of t.
  """
  if path == 'linear':
    return 1 - t, t, -jnp.ones_like(t), jnp.ones_like(t)
  if path == 'trig':
    u = jnp.pi / 2 * t
    return jnp.cos(u), jnp.sin(u), -jnp.pi / 2 * jnp.sin(u), jnp.pi / 2 * jnp.cos(u)
  raise ValueError(f"path={path!r} is unknown; use one of {', '.join(PATHS)}")


def interpolate(path, x, noise, t):
  """Returns x_t = a(t) x + b(t) noise, [B, H, W, C], for t [B]."""
  a, b, _, _ = path_coefficients(path, expand_as(t, x))
  return a * x + b * noise


def velocity_target(path, x, noise, t):
  """Returns v_t = a'(t) x + b'(t) noise, [B, H, W, C]; noise - x on the linear path."""
  _, _, da, db = path_coefficients(path, expand_as(t, x))
  return da * x + db * noise


def normal_like(rng, x):
  """Draws one standard normal image per row: keys [B], x [B, H, W, C] -> float32 of x's shape."""
  return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], jnp.float32))(rng)


def logit_normal_times(rng, mean, std):
  """Draws t = sigmoid(std z + mean), z ~ N(0, 1): keys [B] -> [B] float32 in (0, 1)."""
  z = jax.vmap(lambda key: jax.random.normal(key, (), jnp.float32))(rng)
  return jax.nn.sigmoid(std * z + mean)


def uniform(rng):
  """Draws one number in [0, 1) per row: keys [B] -> [B] float32."""
  return jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(rng)


def draw_dropped(rng, rate):
  """Draws which rows lose their label: keys [B] -> [B] bool, True with probability `rate`."""
  return uniform(rng) < rate


def split_rows(rng, count):
  """Splits keys [B] into `count` arrays of keys [B]."""
  keys = jax.vmap(lambda key: jax.random.split(key, count))(rng)  # [B, count]
  return tuple(keys[:, i] for i in range(count))


def row_mean(x):
  """Returns the mean over everything but the batch: [B, ...] -> [B]."""
  return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def guide(v_cond, v_null, guidance):
  """Returns v_null + guidance (v_cond - v_null), classifier-free guidance on velocities."""
  return v_null + guidance * (v_cond - v_null)

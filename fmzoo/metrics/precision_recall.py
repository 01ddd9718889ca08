"""Improved precision and recall, from features of reference images and of generated ones.

The features stay on the host; pairs of blocks of them go to the device. The norms are computed in
a program of their own: XLA on CPU would put their sums into the loop over all pairs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class PrecisionRecall(NamedTuple):
  """Both in [0, 1]."""

  precision: float  # share of samples that lie in the ball of any reference point
  recall: float  # share of reference points that lie in the ball of any sample


class _Rows(NamedTuple):
  """A block of features, on the device."""

  x: jax.Array  # [block, D] float32
  norms: jax.Array  # [block] float32, squared
  x_half: jax.Array  # [block, D] float32, rounded to float16
  norms_half: jax.Array  # [block] float32, rounded to float16


def radii(features, *, k=3, half=False, block=10_000):
  """Squared distance of every point to its k-th nearest neighbour.

  The k-th after the nearest, which is the point itself or one equal to it.

  Args:
    features: [N, D] float32 on the host, N above k.
    k: neighbours.
    half: computes distances as the ADM evaluator does: in float16, and a block of pairs that holds
      a number beyond its range in float32. Moves results by up to a few 1e-3.
    block: rows and columns of a block, above k; with `half`, results depend on it.

  Returns:
    [N] float32, squared Euclidean.

  Raises:
    ValueError: if there are too few points, or a number is not finite.
  """
  x = _checked('features', features, k, block)
  starts, size = range(0, len(x), block), min(block, len(x))
  nearest = np.full((len(x), 2 * (k + 1)), np.inf, np.float32)  # found so far, and in a block

  def keep(start, found):
    """Puts what a block found among the nearest of the rows from `start`."""
    rows = nearest[start : start + size]
    rows[:, k + 1 :] = np.asarray(found)[: len(rows)]
    rows.sort(axis=1)

  for start in starts:
    u = _load(x, start, size, half=half)
    for other in range(start, len(x), block):  # a pair of blocks serves the points of both
      v = u if other == start else _load(x, other, size, half=half)
      there, back = _distances(u, v, half=half)
      keep(start, _smallest(there, min(size, len(x) - other), count=k + 1))
      if other != start:
        keep(other, _smallest(back, min(size, len(x) - start), count=k + 1))
  return nearest[:, k].copy()


def precision_recall(reference, samples, *, k=3, half=False, block=10_000, reference_radii=None):
  """Precision and recall of samples: the shares of either set on the manifold of the other.

  The manifold of a set is the union of balls around its points, each as large as the distance to
  the k-th neighbour, the surface included.

  Source: Kynkaanniemi et al., arXiv:1904.06991.

  Args:
    reference: [N, D] float32 on the host, N above k.
    samples: [M, D] float32 on the host, M above k.
    k, half, block: as of `radii`.
    reference_radii: [N] float32 from `radii` with the same arguments, None to compute them.

  Returns:
    PrecisionRecall.

  Raises:
    ValueError: if the shapes do not fit, there are too few points, or a number is not finite.
  """
  reference = _checked('reference', reference, k, block)
  samples = _checked('samples', samples, k, block)
  if reference.shape[1] != samples.shape[1]:
    raise ValueError(
      f'features of width {reference.shape[1]} (reference) and {samples.shape[1]} (samples) have'
      ' no distance; take both from the same network'
    )
  settings = {'k': k, 'half': half, 'block': block}
  if reference_radii is None:
    reference_radii = radii(reference, **settings)
  if np.shape(reference_radii) != reference.shape[:1]:
    raise ValueError(
      f'reference_radii {list(np.shape(reference_radii))} are not those of {len(reference)} points'
    )
  sizes = [min(block, len(x)) for x in (reference, samples)]
  balls = reference_radii, radii(samples, **settings)
  recalled, precise = np.zeros(len(reference), bool), np.zeros(len(samples), bool)
  for i in range(0, len(reference), block):
    u, near_u = _load(reference, i, sizes[0], half=half), _padded(balls[0], i, sizes[0], -1)
    for j in range(0, len(samples), block):
      v, near_v = _load(samples, j, sizes[1], half=half), _padded(balls[1], j, sizes[1], -1)
      inside = _covered(u, v, near_u, near_v, half=half)
      for status, start, found in zip((recalled, precise), (i, j), inside):
        part = status[start : start + block]
        part |= np.asarray(found)[: len(part)]
  return PrecisionRecall(float(precise.mean()), float(recalled.mean()))


def _checked(name, features, k, block):
  """Returns features as float32, or raises ValueError."""
  x = np.asarray(features, np.float32)
  if x.ndim != 2 or k < 1 or len(x) <= k:
    raise ValueError(
      f'{k} nearest neighbours need {name} [N, D] with N of at least {k + 1}, found {list(x.shape)}'
    )
  if block <= k:
    raise ValueError(f'block={block} must be above k={k}')
  if not np.isfinite(x).all():
    raise ValueError(f'{np.sum(~np.isfinite(x))} of {x.size} numbers of {name} are not finite')
  return x


def _padded(x, start, size, value=0):
  """Returns rows from `start`, the last block filled up so that every block has one shape."""
  part = np.asarray(x[start : start + size], np.float32)
  widths = [(0, size - len(part))] + [(0, 0)] * (part.ndim - 1)
  return np.pad(part, widths, constant_values=value)


def _load(x, start, size, *, half):
  """Returns the _Rows from `start`; rows of zeros fill up the last block."""
  return _with_norms(_padded(x, start, size), half=half)


@functools.partial(jax.jit, static_argnames='half')
def _with_norms(x, *, half):
  """Returns the _Rows of features; without `half`, its two parts are empty."""
  norms = jnp.sum(x * x, axis=1)
  if not half:
    return _Rows(x, norms, x[:0], norms[:0])
  x_half = _to_half(x)
  return _Rows(x, norms, x_half, _to_half(jnp.sum(_to_half(x_half * x_half), axis=1)))


@functools.partial(jax.jit, static_argnames='half')
def _distances(u, v, *, half):
  """Squared distances of the rows of two blocks, [U, V], and of the second to the first, [V, U].

  In float32 these are the same. Rounded to half between steps, they depend on which norm comes
  first, and each has its own way back to float32.
  """
  def exact():
    """Returns both in float32, of one product."""
    products = _products(u.x, v.x)
    return (
      _squared(u.norms, products, v.norms, round_to=lambda x: x),
      _squared(v.norms, products.T, u.norms, round_to=lambda x: x),
    )

  if not half:
    return exact()
  products = _to_half(_products(u.x_half, v.x_half))
  there = _squared(u.norms_half, products, v.norms_half, round_to=_to_half)
  back = _squared(v.norms_half, products.T, u.norms_half, round_to=_to_half)
  finite = [jnp.isfinite(x).all() for x in (there, back)]  # rows of padding change neither
  instead = lax.cond(finite[0] & finite[1], lambda: (there, back), exact)
  return tuple(jnp.where(ok, x, y) for ok, x, y in zip(finite, (there, back), instead))


@functools.partial(jax.jit, static_argnames='count')
def _smallest(distances, columns, *, count):
  """Returns the smallest `count` of the first columns [block, count], inf where there are fewer."""
  real = jnp.arange(distances.shape[1]) < columns
  return -lax.top_k(jnp.where(real[None, :], -distances, -jnp.inf), count)[0]


@functools.partial(jax.jit, static_argnames='half')
def _covered(u, v, radii_u, radii_v, *, half):
  """Which of `u` lie in a ball around any of `v`, and which of `v` around any of `u`."""
  distances, _ = _distances(u, v, half=half)
  return (
    jnp.any(distances <= radii_v[None, :], axis=1),
    jnp.any(distances <= radii_u[:, None], axis=0),
  )


def _products(x, y):
  """x y^T in float32."""
  return lax.dot_general(x, y, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)


def _squared(norms, products, others, *, round_to):
  """|u|^2 - 2 u v + |v|^2 in this order, at least 0, each step rounded."""
  left = round_to(norms[:, None] - round_to(2 * products))
  return jnp.maximum(round_to(left + others[None, :]), 0)


def _to_half(x):
  """Rounds float32 to the nearest float16, which a cast there and back need not do in XLA."""
  small = jnp.round(x * 2**24) / 2**24  # below 2^-14, float16 has fixed steps
  return jnp.where(jnp.abs(x) < 2**-14, small, lax.reduce_precision(x, 5, 10))

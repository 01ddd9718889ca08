"""Mean and covariance of vectors that arrive in parts, in float64.

The moments of parts add up to the moments of the whole in any order, so hosts and processes can
each count their own vectors. Sums of squares are centred throughout: the covariance does not
suffer from a mean that is large beside it.
"""

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
  """What is kept of N vectors of width D."""

  count: int  # N
  mean: np.ndarray  # [D] float64; zeros if there is no vector
  scatter: np.ndarray  # [D, D] float64, sum of (x - mean) (x - mean)^T


def empty(width):
  """Returns the moments of no vector of a width."""
  return Moments(0, np.zeros(width), np.zeros((width, width)))


def of(x):
  """Returns the moments of vectors.

  Args:
    x: [N, D], of any real type; computed in float64.

  Raises:
    ValueError: if it has another rank, or a number is not finite.
  """
  x = np.asarray(x, np.float64)
  if x.ndim != 2:
    raise ValueError(f'moments need vectors [N, D], found {list(x.shape)}')
  if not len(x):
    return empty(x.shape[1])
  wrong = ~np.isfinite(x)
  if wrong.any():
    rows = np.flatnonzero(wrong.any(axis=1))
    shown = ', '.join(map(str, rows[:5])) + (', ...' if len(rows) > 5 else '')
    raise ValueError(
      f'{wrong.sum()} of {x.size} numbers are not finite, in {len(rows)} of {len(x)} rows: {shown}'
    )
  mean = x.mean(axis=0)
  centred = x - mean
  return Moments(len(x), mean, centred.T @ centred)


def merge(a, b):
  """Returns the moments of the vectors of two parts.

  S = S_a + S_b + (n_a n_b / n) (m_b - m_a) (m_b - m_a)^T

  Source: Chan, Golub and LeVeque 1983, 'Algorithms for computing the sample variance'.

  Args:
    a, b: Moments of one width.

  Raises:
    ValueError: if the widths differ.
  """
  if a.mean.shape != b.mean.shape:
    raise ValueError(
      f'moments of vectors of width {len(a.mean)} and of width {len(b.mean)} do not add up'
    )
  count = a.count + b.count
  if not count:
    return a
  shift, share = b.mean - a.mean, b.count / count
  scatter = a.scatter + b.scatter
  scatter += np.outer(a.count * share * shift, shift)
  return Moments(count, a.mean + share * shift, scatter)


def covariance(m):
  """Returns the unbiased covariance [D, D], with the denominator N - 1.

  Raises:
    ValueError: if there are fewer than two vectors.
  """
  if m.count < 2:
    raise ValueError(f'a covariance needs 2 vectors or more, found {m.count}')
  return m.scatter / (m.count - 1)

"""Fréchet distance between Gaussians fitted to two sets of vectors, in float64, with its error."""

import math
from typing import NamedTuple

import numpy as np

from fmzoo.metrics import moments

UNIT = 2.0**-53  # rounding of float64
ROUGHEST = 1e-5  # of the largest: what float32 statistics may miss symmetry and positivity by


class Distance(NamedTuple):
  """A squared Fréchet distance."""

  value: float  # at least 0 up to error
  error: float  # what rounding has moved value by, at most


def gaussian_statistics(x):
  """Returns the mean [D] and the unbiased covariance [D, D] of vectors, both float64.

  Args:
    x: [N, D], N at least 2.

  Raises:
    ValueError: if there are too few vectors, or a number is not finite.
  """
  kept = moments.of(x)
  return kept.mean, moments.covariance(kept)


def frechet_distance(mean1, cov1, mean2, cov2):
  """Returns the value of `distance`, a float."""
  return distance(mean1, cov1, mean2, cov2).value


def distance(mean1, cov1, mean2, cov2):
  """Squared Fréchet (Wasserstein-2) distance between two Gaussians.

  W^2 = |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1^1/2 C2 C1^1/2)^1/2

  With C = F F^T the last trace is the sum of the singular values of F1^T F2. So no square root is
  taken of a matrix product, whose zero eigenvalues rounding turns into negative and complex ones:
  the result is real, and covariances without full rank need nothing added to them.

  The error is a bound, from what the factors were measured to miss. Let P be the covariance
  nearest to C, which is C itself unless rounding gave it negative eigenvalues, and r a bound of
  the nuclear norm |C - F F^T|. Then |P - F F^T| <= 2 r, and the Gaussians of P and F F^T are at
  most sqrt(2 r) apart (Powers and Stormer 1970). W is a metric, so it is off by at most
  e = sqrt(2 r1) + sqrt(2 r2), and W^2 by at most e (2 W + e). To this comes what the sums, the
  product F1^T F2 and its singular values round, below (D + 1)^2 units of each term.

  Source: Heusel et al., arXiv:1706.08500, equation 6; Dowson and Landau 1982.

  Args:
    mean1, mean2: [D].
    cov1, cov2: [D, D], symmetric and positive semi-definite.

  Returns:
    Distance.

  Raises:
    ValueError: if a number is not finite, the sizes do not fit, or a covariance is none.
  """
  mean1, cov1 = _checked('1', mean1, cov1)
  mean2, cov2 = _checked('2', mean2, cov2)
  if mean1.shape != mean2.shape:
    raise ValueError(
      f'statistics of vectors of width {len(mean1)} and of width {len(mean2)} have no distance'
    )
  factor1, factor2 = _factor('1', cov1), _factor('2', cov2)
  cross = np.linalg.svd(factor1.T @ factor2, compute_uv=False).sum()
  terms = np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2)
  value = terms - 2 * cross
  rounding = 4 * (len(mean1) + 1) ** 2 * UNIT * terms
  apart = sum(math.sqrt(2 * _residual(c, f)) for c, f in ((cov1, factor1), (cov2, factor2)))
  error = rounding + apart * (2 * math.sqrt(max(value, 0) + rounding) + apart)
  return Distance(float(value), float(error))


def _checked(name, mean, cov):
  """Returns a mean and the symmetric part of a covariance as float64."""
  mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
  if mean.ndim != 1 or not mean.size or cov.shape != 2 * mean.shape:
    raise ValueError(
      f'mean{name} {list(mean.shape)} and cov{name} {list(cov.shape)} are no statistics of'
      ' vectors; they need [D] and [D, D]'
    )
  for kind, x in (('mean', mean), ('cov', cov)):
    wrong = np.sum(~np.isfinite(x))
    if wrong:
      raise ValueError(f'{wrong} of {x.size} numbers of {kind}{name} are not finite')
  worst, largest = np.abs(cov - cov.T).max(), np.abs(cov).max()
  if worst > ROUGHEST * largest:
    raise ValueError(
      f'cov{name} is not symmetric: numbers that should be equal differ by {worst:.3g}, and the'
      f' largest is {largest:.3g}'
    )
  return mean, (cov + cov.T) / 2


def _factor(name, cov):
  """Returns F [D, D] with F F^T = cov."""
  values, vectors = np.linalg.eigh(cov)
  if values[0] < -ROUGHEST * np.abs(values).max():
    raise ValueError(
      f'cov{name} is no covariance: its eigenvalues go from {values[0]:.3g} to {values[-1]:.3g},'
      ' and none may be below 0'
    )
  return vectors * np.sqrt(np.maximum(values, 0))  # rounding makes zeros slightly negative


def _residual(cov, factor):
  """Bounds the nuclear norm |cov - F F^T|, which is up to sqrt(D) times the Frobenius norm.

  Computed as it stands, F F^T would round by more than what is looked for. The leading bits of F
  are so few that their products add up without rounding; the rest is small, and so its rounding.
  """
  size = len(cov)
  bits = (53 - math.ceil(math.log2(size))) // 2
  unit = np.ldexp(1.0, np.frexp(np.abs(factor).max(axis=1, keepdims=True))[1] - bits)
  head = np.rint(factor / unit) * unit
  tail = factor - head
  mixed = tail @ (head + tail / 2).T  # with its transpose, all of F F^T but head head^T
  missed = np.linalg.norm(cov - head @ head.T - (mixed + mixed.T))
  rounded = 4 * (size + 2) * UNIT * np.linalg.norm(tail) * np.linalg.norm(factor)
  return math.sqrt(size) * (missed + rounded)

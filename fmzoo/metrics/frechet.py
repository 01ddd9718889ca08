"""Fréchet distance between Gaussians fitted to two sets of vectors, in float64."""

import numpy as np


def gaussian_statistics(x):
  """Returns the mean [D] and the unbiased covariance [D, D] of vectors, both float64.

  Args:
    x: [N, D], N at least 2.

  Raises:
    ValueError: if there are too few vectors, or a number is not finite.
  """
  x = np.asarray(x, np.float64)
  if x.ndim != 2 or len(x) < 2:
    raise ValueError(f'statistics need vectors [N, D] with N of at least 2, found {x.shape}')
  if not np.isfinite(x).all():
    raise ValueError(f'{np.sum(~np.isfinite(x))} of {x.size} numbers are not finite')
  mean = x.mean(axis=0)
  centred = x - mean
  return mean, centred.T @ centred / (len(x) - 1)


def frechet_distance(mean1, cov1, mean2, cov2):
  """Squared Fréchet (Wasserstein-2) distance between two Gaussians.

  |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1^1/2 C2 C1^1/2)^1/2

  With C = F F^T the last trace is the sum of the singular values of F1^T F2. So no square root is
  taken of a matrix product, whose zero eigenvalues rounding turns into +-1e-16: covariances
  without full rank lose no digits, and the result is real.

  Source: Heusel et al., arXiv:1706.08500, equation 6; Dowson and Landau 1982.

  Args:
    mean1, mean2: [D].
    cov1, cov2: [D, D], symmetric and positive semi-definite.

  Returns:
    Float, at least 0 up to rounding.
  """
  mean1, cov1, mean2, cov2 = (np.asarray(x, np.float64) for x in (mean1, cov1, mean2, cov2))
  cross = np.linalg.svd(_factor(cov1).T @ _factor(cov2), compute_uv=False).sum()
  return float(np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def _factor(cov):
  """Returns F [D, D] with F F^T = cov."""
  values, vectors = np.linalg.eigh(cov)
  return vectors * np.sqrt(np.maximum(values, 0))  # rounding makes zeros slightly negative

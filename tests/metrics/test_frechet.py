"""The Fréchet distance against closed forms and scipy's matrix square root."""

import numpy as np
import pytest
import scipy.linalg

from fmzoo.metrics import frechet


def covariance(rng, size, rank):
  """Returns a random covariance of a given rank."""
  factor = rng.standard_normal((size, rank))
  return factor @ factor.T / rank


def test_statistics_are_the_mean_and_the_unbiased_covariance():
  x = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32) + 3
  mean, cov = frechet.gaussian_statistics(x)
  assert mean.dtype == cov.dtype == np.float64
  np.testing.assert_allclose(mean, np.mean(x, 0, dtype=np.float64), rtol=1e-14)
  np.testing.assert_allclose(cov, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-12)


def test_statistics_survive_a_mean_far_from_zero():
  x = np.random.default_rng(0).standard_normal((1000, 3))
  _, near = frechet.gaussian_statistics(x)
  _, far = frechet.gaussian_statistics(x + 1e6)
  np.testing.assert_allclose(far, near, atol=1e-8)


@pytest.mark.parametrize('x,words', [
  (np.zeros((1, 3)), r'\(1, 3\)'),
  (np.zeros(3), r'\(3,\)'),
  (np.array([[0.0, np.nan], [1.0, np.inf]]), '2 of 4 numbers'),
])
def test_statistics_refuse_what_has_none(x, words):
  with pytest.raises(ValueError, match=words):
    frechet.gaussian_statistics(x)


@pytest.mark.parametrize('rank', [1, 5, 20])
def test_equal_gaussians_have_no_distance(rank):
  rng = np.random.default_rng(rank)
  mean, cov = rng.standard_normal(20), covariance(rng, 20, rank)
  assert abs(frechet.frechet_distance(mean, cov, mean, cov)) < 1e-12 * np.trace(cov) * 20


def test_a_shift_adds_its_square():
  rng = np.random.default_rng(1)
  mean, cov, shift = rng.standard_normal(6), covariance(rng, 6, 6), rng.standard_normal(6)
  np.testing.assert_allclose(
    frechet.frechet_distance(mean, cov, mean + shift, cov), np.sum(shift**2), rtol=1e-12
  )


def test_diagonal_covariances_compare_standard_deviations():
  std1, std2 = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 4.0])
  zero = np.zeros(3)
  np.testing.assert_allclose(
    frechet.frechet_distance(zero, np.diag(std1**2), zero, np.diag(std2**2)),
    np.sum((std1 - std2) ** 2), rtol=1e-12,
  )


def test_agrees_with_the_matrix_square_root():
  rng = np.random.default_rng(2)
  mean1, mean2 = rng.standard_normal((2, 16))
  cov1, cov2 = covariance(rng, 16, 40), covariance(rng, 16, 40)
  root = scipy.linalg.sqrtm(cov1 @ cov2)
  want = np.sum((mean1 - mean2) ** 2) + np.trace(cov1 + cov2 - 2 * root.real)
  have = frechet.frechet_distance(mean1, cov1, mean2, cov2)
  np.testing.assert_allclose(have, want, rtol=1e-9)
  np.testing.assert_allclose(
    frechet.frechet_distance(mean2, cov2, mean1, cov1), have, rtol=1e-12
  )


def test_missing_rank_costs_no_digits():
  """In 200 dimensions, two Gaussians that live in the same 3: the answer is that of the 3."""
  rng = np.random.default_rng(3)
  cov1, cov2 = covariance(rng, 3, 8), covariance(rng, 3, 8)
  basis = np.linalg.qr(rng.standard_normal((200, 3)))[0]
  zero3, zero = np.zeros(3), np.zeros(200)
  want = frechet.frechet_distance(zero3, cov1, zero3, cov2)
  have = frechet.frechet_distance(zero, basis @ cov1 @ basis.T, zero, basis @ cov2 @ basis.T)
  np.testing.assert_allclose(have, want, rtol=1e-10)

"""The Fréchet distance against closed forms and scipy's matrix square root."""

import math

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
  (np.zeros((1, 3)), '2 vectors or more, found 1'),
  (np.zeros(3), r'found \[3\]'),
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


@pytest.mark.parametrize('ranks', [(512, 512), (256, 60), (60, 60)])
def test_agrees_with_scipy_without_full_rank(ranks):
  """SciPy's root of a product without full rank is itself good to 1e-7."""
  rng = np.random.default_rng(ranks)
  cov1, cov2 = (covariance(rng, 256, rank) for rank in ranks)
  zero, traces = np.zeros(256), np.trace(cov1 + cov2)
  have, error = frechet.distance(zero, cov1, zero, cov2)
  root = scipy.linalg.sqrtm(cov1 @ cov2)
  np.testing.assert_allclose(have, traces - 2 * np.trace(root).real, rtol=1e-6)
  assert error < 1e-6 * traces


def rotated(variances):
  """Returns H diag(variances) H^T / D, exact in float64 for integers and Hadamard's H."""
  basis = scipy.linalg.hadamard(len(variances)).astype(np.float64)
  return basis * variances @ basis.T / len(variances)


def exact_cases():
  """Yields pairs of covariances in 64 dimensions with the distance of their Gaussians."""
  rng = np.random.default_rng(4)
  for zeros in (0, 20, 60):
    std1, std2 = rng.integers(1, 9, (2, 64)).astype(np.float64)
    std1[:zeros], std2[zeros // 2 : zeros] = 0, 0
    yield rotated(std1**2), rotated(std2**2), np.sum((std1 - std2) ** 2)
  a, b = rng.integers(-5, 6, (2, 64)).astype(np.float64)
  yield np.outer(a, a), np.outer(b, b), a @ a + b @ b - 2 * abs(a @ b)
  a[:32], b[32:] = 0, 0  # nothing in common: rounding shows at its root
  yield np.outer(a, a), np.outer(b, b), a @ a + b @ b
  yield np.zeros((64, 64)), np.outer(b, b), b @ b


@pytest.mark.parametrize('cov1,cov2,want', [*exact_cases()])
def test_the_error_is_at_least_what_the_value_is_off(cov1, cov2, want):
  zero, shift = np.zeros(64), np.arange(64.0)
  have, error = frechet.distance(zero, cov1, shift, cov2)
  assert abs(have - want - shift @ shift) <= error
  assert error < 1e-6 * (shift @ shift + np.trace(cov1 + cov2))


def test_the_error_covers_a_negative_eigenvalue():
  """A covariance rounded to float32, say: the nearest true one is what the distance is to."""
  zero, cov1, cov2 = np.zeros(2), np.diag([1.0, -1e-7]), np.diag([1.0, 4.0])
  have, error = frechet.distance(zero, cov1, zero, cov2)
  assert abs(have - 4) <= error  # of diag([1, 0])
  assert error > math.sqrt(1e-7)


def test_the_residual_is_that_of_exact_arithmetic():
  """A factor off by 2^-40 in one place is off by that in two products, and by its square in one."""
  factor = rotated(np.arange(1, 65.0) ** 2)
  cov, off = factor @ factor.T, 2.0**-40
  assert frechet._residual(cov, factor) < 1e-12  # below what F F^T may round by
  factor[3, 5] += off
  row = factor[:, 5] * off
  want = math.sqrt(2 * (row @ row) - row[3] ** 2)
  assert 0.999 * want < frechet._residual(cov, factor) / 8 < 1.001 * want


def broken(change):
  """Returns statistics in which `change` has set one thing."""
  values = {'mean1': np.zeros(3), 'cov1': np.eye(3), 'mean2': np.zeros(3), 'cov2': np.eye(3)}
  return values | change


@pytest.mark.parametrize('change,words', [
  ({'cov1': np.ones((3, 4))}, r'mean1 \[3\] and cov1 \[3, 4\]'),
  ({'mean2': np.zeros((3, 1))}, r'mean2 \[3, 1\] and cov2 \[3, 3\]'),
  ({'mean2': np.zeros(2), 'cov2': np.eye(2)}, 'width 3 and of width 2'),
  ({'mean1': np.array([0, np.inf, np.nan])}, '2 of 3 numbers of mean1 are not finite'),
  ({'cov2': np.diag([1, np.nan, 1])}, '1 of 9 numbers of cov2 are not finite'),
  ({'cov1': np.array([[1, 0.5, 0], [0, 2, 0], [0, 0, 1]])}, 'cov1 is not symmetric: .* by 0.5'),
  ({'cov2': np.diag([1, -0.25, 2])}, 'cov2 is no covariance: its eigenvalues go from -0.25 to 2'),
])
def test_what_is_no_covariance_is_refused(change, words):
  with pytest.raises(ValueError, match=words):
    frechet.distance(**broken(change))

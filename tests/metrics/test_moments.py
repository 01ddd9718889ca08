"""Moments of parts against NumPy's of the whole."""

import functools
import itertools

import numpy as np
import pytest

from fmzoo.metrics import frechet, moments

OFFSET = 1e5  # beside standard deviations of 1


def vectors(count=60, width=5, seed=0):
  """Returns correlated vectors whose mean is not 0."""
  rng = np.random.default_rng(seed)
  return rng.standard_normal((count, width)) @ rng.standard_normal((width, width)) + 2


def in_parts(x, parts):
  """Returns the moments of consecutive parts, of one size but for the rest."""
  return [moments.of(part) for part in np.array_split(x, parts)]


def test_mean_and_covariance_are_numpys():
  x = vectors().astype(np.float32)
  have = moments.of(x)
  assert have.count == len(x) and have.mean.dtype == have.scatter.dtype == np.float64
  np.testing.assert_allclose(have.mean, x.mean(axis=0, dtype=np.float64), rtol=1e-13)
  np.testing.assert_allclose(moments.covariance(have), np.cov(x, rowvar=False), rtol=1e-11)


@pytest.mark.parametrize('parts', [1, 2, 5, 60])
def test_parts_add_up(parts):
  x = vectors()
  have = functools.reduce(moments.merge, in_parts(x, parts), moments.empty(x.shape[1]))
  want = moments.of(x)
  assert have.count == want.count
  np.testing.assert_allclose(have.mean, want.mean, rtol=1e-13)
  np.testing.assert_allclose(have.scatter, want.scatter, rtol=1e-11)


def test_nothing_adds_nothing():
  some, none = moments.of(vectors()), moments.empty(5)
  for have in (moments.merge(some, none), moments.merge(none, some)):
    np.testing.assert_equal(have, some)
  np.testing.assert_equal(moments.merge(none, moments.of(np.zeros((0, 5)))), none)


@pytest.mark.parametrize('offset', [0, OFFSET])
def test_the_order_of_parts_does_not_change_the_distance(offset):
  x, other = vectors() + offset, vectors(seed=1) + offset

  def distance(kept):
    want = moments.of(other)
    both = (kept.mean, moments.covariance(kept), want.mean, moments.covariance(want))
    return frechet.frechet_distance(*both)

  whole = distance(moments.of(x))
  assert whole > 1
  for parts in (2, 5):
    for order in itertools.islice(itertools.permutations(in_parts(x, parts)), 0, None, 7):
      np.testing.assert_allclose(distance(functools.reduce(moments.merge, order)), whole, rtol=1e-6)


def test_a_large_mean_does_not_drown_the_covariance():
  x = vectors()
  near, far = (
    functools.reduce(moments.merge, in_parts(x + offset, 5)) for offset in (0, OFFSET)
  )
  np.testing.assert_allclose(far.scatter, near.scatter, rtol=0, atol=1e-8)


def test_arguments_are_left_as_they_were():
  a, b = in_parts(vectors(), 2)
  before = a.mean.copy(), a.scatter.copy(), b.mean.copy(), b.scatter.copy()
  moments.merge(a, b)
  np.testing.assert_equal((a.mean, a.scatter, b.mean, b.scatter), before)


def broken():
  """Vectors of which some are not finite."""
  x = np.zeros((9, 3))
  x[[1, 2, 4, 5, 6, 8], 0] = np.nan
  x[1, 1] = np.inf
  return x


@pytest.mark.parametrize('call,words', [
  (lambda: moments.of(np.zeros(3)), r'vectors \[N, D\], found \[3\]'),
  (lambda: moments.of(broken()), '7 of 27 numbers .* in 6 of 9 rows: 1, 2, 4, 5, 6, ...'),
  (lambda: moments.merge(moments.empty(3), moments.empty(4)), 'width 3 and of width 4'),
  (lambda: moments.covariance(moments.of(np.ones((1, 3)))), '2 vectors or more, found 1'),
])
def test_what_has_no_moments_is_refused(call, words):
  with pytest.raises(ValueError, match=words):
    call()

"""Precision and recall against brute force over all pairs of points."""

import numpy as np
import pytest

from fmzoo.metrics import precision_recall
from tests import metrics_reference as reference

BLOCKS = (7, 16, 10_000)


def whole_numbers(count, width=5, seed=0):
  """Returns points whose squared distances float32 holds exactly, many of them equal."""
  return np.random.default_rng(seed).integers(-2, 3, (count, width)).astype(np.float32)


@pytest.fixture(scope='module')
def sets():
  """Reference and samples, 45 and 38 points, which are no multiples of a block."""
  return whole_numbers(45), whole_numbers(38, seed=1) * np.float32([2, 1, 1, 1, 0]) + 1


def brute_radii(x, k):
  """Returns squared distances [N] to the k-th after the nearest, in float64."""
  return np.sort(reference.squared_distances(x.astype(float), x.astype(float)), axis=1)[:, k]


@pytest.mark.parametrize('block', BLOCKS)
@pytest.mark.parametrize('k', [1, 3, 5])
def test_radii_are_those_of_brute_force(sets, block, k):
  have = precision_recall.radii(sets[0], k=k, block=block)
  assert have.shape == (45,) and have.dtype == np.float32
  np.testing.assert_array_equal(have, brute_radii(sets[0], k))


@pytest.mark.parametrize('block', BLOCKS)
def test_shares_are_those_of_brute_force(sets, block):
  """Ties between a radius and a distance included, since both are exact."""
  have = precision_recall.precision_recall(*sets, block=block)
  want = reference.precision_recall(*(x.astype(float) for x in sets))
  assert 0.1 < want[0] < 0.9 and 0.1 < want[1] < 0.9 and want[0] != want[1]
  assert have == want


@pytest.mark.parametrize('half', [False, True])
def test_radii_known_before_give_the_same(sets, half):
  settings = {'half': half, 'block': 16}
  known = precision_recall.radii(sets[0], **settings)
  have = precision_recall.precision_recall(*sets, **settings, reference_radii=known)
  assert have == precision_recall.precision_recall(*sets, **settings)
  none = precision_recall.precision_recall(*sets, **settings, reference_radii=0 * known - 1)
  assert none.precision == 0 and none.recall == have.recall


def test_duplicates_are_neighbours_at_no_distance():
  x = whole_numbers(5, seed=3)
  copies = np.concatenate([x, x, x, x])
  np.testing.assert_array_equal(precision_recall.radii(copies, block=7), np.zeros(20))
  assert precision_recall.precision_recall(copies, x) == (1, 1)


def test_the_sets_are_not_interchangeable():
  """All samples at one place that is real: precise, and the rest of the reference is not found."""
  real = whole_numbers(40, seed=4)
  have = precision_recall.precision_recall(real, np.tile(real[:1], (10, 1)))
  assert have.precision == 1 and have.recall == np.mean((real == real[0]).all(axis=1)) < 1


def in_blocks(x, y, block):
  """Returns squared distances [N, M] in half precision, each block with its own way back."""
  return np.concatenate([
    np.concatenate([
      reference.squared_distances(x[i : i + block], y[j : j + block], half=True)
      for j in range(0, len(y), block)
    ], axis=1) for i in range(0, len(x), block)
  ])


@pytest.fixture(scope='module')
def mixed():
  """Points of which one in 30 is so far that its blocks do not fit float16."""
  x = np.float32(0.37) * whole_numbers(60, seed=5) + 20
  x[17] += 200
  return x


@pytest.mark.parametrize('block', [11, 16, 10_000])
def test_half_precision_goes_back_to_float32_block_by_block(mixed, block):
  want = np.sort(in_blocks(mixed.astype(float), mixed.astype(float), block), axis=1)[:, 3]
  have = precision_recall.radii(mixed, half=True, block=block)
  np.testing.assert_allclose(have, want, rtol=0, atol=1e-2)  # float32, at norms of 2000
  exact = precision_recall.radii(mixed)
  coarse = np.abs(have - exact) > 0.1
  assert not coarse.any() if block > 60 else 10 < coarse.sum() < 60


@pytest.mark.parametrize('block', [11, 10_000])
def test_shares_in_half_precision_are_those_of_brute_force(mixed, block):
  """Distances to samples, and not only radii, are rounded, and the blocks are decided on."""
  samples = mixed[::-1] + np.float32(0.21)
  have = precision_recall.precision_recall(mixed, samples, half=True, block=block)
  wide = mixed.astype(float), samples.astype(float)
  near = [np.sort(in_blocks(x, x, block), axis=1)[:, 3] for x in wide]
  distances = in_blocks(*wide, block)
  np.testing.assert_allclose(have, (
    np.mean((distances <= near[0][:, None]).any(axis=0)),
    np.mean((distances <= near[1]).any(axis=1)),
  ), rtol=0, atol=1.01 / 60)  # one point, at a tie that float32 breaks


def test_products_beyond_half_precision_leave_no_distance():
  """Norms of 40,000 fit and twice the product does not: the evaluator clips minus infinity at 0."""
  x = np.zeros((6, 2), np.float32)
  x[:, 0], x[:, 1] = 200, np.arange(6)
  np.testing.assert_array_equal(precision_recall.radii(x, half=True), np.zeros(6))
  np.testing.assert_array_equal(precision_recall.radii(x), brute_radii(x, 3))


def test_rounding_to_half_is_numpys():
  sizes = 10.0 ** np.arange(-9, 6)[:, None]
  x = (sizes * np.random.default_rng(0).standard_normal(50)).astype(np.float32).ravel()
  x = np.concatenate([x, [65519, 65520, np.inf, 2**-14, 2**-25]]).astype(np.float32)
  with np.errstate(over='ignore'):
    want = x.astype(np.float16).astype(np.float32)
  np.testing.assert_array_equal(precision_recall._to_half(x), want)


@pytest.mark.parametrize('count', [45, 300])
def test_every_block_runs_the_same_programs(count):
  """So long sets cost no more compilations than two blocks do, the last of them padded."""
  x = whole_numbers(count, width=4)
  precision_recall.precision_recall(x[:45], x[:41], block=23)
  programs = [
    precision_recall._with_norms, precision_recall._distances, precision_recall._smallest,
    precision_recall._covered,
  ]
  before = [program._cache_size() for program in programs]
  precision_recall.precision_recall(x, x[3:], block=23)
  assert [program._cache_size() for program in programs] == before


@pytest.mark.parametrize('call,words', [
  (lambda x: precision_recall.radii(x[:3]), r'features .* N of at least 4, found \[3, 5'),
  (lambda x: precision_recall.radii(x[0]), r'found \[5\]'),
  (lambda x: precision_recall.radii(x, k=0), '0 nearest neighbours'),
  (lambda x: precision_recall.radii(x, block=3), 'block=3 must be above k=3'),
  (lambda x: precision_recall.radii(x / 0 * 0), 'numbers of features are not finite'),
  (lambda x: precision_recall.precision_recall(x, x[:2]), r'samples .* found \[2, 5\]'),
  (lambda x: precision_recall.precision_recall(x[:2], x), r'reference .* found \[2, 5\]'),
  (lambda x: precision_recall.precision_recall(x, x[:, :4]), r'width 5 \(reference\) and 4'),
  (lambda x: precision_recall.precision_recall(x, x, reference_radii=np.ones(9)),
   r'reference_radii \[9\] are not those of 45 points'),
])
@pytest.mark.filterwarnings('ignore::RuntimeWarning')
def test_what_has_no_neighbours_is_refused(sets, call, words):
  with pytest.raises(ValueError, match=words):
    call(sets[0])

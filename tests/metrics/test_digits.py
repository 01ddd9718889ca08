"""The digits metric: perfect for the real ones, and it falls when something is wrong."""

import numpy as np
import pytest

from fmzoo import pictures
from fmzoo.data import digits as data
from fmzoo.metrics import digits, frechet


@pytest.fixture(scope='module')
def real():
  """The real digits as uint8 images, and their labels."""
  images, labels = data.DigitsSource().arrays()
  return pictures.to_uint8(images), labels


def test_real_digits_are_perfect(real):
  result = digits.evaluate_digits(*real)
  assert set(result) == {'accuracy', 'frechet'}
  assert all(isinstance(value, float) for value in result.values())
  assert result['accuracy'] > 0.995
  assert 0 <= result['frechet'] < 1e-3  # what rounding to uint8 leaves


def test_shuffled_labels_are_right_by_chance_only(real):
  images, labels = real
  result = digits.evaluate_digits(images, np.random.default_rng(0).permutation(labels))
  assert 0.05 < result['accuracy'] < 0.15
  assert result['frechet'] < 1e-3


def test_noise_is_bad_in_both(real):
  noise = np.random.default_rng(0).integers(0, 256, (1000, 8, 8, 1), np.uint8)
  result = digits.evaluate_digits(noise, np.arange(1000) % 10)
  assert result['accuracy'] < 0.2
  assert result['frechet'] > 10


def test_one_digit_for_all_is_no_distribution(real):
  images, labels = real
  result = digits.evaluate_digits(images[labels == 3], labels[labels == 3])
  assert result['accuracy'] > 0.99
  assert result['frechet'] > 2


def test_pixels_are_compared_in_minus_one_to_one(real):
  """All-black against all-white would be 64 x 2^2; here black images against the real ones."""
  images, labels = real
  flat = data.DigitsSource().arrays()[0].reshape(len(images), -1).astype(np.float64)
  want = np.sum((flat.mean(0) + 1) ** 2) + np.sum(flat.var(0, ddof=1))
  result = digits.evaluate_digits(np.zeros_like(images), labels)
  np.testing.assert_allclose(result['frechet'], want, rtol=1e-9)


def test_two_halves_of_the_real_digits_are_a_quarter_apart():
  """What 900 perfect samples would get against 900 others: 0.30 +- 0.03, a scale for the rest."""
  flat = data.DigitsSource().arrays()[0].reshape(1797, -1)
  distances = []
  for seed in range(5):
    order = np.random.default_rng(seed).permutation(1797)
    halves = [frechet.gaussian_statistics(flat[part]) for part in np.array_split(order, 2)]
    distances.append(frechet.frechet_distance(*halves[0], *halves[1]))
  assert 0.2 < np.mean(distances) < 0.32, distances


@pytest.mark.parametrize('images,labels,words', [
  (np.zeros((4, 8, 8, 1), np.float32), np.zeros(4, int), 'float32'),
  (np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, int), r'\[4, 8, 8, 3\]'),
  (np.zeros((1, 8, 8, 1), np.uint8), np.zeros(1, int), 'at least 2'),
  (np.zeros((4, 8, 8, 1), np.uint8), np.zeros(5, int), '4 images'),
  (np.zeros((4, 8, 8, 1), np.uint8), np.array([0, 1, 10, 2]), '1 labels.*0 to 9.*10'),
  (np.zeros((4, 8, 8, 1), np.uint8), np.array([0, -1, 10, 2]), '2 labels.*-1'),
])
def test_what_is_no_set_of_digits_is_refused(images, labels, words):
  with pytest.raises(ValueError, match=words):
    digits.evaluate_digits(images, labels)

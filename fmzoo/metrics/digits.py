"""How good generated 8x8 digits are: the right class, and the right distribution."""

import functools

import numpy as np

from fmzoo.data import digits
from fmzoo.metrics import frechet


def evaluate_digits(images, labels):
  """Measures generated digits against the 1,797 real ones.

  accuracy: share of images that a classifier of real digits puts into the class asked for. The
  classifier is a support vector machine, radial basis of gamma 0.001, on pixels 0 .. 16.
  frechet: distance between Gaussians fitted to the 64 pixels in [-1, 1] of real and generated
  images; it falls with the number of images, so compare equal numbers.

  Args:
    images: [N, 8, 8, 1] uint8, N at least 2.
    labels: [N] int, the classes asked for, 0 .. 9.

  Returns:
    {'accuracy': float in [0, 1], 'frechet': float}.

  Raises:
    ValueError: if shapes, type or labels are others.
  """
  images, labels = np.asarray(images), np.asarray(labels)
  _check(images, labels)
  classifier, mean, cov = _reference()
  flat = images.reshape(len(images), -1) / 255
  predicted = classifier.predict(16 * flat)
  return {
    'accuracy': float(np.mean(predicted == labels)),
    'frechet': frechet.frechet_distance(
      mean, cov, *frechet.gaussian_statistics(2 * flat - 1)
    ),
  }


def _check(images, labels):
  """Raises ValueError for what is not a set of labelled digits."""
  if images.dtype != np.uint8 or images.shape[1:] != (8, 8, 1) or len(images) < 2:
    raise ValueError(
      f'the digits metric needs images [N, 8, 8, 1] uint8 with N of at least 2, found'
      f' {list(images.shape)} {images.dtype}'
    )
  if labels.shape != images.shape[:1]:
    raise ValueError(f'{len(images)} images need labels [{len(images)}], found {labels.shape}')
  wrong = labels[~np.isin(labels, np.arange(digits.DigitsSource.num_classes))]
  if wrong.size:
    raise ValueError(f'{wrong.size} labels are not digits 0 to 9, the first is {wrong[0]}')


@functools.cache
def _reference():
  """Returns (classifier, mean [64], covariance [64, 64]) of the real digits."""
  from sklearn import svm

  images, labels = digits.DigitsSource().arrays()
  flat = images.reshape(len(images), -1)
  classifier = svm.SVC(gamma=0.001).fit((flat + 1) * 8, labels)
  return classifier, *frechet.gaussian_statistics(flat)

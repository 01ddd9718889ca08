"""The 1,797 real handwritten 8x8 digits that come with scikit-learn: nothing to download."""

import numpy as np


class DigitsSource:
  """Batches {'latent': [B, 8, 8, 1] float32 in [-1, 1], 'label': [B] int32} of rows by index.

  A pixel of 0 .. 16 becomes pixel / 8 - 1, exactly.
  Source: UCI "Optical Recognition of Handwritten Digits", test set, as in sklearn.load_digits.
  """

  name = 'data.name=digits'
  latent_shape = (8, 8, 1)
  num_classes = 10
  latent_scale = 1.0  # latents are stored, not moments
  feature_shape = ()  # no features are stored; the device computes them

  def __init__(self):
    import sklearn.datasets  # takes a second, and only digits need it

    digits = sklearn.datasets.load_digits()
    self._images = (digits.images[..., None] / 8 - 1).astype(np.float32)
    self._labels = digits.target.astype(np.int32)

  def __len__(self):
    return len(self._labels)

  def batch(self, indices):
    """Returns the rows of indices [B]."""
    return {'latent': self._images[indices], 'label': self._labels[indices]}

  def arrays(self):
    """Returns all rows at once: images [1797, 8, 8, 1] float32, labels [1797] int32; copies."""
    return self._images.copy(), self._labels.copy()

"""The digits as rows: all of them, in range, undistorted."""

import pickle

import numpy as np
import sklearn.datasets

from fmzoo.data import digits, pipeline


def test_rows_are_the_digits_of_scikit_learn():
  source = digits.DigitsSource()
  original = sklearn.datasets.load_digits()
  assert len(source) == 1797
  for index in (0, 5, 1796):
    rows = source.batch(np.array([index]))
    assert sorted(rows) == ['label', 'latent']
    assert rows['latent'].shape == (1, 8, 8, 1) and rows['latent'].dtype == np.float32
    assert rows['label'].shape == (1,) and rows['label'].dtype == np.int32
    np.testing.assert_array_equal((rows['latent'][0, ..., 0] + 1) * 8, original.images[index])
    assert rows['label'] == original.target[index]


def test_arrays_hold_every_row_and_the_whole_range():
  source = digits.DigitsSource()
  images, labels = source.arrays()
  assert images.shape == (1797, *source.latent_shape) and images.dtype == np.float32
  assert labels.shape == (1797,) and labels.dtype == np.int32
  assert images.min() == -1 and images.max() == 1
  assert set(labels) == set(range(source.num_classes))
  np.testing.assert_array_equal(images[17], source.batch([17])['latent'][0])
  images[:] = 0  # a copy: the source keeps its own
  assert source.batch([17])['latent'].max() == 1


def test_source_travels_to_worker_processes():
  source = digits.DigitsSource()
  copy = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(copy.batch([3])['latent'], source.batch([3])['latent'])


def test_digits_go_through_the_pipeline():
  source = digits.DigitsSource()
  pipeline.check_fit(source, latent_shape=(8, 8, 1), num_classes=10, latent_scale=1.0)
  batches = pipeline.batches(source, batch_size=128, seed=0)
  batch = next(batches)
  batches.close()
  assert batch['latent'].shape == (128, 8, 8, 1) and batch['latent'].dtype == np.float32
  assert batch['label'].shape == (128,) and batch['label'].dtype == np.int32

"""Streaming changes nothing: batches of any length, parts merged, images counted from any first."""

import jax
import numpy as np
import pytest

from fmzoo.metrics import activations, moments

IMAGES = np.random.default_rng(0).integers(0, 256, (100, 4, 4, 1), np.uint8)


def program(images):
  """Stands for Inception: activations that tell one image from another."""
  flat = images.reshape(len(images), -1).astype(np.float32)
  probabilities = np.asarray(jax.nn.softmax(flat[:, 8:12] / 50))
  return flat[:, :6], flat[:, 4:8], probabilities


def measure(batches, **options):
  return activations.measure(program, batches, **{'batch_size': 16, **options})


def assert_close(found, expected):
  def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-9)

  jax.tree.map(close, found, expected)


@pytest.fixture
def small_chunks(monkeypatch):
  monkeypatch.setattr(activations, 'CHUNK', 32)


def test_statistics_are_those_of_the_images(small_chunks):
  found = measure([IMAGES])
  pool, spatial, _ = program(IMAGES)
  np.testing.assert_allclose(moments.covariance(found.pool), np.cov(pool, rowvar=False), rtol=1e-10)
  np.testing.assert_allclose(found.spatial.mean, spatial.mean(axis=0, dtype=float), rtol=1e-12)
  np.testing.assert_array_equal(found.features, pool)


@pytest.mark.parametrize('lengths', [(1, 99), (17, 16, 67), (33, 33, 34)])
def test_lengths_of_batches_do_not_matter(small_chunks, lengths):
  found = measure(np.split(IMAGES, np.cumsum(lengths)[:-1]), batch_size=7)
  assert_close(found, measure([IMAGES]))


def test_parts_of_two_hosts_are_the_whole(small_chunks):
  first, second = measure([IMAGES[:45]], every=4), measure([IMAGES[45:]], first=45, every=4)
  found, whole = activations.merge(first, second), measure([IMAGES], every=4)
  assert_close(found, whole)
  np.testing.assert_array_equal(whole.features, program(IMAGES)[0][::4])


def test_features_that_are_not_kept_take_no_memory(small_chunks):
  keeper = activations.Keeper(0, 4)
  keeper.add(*program(IMAGES))
  keeper._flush()
  assert all(features.base is None for features in keeper._features)


def test_padding_is_not_counted():
  assert measure([IMAGES[:3]]).pool.count == 3


def test_every_image_is_told_once():
  told = []
  measure([IMAGES], advance=told.append)
  assert sum(told) == len(IMAGES) and max(told) == 16


def test_an_image_whose_activations_are_not_finite_is_named(small_chunks):
  def broken(images):
    pool, spatial, probabilities = program(images)
    return pool, np.where(images[:, 0, 0] == IMAGES[70, 0, 0], np.nan, spatial), probabilities

  first = int(np.argmax(IMAGES[:, 0, 0, 0] == IMAGES[70, 0, 0, 0]))
  with pytest.raises(ValueError, match=f'not finite, the first is image {first};'):
    activations.measure(broken, [IMAGES], batch_size=16)


def test_nothing_to_measure_is_refused():
  with pytest.raises(ValueError, match='no images to measure'):
    measure([])

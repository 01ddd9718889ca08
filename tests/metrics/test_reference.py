"""Statistics of real images: three forms are read, one is written, all others are refused."""

import json
import re

import numpy as np
import pytest

from fmzoo import hashes
from fmzoo.metrics import activations, inception_score, moments, reference

WIDTHS = {'pool': 6, 'spatial': 4}
RNG = np.random.default_rng(0)


def statistics(width):
  x = RNG.standard_normal((30, width))
  return x.mean(axis=0), np.cov(x, rowvar=False)


POOL, SPATIAL = statistics(6), statistics(4)
ADM = {'mu': POOL[0], 'sigma': POOL[1], 'mu_s': SPATIAL[0], 'sigma_s': SPATIAL[1]}
IMAGES = np.zeros((5, 8, 8, 3), np.uint8)


def found(count=30, every=1):
  pool, spatial = RNG.standard_normal((count, 6)), RNG.standard_normal((count, 4))
  score = inception_score.of(np.full((count, 3), 1 / 3), first=0)
  features = pool[::every].astype(np.float32)
  return activations.Activations(moments.of(pool), moments.of(spatial), score, features)


def written(folder, **arrays):
  np.savez(folder / 'x.npz', **arrays)
  return folder / 'x.npz'


def assert_same(gaussian, expected):
  np.testing.assert_array_equal(gaussian.mean, expected[0])
  np.testing.assert_array_equal(gaussian.covariance, expected[1])


def test_adm_statistics_come_with_the_images(tmp_path):
  known = reference.read(written(tmp_path, arr_0=IMAGES, **ADM), WIDTHS)
  assert_same(known.pool, POOL)
  assert_same(known.spatial, SPATIAL)
  assert known.has_images and known.features is None
  assert known.protocol == {
    'file': 'x.npz', 'sha256': hashes.file_sha256(tmp_path / 'x.npz')}


@pytest.mark.parametrize('names', [('mu', 'sigma'), ('ref_mu', 'ref_sigma')])
def test_statistics_without_spatial_features(tmp_path, names):
  known = reference.read(written(tmp_path, **dict(zip(names, POOL))), WIDTHS)
  assert_same(known.pool, POOL)
  assert known.spatial is None and known.features is None and not known.has_images


def test_images_alone_have_no_statistics_yet(tmp_path):
  known = reference.read(written(tmp_path, arr_0=IMAGES), WIDTHS)
  assert known.pool is None and known.spatial is None and known.has_images


def test_what_is_written_is_read(tmp_path):
  made = found()
  reference.write(tmp_path / 'a' / 'x.npz', made, {'source': 'here'})
  known = reference.read(tmp_path / 'a' / 'x.npz', WIDTHS)
  assert_same(known.pool, (made.pool.mean, moments.covariance(made.pool)))
  assert_same(known.spatial, (made.spatial.mean, moments.covariance(made.spatial)))
  np.testing.assert_array_equal(known.features, made.features)
  assert known.protocol['source'] == 'here' and not known.has_images
  assert [file.name for file in (tmp_path / 'a').iterdir()] == ['x.npz']


def test_what_is_there_is_never_replaced(tmp_path):
  (tmp_path / 'x.npz').write_bytes(b'mine')
  with pytest.raises(ValueError, match='x.npz is there already'):
    reference.write(tmp_path / 'x.npz', found(), {})
  assert (tmp_path / 'x.npz').read_bytes() == b'mine'


@pytest.mark.parametrize('count,most', [(9_999, 1), (10_000, 1), (10_001, 2), (50_000, 5)])
def test_features_of_at_most_ten_thousand_images(count, most):
  assert reference.every(count) == most
  assert len(range(0, count, most)) <= reference.MOST_FEATURES


BAD = {
  'other width': ({**ADM, 'mu': np.zeros(5)}, r'mu is float64\[5\], expected floating point \[6\]'),
  'covariance of another width': (
    {**ADM, 'sigma_s': np.eye(6)}, r'sigma_s is float64\[6, 6\], expected floating point \[4, 4\]'),
  'no numbers': ({**ADM, 'mu_s': np.array([0, np.nan, 0, np.inf])}, '2 numbers of mu_s are not'),
  'integers': ({**ADM, 'mu': np.zeros(6, int)}, 'mu is int64'),
  'something else': ({'weights': np.zeros(3)}, r"holds \['weights'\]; expected an .npz with arr_0"),
  'a mean alone': ({'mu': POOL[0]}, r"holds \['mu'\]"),
  'a protocol that is none': ({**ADM, 'protocol': '[1]'}, r'its protocol is \[1\], expected'),
  'features that are a number': ({**ADM, 'pool': np.float32(1)}, r'pool is float32\[\], expected'),
  'features of too few images': (
    {**ADM, 'pool': np.zeros((3, 6), np.float32)}, r'pool is float32\[3, 6\], expected .*\[4, 6\]'),
  'features of another width': (
    {**ADM, 'pool': np.zeros((3, 7), np.float32)}, r'pool is float32\[3, 7\], expected .*\[4, 6\]'),
}


@pytest.mark.parametrize('arrays,words', BAD.values(), ids=BAD)
def test_what_is_no_reference_is_refused(tmp_path, arrays, words):
  with pytest.raises(ValueError, match=words) as raised:
    reference.read(written(tmp_path, **arrays), WIDTHS)
  assert str(tmp_path / 'x.npz') in str(raised.value) and '\n' not in str(raised.value)


def test_a_file_cut_short_is_refused(tmp_path):
  path = written(tmp_path, **ADM)
  path.write_bytes(path.read_bytes()[:-50])
  with pytest.raises(ValueError, match='x.npz is no whole .npz'):
    reference.read(path, WIDTHS)


def test_a_missing_file_says_where_it_is_from(tmp_path):
  with pytest.raises(ValueError, match='VIRTUAL_imagenet256_labeled.npz at https://'):
    reference.read(tmp_path / 'x.npz', WIDTHS)


def test_pickles_are_not_opened(tmp_path):
  path = written(tmp_path, mu=np.array([object()], dtype=object), sigma=POOL[1])
  with pytest.raises(ValueError, match='cannot be read'):
    reference.read(path, WIDTHS)


def test_protocol_is_plain_json(tmp_path):
  reference.write(tmp_path / 'x.npz', found(), {'n': 3})
  with np.load(tmp_path / 'x.npz', allow_pickle=False) as arrays:
    assert json.loads(str(arrays['protocol'])) == {'n': 3}
    assert not re.search('pool|mu', str(arrays['protocol']))

"""Metrics against numbers of the official evaluator (tests/golden/soflow/README.md)."""

import re

import numpy as np
import pytest

from fmzoo.metrics import frechet, inception_score, precision_recall
from tests import golden_files as files

RELATIVE, RADII, HALF_SHARE, HALF_RADII = 1e-5, 1e-5, 0.005, 0.01  # limits of the README there
SETS = {'ref', 'sample'}
INPUTS = {'ref_pool', 'sample_pool', 'ref_spatial', 'sample_spatial', 'softmax_w', 'scale_big'}
LARGEST_HALF = 65504


@pytest.fixture(scope='module', params=['golden_root', 'written_root'])
def golden(request):
  return files.Arrays(request.getfixturevalue(request.param) / 'soflow' / 'metrics.npz')


def probabilities(golden):
  """Softmax of the logits without bias, of the samples."""
  logits = golden['sample_pool'].astype(np.float64) @ golden['softmax_w']
  weights = np.exp(logits - logits.max(axis=1, keepdims=True))
  return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize('name', sorted(SETS))
def test_statistics(golden, name):
  mean, cov = frechet.gaussian_statistics(golden[f'{name}_pool'])
  files.close(mean, golden[f'mu_{name}'], RELATIVE, 'mean')
  files.close(cov, golden[f'sigma_{name}'], RELATIVE, 'covariance')


@pytest.mark.parametrize('name,kind', [('fid', 'pool'), ('sfid', 'spatial')])
def test_distances(golden, name, kind):
  both = (frechet.gaussian_statistics(golden[f'{part}_{kind}']) for part in ('ref', 'sample'))
  (mean1, cov1), (mean2, cov2) = both
  value, error = frechet.distance(mean1, cov1, mean2, cov2)
  np.testing.assert_allclose(value, golden[name], rtol=RELATIVE)
  assert error < 1e-6 * np.trace(cov1 + cov2)


def test_distance_to_itself(golden):
  mean, cov = frechet.gaussian_statistics(golden['ref_pool'])
  value = frechet.frechet_distance(mean, cov, mean, cov)
  np.testing.assert_allclose(value, golden['fid_self'], rtol=0, atol=RELATIVE * np.trace(cov))


def test_class_probabilities(golden):
  """What the score below starts from is what the evaluator starts from."""
  (name,) = golden.names('softmax_probs_first')
  rows = int(name.removeprefix('softmax_probs_first'))
  files.close(probabilities(golden)[:rows], golden[name], RELATIVE, name)


def test_inception_scores(golden):
  names, p = golden.names('is_split'), probabilities(golden)
  assert names
  for name in names:
    kept = inception_score.of(p, 0, size=int(name.removeprefix('is_split')))
    score = inception_score.score(kept).mean
    np.testing.assert_allclose(score, golden[name], rtol=RELATIVE, err_msg=name)


def test_radii(golden):
  names = golden.names('radii_')
  assert {'radii_ref', 'radii_ref_f32'} <= set(names)
  for name in names:
    part, exact = re.fullmatch(r'radii_(\w+?)(_f32)?', name).groups()
    have = precision_recall.radii(golden[f'{part}_pool'], half=not exact)
    limit = RADII if exact else HALF_RADII
    np.testing.assert_allclose(have, golden[name][:, 0], rtol=limit, err_msg=name)


@pytest.mark.parametrize('end,half', [('', True), ('_f32', False), ('_big', True)])
def test_precision_and_recall(golden, end, half):
  """In float16 to its tolerance, in float32 and where float16 overflows exactly."""
  scale = np.float32(golden['scale_big'] if end == '_big' else 1)
  have = precision_recall.precision_recall(
    scale * golden['ref_pool'], scale * golden['sample_pool'], half=half
  )
  want = golden[f'precision{end}'], golden[f'recall{end}']
  np.testing.assert_allclose(have, want, rtol=0, atol=0 if end else HALF_SHARE)


def test_the_big_features_are_beyond_float16(golden):
  assert golden['max_sqnorm_big'] > LARGEST_HALF


def test_every_array_is_an_input_or_was_checked(golden):
  """Runs after the tests above in this file, which mark what they look at."""
  assert not set(golden.unused()) - INPUTS

"""Inception score: closed forms, and parts that add up to the whole."""

import functools
import random

import numpy as np
import pytest
import scipy.special

from fmzoo.metrics import inception_score


def distributions(count=70, classes=6, seed=0):
  """Returns probabilities [count, classes], some of them 0."""
  p = np.random.default_rng(seed).dirichlet(np.full(classes, 0.3), count)
  p[::5, 2] = 0
  return p / p.sum(axis=1, keepdims=True)


def test_images_of_one_class_each_score_the_number_of_classes():
  kept = inception_score.of(np.eye(4)[np.arange(20) % 4], 0)
  np.testing.assert_allclose(inception_score.score(kept), (4, 0), rtol=1e-14, atol=0)


def test_images_that_are_all_alike_score_one():
  kept = inception_score.of(np.tile(distributions(1), (12, 1)), 0)
  np.testing.assert_allclose(inception_score.score(kept), (1, 0), rtol=1e-14, atol=0)


def test_splits_are_consecutive_and_count_equally():
  """The last of them is shorter."""
  p = distributions(70)
  want = [
    np.exp(scipy.special.rel_entr(q, q.mean(axis=0)).sum(axis=1).mean())
    for q in (p[:30], p[30:60], p[60:])
  ]
  have = inception_score.score(inception_score.of(p, 0, size=30))
  np.testing.assert_allclose(have, (np.mean(want), np.std(want)), rtol=1e-12)


def test_a_split_holds_5000_images_unless_said_otherwise():
  kept = inception_score.of(np.tile([0.5, 0.5], (5001, 1)), 0)
  assert list(kept.count) == [5000, 1]


@pytest.mark.parametrize('batch', [1, 7, 35, 70])
def test_parts_in_any_order_add_up(batch):
  p = distributions(70)
  parts = [inception_score.of(p[i : i + batch], i, size=30) for i in range(0, len(p), batch)]
  random.Random(0).shuffle(parts)
  kept = functools.reduce(inception_score.merge, parts, inception_score.empty(6, size=30))
  want = inception_score.of(p, 0, size=30)
  assert list(kept.count) == list(want.count)
  for have, whole in zip(kept[2:], want[2:]):
    np.testing.assert_allclose(have, whole, rtol=1e-12)
  np.testing.assert_allclose(
    inception_score.score(kept), inception_score.score(want), rtol=1e-12
  )


def test_half_precision_probabilities_are_accepted():
  p = distributions().astype(np.float16)
  have = inception_score.score(inception_score.of(p, 0)).mean
  want = inception_score.score(inception_score.of(distributions(), 0)).mean
  np.testing.assert_allclose(have, want, rtol=1e-3)


def part(first, count, size=10):
  """Returns what is kept of some images of two classes."""
  return inception_score.of(np.full((count, 2), 0.5), first, size=size)


@pytest.mark.parametrize('call,words', [
  (lambda: inception_score.score(inception_score.empty(3)), 'needs images, found none'),
  (lambda: inception_score.score(part(12, 4)), 'split 0 of 2 holds 0 images, expected 10'),
  (lambda: inception_score.score(inception_score.merge(part(0, 9), part(10, 1))),
   'split 0 of 2 holds 9 images, expected 10'),
  (lambda: inception_score.score(inception_score.merge(part(0, 10), part(4, 3))),
   'split 0 of 1 holds 13 images, expected 10; .* counted twice'),
  (lambda: inception_score.merge(part(0, 1), part(1, 1, size=20)),
   '2 classes in splits of 10 and of 2 classes in splits of 20'),
  (lambda: inception_score.merge(part(0, 1), inception_score.empty(3, size=10)), '3 classes'),
  (lambda: inception_score.of(np.ones(3), 0), r'\[B, classes\], found \[3\]'),
  (lambda: inception_score.of([[0.5, 0.5], [3.0, -1.0]], 0), 'row 1 adds up to 2, its least is -1'),
  (lambda: inception_score.of([[0.5, np.nan]], 0), '1 of 1 rows .* nan'),
  (lambda: part(-1, 2), 'first=-1'),
  (lambda: part(0, 2, size=0), 'size=0'),
])
def test_what_has_no_score_is_refused(call, words):
  with pytest.raises(ValueError, match=words):
    call()

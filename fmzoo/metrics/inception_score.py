"""Inception score over splits of consecutive images, from class probabilities.

What is kept of the images adds up, so hosts may each count some of them, in any order. The mean
over splits depends on which image is in which: every batch says where in the whole it stands.
"""

from typing import NamedTuple

import numpy as np

SPLIT = 5000  # images
SLACK = 1e-3  # of a sum of probabilities, rounded to bfloat16 at the worst


class Splits(NamedTuple):
  """What is kept of the probabilities p of images, by split of `size` consecutive images."""

  size: int  # images of every split but the last
  count: np.ndarray  # [S] int64, images seen
  total: np.ndarray  # [S, classes] float64, sum of p
  p_log_p: np.ndarray  # [S] float64, sum of p log p over images and classes; 0 log 0 = 0


class Score(NamedTuple):
  """Inception score, 1 .. classes."""

  mean: float  # over splits; a shorter last one counts like the others
  std: float  # over splits, with the denominator S


def empty(classes, *, size=SPLIT):
  """Returns what is kept of no image."""
  return Splits(size, np.zeros(0, np.int64), np.zeros((0, classes)), np.zeros(0))


def of(probabilities, first, *, size=SPLIT):
  """Returns what is kept of consecutive images.

  Args:
    probabilities: [B, classes], each row adds up to 1.
    first: the first image's index in the whole set.
    size: images of a split.

  Returns:
    Splits, with rows of zeros for splits before that of the first image.

  Raises:
    ValueError: if a row is no distribution, or first or size are out of range.
  """
  p = np.asarray(probabilities, np.float64)
  if first < 0 or size < 1:
    raise ValueError(f'first={first} and size={size} must be at least 0 and 1')
  _check(p)
  if not len(p):
    return empty(p.shape[1], size=size)
  logs = np.log(p, out=np.zeros_like(p), where=p > 0)
  split = (first + np.arange(len(p))) // size
  kept = _padded(empty(p.shape[1], size=size), split[-1] + 1)
  np.add.at(kept.count, split, 1)
  np.add.at(kept.total, split, p)
  np.add.at(kept.p_log_p, split, np.sum(p * logs, axis=1))
  return kept


def merge(a, b):
  """Returns what is kept of the images of two parts.

  Raises:
    ValueError: if the parts have splits of other sizes, or other classes.
  """
  ours, theirs = (f'{x.total.shape[1]} classes in splits of {x.size}' for x in (a, b))
  if ours != theirs:
    raise ValueError(f'inception scores of {ours} and of {theirs} do not add up')
  splits = max(len(a.count), len(b.count))
  a, b = _padded(a, splits), _padded(b, splits)
  return Splits(a.size, a.count + b.count, a.total + b.total, a.p_log_p + b.p_log_p)


def score(kept):
  """Returns the inception score.

  exp(mean over images of KL(p || q)) with q the mean of p, for each split; then mean and standard
  deviation over splits.

  Source: Salimans et al., arXiv:1606.03498, section 4; splits as in the ADM evaluator.

  Args:
    kept: Splits of all images.

  Returns:
    Score.

  Raises:
    ValueError: if images are missing or were counted twice.
  """
  if not len(kept.count):
    raise ValueError('an inception score needs images, found none')
  expected = np.full(len(kept.count), kept.size)
  expected[-1] = np.clip(kept.count[-1], 1, kept.size)
  wrong = np.flatnonzero(kept.count != expected)
  if wrong.size:
    raise ValueError(
      f'split {wrong[0]} of {len(expected)} holds {kept.count[wrong[0]]} images, expected'
      f' {expected[wrong[0]]}; images are missing or were counted twice'
    )
  count = kept.count[:, None]
  q = kept.total / count
  logs = np.log(q, out=np.zeros_like(q), where=q > 0)
  scores = np.exp(kept.p_log_p / kept.count - np.sum(q * logs, axis=1))
  return Score(float(scores.mean()), float(scores.std()))


def _check(p):
  """Raises ValueError for rows that are no probabilities."""
  if p.ndim != 2:
    raise ValueError(f'an inception score needs probabilities [B, classes], found {list(p.shape)}')
  wrong = np.flatnonzero(~((p >= 0).all(axis=1) & (np.abs(p.sum(axis=1) - 1) <= SLACK)))
  if wrong.size:
    row = p[wrong[0]]
    raise ValueError(
      f'{wrong.size} of {len(p)} rows are no probabilities; row {wrong[0]} adds up to'
      f' {row.sum():.6g}, its least is {row.min():.3g}; pass the softmax of the logits'
    )


def _padded(kept, splits):
  """Returns a copy with rows of zeros up to a number of splits."""
  more = splits - len(kept.count)
  return kept._replace(
    count=np.pad(kept.count, (0, more)),
    total=np.pad(kept.total, ((0, more), (0, 0))),
    p_log_p=np.pad(kept.p_log_p, (0, more)),
  )

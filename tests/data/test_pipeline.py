"""Batches are a function of seed and step, and the same rows however many processes share them."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from fmzoo import command_line
from fmzoo.data import pipeline


class Rows:
  """Row i is {'latent': [2, 2, 1] full of i, 'label': i}; remembers what was read."""

  name, latent_shape, num_classes, latent_scale = 'the toy rows', (2, 2, 1), 10, 1.0
  feature_shape = ()

  def __init__(self, count):
    self.count, self.read = count, []

  def __len__(self):
    return self.count

  def batch(self, indices):
    self.read.extend(indices)
    latent = np.broadcast_to(indices[:, None, None, None], (len(indices), 2, 2, 1))
    return {'latent': latent.astype(np.float32), 'label': indices.astype(np.int32)}


class Broken(Rows):
  """Rows of which one cannot be read."""

  def batch(self, indices):
    if 3 in indices:
      raise ValueError('row 3 is broken')
    return super().batch(indices)


def take(number, count=10, batch_size=4, seed=0, **options):
  """Returns the labels of the first batches."""
  batches = pipeline.batches(Rows(count), batch_size=batch_size, seed=seed, **options)
  labels = [batch['label'] for batch in itertools.islice(batches, number)]
  batches.close()
  return np.stack(labels)


def test_rows_are_stacked_into_named_arrays():
  batches = pipeline.batches(Rows(10), batch_size=4, seed=0)
  batch = next(batches)
  batches.close()
  assert sorted(batch) == ['label', 'latent']
  assert batch['latent'].shape == (4, 2, 2, 1) and batch['latent'].dtype == np.float32
  assert batch['label'].shape == (4,) and batch['label'].dtype == np.int32
  np.testing.assert_array_equal(batch['latent'][:, 0, 0, 0], batch['label'])


def test_an_epoch_holds_each_row_once_and_the_next_has_another_order():
  epochs = take(15).reshape(-1)[:60].reshape(6, 10)  # batches of 4 cross the borders
  for epoch in epochs:
    assert sorted(epoch) == list(range(10))
  assert len({tuple(epoch) for epoch in epochs}) == 6


def test_seed_decides_the_order():
  np.testing.assert_array_equal(take(10, seed=3), take(10, seed=3))
  assert (take(10, seed=3) != take(10, seed=4)).any()


def test_unshuffled_rows_come_in_their_own_order():
  labels = take(5, shuffle=False)
  np.testing.assert_array_equal(labels.reshape(-1), np.tile(np.arange(10), 2))


@pytest.mark.parametrize('num_threads', [0, 1, 2, 5])
def test_a_later_start_gives_the_tail(num_threads):
  whole = take(12)
  for start in (1, 2, 7):
    tail = take(12 - start, start_step=start, num_threads=num_threads)
    np.testing.assert_array_equal(tail, whole[start:])


@pytest.mark.parametrize('num_workers', [1, 2])
def test_workers_change_no_batch_and_hand_on_anywhere(num_workers):
  """What one process began, others go on with; so does one of several hosts."""
  whole = take(9, batch_size=8)
  share = {'batch_size': 8, 'own': np.arange(4, 8)}
  np.testing.assert_array_equal(
    take(5, start_step=4, num_workers=num_workers, num_threads=1, **share), whole[4:, 4:]
  )


def test_an_error_in_a_worker_is_the_callers():
  batches = pipeline.batches(Broken(10), batch_size=4, seed=0, num_workers=1)
  with pytest.raises(ValueError, match='row 3 is broken'):
    for _ in range(4):
      next(batches)
  batches.close()


def test_a_killed_reader_is_one_line_and_no_hang():
  former = set(multiprocessing.active_children())
  with contextlib.closing(
    pipeline.batches(Rows(10), batch_size=4, seed=0, num_workers=2)
  ) as batches:
    next(batches)
    readers = set(multiprocessing.active_children()) - former
    os.kill(min(reader.pid for reader in readers), signal.SIGKILL)
    with pytest.raises(ValueError, match=r'one of data.num_workers=2 .*exit code -9.*or 0') as told:
      for _ in range(40):
        next(batches)
  assert command_line.raised_here(told.value)
  assert not set(multiprocessing.active_children()) & readers


def test_a_late_start_reads_nothing_before_it():
  rows = Rows(10)
  batches = pipeline.batches(rows, batch_size=4, seed=0, start_step=10**9, num_threads=0)
  next(batches)
  batches.close()
  assert len(rows.read) == 4


@pytest.mark.parametrize('process_count', [2, 4])
@pytest.mark.parametrize('start_step', [0, 5])
def test_processes_hold_their_rows_of_the_one_process_batch(process_count, start_step):
  whole = take(9, batch_size=8, start_step=start_step)
  for own in np.random.default_rng(process_count).permutation(8).reshape(process_count, -1):
    share = take(9, batch_size=8, start_step=start_step, own=own)
    np.testing.assert_array_equal(share, whole[:, own])


def test_a_process_reads_its_own_rows_only():
  rows = Rows(40)
  batches = pipeline.batches(
    rows, batch_size=8, seed=0, own=[2, 3], num_threads=0
  )
  labels = np.concatenate([next(batches)['label'] for _ in range(5)])
  batches.close()
  assert rows.read == list(labels)


def test_a_batch_may_be_larger_than_the_data():
  labels = take(2, count=3, batch_size=12)
  for epoch in labels.reshape(-1, 3):
    assert sorted(epoch) == [0, 1, 2]


def test_reading_ahead_is_bounded():
  rows = Rows(1000)
  batches = pipeline.batches(rows, batch_size=10, seed=0, num_threads=2)
  next(batches)
  time.sleep(0.3)  # time for hundreds of batches, if nothing held the threads back
  batches.close()
  assert 10 < len(rows.read) <= 10 * (2 * 2 + 2)


def test_a_closed_iterator_gives_no_more():
  batches = pipeline.batches(Rows(4), batch_size=2, seed=0)
  next(batches)
  batches.close()
  with pytest.raises(ValueError, match='closed'):
    next(batches)


@pytest.mark.parametrize('changes,words', [
  ({'source': Rows(0)}, 'no rows'),
  ({'batch_size': 0}, 'data.batch_size=0 .* at least 1'),
  ({'own': [3, 4]}, 'own=.* from 0 to 3'),
  ({'own': []}, 'own=.* at least one'),
  ({'seed': -1}, 'run.seed=-1'),
  ({'start_step': -3}, 'start_step=-3'),
  ({'num_threads': -1}, 'data.num_threads=-1'),
  ({'num_workers': -1}, 'data.num_workers=-1'),
])
def test_bad_arguments_are_refused(changes, words):
  arguments = {'source': Rows(10), 'batch_size': 4, 'seed': 0} | changes
  with pytest.raises(ValueError, match=words):
    pipeline.batches(arguments.pop('source'), **arguments)


class FeatureRows(Rows):
  """Rows of a source that stores features, too."""

  feature_shape = (4, 8)


FITTING = {'latent_shape': (2, 2, 1), 'num_classes': 10, 'latent_scale': 1.0}


@pytest.mark.parametrize('source,feature_shape', [
  (Rows, None), (FeatureRows, None), (FeatureRows, (4, 8)),
  (Rows, (4, 8)),  # the device may compute them
])
def test_a_fitting_recipe_passes(source, feature_shape):
  pipeline.check_fit(source(1), **FITTING, feature_shape=feature_shape)


@pytest.mark.parametrize('feature_shape', [(16, 8), (4, 768)])
def test_a_recipe_for_other_features_is_refused(feature_shape):
  with pytest.raises(ValueError) as error:
    pipeline.check_fit(FeatureRows(1), **FITTING, feature_shape=feature_shape)
  line = str(error.value)
  assert '\n' not in line
  for word in ('model.patch', 'model.feature_dim', str(feature_shape), 'toy rows', '(4, 8)'):
    assert word in line


@pytest.mark.parametrize('changes,words', [
  ({'latent_shape': (4, 4, 1)}, r'data.latent_size.*\(4, 4, 1\).*toy rows.*\(2, 2, 1\)'),
  ({'num_classes': 1000}, 'data.num_classes=1000.*toy rows.*10'),
  ({'latent_scale': 0.18215}, 'data.latent_scale=0.18215.*1.0'),
])
def test_a_recipe_for_other_data_is_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    pipeline.check_fit(Rows(1), **FITTING | changes)

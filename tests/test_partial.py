"""A job's chunks are there whole or not at all, and belong to one plan."""

import errno
import fcntl
import hashlib
import json
import shutil

import numpy as np
import pytest

from fmzoo import npz, partial

PLAN = {
  'step': 3, 'num_images': 11, 'sampler': {'num_steps': 4, 'guidance': 1.0}, 'code': 'a',
  'shape': [2, 2, 1], 'stored': 'uint8',
}
IMAGES = np.random.default_rng(0).integers(0, 256, (11, 2, 2, 1), np.uint8)
LABELS = np.arange(11, dtype=np.int32)
PIXELS = hashlib.sha256(IMAGES.tobytes()).hexdigest()


def begun(tmp_path, rows=4, **changes):
  """Returns a Job whose plan is written."""
  job = partial.Job(tmp_path / 'n=11_guidance=1.5.npz', PLAN | changes, rows)
  job.write_plan()
  return job


def write_all(job):
  for chunk in job.missing(range(job.chunks)):
    job.write(chunk, IMAGES[chunk * job.rows : (chunk + 1) * job.rows])


def failing(error):
  """Returns a function that raises an error whatever it is given."""

  def fail(*args):
    raise error

  return fail


def test_chunks_become_the_npz_and_its_record(tmp_path):
  job = begun(tmp_path)
  assert job.chunks == 3 and [job.size(chunk) for chunk in range(3)] == [4, 4, 3]
  write_all(job)
  job.assemble(LABELS)
  assert not job.is_finished, 'pictures are still to come'
  job.remove()
  assert job.is_finished and partial.Job(job.path, PLAN, 9).is_finished
  with np.load(job.path) as arrays:
    np.testing.assert_array_equal(arrays['arr_0'], IMAGES)
    np.testing.assert_array_equal(arrays['labels'], LABELS)
  assert {path.name for path in tmp_path.iterdir()} == {job.path.name, job.record.name}
  assert json.loads(job.record.read_text()) == PLAN | {'rows': 4, 'pixels_sha256': PIXELS}


def test_a_chunk_of_another_size_is_missing(tmp_path):
  job = begun(tmp_path)
  write_all(job)
  assert job.missing(range(3)) == []
  file = sorted(job.folder.glob('0*'))[1]
  assert file.name == '000000004-000000008'
  file.write_bytes(file.read_bytes()[:-1])
  assert job.missing(range(3)) == [1]
  with pytest.raises(ValueError, match='1 of 3 chunks are missing, first 000000004-000000008'):
    job.assemble(LABELS)
  assert not job.path.exists()


def test_rows_are_those_of_the_job_that_is_gone_on_with(tmp_path):
  begun(tmp_path, rows=4)
  assert begun(tmp_path, rows=5).rows == 5, 'there is nothing yet to go on with'
  begun(tmp_path, rows=4).write(1, IMAGES[4:8])
  job = begun(tmp_path, rows=9, code='b')
  assert job.rows == 4 and job.missing(range(3)) == [0, 2]


@pytest.mark.parametrize('changes,words', [
  ({'step': 4}, 'step was 3 and is now 4'),
  ({'sampler': {'num_steps': 4, 'guidance': 2.0}}, 'sampler.guidance was 1.0 and is now 2.0'),
])
@pytest.mark.parametrize('finished', [False, True])
def test_images_of_another_plan_are_refused(tmp_path, changes, words, finished):
  job = begun(tmp_path)
  if finished:
    write_all(job)
    job.assemble(LABELS)
    job.remove()
  with pytest.raises(ValueError, match=words) as error:
    begun(tmp_path, **changes)
  assert '\n' not in str(error.value)


def test_a_file_without_a_record_is_never_replaced(tmp_path):
  path = tmp_path / 'n=11_guidance=1.5.npz'
  path.write_bytes(b'somebody else')
  with pytest.raises(ValueError, match='is there without n=11_guidance=1.5.json'):
    begun(tmp_path)


def test_two_processes_are_kept_apart(tmp_path):
  job = begun(tmp_path)
  with job.locked(0):
    with pytest.raises(ValueError, match='another `sample` is at work'), job.locked(0):
      pass
    with job.locked(1):  # the share of another host
      pass
  with job.locked(0):
    pass


@pytest.mark.parametrize('number', [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog, number):
  monkeypatch.setattr(fcntl, 'flock', failing(OSError(number, 'not here')))
  with begun(tmp_path).locked(0):
    entered = True
  assert entered and 'this file system has no locks (not here)' in caplog.text


def test_other_failures_of_a_lock_are_raised(tmp_path, monkeypatch):
  monkeypatch.setattr(fcntl, 'flock', failing(OSError(errno.EIO, 'broken')))
  with pytest.raises(OSError, match='broken'), begun(tmp_path).locked(0):
    pass


def test_a_removal_that_is_killed_leaves_nothing_to_go_on_with(tmp_path, monkeypatch):
  job = begun(tmp_path)
  write_all(job)
  job.assemble(LABELS)
  with monkeypatch.context() as patch:
    patch.setattr(shutil, 'rmtree', lambda *args, **kwargs: None)  # killed before the first file
    job.remove()
  assert job.is_finished and not job.folder.exists()
  assert len(list(job.removed.iterdir())) == 4, 'plan and chunks stay together'
  partial.Job(job.path, PLAN, 4).remove()
  assert {path.name for path in tmp_path.iterdir()} == {job.path.name, job.record.name}


def test_a_new_job_clears_what_a_killed_removal_left(tmp_path):
  job = begun(tmp_path)
  write_all(job)
  job.folder.rename(job.removed)
  other = begun(tmp_path, step=4)
  assert not job.removed.exists() and other.missing(range(3)) == [0, 1, 2]


def test_chunks_without_a_plan_are_removed_aloud(tmp_path, caplog):
  job = begun(tmp_path)
  write_all(job)
  begun(tmp_path)
  assert job.missing(range(3)) == [], 'a plan stands by its chunks'
  (job.folder / partial.PLAN).unlink()
  with job.locked(0):
    other = begun(tmp_path, step=4)
    assert other.missing(range(3)) == [0, 1, 2] and (job.folder / 'lock-0').exists()
  assert '3 chunks without plan.json, first 000000000-000000004, are removed' in caplog.text


def test_the_record_lists_all_versions_of_the_code_at_work(tmp_path, caplog):
  for chunk, code in enumerate('aba'):
    job = begun(tmp_path, code=code)
    job.write(chunk, IMAGES[4 * chunk : 4 * chunk + 4])
  assert 'goes on with code b, chunks there were made by a;' in caplog.text
  assert 'goes on with code a, chunks there were made by a, b;' in caplog.text
  begun(tmp_path, code='c').assemble(LABELS)  # which makes no chunk
  record = json.loads(job.record.read_text())
  assert (record['code'], record['codes']) == ('c', ['a', 'b'])


def test_a_version_of_the_code_that_made_nothing_is_forgotten(tmp_path, caplog):
  begun(tmp_path, code='a')
  job = begun(tmp_path, code='b')
  write_all(job)
  job.assemble(LABELS)
  record = json.loads(job.record.read_text())
  assert record == PLAN | {'code': 'b', 'rows': 4, 'pixels_sha256': PIXELS} and not caplog.records


def test_the_whole_is_assembled_in_the_folder(tmp_path, monkeypatch):
  job = begun(tmp_path)
  write_all(job)
  write = npz.write

  def watched(file, arrays):
    write(file, arrays)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {job.folder.name, job.record.name}, 'what a kill leaves goes with the folder'
    assert file.name == str(job.folder / 'assembled.tmp'), 'the next one writes over it'

  monkeypatch.setattr(npz, 'write', watched)
  job.assemble(LABELS)
  assert job.path.exists() and not (job.folder / 'assembled.tmp').exists()


def test_a_chunk_of_another_kind_is_refused(tmp_path):
  job = begun(tmp_path)
  for wrong in (IMAGES[:3], IMAGES[:4].astype(np.float32)):
    with pytest.raises(ValueError, match='chunk 0 got'):
      job.write(0, wrong)

"""A job that is killed goes on, and what it leaves does not tell."""

import numpy as np
import pytest

from fmzoo.data import latents, manifests, shards

SETTINGS = {
  'latent_shape': (4, 4, 2), 'num_classes': 5, 'vae': 'toy-vae', 'vae_hash': 'abc',
  'vae_dtype': 'float32', 'scale': 0.18215, 'crop': 'centre 32', 'dtype': 'float32',
  'classes': tuple('abcde'), 'source': 'toy',
}
COUNT, BAD = 11, (4, 9)  # rows of the source, and those that cannot be read


def row(index):
  """Returns a row of the source."""
  moments = np.abs(np.random.default_rng(index).standard_normal((4, 4, 4)))
  return {'moments': moments.astype(np.float32), 'label': index % 5}


def job(path, **changes):
  """Returns the job of eleven rows in three shards."""
  options = {'count': COUNT, 'rows_per_shard': 4}
  manifest = shards.empty_manifest(**{k: changes.pop(k, v) for k, v in SETTINGS.items()})
  return shards.Job(path, manifest, **options | changes)


def rows_of(job, shard, unreadable):
  """Yields the rows of a shard, as `prepare` would."""
  for index in job.rows(shard):
    if index in BAD:
      unreadable.append(f'row {index}')
    else:
      yield f'row {index}', row(index)


def write(job, wanted):
  """Writes some shards."""
  for shard in wanted:
    unreadable = []
    job.write(shard, rows_of(job, shard, unreadable), unreadable)


def contents(path):
  """Returns {name: bytes} of a folder of files."""
  return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def whole(tmp_path):
  """A folder that one job wrote without a stop."""
  first = job(tmp_path / 'whole')
  write(first, first.left())
  first.finish()
  return tmp_path / 'whole'


def test_every_readable_row_is_there_once(whole):
  source = latents.LatentSource(whole)
  expected = [row(index) for index in range(COUNT) if index not in BAD]
  rows = source.batch(np.arange(len(source)))
  assert len(source) == len(expected)
  np.testing.assert_array_equal(rows['moments'], [one['moments'] for one in expected])
  np.testing.assert_array_equal(rows['label'], [one['label'] for one in expected])
  assert source.manifest.unreadable == ['row 4', 'row 9']
  assert source.manifest.classes == list('abcde')
  assert [shard['count'] for shard in source.manifest.shards] == [4, 3, 2]
  latents.verify(whole)


@pytest.mark.parametrize('after', ['row', 'shard', 'entry', 'tmp'])
def test_a_job_that_stopped_goes_on_to_the_same_bytes(tmp_path, whole, after, monkeypatch):
  """Stopped while a row was made, between a shard and its entry, and after both."""
  folder = tmp_path / 'stopped'
  first = job(folder)
  write(first, [0])
  if after == 'row':
    def stopping():
      yield from list(rows_of(first, 1, []))[:2]
      raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
      first.write(1, stopping(), [])
  elif after == 'shard':
    monkeypatch.setattr(shards, '_write_json', lambda *args: None)
    write(first, [1])
    monkeypatch.undo()
  elif after == 'tmp':
    (folder / 'partial' / '00001.999.tmp').write_bytes(b'half a shard')
  else:
    write(first, [1])
  again = job(folder)
  assert again.left() == ([2] if after == 'entry' else [1, 2])
  assert again.done() == (8 if after == 'entry' else 4)
  write(again, again.left())
  assert not list((folder / 'partial').glob('*.tmp'))
  again.finish()
  assert contents(folder) == contents(whole)


def test_hosts_share_the_shards(tmp_path, whole):
  parts = [job(tmp_path / 'shared') for _ in range(2)]
  assert [part.left(p, 2) for p, part in enumerate(parts)] == [[0, 2], [1]]
  write(parts[1], [1])
  with pytest.raises(ValueError, match=r'shards \[0, 2\] are not written; run `prepare` again'):
    parts[0].finish()
  write(parts[0], parts[0].left(0, 2))
  parts[0].finish()
  assert contents(tmp_path / 'shared') == contents(whole)


def test_a_shard_that_was_cut_is_written_again(tmp_path, whole):
  first = job(tmp_path / 'cut')
  write(first, [0, 1, 2])
  file = tmp_path / 'cut' / shards.shard_name(1, 3)
  file.write_bytes(file.read_bytes()[:-5])
  again = job(tmp_path / 'cut')
  assert again.left() == [1]
  write(again, [1])
  again.finish()
  assert contents(tmp_path / 'cut') == contents(whole)


def test_a_shard_without_readable_rows_has_no_file(tmp_path):
  only = job(tmp_path, count=6, rows_per_shard=1)
  write(only, only.left())
  manifest = only.finish()
  assert [shard['count'] for shard in manifest.shards] == [1] * 5
  assert shards.shard_name(4, 6) not in contents(tmp_path)
  assert len(latents.LatentSource(tmp_path)) == 5


@pytest.mark.parametrize('changes,words', [
  ({'source': 'other'}, 'the names, sizes or labels of the source have changed since; go on with'),
  ({'count': 12}, 'rows was 11 and is now 12'),
  ({'vae_hash': 'def'}, "vae_hash was 'abc' and is now 'def'"),
  ({'vae_dtype': 'bfloat16'}, "vae_dtype was 'float32' and is now 'bfloat16'"),
  ({'crop': 'none'}, "crop was 'centre 32' and is now 'none'"),
  ({'rows_per_shard': 5}, 'rows_per_shard was 4 and is now 5'),
])
def test_another_job_does_not_go_on_there(tmp_path, changes, words):
  write(job(tmp_path), [0])
  before = contents(tmp_path / 'partial')
  with pytest.raises(ValueError, match=f'beginnings of other latents: {words}'):
    job(tmp_path, **changes)
  assert contents(tmp_path / 'partial') == before


def test_a_finished_job_has_nothing_left(tmp_path, whole):
  """Also where it was killed before it had tidied up."""
  before = contents(whole)
  (whole / 'partial').mkdir()
  (whole / 'partial' / 'plan.json').write_text('{}')
  again = job(whole)
  assert again.left() == [] and again.done() == COUNT
  assert again.finish() == manifests.read(whole)
  assert contents(whole) == before


@pytest.mark.parametrize('harm', ['gone', 'cut'])
def test_a_finished_job_that_lost_a_shard_is_not_called_finished(whole, harm):
  file = whole / shards.shard_name(1, 3)
  content = file.read_bytes()
  file.unlink()
  if harm == 'cut':
    file.write_bytes(content[:-5])
  with pytest.raises(ValueError, match=f'shard {file.name} .* remove the whole folder first'):
    job(whole)
  assert (whole / 'manifest.json').exists()


def test_other_latents_are_not_written_over(whole):
  before = contents(whole)
  with pytest.raises(ValueError, match='holds other latents: the names, sizes or labels of the'):
    job(whole, source='other')
  assert contents(whole) == before


def test_shards_without_a_plan_are_left_alone(tmp_path, whole):
  (whole / 'manifest.json').unlink()
  before = contents(whole)
  with pytest.raises(ValueError, match='latents-0000.* and no manifest.json; choose another'):
    job(whole)
  assert contents(whole) == before


def test_rows_of_elsewhere_do_not_end_up_in_a_job(tmp_path):
  write(job(tmp_path), [0])
  before = contents(tmp_path / 'partial')
  with pytest.raises(ValueError, match='holds the beginnings of other latents .partial.; choose'):
    shards.write_latents(tmp_path, [row(0)], **SETTINGS)
  assert contents(tmp_path / 'partial') == before


def test_two_do_not_work_on_one_share(tmp_path):
  refused = pytest.raises(ValueError, match='another `prepare` is at work there')
  with shards.locked(tmp_path, 0), shards.locked(tmp_path, 1), refused, shards.locked(tmp_path, 1):
    raise AssertionError
  with shards.locked(tmp_path, 1):
    assert list(tmp_path.glob('partial/lock-*'))


def test_a_full_disk_is_one_line_and_the_job_goes_on(tmp_path, whole, monkeypatch):
  class Full:
    """A writer that finds no room after two records."""

    def __init__(self, *args):
      self.writer, self.left = real(*args), 2
      self.close = self.writer.close

    def write(self, record):
      self.left -= 1
      if self.left < 0:
        raise RuntimeError('write() failed:\n No space left on device')
      self.writer.write(record)

  real = shards.array_record_module.ArrayRecordWriter
  first = job(tmp_path / 'full')
  write(first, [0])
  monkeypatch.setattr(shards.array_record_module, 'ArrayRecordWriter', Full)
  with pytest.raises(ValueError, match='cannot be written .write.. failed: No space.*; make room'):
    write(first, [1])
  monkeypatch.undo()
  assert not list((tmp_path / 'full' / 'partial').glob('*.tmp'))
  again = job(tmp_path / 'full')
  assert again.left() == [1, 2]
  write(again, again.left())
  again.finish()
  assert contents(tmp_path / 'full') == contents(whole)


def test_nothing_readable_is_no_data_set(tmp_path):
  only = job(tmp_path, count=1)
  only.write(0, iter(()), ['row 0'])
  with pytest.raises(ValueError, match='none of 1 images could be read'):
    only.finish()
  assert not (tmp_path / 'manifest.json').exists()


def test_an_unfinished_folder_says_so(tmp_path):
  write(job(tmp_path), [0])
  with pytest.raises(ValueError, match='did not finish there, the same command goes on'):
    latents.LatentSource(tmp_path)


def test_a_damaged_entry_is_named(tmp_path):
  write(job(tmp_path), [0])
  (tmp_path / 'partial' / '00000.json').write_text('{"count": ')
  with pytest.raises(ValueError, match='00000.json is damaged'):
    job(tmp_path).left()


@pytest.mark.parametrize('change,words', [
  ({'label': 2**32}, 'image 3 has label of int64 with values that int32 cannot hold'),
  ({'label': -1}, 'image 3 has label -1, expected 0 to 4'),
  ({'image': np.zeros((2, 2, 3), np.uint8)}, 'has image, label, moments, expected label, moments'),
  ({'image': np.full((6, 6, 3), 256)}, 'has image of int64 with values that uint8 cannot'),
  ({'image': np.zeros((6, 6, 3))}, 'has image of float64 with values that uint8 cannot'),
  ({'image': np.zeros((6, 5, 3), np.uint8)}, r'has image \(6, 5, 3\), expected \(6, 6, 3\)'),
])
def test_a_row_that_does_not_fit_is_named(change, words):
  shape = (6, 6, 3) if 'expected \\(6' in words or 'uint8' in words else ()
  manifest = shards.empty_manifest(**SETTINGS, image_shape=shape)
  with pytest.raises(ValueError, match=words):
    shards.encode(row(3) | change, 'image 3', manifest)


def test_a_record_is_its_fields_in_order():
  """Read without our code."""
  manifest = shards.empty_manifest(**SETTINGS, mirrored=True, image_shape=(2, 2, 3))
  one = row(3)
  image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
  mirrored = np.stack([one['moments'], one['moments'][:, ::-1]])
  record = shards.encode({'moments': mirrored, 'label': 3, 'image': image}, '', manifest)
  assert record == mirrored.tobytes() + image.tobytes() + (3).to_bytes(4, 'little')

"""Latents survive the round trip, and a folder that is not what it says is refused in one line."""

import contextlib
import dataclasses
import json
import os
import pathlib
import pickle
import re
import resource

import numpy as np
import pytest

from fmzoo.data import latents, manifests, pipeline, shards

SHAPE = (4, 4, 2)
COUNT = 10
ENCODER = {'encoder': 'toy-encoder', 'feature_shape': (3, 6)}


def some_rows(count=COUNT, seed=0):
  rng = np.random.default_rng(seed)
  rows = []
  for i in range(count):
    moments = rng.standard_normal((4, 4, 4)).astype(np.float16)
    moments[..., 2:] = abs(moments[..., 2:])
    rows.append({'moments': moments, 'label': i % 5})
  return rows


def with_features(rows, dtype=np.float16, seed=1):
  """Adds features to rows."""
  rng = np.random.default_rng(seed)
  return [row | {'feature': rng.standard_normal((3, 6)).astype(dtype)} for row in rows]


def write(path, rows=None, **changes):
  """Writes three shards of 4, 4 and 2 rows."""
  options = {
    'latent_shape': SHAPE, 'num_classes': 5, 'vae': 'toy-vae', 'vae_hash': 'abc', 'scale': 0.18215,
    'crop': 'centre 256', 'rows_per_shard': 4,
  }
  return shards.write_latents(path, some_rows() if rows is None else rows, **options | changes)


def read(source):
  """Returns every row of a source by itself."""
  rows = source.batch(np.arange(len(source)))
  return [{name: values[i] for name, values in rows.items()} for i in range(len(source))]


@pytest.fixture
def folder(tmp_path):
  write(tmp_path / 'latents')
  return tmp_path / 'latents'


def edit(folder, **changes):
  """Changes the manifest as a careless hand would."""
  file = folder / 'manifest.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize('dtype', ['float16', 'float32'])
def test_rows_come_back_in_order(tmp_path, dtype):
  rows = some_rows()
  write(tmp_path, rows, dtype=dtype)
  source = latents.LatentSource(tmp_path)
  assert len(source) == COUNT
  for want, have in zip(rows, read(source), strict=True):
    assert have['moments'].dtype == dtype and have['label'].dtype == np.int32
    assert have['label'].shape == ()
    np.testing.assert_array_equal(have['moments'], want['moments'])
    assert have['label'] == want['label']
  latents.verify(tmp_path)


def test_float32_moments_keep_every_digit(tmp_path):
  rows = [{'moments': np.full((4, 4, 4), 1 / 3, np.float32), 'label': 0}]
  write(tmp_path, rows, dtype='float32')
  np.testing.assert_array_equal(
    latents.LatentSource(tmp_path).batch(np.array([0]))['moments'][0], rows[0]['moments']
  )


@pytest.mark.parametrize('dtype', ['float16', 'float32'])
def test_features_come_back_bit_for_bit(tmp_path, dtype):
  rows = with_features(some_rows(), dtype)
  manifest = write(tmp_path, rows, dtype=dtype, **ENCODER)
  assert (manifest.encoder, manifest.feature_shape) == ('toy-encoder', [3, 6])
  source = latents.LatentSource(tmp_path)
  assert (source.encoder, source.feature_shape) == ('toy-encoder', (3, 6))
  for want, have in zip(rows, read(source), strict=True):
    assert sorted(have) == ['feature', 'label', 'moments']
    assert have['feature'].dtype == dtype
    assert have['feature'].tobytes() == want['feature'].tobytes()
    np.testing.assert_array_equal(have['moments'], want['moments'])
    assert have['label'] == want['label']


def test_features_may_be_left_out_of_the_rows(tmp_path):
  rows = with_features(some_rows())
  write(tmp_path, rows, **ENCODER)
  source = latents.LatentSource(tmp_path, with_feature=False)
  assert (source.encoder, source.feature_shape) == ('', ())
  assert source.manifest.encoder == 'toy-encoder'
  for want, have in zip(rows, read(source), strict=True):
    assert sorted(have) == ['label', 'moments'] and have['label'] == want['label']
    np.testing.assert_array_equal(have['moments'], want['moments'])


def test_images_and_mirrored_moments_come_where_asked_for(tmp_path):
  rng = np.random.default_rng(2)
  rows = [
    {'moments': np.stack([row['moments'], row['moments'][:, ::-1]]), 'label': row['label'],
     'image': rng.integers(0, 256, (6, 6, 3), np.uint8)} for row in some_rows()
  ]
  write(tmp_path, rows, mirrored=True, image_shape=(6, 6, 3), classes=list('abcde'))
  whole = latents.LatentSource(tmp_path, with_image=True, with_mirror=True)
  assert (whole.image_shape, whole.mirrored) == ((6, 6, 3), True)
  part = latents.LatentSource(tmp_path)
  assert (part.image_shape, part.mirrored) == ((), False)
  for row, all_of_it, bare in zip(rows, read(whole), read(part), strict=True):
    assert sorted(all_of_it) == ['image', 'label', 'moments']
    assert sorted(bare) == ['label', 'moments']
    for name in ('moments', 'image', 'label'):
      np.testing.assert_array_equal(all_of_it[name], row[name])
    np.testing.assert_array_equal(bare['moments'], row['moments'][0])


@pytest.mark.parametrize('with_feature', [True, False])
def test_latents_without_features_have_none(folder, with_feature):
  source = latents.LatentSource(folder, with_feature=with_feature)
  assert (source.encoder, source.feature_shape) == ('', ())
  assert sorted(source.batch(np.array([0]))) == ['label', 'moments']


def test_manifest_says_what_the_folder_holds(folder):
  manifest = json.loads((folder / 'manifest.json').read_text())
  assert manifest['version'] == 3 and manifest['count'] == COUNT
  assert manifest['encoder'] == '' and manifest['feature_shape'] == []
  assert manifest['latent_shape'] == [4, 4, 2] and manifest['layout'] == 'HWC'
  assert manifest['dtype'] == 'float16' and manifest['num_classes'] == 5
  assert (manifest['vae'], manifest['vae_hash']) == ('toy-vae', 'abc')
  assert manifest['scale'] == 0.18215 and manifest['crop'] == 'centre 256'
  assert [shard['count'] for shard in manifest['shards']] == [4, 4, 2]
  names = [f'latents-0000{i}-of-00003.array_record' for i in range(3)]
  assert [shard['name'] for shard in manifest['shards']] == names
  assert sorted(file.name for file in folder.iterdir()) == [*names, 'manifest.json']


def test_records_are_raw_moments_and_a_label(folder):
  """The layout on disk is a promise to other readers; it is read here without our code."""
  from array_record.python import array_record_module

  reader = array_record_module.ArrayRecordReader(
    str(folder / 'latents-00001-of-00003.array_record')
  )
  assert 'group_size:1' in reader.writer_options_string()
  assert 'uncompressed' in reader.writer_options_string()
  record = reader.read([1])[0]
  want = some_rows()[5]
  assert len(record) == 4 * 4 * 4 * 2 + 4
  np.testing.assert_array_equal(
    np.frombuffer(record[:-4], '<f2').reshape(4, 4, 4), want['moments']
  )
  assert int.from_bytes(record[-4:], 'little') == want['label']


def test_features_stand_between_moments_and_label(tmp_path):
  """As above, and the files can be found again."""
  from array_record.python import array_record_module

  rows = with_features(some_rows())
  write(tmp_path, rows, **ENCODER)
  file = tmp_path / 'latents-00001-of-00003.array_record'
  record = array_record_module.ArrayRecordReader(str(file)).read([1])[0]
  label = np.array(rows[5]['label'], '<i4')
  assert record == rows[5]['moments'].tobytes() + rows[5]['feature'].tobytes() + label.tobytes()
  latents.verify(tmp_path)


def test_source_fits_its_own_shape_and_no_other(folder):
  source = latents.LatentSource(folder)
  fitting = {'latent_shape': SHAPE, 'num_classes': 5, 'latent_scale': 0.18215}
  pipeline.check_fit(source, **fitting)
  for change in ({'latent_shape': (32, 32, 4)}, {'num_classes': 1000}, {'latent_scale': 1.0}):
    with pytest.raises(ValueError) as error:
      pipeline.check_fit(source, **fitting | change)
    (key, wanted), = change.items()
    found = fitting[key]
    for word in ('data.', str(wanted), str(found), f'data.path={folder}'):
      assert word in str(error.value)


def test_stored_features_fit_their_own_shape_and_no_other(tmp_path):
  write(tmp_path, with_features(some_rows()), **ENCODER)
  source = latents.LatentSource(tmp_path)
  fitting = {'latent_shape': SHAPE, 'num_classes': 5, 'latent_scale': 0.18215}
  pipeline.check_fit(source, **fitting)
  pipeline.check_fit(source, **fitting, feature_shape=(3, 6))
  with pytest.raises(ValueError, match=r'model.patch.*\(4, 6\).*data.path=.*\(3, 6\)'):
    pipeline.check_fit(source, **fitting, feature_shape=(4, 6))


def test_latents_go_through_the_pipeline_in_threads(folder):
  batches = pipeline.batches(latents.LatentSource(folder), batch_size=5, seed=1, num_threads=3)
  rows = some_rows()
  seen = []
  for _ in range(4):
    batch = next(batches)
    assert batch['moments'].shape == (5, 4, 4, 4) and batch['label'].shape == (5,)
    for moments, label in zip(batch['moments'], batch['label']):
      index = next(i for i, row in enumerate(rows) if (row['moments'] == moments).all())
      assert label == index % 5
      seen.append(index)
  batches.close()
  assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(COUNT))


def test_source_travels_to_worker_processes(folder):
  source = latents.LatentSource(folder)
  source.batch(np.array([0]))
  copy = pickle.loads(pickle.dumps(source))
  rows = np.array([7])
  np.testing.assert_array_equal(copy.batch(rows)['moments'], source.batch(rows)['moments'])


def refused(path):
  """Returns the one line that opening gives."""
  with pytest.raises(ValueError) as error:
    latents.LatentSource(path)
  line = str(error.value)
  assert '\n' not in line and f'data.path={path}' in line
  return line


def test_a_missing_folder_says_how_to_get_one(tmp_path):
  line = refused(tmp_path / 'none')
  assert 'is not a folder' in line and 'prepare --from=' in line and 'manifest.json' in line
  assert "section 'Data' of README.md" in line


def test_a_missing_manifest_says_how_to_get_one(tmp_path):
  line = refused(tmp_path)
  assert 'holds no manifest.json' in line and 'prepare --from=' in line


def test_a_missing_shard_is_named(folder):
  (folder / 'latents-00001-of-00003.array_record').unlink()
  line = refused(folder)
  assert 'latents-00001-of-00003.array_record is missing' in line


def test_a_truncated_shard_is_named(folder):
  file = folder / 'latents-00002-of-00003.array_record'
  size = file.stat().st_size
  file.write_bytes(file.read_bytes()[:-100])
  line = refused(folder)
  assert f'{file.name} has {size - 100} bytes' in line and f'{size} bytes' in line
  with pytest.raises(ValueError, match=file.name):
    latents.verify(folder)


def test_a_shard_of_another_run_is_named(tmp_path, folder):
  write(tmp_path / 'other', some_rows(seed=1))
  name = 'latents-00001-of-00003.array_record'
  (folder / name).write_bytes((tmp_path / 'other' / name).read_bytes())
  assert f'{name} begins with another record' in refused(folder)


def test_moments_that_are_no_numbers_are_named(folder, monkeypatch):
  """They cannot be written; a file that has them comes from elsewhere."""
  record = shards.encode(some_rows()[6], '', manifests.read(folder))
  place = r'record 2 of latents-00001-of-00003.array_record \(row 6\) .*not finite'
  for bad in (np.nan, np.inf, -np.inf):
    source = latents.LatentSource(folder)
    changed = np.float16(bad).tobytes() + record[2:]
    monkeypatch.setattr(source, '_records', {5: record, 6: changed})
    source.batch(np.array([5]))
    with pytest.raises(ValueError, match=place):
      source.batch(np.array([5, 6]))


def test_a_shard_of_the_right_size_but_no_content_is_named(folder):
  file = folder / 'latents-00000-of-00003.array_record'
  file.write_bytes(bytes(file.stat().st_size))
  assert f'{file.name} has no readable end' in refused(folder)


def test_a_shard_with_other_rows_is_named(folder):
  manifest = json.loads((folder / 'manifest.json').read_text())
  shards = manifest['shards']
  shards[0]['count'], shards[1]['count'] = 3, 5
  edit(folder, shards=shards)
  line = refused(folder)
  assert f'{shards[0]["name"]} has 4 rows' in line and 'says 3' in line


@pytest.mark.parametrize('changes,word', [
  ({'count': 11}, 'count 11'),
  ({'version': 2}, 'version 2, this fmzoo reads version 3'),
  ({'layout': 'CHW'}, 'CHW'),
  ({'dtype': 'bfloat16'}, 'bfloat16'),
  ({'latent_shape': [32, 4]}, r'\[32, 4\]'),
  ({'encoder': 'toy-encoder'}, "encoder='toy-encoder'"),
  ({'feature_shape': [3, 6]}, r"encoder='', feature_shape=\[3, 6\]"),
  ({'encoder': 'toy-encoder', 'feature_shape': [18]}, r'\[18\], expected \[N, F\]'),
  ({'encoder': 'toy-encoder', 'feature_shape': 18}, 'int'),
  ({'image_shape': [6, 6]}, r'image_shape \[6, 6\], expected \[h, w, 3\]'),
  ({'classes': ['a', 'b']}, '2 names in classes, expected num_classes=5'),
  ({'surprise': 1}, 'surprise'),
  ({'shards': [{}]}, 'count'),
  ({'shards': 3}, 'shards 3, expected a list'),
  ({'shards': [3]}, r'shards \[3\], expected a list'),
  ({'shards': [], 'count': 0}, 'count 0, expected at least one row'),
  ({'version': 3.0}, 'version 3.0, expected a positive integer'),
  ({'count': 10.0}, 'count 10.0, expected an integer'),
  ({'num_classes': 0}, 'num_classes 0, expected a positive integer'),
  ({'num_classes': True}, 'num_classes True, expected a positive integer'),
  ({'latent_shape': [4, 4, -2]}, r'latent_shape \[4, 4, -2\], expected a list of positive'),
  ({'latent_shape': '4,4,2'}, "latent_shape '4,4,2', expected a list of positive"),
  ({'latent_shape': [4, 4, 2**40]}, 'cannot be used'),
  ({'image_shape': [6.0, 6, 3]}, r'image_shape \[6.0, 6, 3\], expected a list of positive'),
  ({'dtype': ['float16']}, r"dtype \['float16'\], expected a string"),
  ({'layout': 3}, 'layout 3, expected a string'),
  ({'vae': None}, 'vae None, expected a string'),
  ({'vae_hash': 1}, 'vae_hash 1, expected a string'),
  ({'crop': []}, r'crop \[\], expected a string'),
  ({'encoder': False}, 'encoder False, expected a string'),
  ({'encoder': 'a\nb'}, r"encoder='a\\nb'"),
  ({'a\nb': 1}, 'a b'),
  ({'classes': 'abcde'}, "classes 'abcde', expected a list of strings"),
  ({'unreadable': [1]}, r'unreadable \[1\], expected a list of strings'),
  ({'mirrored': 1}, 'mirrored 1, expected true or false'),
  ({'scale': 0}, 'scale 0, expected a finite number'),
  ({'scale': True}, 'scale True, expected a finite number'),
  ({'scale': float('inf')}, 'scale inf, expected a finite number'),
  ({'scale': float('nan')}, 'scale nan, expected a finite number'),
  ({'scale': '1'}, "scale '1', expected a finite number"),
])
def test_a_manifest_that_makes_no_sense_is_refused(folder, changes, word):
  edit(folder, **changes)
  with pytest.raises(ValueError, match=word):
    latents.LatentSource(folder)
  refused(folder)


@pytest.mark.parametrize('changes,word', [
  ({'name': '../latents-00001-of-00003.array_record'}, "name '../lat.*', expected a file name"),
  ({'name': 'a/b'}, "name 'a/b', expected a file name without a folder"),
  ({'name': '/etc/hosts'}, "name '/etc/hosts', expected"),
  ({'name': '..'}, "name '..', expected"),
  ({'name': ''}, "name '', expected"),
  ({'name': 'a\nb'}, r"name 'a\\nb', expected"),
  ({'name': 7}, 'name 7, expected'),
  ({'count': -4}, 'count -4, expected a positive integer'),
  ({'count': True}, 'count True, expected a positive integer'),
  ({'bytes': 1.5}, 'bytes 1.5, expected a positive integer'),
  ({'sha256': None}, 'sha256 None, expected 64 hex'),
  ({'first': 'x' * 64}, "first 'xxx.*', expected 64 hex"),
  ({'more': 1}, 'has bytes, count, first, more, name, sha256; expected name, count'),
])
def test_a_shard_entry_that_makes_no_sense_is_refused(folder, changes, word):
  shards = json.loads((folder / 'manifest.json').read_text())['shards']
  shards[1].update(changes)
  edit(folder, shards=shards)
  line = refused(folder)
  assert 'manifest.json cannot be used: shard 1: ' in line and re.search(word, line), line
  with pytest.raises(ValueError, match='cannot be used'):
    latents.verify(folder)


def test_every_field_of_a_manifest_has_a_kind():
  fields = [field.name for field in dataclasses.fields(manifests.Manifest)]
  assert sorted(name for _, _, names in manifests.KINDS for name in names) == sorted(fields)


@pytest.mark.parametrize(
  'text', ['', '{"version": ', '[]', '{}', '{"version": 1}', pytest.param('[' * 10**5, id='deep')]
)
def test_a_torn_manifest_is_refused(folder, text):
  (folder / 'manifest.json').write_text(text)
  assert 'manifest.json cannot be used' in refused(folder)


def test_records_of_another_length_are_refused(folder):
  edit(folder, latent_shape=[4, 4, 4])
  with pytest.raises(ValueError, match=r'\(row 2\) has 132 bytes.*\(4, 4, 8\)'):
    latents.LatentSource(folder).batch(np.array([2]))


def test_records_without_the_features_of_the_manifest_are_refused(folder):
  edit(folder, encoder='toy-encoder', feature_shape=[3, 6])
  for with_feature in (True, False):
    with pytest.raises(ValueError, match=r'\(row 2\) has 132 bytes.*feature \(3, 6\)'):
      latents.LatentSource(folder, with_feature=with_feature).batch(np.array([2]))


def test_records_with_features_the_manifest_does_not_know_are_refused(tmp_path):
  write(tmp_path, with_features(some_rows()), **ENCODER)
  edit(tmp_path, encoder='', feature_shape=[])
  with pytest.raises(ValueError, match=r'\(row 2\) has 168 bytes.*\(4, 4, 4\) float16, label'):
    latents.LatentSource(tmp_path).batch(np.array([2]))


def test_flipped_bytes_are_found_by_verify_and_by_reading(folder):
  file = folder / 'latents-00001-of-00003.array_record'
  content = bytearray(file.read_bytes())
  at = bytes(content).index(some_rows()[5]['moments'].tobytes())
  content[at : at + 8] = bytes(8)
  file.write_bytes(content)
  with pytest.raises(ValueError, match=f'{file.name} has checksum'):
    latents.verify(folder)
  source = latents.LatentSource(folder)
  with pytest.raises(ValueError, match=rf'record 1 of {file.name} \(row 5\) is damaged'):
    source.batch(np.array([4, 5]))
  source.batch(np.array([4, 6]))


@contextlib.contextmanager
def no_more_files():
  """Opens nothing: the limit is what is open already."""
  limits = resource.getrlimit(resource.RLIMIT_NOFILE)
  with open(os.devnull) as lowest:  # every lower number is taken
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest.fileno() + 1, limits[1]))
    try:
      yield
    finally:
      resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_too_many_open_files_are_not_a_damaged_shard(folder):
  source = latents.LatentSource(folder)
  source.batch(np.array([9]))
  shard = manifests.read(folder).shards[0]
  file = folder / shard['name']
  for reading in (lambda: source.batch(np.array([0])),
                  lambda: latents._check_rows(folder, file, shard)):
    with no_more_files(), pytest.raises(ValueError) as error:
      reading()
    line = str(error.value)
    assert f'data.path={folder}: ' in line and file.name in line and '\n' not in line
    assert 'cannot be read (open() failed: Too many open files' in line and '`ulimit -n`' in line
    assert not re.search('damaged|copy|write|no readable', line)


@pytest.mark.parametrize('reason,is_remote,remedy', [
  ('read() failed: Input/output error; at byte 7', False, 'check its permissions and the disk'),
  ('open() failed: Permission denied', False, 'check its permissions and the disk'),
  ('Permanent error,\nwith a last message of {"code": 403}', True,
   'check the network and the credentials'),
  ('Retry policy exhausted', True, 'check the network and the credentials'),
])
def test_a_shard_that_cannot_be_read_now_is_not_called_damaged(
  folder, monkeypatch, reason, is_remote, remedy
):
  class Failing:
    def __getitem__(self, index):
      raise RuntimeError(reason)

  source = latents.LatentSource(folder)
  monkeypatch.setattr(source, '_records', Failing())
  monkeypatch.setattr(source, '_is_remote', is_remote)
  with pytest.raises(ValueError) as error:
    source.batch(np.array([5]))
  line = str(error.value)
  assert f'(row 5) cannot be read ({" ".join(reason.split())}); ' in line and line.endswith(remedy)


@pytest.mark.parametrize('size', [1, 65540, 65600, 131071])
def test_a_shard_cut_anywhere_is_called_damaged(folder, size):
  """Also where the manifest was made to fit it; the library has other words for each place."""
  manifest = json.loads((folder / 'manifest.json').read_text())
  file = folder / manifest['shards'][0]['name']
  file.write_bytes(file.read_bytes()[:size])
  manifest['shards'][0]['bytes'] = size
  edit(folder, shards=manifest['shards'])
  line = refused(folder)
  assert f'{file.name} has no readable end' in line and 'copy or write it again' in line


def test_latents_are_never_written_over(folder):
  before = (folder / 'manifest.json').read_bytes()
  with pytest.raises(ValueError, match='holds latents already'):
    write(folder)
  assert (folder / 'manifest.json').read_bytes() == before


@pytest.mark.parametrize('row,words', [
  ({'moments': np.zeros((4, 4, 2)), 'label': 0}, r'row 6 has moments \(4, 4, 2\).*\(4, 4, 4\)'),
  ({'moments': np.zeros((4, 4, 4)), 'label': 5}, 'row 6 has label 5.*0 to 4'),
  ({'moments': np.full((4, 4, 4), 1e6), 'label': 0}, 'row 6 .*float16.*float32'),
  ({'moments': np.full((4, 4, 4), np.nan), 'label': 0}, 'row 6'),
  ({'moments': np.full((4, 4, 4), -9.5), 'label': 0}, 'row 6 .*deviation of -9.5.*log-variance'),
  ({'moments': np.zeros((4, 4, 4)), 'label': 0, 'feature': np.zeros((3, 6))},
   "row 6 has feature, label, moments, expected label, moments, .*encoder=''"),
])
def test_a_bad_row_leaves_nothing_behind(tmp_path, row, words):
  rows = some_rows()
  rows[6] = row
  with pytest.raises(ValueError, match=words):
    write(tmp_path, rows)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('feature,words', [
  ({'feature': np.zeros((6, 3))}, r'row 6 has feature \(6, 3\), expected \(3, 6\)'),
  ({'feature': np.full((3, 6), np.inf)}, 'row 6 has feature .*float16'),
  ({'feature': np.full((3, 6), 7e4)}, 'row 6 has feature .*float16.*float32'),
  ({}, "row 6 has label, moments, expected feature, .*encoder='toy-encoder'"),
])
def test_a_bad_feature_leaves_nothing_behind(tmp_path, feature, words):
  rows = with_features(some_rows())
  rows[6] = some_rows()[6] | feature
  with pytest.raises(ValueError, match=words):
    write(tmp_path, rows, **ENCODER)
  assert list(tmp_path.iterdir()) == []


def test_means_may_be_negative_and_deviations_zero(tmp_path):
  moments = np.concatenate([np.full((4, 4, 2), -3.0), np.zeros((4, 4, 2))], axis=-1)
  write(tmp_path, [{'moments': moments, 'label': 0}])
  rows = latents.LatentSource(tmp_path).batch(np.array([0]))
  np.testing.assert_array_equal(rows['moments'][0], moments)


def test_a_writer_that_was_stopped_can_start_again(tmp_path):
  def stopping():
    yield from some_rows()[:6]
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    write(tmp_path, stopping())
  refused(tmp_path)
  write(tmp_path)
  assert len(latents.LatentSource(tmp_path)) == COUNT


@pytest.mark.parametrize('arguments,words', [
  ({'rows': []}, 'no rows'),
  ({'dtype': 'float64'}, 'float64.*float16 or float32'),
  ({'encoder': 'toy-encoder'}, "encoder='toy-encoder'.*both or neither"),
  ({'feature_shape': (3, 6)}, r"encoder='', feature_shape=\[3, 6\].*both or neither"),
  (ENCODER | {'feature_shape': (3, 6, 1)}, r'\[3, 6, 1\], expected \[N, F\]'),
])
def test_nothing_to_write_is_refused(tmp_path, arguments, words):
  with pytest.raises(ValueError, match=words):
    write(tmp_path, **arguments)
  assert list(tmp_path.iterdir()) == []


def test_the_readme_writes_latents_that_can_be_read(tmp_path, monkeypatch):
  readme = pathlib.Path(__file__).parents[2] / 'README.md'
  scripts = re.findall(r"python - <<'END'\n(.*?)END\n", readme.read_text(), re.DOTALL)
  script, = [script for script in scripts if 'write_latents' in script]
  monkeypatch.chdir(tmp_path)
  exec(script, {})
  source = latents.LatentSource('data/latents')
  pipeline.check_fit(
    source, latent_shape=(32, 32, 4), num_classes=1000, latent_scale=0.18215,
    feature_shape=(256, 768),
  )
  assert len(source) == 8 and source.batch(np.array([7]))['feature'].shape == (1, 256, 768)

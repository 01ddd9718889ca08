"""Moments as the official codes store them: rows, what must agree, what is refused."""

import concurrent.futures
import errno
import json
import os
import pathlib
import subprocess
import sys

import h5py
import numpy as np
import pytest
from PIL import Image

from fmzoo.data import images, official, picture_files
from tests import golden_files as files

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'soflow' / 'latents_tiny.hdf5'
ROWS, SIZE = 6, 32
RNG = np.random.default_rng(0)
MEAN = RNG.standard_normal((ROWS, 4, 4, 4)).astype(np.float32)
STORED = np.concatenate([MEAN, np.abs(MEAN[:, ::-1]) / 8], axis=1)  # [6, 8, 4, 4]
PIXELS = RNG.integers(0, 256, (ROWS, SIZE, SIZE, 3), np.uint8)
LABELS = np.array([3, 0, 999, 3, 1, 7])


def write_hdf5(file, libver='latest', **changes):
  """Writes SoFlow's layout; a change of None leaves a dataset out."""
  parts = {
    'latents': STORED, 'labels': LABELS, 'amount': np.int64(ROWS), 'latent_size': np.int64(4)
  }
  with h5py.File(file, 'w', libver=libver) as content:
    for name, value in (parts | changes).items():
      if value is not None:
        content.create_dataset(name, data=value)
  return file


def write_repa(folder, pictures='png', rows=ROWS):
  """Writes REPA's layout, as its preprocessing names the files: a thousand to a folder."""
  labels = []
  for i in range(rows):
    name = f'{i // 4:05d}/img-mean-std-{i:08d}.npy'
    save(folder / 'vae-sd' / name, STORED[i])
    labels.append([name, int(LABELS[i])])
    picture = folder / 'images' / f'{i // 4:05d}' / f'img{i:08d}.{pictures}'
    picture.parent.mkdir(parents=True, exist_ok=True)
    if pictures == 'npy':
      save(picture, PIXELS[i].transpose(2, 0, 1))
    else:
      Image.fromarray(PIXELS[i]).save(picture)
  (folder / 'images' / 'dataset.json').write_text('{"labels": null}')
  write_labels(folder, labels)
  return folder


def read_labels(folder):
  return json.loads((folder / 'vae-sd' / 'dataset.json').read_text())['labels']


def write_labels(folder, labels):
  (folder / 'vae-sd' / 'dataset.json').write_text(json.dumps({'labels': labels}))


def save(file, array):
  file.parent.mkdir(parents=True, exist_ok=True)
  np.save(file, array)


def refused(spec, *words, size=SIZE, with_pixels=False):
  """Opens what must be refused in one line with these words."""
  with pytest.raises(ValueError) as error:
    images.open_source(str(spec), size, with_pixels)
  line = str(error.value)
  assert '\n' not in line
  for word in words:
    assert word in line, line


def unreadable(source, index, reason):
  """Reads a row that cannot be read, and one that can."""
  with pytest.raises(images.Unreadable, match=reason) as error:
    source[index]
  source[index - 1]
  assert '\n' not in str(error.value)
  return error.value


def has_the_rows(source, with_pixels=False):
  """Compares every row with what was written."""
  assert len(source) == ROWS
  for i, row in enumerate(source):
    assert row.pop('label') == LABELS[i]
    moments = row.pop('moments')
    assert moments.dtype == np.float32 and moments.flags.c_contiguous
    np.testing.assert_array_equal(moments, files.channels_last(STORED[i]))
    if with_pixels:
      np.testing.assert_array_equal(row.pop('pixels'), PIXELS[i])
    assert not row


def test_the_recorded_file_of_soflow_golden():
  """tests/golden/soflow/README.md: latents, labels, amount and latent_size of the official code."""
  source = images.open_source(str(GOLDEN), 32, False)
  with h5py.File(GOLDEN) as content:
    latents, labels = content['latents'][()], content['labels'][()]
    assert len(source) == content['amount'][()] == 6
    assert source.size == 8 * content['latent_size'][()] == 32
  assert (latents[:, 4:] >= 0).all() and (latents[:, :4] < 0).any()
  for i, row in enumerate(source):
    np.testing.assert_array_equal(files.channels_first(row['moments']), latents[i])
    assert row['label'] == labels[i]


@pytest.mark.parametrize('libver', ['earliest', 'latest'])
def test_hdf5_gives_its_rows(tmp_path, libver):
  source = images.open_source(str(write_hdf5(tmp_path / 'x.h5', libver)), SIZE, False)
  has_the_rows(source)
  assert source.has_moments and source.crop == 'ADM centre crop to 32'
  assert source.vae == "sd-vae-ft-mse (assumed, as SoFlow's)"
  assert (source.classes, source.num_classes) == ((), 0) and source.name_of(3) == 'row 3'
  with pytest.raises(IndexError):
    source[-1]


def test_stored_moments_tell_how_many_classes_their_labels_need(tmp_path):
  for highest in (999, 7):
    labels = np.minimum(LABELS, highest)
    hdf5 = official.SoflowHdf5(write_hdf5(tmp_path / f'{highest}.h5', labels=labels))
    repa = write_repa(tmp_path / str(highest))
    write_labels(repa, [[name, min(label, highest)] for name, label in read_labels(repa)])
    assert hdf5.lowest_classes == highest + 1 and type(hdf5.lowest_classes) is int
    assert official.RepaFolder(repa, SIZE, False).lowest_classes == highest + 1


def test_hdf5_is_shared_by_threads(tmp_path):
  source = official.SoflowHdf5(write_hdf5(tmp_path / 'x.h5'))
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    rows = list(pool.map(source.__getitem__, list(range(ROWS)) * 20))
  for i, row in enumerate(rows):
    np.testing.assert_array_equal(files.channels_first(row['moments']), STORED[i % ROWS])


@pytest.mark.parametrize('changes,words', [
  ({'latents': None}, "no dataset 'latents'"),
  ({'amount': None}, "no dataset 'amount'"),
  ({'amount': np.int64(7)}, 'shape (6, 8, 4, 4), amount and latent_size say (7, 8, 4, 4)'),
  ({'latent_size': np.int64(8)}, 'say (6, 8, 8, 8)'),
  ({'latents': STORED[:, :4]}, 'shape (6, 4, 4, 4)'),
  ({'latents': STORED.astype(np.float64)}, 'latents are float64, expected float32'),
  ({'labels': LABELS[:5]}, 'labels have shape (5,), amount says (6,)'),
  ({'labels': LABELS.astype(np.float32)}, 'labels is float32, expected integers'),
  ({'labels': LABELS - 1}, 'row 1 has label -1'),
  ({'amount': np.array([6])}, 'amount has shape (1,), expected one number'),
  ({'latents': STORED[:0], 'labels': LABELS[:0], 'amount': np.int64(0)}, 'amount=0'),
])
def test_hdf5_whose_parts_do_not_agree_is_refused(tmp_path, changes, words):
  file = write_hdf5(tmp_path / 'x.hdf5', **changes)
  refused(file, str(file), words, 'copy or write it again')


def test_hdf5_that_is_missing_cut_or_something_else_is_refused(tmp_path):
  file = tmp_path / 'x.hdf5'
  refused(file, 'is not there')
  write_hdf5(file)
  file.write_bytes(file.read_bytes()[:-100])
  refused(file, 'cannot be used', 'truncated')
  file.write_text('hello')
  refused(file, 'cannot be used', 'signature')


def test_hdf5_of_another_size_or_without_pixels_is_refused():
  refused(GOLDEN, 'pictures of 32 pixels, expected 256; set data.latent_size=4 or', size=256)
  refused(
    GOLDEN, "no pixels, but the recipe's method aligns with features of pictures",
    'use a method that does not, or the pictures', with_pixels=True,
  )


@pytest.mark.parametrize('value,reason', [
  (np.nan, 'not all finite'), (np.inf, 'not all finite'), (-0.25, 'deviation of -0.25'),
])
def test_a_row_that_is_no_moments_is_unreadable(tmp_path, value, reason):
  latents = STORED.copy()
  latents[2, 5, 1, 1] = value
  folder = write_repa(tmp_path / 'repa')
  np.save(folder / 'vae-sd' / '00000' / 'img-mean-std-00000002.npy', latents[2])
  hdf5 = official.SoflowHdf5(write_hdf5(tmp_path / 'x.h5', latents=latents))
  assert unreadable(hdf5, 2, reason).name == 'row 2'
  repa = official.RepaFolder(folder, SIZE, False)
  assert unreadable(repa, 2, reason).name == 'vae-sd/00000/img-mean-std-00000002.npy'


def test_a_damaged_chunk_of_hdf5_is_unreadable(tmp_path):
  with h5py.File(write_hdf5(tmp_path / 'x.h5', latents=None), 'a') as content:
    latents = content.create_dataset(
      'latents', data=STORED, chunks=(1, 8, 4, 4), compression='gzip', fletcher32=True
    )
    at = latents.id.get_chunk_info(3).byte_offset
  data = bytearray((tmp_path / 'x.h5').read_bytes())
  data[at + 20 : at + 30] = bytes(10)
  (tmp_path / 'x.h5').write_bytes(data)
  source = official.SoflowHdf5(tmp_path / 'x.h5')
  unreadable(source, 3, 'row 3 cannot be read: its part of the file is damaged')


def test_a_disk_that_fails_is_not_blamed_on_a_row_of_hdf5(tmp_path):
  """A folder in place of the file that is open: reading it fails as a broken disk would."""
  latents = np.tile(STORED, (400, 1, 1, 1))  # more than is read ahead at opening
  labels = np.tile(LABELS, 400)
  write_hdf5(tmp_path / 'x.h5', latents=latents, labels=labels, amount=np.int64(2400))
  source = official.SoflowHdf5(tmp_path / 'x.h5')
  handle = next(
    int(entry) for entry in os.listdir('/proc/self/fd')
    if os.path.realpath(f'/proc/self/fd/{entry}') == str((tmp_path / 'x.h5').resolve())
  )
  whole, folder = os.dup(handle), os.open(tmp_path, os.O_RDONLY)
  os.dup2(folder, handle)
  with pytest.raises(OSError) as error:
    source[2399]
  os.dup2(whole, handle)
  os.close(whole), os.close(folder)
  assert error.value.errno == errno.EISDIR
  with pytest.raises(IsADirectoryError):  # HDF5 itself would give zeros now
    source[2398]


@pytest.mark.parametrize('error', [
  OSError(errno.ESTALE, 'Stale file handle'), RuntimeError('not a\ndataset'),
])
def test_only_what_cannot_be_decoded_damages_a_row_of_hdf5(tmp_path, monkeypatch, error):
  class Latents:
    def __getitem__(self, index):
      raise error

  source = official.SoflowHdf5(write_hdf5(tmp_path / 'x.h5'))
  monkeypatch.setattr(source, '_latents', Latents())
  with pytest.raises((OSError, ValueError), match='Stale|row 3 .*: not a dataset') as raised:
    source[3]
  assert not isinstance(raised.value, images.Unreadable)


def test_the_fingerprint_of_hdf5_changes_with_labels_and_shape(tmp_path):
  seen = {
    official.SoflowHdf5(write_hdf5(tmp_path / f'{i}.h5', **changes)).fingerprint()
    for i, changes in enumerate((
      {}, {}, {'labels': LABELS[::-1]},
      {'latents': STORED[:5], 'labels': LABELS[:5], 'amount': np.int64(5)},
    ))
  }
  assert len(seen) == 3


@pytest.mark.parametrize('pictures', ['png', 'npy'])
def test_repa_folders_give_their_rows(tmp_path, pictures):
  source = images.open_source(str(write_repa(tmp_path, pictures)), SIZE, True)
  has_the_rows(source, with_pixels=True)
  assert source.has_moments and source.crop == 'ADM centre crop to 32'
  assert source.vae == "sd-vae-ft-ema (assumed, as BFM's)"
  assert (source.classes, source.num_classes) == ((), 0)
  assert source.name_of(5) == 'vae-sd/00001/img-mean-std-00000005.npy'
  with pytest.raises(IndexError):
    source[-1]


def test_repa_without_pixels_needs_no_pictures(tmp_path):
  folder = write_repa(tmp_path)
  (folder / 'images').rename(tmp_path / 'elsewhere')
  source = images.open_source(str(folder), SIZE, False)
  has_the_rows(source)
  refused(folder, 'no folder images/', with_pixels=True)


def test_repa_pairs_files_by_their_place_after_sorting(tmp_path):
  """As text over whole paths, where '-' comes before '/'; labels go by name, in any order."""
  for i, name in enumerate(('a-b/x.npy', 'a/1.npy', 'a/b/x.npy', 'b.npy')):
    save(tmp_path / 'vae-sd' / name, STORED[i])
  write_labels(tmp_path, [['b.npy', 3], ['a/b/x.npy', 2], ['a/1.npy', 1], ['a-b/x.npy', 0]])
  for i in range(4):
    save(tmp_path / 'images' / f'{i}.npy', PIXELS[i].transpose(2, 0, 1))
  for i, row in enumerate(images.open_source(str(tmp_path), SIZE, True)):
    assert row['label'] == i
    np.testing.assert_array_equal(row['moments'], files.channels_last(STORED[i]))
    np.testing.assert_array_equal(row['pixels'], PIXELS[i])


def test_repa_whose_numbers_do_not_agree_is_refused(tmp_path):
  """As many of both, but another one is missing: all between would get each other's pictures."""
  folder = write_repa(tmp_path)
  (folder / 'images' / '00000' / 'img00000001.png').unlink()
  (folder / 'vae-sd' / '00000' / 'img-mean-std-00000003.npy').unlink()
  assert len(images.open_source(str(folder), SIZE, False)) == ROWS - 1
  refused(
    folder, 'images/00000/img00000002.png', 'vae-sd/00000/img-mean-std-00000001.npy',
    'expected the same number', with_pixels=True,
  )


def test_repa_folders_that_are_gone_are_not_called_unreadable(tmp_path):
  folder = write_repa(tmp_path)
  source = images.open_source(str(folder), SIZE, True)
  for part in ('images', 'vae-sd'):
    (folder / part).rename(folder / 'elsewhere')
    with pytest.raises(FileNotFoundError):
      source[3]
    (folder / 'elsewhere').rename(folder / part)
  assert source[3]['label'] == LABELS[3]


def test_repa_is_listed_with_a_word_and_the_sizes(tmp_path, monkeypatch, caplog):
  folder = write_repa(tmp_path)
  with caplog.at_level('INFO'):
    source = images.open_source(str(folder), SIZE, True)
  for part in ('images', 'vae-sd'):
    assert f'listing files in {folder / part}' in caplog.text
  expected, asked = source.fingerprint(), []
  monkeypatch.setattr(os, 'stat', lambda path, **options: asked.append(path))
  assert source.fingerprint() == expected and not asked


def test_repa_with_other_counts_or_labels_is_refused(tmp_path):
  folder = write_repa(tmp_path)
  (folder / 'images' / '00001' / 'img00000005.png').unlink()
  refused(folder, 'images/ holds 5 pictures and vae-sd/ 6 .npy files', with_pixels=True)
  save(folder / 'vae-sd' / 'more.npy', STORED[0])
  refused(folder, 'has no label for 1 of 7 files, such as more.npy')


@pytest.mark.parametrize('text,words', [
  ('', 'cannot be used'),
  ('[]', 'it is no {"labels"'),
  ('{"labels": null}', 'it is no {"labels"'),
  ('{"labels": [["a.npy"]]}', 'it has ["a.npy"], expected'),
  ('{"labels": [["a.npy", "cat"]]}', 'expected [name, label'),
  ('{"labels": [["a.npy", -1]]}', 'expected [name, label'),
  ('{"labels": [["a.npy", true]]}', 'expected [name, label'),
  ('{"labels": [["a.npy", 1e9]]}', 'expected [name, label'),
  ('{"labels": [["../a.npy", 1]]}', 'leads out of its folder'),
  ('{"labels": [["/etc/a.npy", 1]]}', 'leads out of its folder'),
  ('[' * 100_000, 'cannot be used'),
])
def test_repa_with_other_names_and_labels_is_refused(tmp_path, text, words):
  folder = write_repa(tmp_path)
  (folder / 'vae-sd' / 'dataset.json').write_text(text)
  refused(folder, 'dataset.json', words)


def test_repa_without_moments_is_refused(tmp_path):
  (tmp_path / 'vae-sd').mkdir()
  write_labels(tmp_path, [])
  refused(tmp_path, 'vae-sd/ holds no .npy')


def pickled(file):
  np.save(file, np.array([{}], object), allow_pickle=True)


@pytest.mark.parametrize('change,reason', [
  (lambda file: file.write_bytes(file.read_bytes()[:-1]), 'no whole .npy'),
  (lambda file: file.write_bytes(b''), 'no whole .npy'),
  (lambda file: file.write_bytes(b'hello' * 100), 'no whole .npy'),
  (pickled, 'no whole .npy of numbers'),
  (lambda file: file.unlink(), 'no such file'),
  (lambda file: np.save(file, STORED[0][:4]), r'float32 \(4, 4, 4\), expected float32 \(8, 4, 4\)'),
  (lambda file: np.save(file, PIXELS[0][:8, :4, :1]), 'moments uint8'),
])
def test_a_damaged_file_of_moments_is_unreadable(tmp_path, change, reason):
  source = images.open_source(str(write_repa(tmp_path)), SIZE, False)
  change(tmp_path / 'vae-sd' / '00000' / 'img-mean-std-00000003.npy')
  error = unreadable(source, 3, reason)
  assert str(tmp_path) not in str(error)


def test_a_header_that_promises_too_much_takes_no_memory(tmp_path):
  """A terabyte would fail to be reserved, and with another exception."""
  source = images.open_source(str(write_repa(tmp_path)), SIZE, False)
  file = tmp_path / 'vae-sd' / '00000' / 'img-mean-std-00000003.npy'
  with open(file, 'wb') as stream:
    np.lib.format.write_array_header_1_0(
      stream, {'descr': '<f4', 'fortran_order': False, 'shape': (2**20, 2**18)}
    )
  unreadable(source, 3, 'no whole .npy')


@pytest.mark.parametrize('pictures,change,reason', [
  ('png', lambda file: Image.new('RGB', (32, 33)).save(file), '32 x 33 pixels, expected 32 x 32'),
  ('png', lambda file: file.write_bytes(b'hello'), 'it is no JPEG'),
  ('npy', lambda file: np.save(file, PIXELS[0]), r'uint8 \(32, 32, 3\), expected .*\(3, 32, 32\)'),
  ('npy', lambda file: np.save(file, np.zeros((3, 32, 32))), 'it has float64'),
])
def test_pictures_of_another_size_are_unreadable(tmp_path, pictures, change, reason):
  source = images.open_source(str(write_repa(tmp_path, pictures)), SIZE, True)
  change(tmp_path / 'images' / '00000' / f'img00000003.{pictures}')
  assert unreadable(source, 3, reason).name == f'images/00000/img00000003.{pictures}'


def test_moments_of_another_size_are_unreadable(tmp_path):
  source = images.open_source(str(write_repa(tmp_path)), 64, False)
  with pytest.raises(images.Unreadable, match=r'\(8, 4, 4\), expected float32 \(8, 8, 8\)'):
    source[0]


def test_the_fingerprint_of_repa_changes_with_files_and_labels(tmp_path):
  def fingerprint(folder, with_pixels=True):
    return official.RepaFolder(folder, SIZE, with_pixels).fingerprint()

  for name in ('a', 'b'):
    write_repa(tmp_path / name)
  before = fingerprint(tmp_path / 'a')
  assert before == fingerprint(tmp_path / 'b') != fingerprint(tmp_path / 'a', False)
  picture = tmp_path / 'b' / 'images' / '00000' / 'img00000003.png'
  picture.write_bytes(picture.read_bytes() + b'x')
  save(tmp_path / 'a' / 'vae-sd' / '00000' / 'img-mean-std-00000003.npy', STORED[0][:4])
  assert len({before, fingerprint(tmp_path / 'a'), fingerprint(tmp_path / 'b')}) == 3


def test_damaged_headers_of_npy_raise_nothing_but_unreadable(tmp_path):
  save(tmp_path / 'x.npy', STORED[0])
  whole = (tmp_path / 'x.npy').read_bytes()
  rng = np.random.default_rng(0)
  for _ in range(500):
    data = np.frombuffer(whole, np.uint8).copy()
    data[rng.integers(0, 100, rng.integers(1, 5))] = rng.integers(0, 256)
    try:
      picture_files.read_npy(data.tobytes(), 'x')
    except images.Unreadable as error:
      assert 'no whole .npy' in error.reason


def test_sources_need_no_jax(tmp_path):
  write_hdf5(tmp_path / 'x.h5')
  script = f'''
import sys
from fmzoo.data import images
assert len(images.open_source({str(tmp_path / 'x.h5')!r}, 32, False)[0]['moments'])
assert not {{'jax', 'tensorflow'}} & set(sys.modules)
'''
  subprocess.run(
    [sys.executable, '-c', script], check=True, timeout=60, env=dict(os.environ),
    cwd=pathlib.Path(__file__).parents[2],
  )

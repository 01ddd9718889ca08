"""Pictures come back in order, a few at a time, and what is none is refused in one line."""

import numpy as np
import pytest
from PIL import Image

from fmzoo import npz, picture_stream, pictures


def random_images(count, height=6, width=8, channels=3):
  shape = (count, height, width, channels)
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def expect_images(path, images, labels):
  """Reads a path in batches of 3 and compares."""
  with picture_stream.open_images(path) as stream:
    assert len(stream) == len(images) and stream.shape == images.shape[1:]
    batches = list(stream.batches(3))
    again = list(stream.batches(len(images)))
    if labels is None:
      assert stream.labels is None
    else:
      assert stream.labels.dtype == np.int32
      np.testing.assert_array_equal(stream.labels, labels)
  assert [len(batch) for batch in batches] == [3, 3, 1]
  assert {batch.dtype for batch in batches} == {np.dtype(np.uint8)}
  np.testing.assert_array_equal(np.concatenate(batches), images)
  np.testing.assert_array_equal(np.concatenate(again), images)


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('labels', [None, np.arange(7)])
def test_npz(tmp_path, save, channels, labels):
  images = random_images(7, channels=channels)
  more = {} if labels is None else {'labels': labels}
  save(tmp_path / 'x.npz', arr_0=images, **more)
  expect_images(tmp_path / 'x.npz', images, labels)


def test_arrays_are_not_read_whole(tmp_path, monkeypatch):
  images = random_images(7)
  np.savez(tmp_path / 'x.npz', arr_0=images)
  asked, read = [], npz.Reader._read

  def noted(self, name, member, size):
    asked.append(size)
    return read(self, name, member, size)

  monkeypatch.setattr(npz.Reader, '_read', noted)
  with picture_stream.open_images(tmp_path / 'x.npz') as stream:
    list(stream.batches(2))
  assert max(asked) == images[:2].nbytes


@pytest.mark.parametrize('channels', [1, 3])
def test_folder_of_pngs(tmp_path, channels):
  images = random_images(7, channels=channels)
  pictures.save_folder(tmp_path / 'all', images)
  expect_images(tmp_path / 'all', images, None)


def test_names_count_without_regard_to_case(tmp_path, caplog):
  images = random_images(7)
  pictures.save_folder(tmp_path, images)
  (tmp_path / '00002.png').rename(tmp_path / '00002.PNG')
  (tmp_path / '00005.png').rename(tmp_path / '00005.Png')
  expect_images(tmp_path, images, None)
  assert not caplog.records


def test_other_files_are_left_out_aloud(tmp_path, caplog):
  images = random_images(7)
  pictures.save_folder(tmp_path, images)
  for name in ('notes.txt', '00003.jpg'):
    (tmp_path / name).write_text('no picture')
  expect_images(tmp_path, images, None)
  assert 'left out, no PNGs by their name: 2 beside 7 PNGs, first 00003.jpg' in caplog.text


def test_palettes_become_rgb(tmp_path):
  image = Image.new('RGB', (8, 6), (200, 100, 50))
  image.convert('P', palette=Image.Palette.ADAPTIVE).save(tmp_path / '0.png')
  with picture_stream.open_images(tmp_path) as stream:
    batch, = stream.batches(5)
  assert batch.shape == (1, 6, 8, 3) and (batch == [200, 100, 50]).all()


def truncated(path):
  """Writes an .npz whose end is missing."""
  np.savez(path, arr_0=random_images(7))
  path.write_bytes(path.read_bytes()[:300])


BAD_FILES = {
  'missing': (lambda path: None, 'is missing'),
  'no zip': (lambda path: path.write_bytes(b'PK'), 'cannot be read'),
  'truncated': (truncated, 'cannot be read'),
  'other arrays': (lambda path: np.savez(path, latents=np.zeros(3)), 'holds latents and no arr_0'),
  'float': (lambda path: np.savez(path, arr_0=np.zeros((2, 4, 4, 3))), 'float64'),
  'rank': (lambda path: np.savez(path, arr_0=np.zeros((2, 4, 4), np.uint8)), r'\(2, 4, 4\)'),
  'channels': (lambda path: np.savez(path, arr_0=np.zeros((2, 4, 4, 4), np.uint8)), r', 4\)'),
  'empty': (lambda path: np.savez(path, arr_0=np.zeros((0, 4, 4, 3), np.uint8)), r'\(0, 4'),
  'objects': (lambda path: np.savez(path, arr_0=np.array([{}, 1], object)), 'pickled'),
  'labels': (
    lambda path: np.savez(path, arr_0=random_images(2), labels=np.arange(3)), r'labels \(3,\)'),
  'float labels': (
    lambda path: np.savez(path, arr_0=random_images(2), labels=np.zeros(2)), 'of integers'),
}


@pytest.mark.parametrize('kind', BAD_FILES)
def test_a_bad_npz_is_one_line(tmp_path, kind):
  path = tmp_path / 'x.npz'
  make, words = BAD_FILES[kind]
  make(path)
  with pytest.raises(ValueError, match=words) as error:
    picture_stream.open_images(path)
  assert str(path) in str(error.value) and '\n' not in str(error.value)


def other_size(folder):
  """Adds a picture that is wider than the others."""
  pictures.save_folder(folder, random_images(1, width=9), first=2)


def other_mode(folder):
  """Adds a grey one."""
  pictures.save_folder(folder, random_images(1, channels=1), first=2)


def transparent(mode, **options):
  """Returns what adds a picture of a mode to a folder."""
  return lambda folder: Image.new(mode, (8, 6)).save(folder / '2.png', **options)


BAD_FOLDERS = {
  'another size': (other_size, r'00002.png is \(6, 9, 3\), expected \(6, 8, 3\) as 00000.png'),
  'grey': (other_mode, r'00002.png is \(6, 8, 1\)'),
  'no picture': (lambda folder: (folder / '2.png').write_bytes(b'x'), '2.png cannot be read'),
  '16 bits': (
    lambda folder: Image.new('I;16', (8, 6)).save(folder / '2.png'), 'cannot be read: mode I;16'),
  'RGBA': (transparent('RGBA'), '2.png cannot be read: mode RGBA with transparency.* background'),
  'LA': (transparent('LA'), 'mode LA with transparency'),
  'a palette': (transparent('P', transparency=0), 'mode P with transparency'),
  'one colour': (transparent('RGB', transparency=(0, 0, 0)), 'mode RGB with transparency'),
}


@pytest.mark.parametrize('kind', BAD_FOLDERS)
def test_a_bad_picture_is_named(tmp_path, kind):
  make, words = BAD_FOLDERS[kind]
  pictures.save_folder(tmp_path, random_images(2))
  make(tmp_path)
  with pytest.raises(ValueError, match=words) as error, picture_stream.open_images(tmp_path) as it:
    list(it.batches(2))
  assert '\n' not in str(error.value)


def test_a_folder_without_pictures_is_refused(tmp_path):
  with pytest.raises(ValueError, match='holds no PNGs; expected'):
    picture_stream.open_images(tmp_path)

"""Arrays that are written in pieces are what numpy reads, and what is damaged is refused."""

import numpy as np
import pytest

from fmzoo import npz

VALUES = np.arange(5 * 3 * 2).reshape(5, 3, 2).astype(np.uint8)


def write(path, values=VALUES, step=2, shape=None):
  """Writes `x` in pieces of `step` rows, and `y` whole."""
  pieces = (values[i : i + step] for i in range(0, len(values), step))
  whole = np.array([7, 8], np.int32)
  with open(path, 'wb') as file:
    npz.write(file, {
      'x': (np.uint8, shape or values.shape, pieces), 'y': (np.int32, (2,), [whole])
    })
  return path


def test_numpy_reads_what_was_written_in_pieces(tmp_path):
  with np.load(write(tmp_path / 'x.npz')) as arrays:
    assert arrays.files == ['x', 'y'] and arrays['x'].dtype == np.uint8
    np.testing.assert_array_equal(arrays['x'], VALUES)
    np.testing.assert_array_equal(arrays['y'], [7, 8])


def test_bytes_depend_on_the_arrays_alone(tmp_path):
  first, second = (write(tmp_path / f'{step}.npz', step=step).read_bytes() for step in (1, 4))
  assert first == second


@pytest.mark.parametrize('step,shape,words', [
  (2, (6, 3, 2), '5 rows, expected 6'), (2, (5, 2, 3), r'\(3, 2\) uint8, expected \(2, 3\)'),
])
def test_pieces_that_do_not_fit_are_refused(tmp_path, step, shape, words):
  with pytest.raises(ValueError, match=words):
    write(tmp_path / 'x.npz', step=step, shape=shape)


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
@pytest.mark.parametrize('size', [1, 2, 5, 9])
def test_rows_of_numpy_files_come_in_order(tmp_path, save, size):
  save(tmp_path / 'x.npz', x=VALUES)
  with npz.Reader(tmp_path / 'x.npz') as reader:
    assert reader.names() == ['x'] and reader.header('x') == ((5, 3, 2), np.uint8)
    pieces = list(reader.rows('x', size))
  assert max(map(len, pieces)) == min(size, 5)
  np.testing.assert_array_equal(np.concatenate(pieces), VALUES)


def flip_a_byte(path):
  """Changes the last number of `x`."""
  data = bytearray(path.read_bytes())
  place = data.index(VALUES[-1].tobytes()) + VALUES[-1].size - 1
  data[place] ^= 1
  path.write_bytes(data)


@pytest.mark.parametrize('damage,words', [
  (lambda path: path.unlink(), 'No such file'),
  (lambda path: path.write_bytes(path.read_bytes()[:-80]), 'not a zip file'),
  (flip_a_byte, 'CRC'),
  (lambda path: np.savez(path, x=np.array([{}, {}], object)), 'pickled objects'),
  (lambda path: np.savez(path, x=np.asfortranarray(VALUES)), 'first axis fastest'),
  (lambda path: np.savez(path, x=np.uint8(3)), 'a single number'),
  (lambda path: np.savez(path, z=VALUES), "no item named 'x.npy'"),
])
def test_damaged_files_are_one_line(tmp_path, damage, words):
  path = write(tmp_path / 'x.npz')
  damage(path)
  with pytest.raises(ValueError, match=words) as error, npz.Reader(path) as reader:
    list(reader.rows('x', 2))
  assert str(path) in str(error.value) and '\n' not in str(error.value)

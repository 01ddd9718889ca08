"""`.npz` files written and read a few rows at a time; nothing here holds a whole array.

Arrays lie in them uncompressed and under a fixed date, so that equal arrays give equal files.
Compressed files of others can be read as well, pickled objects never.
"""

import math
import zipfile
import zlib

import numpy as np

DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip archive can hold
DAMAGES = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error,
           NotImplementedError, RuntimeError)  # what zipfile and numpy raise on such files
HEADERS = {
  (1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0,
}


def write(file, arrays):
  """Writes arrays that come in pieces.

  Args:
    file: open for writing bytes.
    arrays: {name: (dtype, shape, pieces)}; pieces are arrays which, joined along the first axis,
      have that dtype and shape. Any iterable does; each is read once, in turn.

  Raises:
    ValueError: if pieces do not make up their shape.
  """
  with zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED) as archive:
    for name, (dtype, shape, pieces) in arrays.items():
      entry, rows = zipfile.ZipInfo(f'{name}.npy', DATE), 0
      header = {
        'descr': np.lib.format.dtype_to_descr(np.dtype(dtype)), 'fortran_order': False,
        'shape': tuple(shape),
      }
      with archive.open(entry, 'w', force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for piece in pieces:
          if piece.dtype != dtype or piece.shape[1:] != tuple(shape[1:]):
            raise ValueError(
              f'{name} got rows {piece.shape[1:]} {piece.dtype}, expected {tuple(shape[1:])}'
              f' {dtype}'
            )
          member.write(np.ascontiguousarray(piece))
          rows += len(piece)
      if rows != shape[0]:
        raise ValueError(f'{name} got {rows} rows, expected {shape[0]}')


class Reader:
  """Arrays of an `.npz`, by name; a context manager.

  Args:
    path: of the file.

  Raises:
    ValueError: one line, if it is missing or no such file.
  """

  def __init__(self, path):
    self.path = path
    try:
      self._archive = zipfile.ZipFile(path)
    except DAMAGES as error:
      raise self._unreadable(error) from error

  def names(self):
    """Returns the names of the arrays."""
    return [name.removesuffix('.npy') for name in self._archive.namelist()]

  def header(self, name):
    """Returns (shape, dtype) of an array."""
    with self._open(name) as member:
      return self._read_header(name, member)

  def rows(self, name, size):
    """Yields arrays of `size` rows of an array, the last of fewer.

    Raises:
      ValueError: one line, if bytes are missing or other than they were.
    """
    with self._open(name) as member:
      shape, dtype = self._read_header(name, member)
      row = math.prod(shape[1:]) * dtype.itemsize
      for first in range(0, shape[0], size):
        count = min(size, shape[0] - first)
        data = self._read(name, member, count * row)
        yield np.frombuffer(data, dtype).reshape(count, *shape[1:])
      if self._read_past(name, member):
        raise self._unreadable(f'{name} has more bytes than its shape {shape} says')

  def array(self, name):
    """Returns a whole array."""
    shape, _ = self.header(name)
    return next(self.rows(name, max(shape[0], 1)))

  def close(self):
    """Closes the file."""
    self._archive.close()

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()

  def _open(self, name):
    """Opens the member of an array."""
    try:
      return self._archive.open(f'{name}.npy')
    except DAMAGES as error:
      raise self._unreadable(error) from error

  def _read_header(self, name, member):
    """Returns (shape, dtype) from the beginning of a member; refuses what is no plain array."""
    try:
      version = np.lib.format.read_magic(member)
      shape, fortran_order, dtype = HEADERS[version](member)
    except DAMAGES as error:
      raise self._unreadable(error) from error
    if dtype.hasobject:
      raise self._unreadable(f'{name} holds pickled objects, which are never loaded')
    if fortran_order and len(shape) > 1:
      raise self._unreadable(f'{name} is stored with the first axis fastest, expected the last')
    if not shape:
      raise self._unreadable(f'{name} is a single number')
    return shape, dtype

  def _read(self, name, member, size):
    """Reads exactly `size` bytes."""
    pieces, left = [], size
    try:
      while left and (piece := member.read(left)):
        pieces.append(piece)
        left -= len(piece)
    except DAMAGES as error:
      raise self._unreadable(error) from error
    if left:
      raise self._unreadable(f'{name} ends {left} bytes early')
    return b''.join(pieces)

  def _read_past(self, name, member):
    """Returns whether bytes are left; the checksum is compared where there are none."""
    try:
      return bool(member.read(1))
    except DAMAGES as error:
      raise self._unreadable(error) from error

  def _unreadable(self, reason):
    """Returns the error to raise, on one line."""
    return ValueError(f'{self.path} cannot be read: {" ".join(str(reason).split())}')

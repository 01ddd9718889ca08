"""Pictures read back a few at a time, from an `.npz` or from a folder of PNGs."""

import logging
import pathlib

import numpy as np

from fmzoo import npz

REMEDY = 'expected an .npz with arr_0, uint8 [n, H, W, 1 or 3], or a folder of PNGs'
GREY_MODES = ('1', 'L')  # of PIL; pictures of these have one channel
DEEP_MODES = ('I', 'F')  # beginnings of the modes with more than 8 bits
ALPHA_MODES = ('A', 'a')  # ends of the modes with transparency, such as RGBA

_log = logging.getLogger(__name__)


def open_images(path):
  """Opens images for reading in order.

  Args:
    path: an ADM `.npz` (arr_0 and, if there, labels) or a folder of PNGs, taken by name; what else
      is in the folder is left out, and the log says so.

  Returns:
    An object with `len`, `shape` (H, W, C), `labels` ([n] int32 or None), `batches(size)` and
    `close`; a context manager. Batches are uint8 [<= size, H, W, C].

  Raises:
    ValueError: one line, if there are no such images.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise ValueError(f'{path} is missing; {REMEDY}')
  return Folder(path) if path.is_dir() else Npz(path)


class Npz:
  """Images of an `.npz`; see `open_images`."""

  def __init__(self, path):
    self.path = path
    try:
      self._reader = npz.Reader(path)
    except ValueError as error:
      raise ValueError(f'{error}; {REMEDY}') from error
    try:
      self._count, self.shape = self._images()
      self.labels = self._labels()
    except ValueError:
      self.close()
      raise

  def _images(self):
    """Returns (n, (H, W, C)), checked."""
    if 'arr_0' not in self._reader.names():
      names = ', '.join(self._reader.names()) or 'nothing'
      raise ValueError(f'{self.path} holds {names} and no arr_0; {REMEDY}')
    shape, dtype = self._reader.header('arr_0')
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
      raise ValueError(f'{self.path} holds arr_0 {shape} {dtype}; {REMEDY}')
    return shape[0], tuple(shape[1:])

  def _labels(self):
    """Returns labels [n] int32, or None where there are none."""
    if 'labels' not in self._reader.names():
      return None
    shape, dtype = self._reader.header('labels')
    if shape != (self._count,) or dtype.kind not in 'iu':
      raise ValueError(
        f'{self.path} holds labels {shape} {dtype}, expected ({self._count},) of integers; write'
        ' one label an image or none'
      )
    return self._reader.array('labels').astype(np.int32)

  def __len__(self):
    return self._count

  def batches(self, size):
    """Yields uint8 [<= size, H, W, C] in order."""
    return self._reader.rows('arr_0', size)

  def close(self):
    """Closes the file."""
    self._reader.close()

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()


class Folder:
  """Images of a folder; see `open_images`. Its files have no labels."""

  labels = None

  def __init__(self, path):
    found = sorted(path.iterdir())
    self._files = [file for file in found if _is_png(file)]
    if not self._files:
      raise ValueError(f'{path} holds no PNGs; {REMEDY}')
    others = [file for file in found if not _is_png(file)]
    if others:
      _log.warning(
        '%s: left out, no PNGs by their name: %d beside %d PNGs, first %s', path, len(others),
        len(self._files), others[0].name,
      )
    self.shape = _read_png(self._files[0]).shape

  def __len__(self):
    return len(self._files)

  def batches(self, size):
    """Yields uint8 [<= size, H, W, C] in the order of names."""
    for first in range(0, len(self._files), size):
      yield np.stack([self._read(file) for file in self._files[first : first + size]])

  def _read(self, file):
    """Returns [H, W, C] of a file, of the first one's shape."""
    image = _read_png(file)
    if image.shape != self.shape:
      raise ValueError(
        f'{file} is {image.shape}, expected {self.shape} as {self._files[0].name} is; images of one'
        ' measurement have one size and one number of channels'
      )
    return image

  def close(self):
    """Does nothing: files are closed as soon as they are read."""

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()


def _is_png(file):
  """Says whether a file has the name of a PNG."""
  return file.suffix.lower() == '.png'


def _read_png(file):
  """Returns [H, W, 1 or 3] uint8; what is not grey becomes RGB, transparency is refused."""
  from PIL import Image

  try:
    with Image.open(file) as image:
      if image.mode.startswith(DEEP_MODES):
        raise ValueError(f'mode {image.mode} has more than 8 bits a channel')
      if image.mode.endswith(ALPHA_MODES) or 'transparency' in image.info:
        raise ValueError(
          f'mode {image.mode} with transparency, and nothing says what is behind it; lay it over'
          ' a background'
        )
      if image.mode in GREY_MODES:
        return np.asarray(image.convert('L'))[..., None]
      return np.asarray(image.convert('RGB'))
  except (OSError, ValueError, SyntaxError) as error:
    reason = ' '.join(str(error).split())
    raise ValueError(
      f'{file} cannot be read: {reason}; expected an opaque PNG of 8 bits'
    ) from error

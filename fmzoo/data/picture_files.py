"""Files of pictures: which of them a folder holds, decoding, and the ADM centre crop.

Decoding is Pillow's; the orientation that EXIF may state is not applied, as in the official code.
"""

import errno
import io
import math
import os
import struct
import tokenize
import zlib

import numpy as np
from PIL import Image

ENDINGS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm', '.pgm')
# What a file holds decides, not its ending. Others stay out: some of them start programs.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM')
# Pillow has no common class for what a damaged file makes its decoders raise.
DAMAGE = (
  OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError,
  NotImplementedError, struct.error, zlib.error,
)
# Faults of one file. Others, such as EIO or ESTALE, are of what it lies on, and hit all files.
OF_ONE_FILE = (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ELOOP)
NPY_HEADERS = {
  (1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0,
}
MOST_BYTES = 2**30  # of a file: more than a picture of as many pixels as Pillow allows takes


class Unreadable(ValueError):
  """One row of a source cannot be read; the others may be fine.

  Args:
    name: of the row, as `name_of` of its source gives it.
    reason: why, a few words.
  """

  def __init__(self, name, reason):
    super().__init__(f'{name} cannot be read: {reason}')
    self.name, self.reason = name, reason


class Root:
  """The folder that the files of a source are in.

  Args:
    path: folder, which is there.
  """

  def __init__(self, path):
    self._path = os.fspath(path)
    self._device = os.stat(path).st_dev

  def read(self, file, name):
    """Returns the bytes of a file.

    Args:
      file: path relative to this folder.
      name: for the error.

    Raises:
      Unreadable: if the file alone is missing, locked away, a folder or huge.
      OSError: as it is, if more than this file cannot be read.
    """
    try:
      with open(os.path.join(self._path, file), 'rb') as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > MOST_BYTES:
          raise Unreadable(name, f'it has {size} bytes, expected {MOST_BYTES} or fewer')
        return stream.read()
    except OSError as error:
      if error.errno not in OF_ONE_FILE or not self._is_there():
        raise
      raise Unreadable(name, os.strerror(error.errno).lower()) from error

  def _is_there(self):
    """Returns whether the folder is; the place it was mounted at, left empty, is another device.
    """
    try:
      return os.stat(self._path).st_dev == self._device
    except OSError:
      return False


def adm_crop(image, size):
  """Cuts the middle of a picture, its shorter side scaled to `size`.

  Halves both sides (rounded down, box filter) while the shorter is at least 2 size, then resizes by
  scale = size / shorter side to round(side scale) (half to even, bicubic), then crops from
  floor((side - size) / 2). Smaller pictures are enlarged.
  Source: centre crop of ADM (guided diffusion), which SoFlow and REPA use.

  Args:
    image: PIL image; becomes RGB first, by dropping what is transparent.
    size: side of the result, pixels.

  Returns:
    [size, size, 3] uint8.
  """
  if image.mode != 'RGB':
    image = image.convert('RGB')
  while min(image.size) >= 2 * size:
    image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
  scale = size / min(image.size)
  sides = tuple(round(side * scale) for side in image.size)
  pixels = np.asarray(image.resize(sides, Image.Resampling.BICUBIC))
  left, top = ((side - size) // 2 for side in sides)
  return pixels[top : top + size, left : left + size].copy()


def read_crop(data, name, size):
  """Returns `adm_crop` of a picture: [size, size, 3] uint8.

  Args:
    data: bytes of its file.
    name: for the error.
    size: side, pixels.

  Raises:
    Unreadable: see `read_rgb`; or the picture is so narrow that scaling makes it huge.
  """
  image = read_rgb(data, name)
  width, height = image.size
  if size * size * max(width, height) > min(width, height) * Image.MAX_IMAGE_PIXELS:
    raise Unreadable(name, f'{width} x {height} pixels are too narrow to scale')
  return adm_crop(image, size)


def read_rgb(data, name):
  """Returns a picture as an RGB PIL image; of several frames the first.

  Args:
    data: bytes of its file.
    name: for the error.

  Raises:
    Unreadable: if it is no picture, damaged, larger than Pillow allows, or of more than 8 bits in
      one channel: Pillow would clip those.
  """
  Image.init()  # loads all formats; left to Image.open, threads may look before they are there
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
      image.load()
      if image.mode[0] in 'IF':
        raise Unreadable(name, f'its pixels are of mode {image.mode}, expected 8 bits a channel')
      image.info.pop('transparency', None)  # conversion to RGB warns of what it drops anyway
      return image.convert('RGB')
  except Unreadable:
    raise
  except Image.UnidentifiedImageError as error:
    raise Unreadable(name, f'it is no {", ".join(FORMATS[:-1])} or {FORMATS[-1]}') from error
  except Image.DecompressionBombError as error:
    most = 2 * Image.MAX_IMAGE_PIXELS
    raise Unreadable(name, f'it has more than {most} pixels') from error
  except DAMAGE as error:
    if getattr(error, 'errno', None):  # of this machine: the bytes are there already
      raise
    reason = ' '.join(f'damaged ({type(error).__name__}: {error})'.split())
    raise Unreadable(name, reason) from error


def read_npy(data, name):
  """Returns the array of a .npy file, which may hold no Python objects.

  Args:
    data: bytes of the file.
    name: for the error.

  Raises:
    Unreadable: if it is cut short or no such file.
  """
  stream = io.BytesIO(data)
  try:
    version = np.lib.format.read_magic(stream)
    shape, is_fortran, dtype = NPY_HEADERS[version](stream)
    # Refuses a damaged header that asks for more than there is before it allocates anything.
    values = np.frombuffer(data, dtype, math.prod(shape), stream.tell())
    return values.reshape(shape, order='F' if is_fortran else 'C').copy()
  except (*DAMAGE, tokenize.TokenError, RecursionError) as error:
    raise Unreadable(name, 'it is no whole .npy of numbers') from error


def check_index(index, count):
  """Raises IndexError for an index outside 0 .. count - 1, which ends iteration."""
  if not 0 <= index < count:
    raise IndexError(f'row {index} of {count}')


def printable(name):
  """Returns a file's name as text that can be printed, whatever its bytes are."""
  text = os.fsencode(name).decode(errors='replace')
  return ''.join(letter if letter.isprintable() else '\ufffd' for letter in text)


def file_size(path):
  """Returns the bytes of a file, -1 where there is none."""
  try:
    return os.stat(path).st_size
  except OSError:
    return -1


def entries(folder, endings=ENDINGS):
  """Returns the sorted names of what is in a folder; hidden ones are left out.

  Args:
    folder: path.
    endings: of the files that are looked for, lower case; a file's own case is irrelevant.

  Returns:
    folders, files with such an ending as (name, bytes), and all else: three lists. Links that lead
    nowhere are files of -1 bytes.

  Raises:
    ValueError: one line, if it cannot be listed.
  """
  folders, found, others = [], [], []
  try:
    with os.scandir(folder) as listing:
      for entry in listing:
        if entry.name.startswith('.'):
          continue
        if entry.is_dir():
          folders.append(entry.name)
        elif entry.name.lower().endswith(endings) and (entry.is_file() or entry.is_symlink()):
          found.append((entry.name, _size(entry)))
        else:
          others.append(entry.name)
  except OSError as error:
    reason = error.strerror or error
    raise ValueError(f'{printable(folder)} cannot be listed: {reason}; check the path') from error
  return sorted(folders), sorted(found), sorted(others)


def _size(entry):
  """Returns the bytes of a file in a listing, -1 where a link leads nowhere."""
  try:
    return entry.stat().st_size  # now: after a listing, network folders have it at hand
  except FileNotFoundError:
    return -1


def files_below(path, endings=ENDINGS):
  """Lists a folder and all folders below it, links to folders included.

  Args:
    path: folder.
    endings: see `entries`.

  Returns:
    [(folder, files)] and [(folder, other files)], folders relative to path ('' for itself), in the
    order of the folders' names as text; files and others as `entries` gives them.

  Raises:
    ValueError: one line, if one cannot be listed or a link leads to a folder it is in.
  """
  found, others, pending = [], [], [('', frozenset())]
  while pending:
    below, above = pending.pop()
    folder = os.path.join(path, below)
    folders, names, left = entries(folder, endings)
    status = os.stat(folder)
    here = status.st_dev, status.st_ino
    if here in above:
      raise ValueError(f'{printable(folder)} links to a folder it is in; remove the link')
    found.append((below, names))
    others.append((below, left))
    pending += [(os.path.join(below, name), above | {here}) for name in folders]
  return sorted(found), sorted(others)

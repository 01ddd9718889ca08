"""Files of pictures: which of them a folder holds, decoding, and the ADM centre crop.

Decoding is Pillow's; the orientation that EXIF may state is not applied, as in the official code.
"""

import errno
import os
import struct
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
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of this machine, not faults of the file


class Unreadable(ValueError):
  """One row of a source cannot be read; the others may be fine.

  Args:
    name: of the row, as `name_of` of its source gives it.
    reason: why, a few words.
  """

  def __init__(self, name, reason):
    super().__init__(name, reason)  # both, so that it travels between processes
    self.name, self.reason = name, reason

  def __str__(self):
    return f'{self.name} cannot be read: {self.reason}'


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


def read_crop(file, name, size):
  """Returns `adm_crop` of a picture: [size, size, 3] uint8.

  Args:
    file: path, or stream of bytes.
    name: for the error.
    size: side, pixels.

  Raises:
    Unreadable: see `read_rgb`; or the picture is so narrow that scaling makes it huge.
  """
  image = read_rgb(file, name)
  width, height = image.size
  if size * size * max(width, height) > min(width, height) * Image.MAX_IMAGE_PIXELS:
    raise Unreadable(name, f'{width} x {height} pixels are too narrow to scale')
  return adm_crop(image, size)


def read_rgb(file, name):
  """Returns a picture in a file as an RGB PIL image; of several frames the first.

  Args:
    file: path, or stream of bytes.
    name: for the error.

  Raises:
    Unreadable: if it is missing, no picture, damaged, larger than Pillow allows, or of more than
      8 bits in one channel: Pillow would clip those.
  """
  Image.init()  # loads all formats; left to Image.open, threads may look before they are there
  try:
    with Image.open(file, formats=FORMATS) as image:
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
    raise Unreadable(name, _reason(error)) from error


def _reason(error):
  """Returns why a file cannot be read, in one line without its path; raises shortages again."""
  number = getattr(error, 'errno', None)
  if number in SHORTAGES:
    raise error
  if number:
    return os.strerror(number).lower()
  return ' '.join(f'damaged ({type(error).__name__}: {error})'.split())


def read_npy(file, name):
  """Returns the array of a .npy file, which may hold no Python objects.

  Raises:
    Unreadable: if it is missing, cut short or no such file.
  """
  try:
    # A map allocates nothing where a damaged header asks for more than the file holds.
    array = np.lib.format.open_memmap(file, mode='r')
  except OSError as error:
    raise Unreadable(name, _reason(error)) from error
  except (ValueError, EOFError, SyntaxError, OverflowError) as error:
    raise Unreadable(name, 'it is no whole .npy of numbers') from error
  return np.array(array)


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
    folders, files with such an ending (also links that lead nowhere), and all else: three lists.

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
          found.append(entry.name)
        else:
          others.append(entry.name)
  except OSError as error:
    reason = error.strerror or error
    raise ValueError(f'{printable(folder)} cannot be listed: {reason}; check the path') from error
  return sorted(folders), sorted(found), sorted(others)


def files_below(path, endings=ENDINGS):
  """Lists a folder and all folders below it, links to folders included.

  Args:
    path: folder.
    endings: see `entries`.

  Returns:
    [(folder, files)] and [(folder, other files)], folders relative to path ('' for itself), in the
    order of the folders' names as text.

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

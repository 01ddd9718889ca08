"""CIFAR-10's training pictures in memory, from whichever of its published forms is on disk.

Binary files, pickled files (read by an interpreter that runs none of their code) or a TFDS folder;
nothing is downloaded. Sizes are checked before anything is read.
"""

import gzip
import math
import pathlib
import re
import tarfile
import zlib

import numpy as np

from fmzoo import paths
from fmzoo.data import batch_pickle

URL = 'https://www.cs.toronto.edu/~kriz/cifar.html'
SHAPE = (32, 32, 3)
NUM_CLASSES = 10
NUM_FILES = 5  # of the training split
RECORD = 1 + math.prod(SHAPE)  # bytes: label, then red, green and blue, row by row
CHUNK = 2**20  # bytes


class Cifar10Source:
  """Batches {'pixels': [B, 32, 32, 3] uint8, 'label': [B] int32} of rows by index; 150 MB in all.

  The first of these in the folder is read: `cifar-10-batches-bin/`, `cifar-10-binary.tar.gz`,
  `cifar-10-batches-py/`, `cifar-10-python.tar.gz`, and then `dataset_info.json` of TFDS in it, in
  a folder of it or in `cifar10/VERSION/`. The order of rows is that of the files, and TFDS shuffles
  its own.

  Args:
    path: folder.
    rows: expected in all; NUM_FILES files have the same number of them.

  Raises:
    ValueError: one line, if nothing is there, or it is incomplete or damaged.
  """

  latent_shape = SHAPE
  num_classes = NUM_CLASSES
  latent_scale = 1.0  # pixels are stored, not moments
  feature_shape = ()  # no features are stored

  def __init__(self, path, rows=50_000):
    self.name = f'data.path={path}'
    paths.expect_local('data.path', path)
    self._pixels, self._labels = _read(pathlib.Path(path), rows)

  def __len__(self):
    return len(self._labels)

  def batch(self, indices):
    """Returns the rows of indices [B]."""
    return {'pixels': self._pixels[indices], 'label': self._labels[indices]}


def _read(path, rows):
  """Returns pixels [rows, 32, 32, 3] uint8 and labels [rows] int32 of what the folder holds."""
  for folder, archive, pattern, decode, most_bytes in FORMS:
    names = [pattern.format(number) for number in range(1, NUM_FILES + 1)]
    most = most_bytes(rows // NUM_FILES)
    if (path / folder).is_dir():
      files = _from_folder(path / folder, names, most)
    elif (path / archive).is_file():
      files = _from_archive(path / archive, folder, names, most)
    else:
      continue
    parts = [decode(*file, rows // NUM_FILES) for file in files]
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts))
    return pixels, labels
  for pattern in ('.', '*', 'cifar10/*'):
    infos = path.glob(f'{pattern}/dataset_info.json')
    for info in sorted(infos, key=lambda info: _version(info.parent), reverse=True):
      return _from_tfds(info.parent, rows)
  problem = 'holds no CIFAR-10' if path.is_dir() else 'is not a folder'
  raise ValueError(
    f'data.path={path} {problem}; put cifar-10-binary.tar.gz or cifar-10-python.tar.gz of {URL}'
    ' there, packed or extracted, or a TFDS folder of cifar10, or set data.path'
  )


def _version(folder):
  """Returns what sorts folders by version, 3.0.10 after 3.0.2, and the ones without first."""
  is_version = re.fullmatch(r'[0-9]+([.][0-9]+)*', folder.name)
  return [int(part) for part in folder.name.split('.')] if is_version else [], folder.name


def _from_folder(folder, names, most):
  """Yields (path, content) of files, each of at most so many bytes."""
  for name in names:
    file = folder / name
    if not file.is_file():
      raise ValueError(f'{file} is missing; extract the archive of {URL} again')
    if file.stat().st_size > most:
      raise ValueError(
        f'{file} has {file.stat().st_size} bytes, expected at most {most}; extract the archive of'
        f' {URL} again'
      )
    yield str(file), file.read_bytes()


class _Bounded:
  """Reads a stream, and no further than so many bytes from its start."""

  def __init__(self, stream, most):
    self.stream, self.most, self.left = stream, most, most

  def read(self, size):
    """Returns the next bytes."""
    content = self.stream.read(size)
    self.left -= len(content)
    if self.left < 0:
      raise tarfile.ReadError(f'it unpacks to more than {self.most} bytes')
    return content


def _from_archive(archive, folder, names, most):
  """Returns [(path, content)] of files in a .tar.gz, which is read once."""
  contents = {}
  try:
    with gzip.open(archive) as unpacked:
      stream = _Bounded(unpacked, 8 * most + CHUNK)  # six batches, text, and headers of any size
      with tarfile.open(fileobj=stream, mode='r|') as members:
        for member in members:
          *_, parent, name = ('', '', *pathlib.PurePosixPath(member.name).parts)
          if member.isfile() and parent == folder and name in names:
            if member.size > most:
              raise tarfile.ReadError(
                f'{folder}/{name} in it has {member.size} bytes, expected at most {most}'
              )
            contents[name] = members.extractfile(member).read()
      while stream.read(CHUNK):  # to its end, where the checksum is
        pass
  except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
    size = archive.stat().st_size
    raise ValueError(
      f'{archive}, {size} bytes, cannot be read: {error}; copy it from {URL} again'
    ) from error
  for name in names:
    if name not in contents:
      raise ValueError(f'{archive} holds no {folder}/{name}; copy it from {URL} again')
  return [(f'{archive}: {folder}/{name}', contents[name]) for name in names]


def _from_binary(file, content, rows):
  """Returns pixels and labels of a binary file, records of a label and its pixels."""
  if len(content) != rows * RECORD:
    raise ValueError(
      f'{file} has {len(content)} bytes, expected {rows * RECORD} ({rows} records of {RECORD});'
      f' copy it from {URL} again'
    )
  records = np.frombuffer(content, np.uint8).reshape(rows, RECORD)
  return _images(records[:, 1:]), _checked_labels(file, records[:, 0])


def _from_pickle(file, content, rows):
  """Returns pixels and labels of a pickled file, a dict with b'data' and b'labels'."""
  try:
    batch = batch_pickle.Pickle(content).load()
    if type(batch) is not dict:
      raise ValueError(f'it holds no dict but {type(batch).__name__}')
    pixels, labels = _array(batch.get(b'data'), rows), _integers(batch.get(b'labels'), rows)
  except (ValueError, OverflowError) as error:
    raise ValueError(
      f'{file}, {len(content)} bytes, is no batch of CIFAR-10: {error}; copy it from {URL} again'
    ) from error
  return _images(pixels), _checked_labels(file, labels)


FORMS = (  # folder, archive, its files, what reads one, the bytes of one at most
  ('cifar-10-batches-bin', 'cifar-10-binary.tar.gz', 'data_batch_{}.bin', _from_binary,
   lambda rows: rows * RECORD),
  ('cifar-10-batches-py', 'cifar-10-python.tar.gz', 'data_batch_{}', _from_pickle,
   lambda rows: 2 * rows * (RECORD + 100) + 4096),  # file names; Python 3 writes bytes as UTF-8
)


def _array(recorded, rows):
  """Returns the [rows, 3072] uint8 array that a pickle describes."""
  state = recorded.state if type(recorded) is batch_pickle.Object else None
  if type(state) is not tuple or len(state) != 5:
    raise ValueError("its b'data' are no array")
  _, shape, dtype, is_fortran, content = state
  args = dtype.args if type(dtype) is batch_pickle.Object else None
  kind = args[0] if type(args) is tuple and args else None
  if type(kind) not in (bytes, str) or kind not in ('u1', b'u1'):
    found = repr(kind[:batch_pickle.MAX_NAME]) if type(kind) in (bytes, str) else 'of no dtype'
    raise ValueError(f'its data are {found} and not uint8')
  if type(shape) is not tuple or [type(size) for size in shape] != [int, int]:
    raise ValueError('its data have no shape of two numbers')
  if shape != (rows, RECORD - 1):
    raise ValueError(f'its data have shape {shape}, expected {(rows, RECORD - 1)}')
  if type(content) is not bytes or type(is_fortran) not in (bool, int):
    raise ValueError('its data are no bytes')
  return np.frombuffer(content, np.uint8).reshape(shape, order='F' if is_fortran else 'C')


def _integers(values, rows):
  """Returns the labels of a pickle as an array [rows]."""
  if type(values) is not list or any(type(value) is not int for value in values):
    raise ValueError("its b'labels' are no list of numbers")
  if len(values) != rows:
    raise ValueError(f'it has {len(values)} labels, expected {rows}')
  return np.array(values, np.int64)


def _images(pixels):
  """Returns [n, 32, 32, 3] of [n, 3072], whose colours are one after the other."""
  height, width, channels = SHAPE
  planes = pixels.reshape(-1, channels, height, width)
  return np.ascontiguousarray(planes.transpose(0, 2, 3, 1))


def _checked_labels(file, labels):
  """Returns labels as int32, all of them 0 .. 9."""
  outside = (labels < 0) | (labels >= NUM_CLASSES)
  if outside.any():
    raise ValueError(
      f'{file} has label {labels[outside][0]}, expected 0 to {NUM_CLASSES - 1}; copy it from {URL}'
      ' again'
    )
  return labels.astype(np.int32)


def _from_tfds(folder, rows):
  """Returns pixels and labels of the training split in a TFDS folder."""
  import tensorflow_datasets as tfds  # takes half a second; it needs no TensorFlow to read
  from google.protobuf import json_format

  try:
    builder = tfds.builder_from_directory(folder)
    split = builder.info.splits.get('train')
    count, name = split.num_examples if split else 0, builder.name
    is_expected = count == rows and name == 'cifar10'
    train = builder.as_data_source('train') if is_expected else ()
    pairs = [(row['image'], row['label']) for row in train]
  except (json_format.Error, ValueError, NotImplementedError, RuntimeError, OSError) as error:
    problem = str(error).partition('\n')[0]
    raise ValueError(
      f"{folder} cannot be read: {problem}; prepare it again with file_format='array_record'"
    ) from error
  if not is_expected:
    raise ValueError(
      f"{folder} holds {count} training rows of '{name}', expected {rows} of 'cifar10'; prepare it"
      ' again or set data.path'
    )
  pixels, labels = (np.stack(arrays) for arrays in zip(*pairs))
  return pixels, _checked_labels(folder, labels)

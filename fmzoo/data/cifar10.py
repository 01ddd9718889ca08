"""CIFAR-10's training pictures in memory, from whichever of its published forms is on disk.

Binary files, pickled files (unpacked by an allow-list that runs none of their code) or a TFDS
folder; nothing is downloaded.
"""

import gzip
import io
import math
import pathlib
import pickle
import tarfile
import zlib

import numpy as np

URL = 'https://www.cs.toronto.edu/~kriz/cifar.html'
SHAPE = (32, 32, 3)
NUM_CLASSES = 10
NUM_FILES = 5  # of the training split
RECORD = 1 + math.prod(SHAPE)  # bytes: label, then red, green and blue, row by row
UNPICKLED = (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError,
             OverflowError, MemoryError)  # what a damaged pickle may raise


class Cifar10Source:
  """Rows {'pixels': [32, 32, 3] uint8, 'label': [] int32} by index, 150 MB of memory in all.

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
    self._pixels, self._labels = _read(pathlib.Path(path), rows)

  def __len__(self):
    return len(self._labels)

  def __getitem__(self, index):
    return {'pixels': self._pixels[index], 'label': self._labels[index]}


def _read(path, rows):
  """Returns pixels [rows, 32, 32, 3] uint8 and labels [rows] int32 of what the folder holds."""
  for folder, archive, pattern, decode in FORMS:
    names = [pattern.format(number) for number in range(1, NUM_FILES + 1)]
    if (path / folder).is_dir():
      files = _from_folder(path / folder, names)
    elif (path / archive).is_file():
      files = _from_archive(path / archive, folder, names)
    else:
      continue
    parts = [decode(*file, rows // NUM_FILES) for file in files]
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts))
    return pixels, labels
  for pattern in ('.', '*', 'cifar10/*'):
    for info in sorted(path.glob(f'{pattern}/dataset_info.json'), reverse=True):
      return _from_tfds(info.parent, rows)
  problem = 'holds no CIFAR-10' if path.is_dir() else 'is not a folder'
  raise ValueError(
    f'data.path={path} {problem}; put cifar-10-binary.tar.gz or cifar-10-python.tar.gz of {URL}'
    ' there, packed or extracted, or a TFDS folder of cifar10, or set data.path'
  )


def _from_folder(folder, names):
  """Yields (path, content) of files."""
  for name in names:
    if not (folder / name).is_file():
      raise ValueError(f'{folder / name} is missing; extract the archive of {URL} again')
    yield str(folder / name), (folder / name).read_bytes()


def _from_archive(archive, folder, names):
  """Returns [(path, content)] of files in a .tar.gz, which is read once."""
  contents = {}
  try:
    with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode='r|') as members:
      for member in members:
        *_, parent, name = ('', '', *pathlib.PurePosixPath(member.name).parts)
        if member.isfile() and parent == folder and name in names:
          contents[name] = members.extractfile(member).read()
      stream.read()  # to its end, where the checksum is
  except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
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
    batch = _Unpickler(io.BytesIO(content), encoding='bytes').load()
    pixels, labels = _array(batch[b'data']), np.array(batch[b'labels'], np.int32)
  except UNPICKLED as error:
    raise ValueError(
      f'{file}, {len(content)} bytes, is no batch of CIFAR-10: {error!r}; copy it from {URL} again'
    ) from error
  if pixels.shape != (rows, RECORD - 1) or labels.shape != (rows,):
    raise ValueError(
      f'{file} has data {pixels.shape} and labels {labels.shape}, expected {(rows, RECORD - 1)} and'
      f' {(rows,)}; copy it from {URL} again'
    )
  return _images(pixels), _checked_labels(file, labels)


FORMS = (  # folder, archive, its files, what reads one
  ('cifar-10-batches-bin', 'cifar-10-binary.tar.gz', 'data_batch_{}.bin', _from_binary),
  ('cifar-10-batches-py', 'cifar-10-python.tar.gz', 'data_batch_{}', _from_pickle),
)


class _Recorded:
  """Stands for an object of NumPy in a pickle: keeps how it is made and makes nothing."""

  def __init__(self, *args):
    self.args = args

  def __setstate__(self, state):
    self.state = state


def _latin1(text, encoding):
  """Does for a pickle what _codecs.encode would, in the one encoding that NumPy asks for."""
  if encoding not in ('latin1', b'latin1'):
    raise pickle.UnpicklingError(f'encoding {encoding!r} instead of latin1')
  return text.encode('latin1')


class _Unpickler(pickle.Unpickler):
  """Reads dicts, lists, numbers, text and what describes a NumPy array; refuses all else."""

  ALLOWED = {
    ('numpy.core.multiarray', '_reconstruct'): _Recorded, ('numpy', 'ndarray'): _Recorded,
    ('numpy', 'dtype'): _Recorded, ('_codecs', 'encode'): _latin1,
  }

  def find_class(self, module, name):
    """Returns what stands for a global of the pickle."""
    if (module, name) not in self.ALLOWED:
      raise pickle.UnpicklingError(f'it asks for {module}.{name}, which no such batch needs')
    return self.ALLOWED[module, name]


def _array(recorded):
  """Returns the uint8 array that a pickle describes."""
  _, shape, dtype, is_fortran, content = recorded.state
  if dtype.args[0] not in ('u1', b'u1'):
    raise ValueError(f'its data are {dtype.args[0]!r} and not uint8')
  return np.frombuffer(content, np.uint8).reshape(shape, order='F' if is_fortran else 'C')


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
    found = f"{split.num_examples if split else 0} training rows of '{builder.name}'"
    pairs = []
    if found == f"{rows} training rows of 'cifar10'":
      pairs = [(row['image'], row['label']) for row in builder.as_data_source('train')]
  except (json_format.Error, ValueError, NotImplementedError, RuntimeError, OSError) as error:
    problem = str(error).partition('\n')[0]
    raise ValueError(
      f"{folder} cannot be read: {problem}; prepare it again with file_format='array_record'"
    ) from error
  if not pairs:
    raise ValueError(
      f"{folder} holds {found}, expected {rows} of 'cifar10'; prepare it again or set data.path"
    )
  pixels, labels = (np.stack(arrays) for arrays in zip(*pairs))
  return pixels, _checked_labels(folder, labels)

"""Sources of pictures and of stored moments that `prepare` turns into stored latents.

What `open_source` returns holds to this, whatever the source:
- `len(source)`, and `source[i]` -> {'label': int, and one or both of 'pixels' [size, size, 3] uint8
  (cropped) and 'moments' [h, w, 2 C] float32 (mean, then standard deviation, unscaled)}. An index
  outside raises IndexError; a row that cannot be read raises `Unreadable` (attributes `name`,
  `reason`), and the others can still be read; where more than the row is at fault, the OSError is
  raised, or ValueError. Threads may share a source.
- `source.name_of(i)`: what row i is called, without any folder of this machine.
- `source.classes`: names by label, () where unknown; `source.num_classes`: 0 where unknown.
- `source.lowest_classes`: the fewest classes that its labels fit into, 1 + the highest; all of
  `num_classes` where that is known. No label is below 0.
- `source.crop`: how pictures were or are cut; `source.vae`: '' for pictures, for stored moments the
  name of the VAE that the official code made them with.
- `source.has_moments`: whether every row has them.
- `source.fingerprint()`: hex SHA-256 of what identifies the listing (names, sizes of files, labels)
  without the contents, the same wherever the source is copied to.
"""

import array
import collections
import concurrent.futures
import hashlib
import itertools
import os
import re

import numpy as np
from absl import logging
from array_record.python import array_record_module

from fmzoo import paths
from fmzoo.data import official, picture_files

adm_crop = picture_files.adm_crop
Unreadable = picture_files.Unreadable

FORMS = (
  'tfds:NAME[:SPLIT], a .hdf5 file of stored moments, a folder with vae-sd/dataset.json,'
  ' or a folder of pictures'
)
AHEAD = 64  # rows that are read before they are needed
SPLITS = frozenset(('train', 'training', 'val', 'valid', 'validation', 'test'))


def open_source(spec, size, with_pixels):
  """Opens whatever `--from` names.

  Args:
    spec: `tfds:NAME[:SPLIT]`, the path of an .hdf5 or .h5 file, of a folder with
      vae-sd/dataset.json, or of a folder of pictures.
    size: side of the cropped pictures, pixels; stored moments must be of that size.
    with_pixels: whether rows must have pixels, also where moments are stored.

  Returns:
    A source as this module's docstring describes it.

  Raises:
    ValueError: one line, if there is nothing of these forms, it cannot be used or has no pixels.
  """
  if size < 1:
    raise ValueError(f'size={size} must be 1 or more')
  paths.expect_local('--from', spec)
  if spec.startswith('tfds:'):
    return TfdsImages(*_name_and_split(spec), size)
  path = os.path.expanduser(spec)
  if not os.path.exists(path):
    raise ValueError(f'--from={spec} is not there; expected {FORMS}')
  if path.lower().endswith(('.hdf5', '.h5')) and not os.path.isdir(path):
    source = official.SoflowHdf5(path)
    if source.size != size:
      raise ValueError(
        f'--from={spec} holds moments of pictures of {source.size} pixels, expected {size}; set'
        f' data.latent_size={source.size // official.DOWN} or choose another file'
      )
    if with_pixels:
      raise ValueError(
        f"--from={spec} holds moments and no pixels, but the recipe's method aligns with features"
        ' of pictures; use a method that does not, or the pictures it was made from as source'
      )
    return source
  if os.path.isfile(os.path.join(path, 'vae-sd', 'dataset.json')):
    return official.RepaFolder(path, size, with_pixels)
  if os.path.isdir(path):
    return ImageFolder(path, size)
  raise ValueError(f'--from={spec} is a file of another kind; expected {FORMS}')


def read_ahead(rows, indices, num_threads):
  """Yields each row, or why it cannot be read, while threads read those that follow.

  Args:
    rows: a source.
    indices: of the rows, in order.
    num_threads: 0 reads a row when it is asked for.

  Yields:
    A row, or the `Unreadable` that reading it raised.
  """

  def read(index):
    """Returns one of either."""
    try:
      return rows[index]
    except Unreadable as error:
      return error

  if not num_threads:
    yield from map(read, indices)
    return
  with concurrent.futures.ThreadPoolExecutor(num_threads) as threads:
    coming, left = collections.deque(), iter(indices)
    try:
      while True:
        room = AHEAD + num_threads - len(coming)
        coming.extend(threads.submit(read, index) for index in itertools.islice(left, room))
        if not coming:
          return
        yield coming.popleft().result()
    finally:
      for future in coming:
        future.cancel()


class ImageFolder:
  """Pictures in one folder per class, or in one folder without classes.

  Class folders in the order of their names have the labels 0, 1, ...; inside, pictures are found at
  any depth, folder by folder in the order of the folders' names, and by name within each: the
  order of torchvision's ImageFolder. Hidden files and folders are ignored, files whose endings are
  not in `picture_files.ENDINGS` are counted and logged.

  Args:
    path: folder.
    size: side of the cropped pictures, pixels.

  Raises:
    ValueError: one line, if there are no pictures, or both pictures and folders, or a folder
      without pictures, or the folders are splits of a data set instead of classes.
  """

  vae = ''
  has_moments = False

  def __init__(self, path, size):
    self._path, self._size = os.fspath(path), size
    self.crop = f'ADM centre crop to {size}'
    logging.info('listing pictures in %s', picture_files.printable(self._path))
    folders, pictures, left = picture_files.entries(self._path)
    self._check(folders, pictures)
    self._root = picture_files.Root(self._path)
    self._names, self._sizes = [name for name, _ in pictures], array.array('q')
    self._sizes.extend(size for _, size in pictures)
    counts = [len(pictures)] if pictures else []
    for folder in folders:
      before = len(self._names)
      left += self._add_class(folder)
      counts.append(len(self._names) - before)
    self._labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    self.classes = tuple(picture_files.printable(folder) for folder in folders)
    self.num_classes = self.lowest_classes = max(len(folders), 1)
    if left:
      logging.info(
        '--from=%s: left out %d files whose endings are not of pictures, such as %s',
        path, len(left), picture_files.printable(left[0]),
      )

  def __len__(self):
    return len(self._names)

  def __getitem__(self, index):
    picture_files.check_index(index, len(self))
    name = self.name_of(index)
    pixels = picture_files.read_crop(self._root.read(self._names[index], name), name, self._size)
    return {'pixels': pixels, 'label': int(self._labels[index])}

  def name_of(self, index):
    """Returns the path of a picture within the folder."""
    return picture_files.printable(self._names[index])

  def fingerprint(self):
    """Returns hex SHA-256 over classes, and name, bytes and label of each picture."""
    digest = hashlib.sha256(repr(('pictures', self.classes)).encode())
    for name, size, label in zip(self._names, self._sizes, self._labels):
      digest.update(b'%b\0%d %d\n' % (os.fsencode(name), size, label))
    return digest.hexdigest()

  def _check(self, folders, pictures):
    """Refuses a folder whose first level is neither classes nor pictures."""
    start = f'--from={self._path} holds'
    if folders and pictures:
      raise ValueError(
        f'{start} both pictures ({picture_files.printable(pictures[0][0])}) and folders'
        f' ({picture_files.printable(folders[0])}); expected pictures of no class, or only folders,'
        ' one for each class'
      )
    if not folders and not pictures:
      raise ValueError(f'{start} no pictures ({", ".join(picture_files.ENDINGS)}); check the path')
    if folders and SPLITS.issuperset(folders):
      raise ValueError(
        f'{start} {", ".join(folders)}, which are splits and no classes; choose'
        f' {os.path.join(self._path, folders[0])}'
      )

  def _add_class(self, folder):
    """Adds the pictures of a class; returns its other files, relative to the path."""
    found, others = picture_files.files_below(os.path.join(self._path, folder))
    if not any(files for _, files in found):
      raise ValueError(
        f'--from={self._path}: class folder {picture_files.printable(folder)} holds no pictures'
        f' ({", ".join(picture_files.ENDINGS)}); fill or remove it'
      )
    for below, files in found:
      self._names += [os.path.join(folder, below, name) for name, _ in files]
      self._sizes.extend(size for _, size in files)
    return [os.path.join(folder, below, name) for below, files in others for name in files]


class TfdsImages:
  """Pictures with the features 'image' and 'label' of a data set that TFDS has prepared.

  Needs no TensorFlow, and downloads nothing. TFDS shuffles when it prepares, so rows have another
  order than the files they came from.

  Args:
    name: of a builder, such as imagenet2012, looked for in TFDS's data folder (TFDS_DATA_DIR, else
      ~/tensorflow_datasets), or the path of a version folder such as .../imagenet2012/5.1.0.
    split: such as train, or train[:1%].
    size: side of the cropped pictures, pixels.

  Raises:
    ValueError: one line, if it is not prepared, or not for random access, there is no such split,
      or the features are others.
  """

  vae = ''
  has_moments = False

  def __init__(self, name, split, size):
    self._name, self._split, self._size = name, split, size
    self.crop = f'ADM centre crop to {size}'
    self._builder = _builder(name)
    self._rows = _rows(self._builder, name, split)
    _check_shards(self._builder, name, split)
    label = self._builder.info.features['label']
    self.classes, self.num_classes = tuple(label.names), label.num_classes
    self.lowest_classes = self.num_classes

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, index):
    from google.protobuf import message

    picture_files.check_index(index, len(self))
    name = self.name_of(index)
    try:
      row = self._rows[index]
    except (RuntimeError, ValueError, KeyError, message.DecodeError) as error:
      if isinstance(error, RuntimeError) and not _is_damage(error):
        raise ValueError(
          f'--from=tfds:{self._name}: {name} cannot be read: {_line(error)}; see that its files can'
          ' be read and start again'
        ) from error
      raise Unreadable(name, 'its record is damaged') from error
    label = int(row['label'])
    if not 0 <= label < self.num_classes:
      raise Unreadable(name, f'it has label {label}, expected 0 to {self.num_classes - 1}')
    pixels = picture_files.read_crop(row['image'], name, self._size)
    return {'pixels': pixels, 'label': label}

  def name_of(self, index):
    """Returns 'row 17'."""
    return f'row {index}'

  def fingerprint(self):
    """Returns hex SHA-256 over the data set's name and version, and each part of a file read."""
    info = self._builder.info
    digest = hashlib.sha256(f'TFDS {info.full_name}\n'.encode())
    for part in info.splits[self._split].file_instructions:
      size = picture_files.file_size(part.filename)
      line = f'{os.path.basename(part.filename)} {part.skip} {part.take} {size}\n'
      digest.update(line.encode())
    return digest.hexdigest()


def _name_and_split(spec):
  """Returns the parts of tfds:NAME[:SPLIT]; a NAME may end in :VERSION."""
  match = re.fullmatch(r'tfds:([^:]+(?::[0-9][0-9.*]*)?)(?::(.+))?', spec)
  if not match:
    raise ValueError(
      f'--from={spec} cannot be used; expected tfds:NAME[:SPLIT], such as tfds:imagenet2012:train'
    )
  return match[1], match[2] or 'train'


def _builder(name):
  """Returns the TFDS builder of a name or version folder, which has 'image' and 'label'."""
  import tensorflow_datasets as tfds  # takes a second; it needs no TensorFlow to read
  from google.protobuf import json_format

  path = os.path.expanduser(name)
  is_path = name[0] in '/.~' or os.path.isfile(os.path.join(path, 'dataset_info.json'))
  try:
    builder = tfds.builder_from_directory(path) if is_path else tfds.builder(name)
    features = builder.info.features
  except (json_format.Error, ValueError, AssertionError, OSError) as error:
    expected = 'a version folder such as .../imagenet2012/5.1.0' if is_path else 'a name of TFDS'
    raise ValueError(
      f'--from=tfds:{name} cannot be opened: {_line(error)}; expected {expected} that is prepared'
    ) from error
  for key, kind in (('image', tfds.features.Image), ('label', tfds.features.ClassLabel)):
    if not isinstance(features, tfds.features.FeaturesDict) or key not in features:
      raise ValueError(
        f"--from=tfds:{name} has no feature '{key}', expected 'image' and 'label'; choose another"
      )
    if not isinstance(features[key], kind):
      found = type(features[key]).__name__
      raise ValueError(
        f"--from=tfds:{name}: feature '{key}' is {found}, expected {kind.__name__}; choose another"
      )
  if features['image'].np_dtype != np.uint8:
    found = np.dtype(features['image'].np_dtype)
    raise ValueError(f"--from=tfds:{name}: 'image' is {found}, expected uint8; choose another")
  return builder


def _rows(builder, name, split):
  """Returns the rows of a split by index, their images as bytes of files."""
  import tensorflow_datasets as tfds

  try:
    return builder.as_data_source(split, decoders={'image': tfds.decode.SkipDecoding()})
  except (ValueError, RuntimeError, OSError) as error:  # NotImplementedError is a RuntimeError
    problem, form = _line(error), builder.info.file_format
    if not builder.info.splits:
      problem = f'it is not prepared in {builder.data_dir}'
    elif isinstance(error, NotImplementedError):
      problem = f'{builder.data_dir} is in file format {form.value if form else "unknown"}'
    elif isinstance(error, ValueError):
      raise ValueError(f'--from=tfds:{name}:{split} cannot be used: {problem}') from error
    raise ValueError(
      f'--from=tfds:{name}:{split} cannot be read: {problem}; prepare it once, where TensorFlow is'
      f" installed: python -c \"import tensorflow_datasets as tfds; tfds.builder('{builder.name}',"
      " file_format='array_record').download_and_prepare()\""
    ) from error


def _check_shards(builder, name, split):
  """Opens each file of a split, which TFDS does only when a row of it is read."""
  is_array_record = builder.info.file_format and builder.info.file_format.value == 'array_record'
  if not is_array_record or not builder.info.splits:
    return
  for part in builder.info.splits[split].file_instructions:
    try:
      reader = array_record_module.ArrayRecordReader(str(part.filename))
      found = f'{reader.num_records()} rows'
      reader.close()
    except RuntimeError:
      found = 'no readable end'
    if found != f'{part.examples_in_shard} rows':
      raise ValueError(
        f'--from=tfds:{name}: {os.path.basename(part.filename)} has {found}, dataset_info.json says'
        f' {part.examples_in_shard} rows; copy or prepare it again'
      )


def _is_damage(error):
  """Returns whether a RuntimeError of ArrayRecord is about a record's bytes, not about the disk."""
  problem = str(error).partition(';')[0]  # what follows is where, with paths
  return bool(re.search('corrupt|truncated|decompress', problem, re.IGNORECASE))


def _line(error):
  """Returns the first line of an error's message."""
  return str(error).partition('\n')[0]

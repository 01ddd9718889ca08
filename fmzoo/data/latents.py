"""Stored latents, read: batches of rows by index, and checks of the shards.

The format is that of data/manifests.py; data/shards.py writes it.
"""

import hashlib
import math
import os
import pathlib

import numpy as np
from array_record.python import array_record_data_source, array_record_module

from fmzoo import paths
from fmzoo.data import manifests

# Bits of a number as an integer without its sign, and the lowest such integer that is not finite.
BITS = {'float16': ('<u2', 0x7FFF, 0x7C00), 'float32': ('<u4', 0x7FFFFFFF, 0x7F800000)}
# How array_record's words begin where bytes are not those that were written. All else, such as too
# many open files or a bucket that refuses, says nothing about the file.
CORRUPTED = ('Corrupted', 'Invalid', 'Failed to parse', 'ArrayRecord file should be')


class LatentSource:
  """Batches {'moments': [B, H, W, 2 C], 'label': [B] int32} of rows by index.

  Moments come in the stored dtype (half the bytes on their way to the device), and with those of
  the mirror image, [B, 2, H, W, 2 C], where asked for. So do 'feature' [B, N, F], in the stored
  dtype, and 'image' [B, h, w, 3] uint8: where they are stored and asked for. Only then is `encoder`
  not '' and `feature_shape`, `image_shape` not (). Opening checks that every shard is there with
  the size (in a bucket not), the rows and the first record of the manifest; checksums take a pass
  over all bytes and are for `verify`.

  Args:
    path: folder written by data/shards.py, or the address of a copy, gs://bucket/folder. Each row
      read there is a request of its own.
    with_feature, with_image, with_mirror: False leaves these out of the rows, for what needs none.

  Raises:
    ValueError: one line, if the folder is missing, incomplete or of another format.
  """

  def __init__(self, path, with_feature=True, with_image=False, with_mirror=False):
    manifest = self.manifest = manifests.read(path)
    self.name = f'data.path={path}'
    self.latent_shape = tuple(manifest.latent_shape)
    self.num_classes = manifest.num_classes
    self.latent_scale = manifest.scale
    self.mirrored = with_mirror and manifest.mirrored
    self.encoder = manifest.encoder if with_feature else ''
    self.feature_shape = tuple(manifest.feature_shape) if with_feature else ()
    self.image_shape = tuple(manifest.image_shape) if with_image else ()
    self._is_remote = paths.is_bucket(path)
    self._record = manifests.record_dtype(manifest)
    self._fields = self._wanted_fields()
    self._first_rows = np.cumsum([0, *(shard['count'] for shard in manifest.shards)])
    files = [  # rows given, so that none is opened once more
      f'{file}[0:{shard["count"]}]'
      for file, shard in zip(check_shards(path, manifest), manifest.shards)
    ]
    self._records = array_record_data_source.ArrayRecordDataSource(files)

  def _wanted_fields(self):
    """Returns {name: (dtype, shape, offset in the record)} of what goes into the rows."""
    fields = {}
    for name, (field, offset) in self._record.fields.items():
      dtype, shape = field.subdtype or (field, ())
      if name == 'moments' and self.manifest.mirrored and not self.mirrored:
        shape = shape[1:]  # the image's own come first
      wanted = {'feature': self.feature_shape, 'image': self.image_shape}.get(name, True)
      if wanted:
        fields[name] = dtype, shape, offset
    return fields

  def __len__(self):
    return self.manifest.count

  def batch(self, indices):
    """Returns the rows of an array of indices [B], each in 0 .. len - 1, as {name: [B, ...]}.

    Raises:
      ValueError: names the shard and the record that cannot be read or holds what is no number.
    """
    count = len(indices)
    flat = {  # a row of each is filled at once, by one copy
      name: np.empty((count, math.prod(shape)), dtype)
      for name, (dtype, shape, _) in self._fields.items()
    }
    places = [
      (flat[name], dtype, flat[name].shape[1], offset)
      for name, (dtype, _, offset) in self._fields.items()
    ]
    for i, index in enumerate(indices.tolist()):
      record = self._read(index)
      for rows, dtype, size, offset in places:
        rows[i] = np.frombuffer(record, dtype, size, offset)
    self._check_finite(flat['moments'], indices)
    return {
      name: flat[name].reshape(count, *shape) for name, (_, shape, _) in self._fields.items()
    }

  def _read(self, index):
    """Returns the bytes of a record."""
    try:
      record = self._records[index]
    except RuntimeError as error:
      words = _unreadable(error, 'is damaged', self._is_remote)
      raise ValueError(f'{self._place(index)} {words}') from error
    if len(record) != self._record.itemsize:
      raise ValueError(
        f'{self._place(index)} has {len(record)} bytes, manifest.json says'
        f' {self._record.itemsize} ({self._layout()}); write the latents again'
      )
    return record

  def _layout(self):
    """Returns the fields of a record in words."""
    return ', '.join(
      f'{name} {field.shape} {field.base.name}' for name, (field, _) in self._record.fields.items()
    )

  def _place(self, index):
    """Returns where a row is, for messages."""
    shard = int(np.searchsorted(self._first_rows, index, side='right')) - 1
    return (
      f'{self.name}: record {index - self._first_rows[shard]} of'
      f' {self.manifest.shards[shard]["name"]} (row {index})'
    )

  def _check_finite(self, moments, indices):
    """Refuses moments [B, numbers] that are no numbers; compares bits, a microsecond a row."""
    bits, magnitude, lowest = BITS[self.manifest.dtype]
    magnitudes = moments.view(bits) & np.array(magnitude, bits)
    if magnitudes.size and magnitudes.max() >= lowest:
      index = int(indices[np.argmax(magnitudes.max(axis=1))])
      raise ValueError(
        f'{self._place(index)} holds moments that are not finite; write the latents again'
      )


def verify(path):
  """Reads every byte of the shards and compares the checksums with the manifest.

  Raises:
    ValueError: names the first shard that is missing, cut short or changed.
  """
  paths.expect_local('data.path', path)
  for shard in manifests.read(path).shards:
    found = sha256(_check_size(path, shard))
    if found != shard['sha256']:
      raise ValueError(
        f'data.path={path}: shard {shard["name"]} has checksum {found}, manifest.json says'
        f' {shard["sha256"]}; copy or write it again'
      )


def check_shards(path, manifest):
  """Returns the paths of the shards, each with the size, rows and first record of the manifest.

  Raises:
    ValueError: names the first shard that is missing, cut short or of another run.
  """
  files = [_check_size(path, shard) for shard in manifest.shards]
  for file, shard in zip(files, manifest.shards):
    _check_rows(path, file, shard)
  return files


def _check_size(path, shard):
  """Returns the path of a shard that has the size of the manifest.

  In a bucket it is not asked for: an object is never cut short, and `_check_rows` reads its end.
  """
  if paths.is_bucket(path):
    return os.path.join(path, shard['name'])
  file = pathlib.Path(path) / shard['name']
  found = file.stat().st_size if file.is_file() else None
  if found != shard['bytes']:
    problem = 'is missing' if found is None else f'has {found} bytes'
    raise ValueError(
      f'data.path={path}: shard {shard["name"]} {problem}, manifest.json says {shard["bytes"]}'
      ' bytes; copy or write it again'
    )
  return file


def _check_rows(path, file, shard):
  """Opens a shard and compares its number of rows and the first of them with the manifest."""
  try:
    reader = array_record_module.ArrayRecordReader(str(file))
    found = reader.num_records()  # 0 if it cannot be read, which `read` says
    first = hashlib.sha256(reader.read([0])[0]).hexdigest()
    reader.close()
  except RuntimeError as error:
    words = _unreadable(error, 'has no readable end or first record', paths.is_bucket(path))
    raise ValueError(f'data.path={path}: shard {shard["name"]} {words}') from error
  problem = None
  if found != shard['count']:
    problem = f'has {found} rows, manifest.json says {shard["count"]} rows'
  elif first != shard['first']:
    problem = 'begins with another record than manifest.json says, so it is of another run'
  if problem:
    raise ValueError(
      f'data.path={path}: shard {shard["name"]} {problem}; copy or write it again'
    )


def _unreadable(error, damaged, is_remote):
  """Returns words for an error of reading a shard, and a remedy; `damaged` is for wrong bytes."""
  reason = manifests.one_line(error)
  if reason.startswith(CORRUPTED):
    return f'{damaged} ({reason}); copy or write it again'
  if 'Too many open files' in reason:
    remedy = 'a file of every shard stays open: raise the limit, see `ulimit -n`'
  elif is_remote:
    remedy = 'check the network and the credentials'
  else:
    remedy = 'check its permissions and the disk'
  return f'cannot be read ({reason}); {remedy}'


def sha256(file):
  """Returns the checksum of a file's bytes, hexadecimal."""
  with open(file, 'rb') as content:
    return hashlib.file_digest(content, 'sha256').hexdigest()

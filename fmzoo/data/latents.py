"""The stored latent format: VAE moments of many images in ArrayRecord shards, and a manifest.

A folder holds `manifest.json` (`Manifest`) and the shards `latents-00000-of-00004.array_record`. A
record is, little-endian and without a header: the moments [H, W, 2 C] of an image, C mean channels
and then C standard deviations, unscaled; where `mirrored`, those of its mirror image; the patch
features [N, F] of a frozen encoder, if there are any; the image [h, w, 3] itself in bytes, if it is
kept; the label as int32. Here they are read; data/shards.py writes them.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re

import numpy as np
from array_record.python import array_record_data_source, array_record_module

from fmzoo import paths
from fmzoo.data import buckets

VERSION = 3
DTYPES = {'float16': np.dtype('<f2'), 'float32': np.dtype('<f4')}
# Bits of a number as an integer without its sign, and the lowest such integer that is not finite.
BITS = {'float16': ('<u2', 0x7FFF, 0x7C00), 'float32': ('<u4', 0x7FFFFFFF, 0x7F800000)}
# How array_record's words begin where bytes are not those that were written. All else, such as too
# many open files or a bucket that refuses, says nothing about the file.
CORRUPTED = ('Corrupted', 'Invalid', 'Failed to parse', 'ArrayRecord file should be')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
  """What manifest.json holds; written last, so a folder with one is complete."""

  version: int  # of this format
  count: int  # rows in all shards
  shards: list  # {'name', 'count' (rows), 'bytes', 'sha256', 'first' (sha256 of its first record)}
  latent_shape: list  # [H, W, C]
  layout: str  # order of a latent's axes; 'HWC'
  dtype: str  # of the stored moments and features, 'float16' or 'float32'
  mirrored: bool  # moments of the mirror image follow those of the image
  num_classes: int  # labels are 0 .. num_classes - 1
  classes: list  # their names in that order; [] where they have none
  vae: str  # name of the VAE that made the moments
  vae_hash: str  # of its encoder's weights, convert.vae.encoder_hash; '' where nobody knows
  vae_dtype: str  # of its products, 'float32' or 'bfloat16'; '' where nobody knows
  scale: float  # latent = scale times a draw from the moments
  crop: str  # how images were cut before encoding
  encoder: str  # name of the frozen encoder that made the features; '' where none are stored
  feature_shape: list  # [N, F], patch tokens and their width; [] where none are stored
  image_shape: list  # [h, w, 3] of the stored images, uint8; [] where none are stored
  source: str  # what identifies the rows that it was made of; '' where nothing does
  unreadable: list  # names of images of the source that could not be read, and are left out


def record_dtype(manifest):
  """Returns the layout of a record as a packed structured dtype, its fields in their order."""
  height, width, channels = manifest.latent_shape
  number = DTYPES[manifest.dtype]
  moments = (height, width, 2 * channels)
  fields = [('moments', number, (2, *moments) if manifest.mirrored else moments)]
  if manifest.feature_shape:
    fields.append(('feature', number, tuple(manifest.feature_shape)))
  if manifest.image_shape:
    fields.append(('image', np.uint8, tuple(manifest.image_shape)))
  return np.dtype([*fields, ('label', '<i4')])


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
    manifest = self.manifest = read_manifest(path)
    self.name = f'data.path={path}'
    self.latent_shape = tuple(manifest.latent_shape)
    self.num_classes = manifest.num_classes
    self.latent_scale = manifest.scale
    self.mirrored = with_mirror and manifest.mirrored
    self.encoder = manifest.encoder if with_feature else ''
    self.feature_shape = tuple(manifest.feature_shape) if with_feature else ()
    self.image_shape = tuple(manifest.image_shape) if with_image else ()
    self._is_remote = paths.is_bucket(path)
    self._record = record_dtype(manifest)
    self._fields = self._wanted_fields()
    self._first_rows = np.cumsum([0, *(shard['count'] for shard in manifest.shards)])
    files = []
    for shard in manifest.shards:
      file = _check_size(path, shard)
      _check_rows(path, file, shard)
      files.append(f'{file}[0:{shard["count"]}]')  # rows given, so it is not opened once more
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


def read_manifest(path):
  """Returns the Manifest of a folder.

  Raises:
    ValueError: one line, if there is none, or it cannot be used.
  """
  text, problem = _manifest_text(path)
  if text is None:
    raise ValueError(
      f'data.path={path} {problem}; expected latents (manifest.json and ArrayRecord shards): make'
      " them with `prepare --from=PICTURES`, as section 'Data' of README.md shows, or set data.path"
    )
  try:
    values = json.loads(text)
    if values['version'] != VERSION:
      raise ValueError(f'version {values["version"]}, this fmzoo reads version {VERSION}')
    manifest = Manifest(**values)
    check(manifest)
    if sum(shard['count'] for shard in manifest.shards) != manifest.count:
      raise ValueError(f'count {manifest.count}, but its shards have another sum')
    if not manifest.count:
      raise ValueError('count 0, expected at least one row')
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise ValueError(
      f'data.path={path}: manifest.json cannot be used: {_one_line(error)}; write the latents again'
    ) from error
  return manifest


def _manifest_text(path):
  """Returns (bytes of the manifest or None, what is wrong if there is none)."""
  if paths.is_bucket(path):
    return buckets.read(os.path.join(path, 'manifest.json')), 'holds no manifest.json'
  paths.expect_local('data.path', path)
  file = pathlib.Path(path) / 'manifest.json'
  if file.is_file():
    return file.read_bytes(), ''
  problem = 'holds no manifest.json' if file.parent.is_dir() else 'is not a folder'
  if (file.parent / PARTIAL).is_dir():
    problem += ': `prepare` did not finish there, the same command goes on'
  return None, problem


PARTIAL = 'partial'  # folder of a manifest's beginnings, see data/shards.py


def _is_list(value, is_item):
  """Says whether a value is a list of such items."""
  return isinstance(value, list) and all(map(is_item, value))


def _is_text(value):
  """Says whether a value is a string."""
  return isinstance(value, str)


def _is_count(value):
  """Says whether a value is an integer above 0; True is none."""
  return type(value) is int and value > 0


def _is_file_name(value):
  """Says whether a value names a file of the folder; with a slash it could be one elsewhere."""
  plain = _is_text(value) and value == os.path.basename(value) and value.isprintable()
  return plain and value not in ('', '.', '..')


# A manifest may be of any hand. Kinds of values: (words, test, names of such fields).
SHARD_KINDS = (
  ('a file name without a folder', _is_file_name, ('name',)),
  ('a positive integer', _is_count, ('count', 'bytes')),
  ('64 hexadecimal digits', lambda value: _is_text(value) and re.fullmatch('[0-9a-f]{64}', value),
   ('sha256', 'first')),
)
KINDS = (
  ('a positive integer', _is_count, ('version', 'num_classes')),
  ('an integer, 0 or more', lambda value: value == 0 and type(value) is int or _is_count(value),
   ('count',)),
  ('a list of positive integers', lambda value: _is_list(value, _is_count),
   ('latent_shape', 'feature_shape', 'image_shape')),
  ('a string', _is_text, ('layout', 'dtype', 'vae', 'vae_hash', 'crop', 'encoder')),
  ('a list of strings', lambda value: _is_list(value, _is_text), ('classes', 'unreadable')),
  ('true or false', lambda value: isinstance(value, bool), ('mirrored',)),
  ('a finite number above 0',
   lambda value: type(value) in (int, float) and 0 < value < math.inf, ('scale',)),
  ('a list of shards, objects', lambda value: _is_list(value, lambda item: isinstance(item, dict)),
   ('shards',)),
)


def _check_kinds(values, kinds, where):
  """Refuses {name: value} with other names than those of `kinds`, or values of another kind."""
  expected = [name for _, _, names in kinds for name in names]
  if values.keys() != set(expected):
    raise ValueError(
      f'{where}has {", ".join(sorted(values)) or "nothing"}; expected {", ".join(expected)}'
    )
  for words, fits, names in kinds:
    for name in names:
      if not fits(values[name]):
        raise ValueError(f'{where}{name} {repr(values[name])[:100]}, expected {words}')


def check(manifest):
  """Refuses a Manifest with fields of another kind, or which do not fit each other.

  Raises:
    ValueError: names the field and what is expected.
  """
  _check_kinds(vars(manifest), KINDS, '')
  for index, shard in enumerate(manifest.shards):
    _check_kinds(shard, SHARD_KINDS, f'shard {index}: ')
  if manifest.layout != 'HWC' or manifest.dtype not in DTYPES:
    raise ValueError(
      f'layout {manifest.layout!r}, dtype {manifest.dtype!r}; expected HWC,'
      f' {" or ".join(DTYPES)}'
    )
  if len(manifest.latent_shape) != 3:
    raise ValueError(f'latent_shape {manifest.latent_shape}, expected [H, W, C]')
  if bool(manifest.encoder) != bool(manifest.feature_shape):
    raise ValueError(
      f'encoder={manifest.encoder!r}, feature_shape={manifest.feature_shape}: expected both or'
      ' neither'
    )
  if len(manifest.feature_shape) not in (0, 2):
    raise ValueError(f'feature_shape {manifest.feature_shape}, expected [N, F]')
  if manifest.image_shape and (len(manifest.image_shape) != 3 or manifest.image_shape[2] != 3):
    raise ValueError(f'image_shape {manifest.image_shape}, expected [h, w, 3]')
  if manifest.classes and len(manifest.classes) != manifest.num_classes:
    raise ValueError(
      f'{len(manifest.classes)} names in classes, expected num_classes={manifest.num_classes}'
    )
  record_dtype(manifest)  # which numpy refuses where a record would be larger than it can be


def verify(path):
  """Reads every byte of the shards and compares the checksums with the manifest.

  Raises:
    ValueError: names the first shard that is missing, cut short or changed.
  """
  paths.expect_local('data.path', path)
  for shard in read_manifest(path).shards:
    found = sha256(_check_size(path, shard))
    if found != shard['sha256']:
      raise ValueError(
        f'data.path={path}: shard {shard["name"]} has checksum {found}, manifest.json says'
        f' {shard["sha256"]}; copy or write it again'
      )


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
  reason = _one_line(error)
  if reason.startswith(CORRUPTED):
    return f'{damaged} ({reason}); copy or write it again'
  if 'Too many open files' in reason:
    remedy = 'a file of every shard stays open: raise the limit, see `ulimit -n`'
  elif is_remote:
    remedy = 'check the network and the credentials'
  else:
    remedy = 'check its permissions and the disk'
  return f'cannot be read ({reason}); {remedy}'


def _one_line(error):
  """Returns the words of an error, without line breaks and not endless."""
  return ' '.join(str(error).split())[:300]


def sha256(file):
  """Returns the checksum of a file's bytes, hexadecimal."""
  with open(file, 'rb') as content:
    return hashlib.file_digest(content, 'sha256').hexdigest()

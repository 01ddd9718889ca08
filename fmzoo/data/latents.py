"""The stored latent format: VAE moments of many images in ArrayRecord shards, and a manifest.

A folder holds `manifest.json` (`Manifest`) and the shards `latents-00000-of-00004.array_record`. A
record is the bytes of moments [H, W, 2 C], C mean channels and then C standard deviations, of the
patch features [N, F] of a frozen encoder, if there are any, and of the label as int32;
little-endian, no header. Moments are unscaled.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import tempfile

import numpy as np
from array_record.python import array_record_data_source, array_record_module

VERSION = 2
DTYPES = {'float16': np.dtype('<f2'), 'float32': np.dtype('<f4')}
LABEL = np.dtype('<i4')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
  """What manifest.json holds; written last, so a folder with one is complete."""

  version: int  # of this format
  count: int  # rows in all shards
  shards: list  # {'name', 'count' (rows), 'bytes', 'sha256'} of each file, in the order of the rows
  latent_shape: list  # [H, W, C]
  layout: str  # order of a latent's axes; 'HWC'
  dtype: str  # of the stored moments and features, 'float16' or 'float32'
  num_classes: int  # labels are 0 .. num_classes - 1
  vae: str  # name of the VAE that made the moments
  vae_hash: str  # of its weights
  scale: float  # latent = scale times a draw from the moments
  crop: str  # how images were cut before encoding
  encoder: str  # name of the frozen encoder that made the features; '' where none are stored
  feature_shape: list  # [N, F], patch tokens and their width; [] where none are stored


class LatentSource:
  """Rows {'moments': [H, W, 2 C] float32, 'label': [] int32} by index.

  Rows also have 'feature', [N, F] in the stored dtype (half the bytes on their way to the device),
  where features are stored and asked for: only then is `encoder` not '' and `feature_shape` not ().
  Opening checks that every shard is there with the
  size and rows of the manifest; checksums take a pass over all bytes and are for `verify`.

  Args:
    path: folder written by `write_latents`.
    with_feature: False leaves stored features out of the rows, for methods that need none.

  Raises:
    ValueError: one line, if the folder is missing, incomplete or of another format.
  """

  def __init__(self, path, with_feature=True):
    self.manifest = read_manifest(path)
    self.name = f'data.path={path}'
    height, width, channels = self.latent_shape = tuple(self.manifest.latent_shape)
    self.num_classes = self.manifest.num_classes
    self.latent_scale = self.manifest.scale
    self.encoder = self.manifest.encoder if with_feature else ''
    self.feature_shape = tuple(self.manifest.feature_shape) if with_feature else ()
    self._moments_shape = (height, width, 2 * channels)
    self._dtype = DTYPES[self.manifest.dtype]
    files = []
    for shard in self.manifest.shards:
      file = _check_size(path, shard)
      _check_rows(path, shard)
      files.append(f'{file}[0:{shard["count"]}]')  # rows given, so it is not opened once more
    self._records = array_record_data_source.ArrayRecordDataSource(files)

  def __len__(self):
    return self.manifest.count

  def __getitem__(self, index):
    if not 0 <= index < len(self):
      raise IndexError(f'row {index} of {len(self)}')
    try:
      record = self._records[index]
    except RuntimeError as error:
      raise ValueError(
        f'{self.name}: row {index} is damaged; fmzoo.data.latents.verify names the shard, write'
        ' the latents again'
      ) from error
    stored = self.manifest.feature_shape  # also where rows leave features out
    moments = math.prod(self._moments_shape)
    numbers = moments + (math.prod(stored) if stored else 0)
    if len(record) != numbers * self._dtype.itemsize + LABEL.itemsize:
      features = f', features {tuple(stored)}' if stored else ''
      raise ValueError(
        f'{self.name}: row {index} has {len(record)} bytes, which is not moments'
        f' {self._moments_shape}{features} {self.manifest.dtype} and a label; write the latents'
        ' again'
      )
    values = np.frombuffer(record, self._dtype, numbers)
    row = {
      'moments': values[:moments].reshape(self._moments_shape).astype(np.float32),
      'label': np.frombuffer(record[-LABEL.itemsize :], LABEL)[0].astype(np.int32),
    }
    if self.feature_shape:
      row['feature'] = values[moments:].reshape(self.feature_shape)
    return row


def read_manifest(path):
  """Returns the Manifest of a folder.

  Raises:
    ValueError: one line, if there is none, or it cannot be used.
  """
  file = pathlib.Path(path) / 'manifest.json'
  if not file.is_file():
    problem = 'holds no manifest.json' if file.parent.is_dir() else 'is not a folder'
    raise ValueError(
      f'data.path={path} {problem}; expected latents as fmzoo.data.latents.write_latents writes'
      " them (manifest.json and ArrayRecord shards): write them there, as section 'Data' of"
      ' README.md shows, or set data.path'
    )
  try:
    values = json.loads(file.read_text())
    if values['version'] != VERSION:
      raise ValueError(f'version {values["version"]}, this fmzoo reads version {VERSION}')
    manifest = Manifest(**values)
    if manifest.layout != 'HWC' or manifest.dtype not in DTYPES:
      raise ValueError(
        f'layout {manifest.layout}, dtype {manifest.dtype}; expected HWC, {" or ".join(DTYPES)}'
      )
    if len(manifest.latent_shape) != 3:
      raise ValueError(f'latent_shape {manifest.latent_shape}, expected [H, W, C]')
    _check_encoder(manifest.encoder, manifest.feature_shape)
    if sum(shard['count'] for shard in manifest.shards) != manifest.count:
      raise ValueError(f'count {manifest.count}, but its shards have another sum')
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f'data.path={path}: manifest.json cannot be used: {error}; write the latents again'
    ) from error
  return manifest


def verify(path):
  """Reads every byte of the shards and compares the checksums with the manifest.

  Raises:
    ValueError: names the first shard that is missing, cut short or changed.
  """
  for shard in read_manifest(path).shards:
    found = _sha256(_check_size(path, shard))
    if found != shard['sha256']:
      raise ValueError(
        f'data.path={path}: shard {shard["name"]} has checksum {found}, manifest.json says'
        f' {shard["sha256"]}; copy or write it again'
      )


def write_latents(
  path, rows, *, latent_shape, num_classes, vae, vae_hash, scale, crop,
  dtype='float16', rows_per_shard=65536, encoder='', feature_shape=(),
):
  """Writes a folder that `LatentSource` reads; it counts as written once its manifest is there.

  Args:
    path: folder; made if missing, refused if it has a manifest.
    rows: iterable of {'moments': [H, W, 2 C], mean and standard deviation, 'label': int}, and
      'feature': [N, F] if there is an encoder.
    latent_shape: (H, W, C).
    num_classes, vae, vae_hash, scale, crop, dtype: see `Manifest`.
    rows_per_shard: most rows of a file.
    encoder, feature_shape: see `Manifest`; both or neither.

  Returns:
    The Manifest.

  Raises:
    ValueError: if there are latents already or no rows, or a row has another shape, a label out of
      range, a negative standard deviation or a number that `dtype` cannot hold.
  """
  path = pathlib.Path(path)
  if (path / 'manifest.json').exists():
    raise ValueError(f'{path} holds latents already; choose another folder or remove them first')
  if dtype not in DTYPES:
    raise ValueError(f"dtype='{dtype}' must be {' or '.join(DTYPES)}")
  _check_encoder(encoder, list(feature_shape))
  manifest = Manifest(
    version=VERSION, count=0, shards=[], latent_shape=list(latent_shape), layout='HWC',
    dtype=dtype, num_classes=num_classes, vae=vae, vae_hash=vae_hash, scale=scale, crop=crop,
    encoder=encoder, feature_shape=list(feature_shape),
  )
  path.mkdir(parents=True, exist_ok=True)
  records = (_encode(row, index, manifest) for index, row in enumerate(rows))
  with tempfile.TemporaryDirectory(dir=path, prefix='partial-') as partial:
    counts = []
    for record in records:
      shard = itertools.chain([record], itertools.islice(records, rows_per_shard - 1))
      counts.append(_write_shard(pathlib.Path(partial) / str(len(counts)), shard))
    if not counts:
      raise ValueError(f'no rows to write to {path}')
    shards = _publish(path, partial, counts)
    manifest = dataclasses.replace(manifest, count=sum(counts), shards=shards)
    text = json.dumps(dataclasses.asdict(manifest), indent=2)
    (pathlib.Path(partial) / 'manifest.json').write_text(text)
    os.replace(pathlib.Path(partial) / 'manifest.json', path / 'manifest.json')
  return manifest


def _check_encoder(encoder, feature_shape):
  """Refuses an encoder without features, features without an encoder, and those not [N, F]."""
  if bool(encoder) != bool(feature_shape):
    raise ValueError(
      f"encoder='{encoder}', feature_shape={feature_shape}: expected both or neither"
    )
  if len(feature_shape) not in (0, 2):
    raise ValueError(f'feature_shape {feature_shape}, expected [N, F]')


def _encode(row, index, manifest):
  """Returns the bytes of one record, checked."""
  height, width, channels = manifest.latent_shape
  moments = _stored(row, index, 'moments', (height, width, 2 * channels), manifest.dtype)
  lowest = moments[..., channels:].min()
  if lowest < 0:
    raise ValueError(
      f'row {index} has a standard deviation of {lowest}, expected 0 or more; if the last'
      f' {channels} channels of its moments are log-variances, write exp(log-variance / 2)'
    )
  if ('feature' in row) != bool(manifest.feature_shape):
    problem = 'a feature' if 'feature' in row else 'no feature'
    raise ValueError(
      f"row {index} has {problem}, expected what encoder='{manifest.encoder}', feature_shape="
      f'{manifest.feature_shape} say'
    )
  content = moments.tobytes()
  if manifest.feature_shape:
    shape = tuple(manifest.feature_shape)
    content += _stored(row, index, 'feature', shape, manifest.dtype).tobytes()
  label = int(row['label'])
  if not 0 <= label < manifest.num_classes:
    raise ValueError(f'row {index} has label {label}, expected 0 to {manifest.num_classes - 1}')
  return content + np.array(label, LABEL).tobytes()


def _stored(row, index, key, shape, dtype):
  """Returns an array of a row in the type that is stored, checked."""
  with np.errstate(over='ignore'):  # what does not fit becomes inf, and is refused below
    array = np.asarray(row[key]).astype(DTYPES[dtype])
  if array.shape != shape:
    raise ValueError(f'row {index} has {key} {array.shape}, expected {shape}')
  if not np.isfinite(array).all():
    raise ValueError(
      f'row {index} has {key} with numbers that {dtype} cannot hold; check it or use float32'
    )
  return array


def _write_shard(file, records):
  """Writes records to one file and returns how many."""
  # Groups of 1 for random access; moments are noise to a compressor.
  writer = array_record_module.ArrayRecordWriter(str(file), 'group_size:1,uncompressed')
  count = 0
  try:
    for record in records:
      writer.write(record)
      count += 1
  finally:
    writer.close()
  return count


def _publish(path, partial, counts):
  """Moves finished shards to their final names; returns their entries in the manifest."""
  entries = []
  for index, count in enumerate(counts):
    file = pathlib.Path(partial) / str(index)
    name = f'latents-{index:05d}-of-{len(counts):05d}.array_record'
    entries.append(
      {'name': name, 'count': count, 'bytes': file.stat().st_size, 'sha256': _sha256(file)}
    )
    os.replace(file, path / name)
  return entries


def _check_size(path, shard):
  """Returns the path of a shard that has the size of the manifest."""
  file = pathlib.Path(path) / shard['name']
  found = file.stat().st_size if file.is_file() else None
  if found != shard['bytes']:
    problem = 'is missing' if found is None else f'has {found} bytes'
    raise ValueError(
      f'data.path={path}: shard {shard["name"]} {problem}, manifest.json says {shard["bytes"]}'
      ' bytes; copy or write it again'
    )
  return file


def _check_rows(path, shard):
  """Opens a shard and compares its number of rows with the manifest."""
  try:
    reader = array_record_module.ArrayRecordReader(str(pathlib.Path(path) / shard['name']))
    found = f'{reader.num_records()} rows'
    reader.close()
  except RuntimeError:
    found = 'no readable end'
  if found != f'{shard["count"]} rows':
    raise ValueError(
      f'data.path={path}: shard {shard["name"]} has {found}, manifest.json says {shard["count"]}'
      ' rows; copy or write it again'
    )


def _sha256(file):
  with open(file, 'rb') as content:
    return hashlib.file_digest(content, 'sha256').hexdigest()

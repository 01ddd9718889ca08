"""Writes the stored latent format of data/latents.py, a shard at a time.

`write_latents` takes rows from anywhere, all or nothing. `Job` is for long work: shards are written
in any order, by any number of processes, and what was finished before a kill stays finished.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import tempfile

import numpy as np
from array_record.python import array_record_module

from fmzoo import files, paths
from fmzoo.data import latents, manifests

RESULTS = ('count', 'shards', 'unreadable')  # fields of a manifest that are known at its end
REMEDY = 'write the latents to a folder of this machine or a mounted one, and copy it there'


def write_latents(path, rows, *, rows_per_shard=65536, **settings):
  """Writes a folder that `LatentSource` reads; it counts as written once its manifest is there.

  Args:
    path: folder; made if missing, refused if it has a manifest.
    rows: iterable of {'moments': [H, W, 2 C], mean and standard deviation, 'label': int}, and, if
      the settings say so, 'feature' [N, F] and 'image' [h, w, 3] uint8; 'moments' are
      [2, H, W, 2 C] where mirrored.
    rows_per_shard: most rows of a file.
    **settings: see `empty_manifest`.

  Returns:
    The Manifest.

  Raises:
    ValueError: if there are latents already or no rows, or a row has another shape, a label out of
      range, a negative standard deviation or a number that the dtype cannot hold.
  """
  expect_unwritten(path)
  path = pathlib.Path(path)
  manifest = empty_manifest(**settings)
  path.mkdir(parents=True, exist_ok=True)
  records = (encode(row, f'row {index}', manifest) for index, row in enumerate(rows))
  with tempfile.TemporaryDirectory(dir=path, prefix='writing-') as folder:
    entries = []
    for record in records:
      shard = itertools.chain([record], itertools.islice(records, rows_per_shard - 1))
      entries.append(_write_shard(pathlib.Path(folder) / str(len(entries)), shard))
    if not entries:
      raise ValueError(f'no rows to write to {path}')
    for index, entry in enumerate(entries):
      os.replace(entry['name'], path / shard_name(index, len(entries)))
      entry['name'] = shard_name(index, len(entries))
    return _write_manifest(path, manifest, entries)


def empty_manifest(
  *, latent_shape, num_classes, vae, vae_hash, scale, crop, vae_dtype='', dtype='float16',
  classes=(), mirrored=False, encoder='', feature_shape=(), image_shape=(), source='',
):
  """Returns the Manifest of a folder without rows; arguments are its fields.

  Raises:
    ValueError: if they do not fit each other.
  """
  manifest = manifests.Manifest(
    version=manifests.VERSION, count=0, shards=[], latent_shape=list(latent_shape), layout='HWC',
    dtype=dtype, mirrored=mirrored, num_classes=num_classes, classes=list(classes), vae=vae,
    vae_hash=vae_hash, vae_dtype=vae_dtype, scale=scale, crop=crop, encoder=encoder,
    feature_shape=list(feature_shape), image_shape=list(image_shape), source=source,
    unreadable=[],
  )
  manifests.check(manifest)
  return manifest


def expect_unwritten(path):
  """Refuses a folder that holds latents already or their beginnings, and an address."""
  paths.expect_local('data.path', path, REMEDY)
  path = pathlib.Path(path)
  if (path / 'manifest.json').exists():
    raise ValueError(f'{path} holds latents already; choose another folder or remove them first')
  if found := [*path.glob(manifests.PARTIAL), *path.glob('latents-*.array_record')]:
    raise ValueError(
      f'{path} holds the beginnings of other latents ({found[0].name}); choose another folder or'
      ' remove them first'
    )


def shard_name(index, count):
  """Returns the file name of a shard."""
  return f'latents-{index:05d}-of-{count:05d}.array_record'


def locked(path, process_index):
  """Keeps others away from a host's share of a `Job`, see files.locked."""
  return files.locked(pathlib.Path(path) / manifests.PARTIAL, process_index, 'prepare')


class Job:
  """A folder of latents in the making: `count` rows in shards of equal size, none twice.

  `partial/` in it holds the plan and an entry for every shard that is finished; `finish` turns them
  into the manifest. A job of another plan is refused there; one that is finished has nothing left.

  Args:
    path: folder; made if missing.
    manifest: as `empty_manifest` returns it, with its `source`.
    count: rows of the source.
    rows_per_shard: of every shard but the last; fewer where rows turn out unreadable.

  Raises:
    ValueError: if there are other latents already, or the beginnings of others.
  """

  def __init__(self, path, manifest, *, count, rows_per_shard):
    paths.expect_local('data.path', path, REMEDY)
    self.path, self.manifest = pathlib.Path(path), manifest
    self.count, self.rows_per_shard = count, rows_per_shard
    self.shards = -(-count // rows_per_shard)
    self.partial = self.path / manifests.PARTIAL
    self.is_finished = (self.path / 'manifest.json').exists()
    if self.is_finished:
      self._expect_same('other latents', dataclasses.asdict(manifests.read(path)))
      self._expect_whole()
      return
    if not (self.partial / 'plan.json').exists():
      if found := [*self.path.glob('latents-*.array_record')]:
        raise ValueError(
          f'{path} holds {found[0].name} and no manifest.json; choose another folder or remove'
          ' such files first'
        )
      self.partial.mkdir(parents=True, exist_ok=True)
      _write_json(self.partial / 'plan.json', self._plan())
    self._expect_same('the beginnings of other latents', _read_json(self.partial / 'plan.json'))

  def _plan(self):
    """Returns what a job must share with the one that it goes on with."""
    plan = dataclasses.asdict(self.manifest) | {
      'rows': self.count, 'rows_per_shard': self.rows_per_shard
    }
    return {key: value for key, value in plan.items() if key not in RESULTS}

  def _expect_same(self, what, found):
    """Compares the plan with what is in the folder; a manifest does not know all of it."""
    plan = self._plan()
    for key in sorted(plan.keys() & found.keys()):
      if plan[key] != found[key]:
        was, is_now = (repr(value[key])[:100] for value in (found, plan))
        change = (
          'the names, sizes or labels of the source have changed since' if key == 'source'
          else f'{key} was {was} and is now {is_now}'
        )
        raise ValueError(
          f'{self.path} holds {what}: {change}; go on with what it was, remove the folder or choose'
          ' another'
        )

  def _expect_whole(self):
    """Refuses a finished folder with a damaged shard, which cannot be written by itself."""
    try:
      latents.check_shards(self.path, manifests.read(self.path))
    except ValueError as error:
      raise ValueError(
        f'{error}: to have `prepare` write it, remove the whole folder first'
      ) from error

  def left(self, process_index=0, process_count=1):
    """Returns the shards that this process has still to write."""
    if self.is_finished:
      return []
    mine = range(process_index, self.shards, process_count)
    return [shard for shard in mine if not self._is_done(shard)]

  def rows(self, shard):
    """Returns the range of the source's rows that belong to a shard."""
    first = shard * self.rows_per_shard
    return range(first, min(first + self.rows_per_shard, self.count))

  def write(self, shard, rows, unreadable):
    """Writes a shard and then its entry.

    Args:
      shard: of `left`.
      rows: iterable of (name for messages, row as in `write_latents`), in the source's order.
      unreadable: list that holds the names of the shard's unreadable images once `rows` has ended.

    Returns:
      How many rows were written.

    Raises:
      ValueError: names a row that cannot be stored.
    """
    records = (encode(row, name, self.manifest) for name, row in rows)
    for left_over in self.partial.glob(f'{shard:05d}.*.tmp'):  # of a process that was killed
      left_over.unlink()
    temporary = self.partial / f'{shard:05d}.{os.getpid()}.tmp'
    entry = _write_shard(temporary, records)
    name = shard_name(shard, self.shards)
    if entry['count']:
      os.replace(temporary, self.path / name)
    _write_json(self._entry(shard), entry | {'name': name, 'unreadable': list(unreadable)})
    return entry['count']

  def finish(self):
    """Writes the manifest of all shards and removes `partial/`; returns the Manifest.

    Raises:
      ValueError: if a shard is missing, or there is no row in any.
    """
    if self.is_finished:
      shutil.rmtree(self.partial, ignore_errors=True)
      return manifests.read(self.path)
    if missing := self.left():
      raise ValueError(
        f'{self.path}: shards {missing[:8]} are not written; run `prepare` again, with all hosts on'
        ' one file system'
      )
    entries = [_read_json(self._entry(shard)) for shard in range(self.shards)]
    unreadable = [name for entry in entries for name in entry.pop('unreadable')]
    entries = [entry for entry in entries if entry['count']]
    if not entries:
      raise ValueError(f'{self.path}: none of {self.count} images could be read')
    manifest = _write_manifest(
      self.path, dataclasses.replace(self.manifest, unreadable=unreadable), entries
    )
    shutil.rmtree(self.partial)
    return manifest

  def done(self):
    """Returns how many rows of the source are in finished shards, those left out included."""
    if self.is_finished:
      return self.count
    return sum(len(self.rows(shard)) for shard in range(self.shards) if self._is_done(shard))

  def _entry(self, shard):
    """Returns the path of a shard's entry."""
    return self.partial / f'{shard:05d}.json'

  def _is_done(self, shard):
    """Says whether a shard and its entry are there and of one size."""
    if not self._entry(shard).exists():
      return False
    entry, file = _read_json(self._entry(shard)), self.path / shard_name(shard, self.shards)
    return not entry['count'] or (file.exists() and file.stat().st_size == entry['bytes'])


def encode(row, name, manifest):
  """Returns the bytes of one record, checked; `name` is the row's in messages."""
  record = manifests.record_dtype(manifest)
  if set(row) != set(record.names):
    raise ValueError(
      f'{name} has {", ".join(sorted(row))}, expected {", ".join(sorted(record.names))}, as'
      f" encoder='{manifest.encoder}' and image_shape={manifest.image_shape} say"
    )
  values = np.empty((), record)
  for field in record.names:
    values[field] = _stored(row[field], f'{name} has {field}', record[field])
  lowest = values['moments'][..., manifest.latent_shape[2] :].min()
  if lowest < 0:
    raise ValueError(
      f'{name} has a standard deviation of {lowest}, expected 0 or more; if the last'
      f' {manifest.latent_shape[2]} channels of its moments are log-variances, write'
      ' exp(log-variance / 2)'
    )
  if not 0 <= values['label'] < manifest.num_classes:
    raise ValueError(
      f'{name} has label {values["label"]}, expected 0 to {manifest.num_classes - 1}'
    )
  return values.tobytes()


def _stored(value, what, field):
  """Returns an array of a row in the type that is stored, checked."""
  value, dtype = np.asarray(value), field.base
  if value.shape != field.shape:
    raise ValueError(f'{what} {value.shape}, expected {field.shape}')
  if dtype.kind != 'f':
    if value.dtype.kind not in 'iu' or (value.astype(dtype) != value).any():
      raise ValueError(f'{what} of {value.dtype} with values that {dtype} cannot hold')
    return value.astype(dtype)
  with np.errstate(over='ignore'):  # what does not fit becomes inf, and is refused below
    value = value.astype(dtype)
  if not np.isfinite(value).all():
    raise ValueError(
      f'{what} with numbers that {dtype.name} cannot hold; check it or use float32'
    )
  return value


def _write_shard(file, records):
  """Writes records to a file and returns its entry for the manifest; no records, no file."""
  count, first = 0, ''
  with _writing(file):  # groups of 1 for random access; moments are noise to a compressor
    writer = array_record_module.ArrayRecordWriter(str(file), 'group_size:1,uncompressed')
  try:
    for record in records:
      first = first or hashlib.sha256(record).hexdigest()
      with _writing(file):
        writer.write(record)
      count += 1
  finally:
    with _writing(file):
      writer.close()
  _sync(file)
  if not count:
    file.unlink()
    return {'name': str(file), 'count': 0}
  return {
    'name': str(file), 'count': count, 'bytes': file.stat().st_size,
    'sha256': latents.sha256(file), 'first': first,
  }


@contextlib.contextmanager
def _writing(file):
  """Turns what array_record raises into one line, and leaves no half a file on a full disk."""
  try:
    yield
  except RuntimeError as error:
    file.unlink(missing_ok=True)
    raise ValueError(
      f'{file} cannot be written ({" ".join(str(error).split())[:200]}); make room or choose'
      ' another folder'
    ) from error


def _sync(file):
  """Has a file's bytes on disk before anything is said of them, lest a lost machine loses them."""
  with open(file, 'rb') as content:
    os.fsync(content.fileno())


def _write_manifest(path, manifest, entries):
  """Writes manifest.json for the shards of entries, and returns the Manifest."""
  manifest = dataclasses.replace(
    manifest, count=sum(entry['count'] for entry in entries), shards=entries
  )
  _write_json(path / 'manifest.json', dataclasses.asdict(manifest))
  return manifest


def _write_json(file, values):
  """Writes a file as a whole or not at all."""
  temporary = file.with_name(f'{file.name}.{os.getpid()}.tmp')
  temporary.write_text(json.dumps(values, indent=2))
  _sync(temporary)
  os.replace(temporary, file)


def _read_json(file):
  """Returns what `_write_json` wrote; a file of another hand is refused."""
  try:
    return json.loads(file.read_text())
  except ValueError as error:
    raise ValueError(f'{file} is damaged ({error}); remove it and run `prepare` again') from error

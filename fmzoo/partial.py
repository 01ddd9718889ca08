"""Images in the making: chunks of them on disk, each whole or not at all, whoever made it."""

import hashlib
import json
import logging
import math
import pathlib
import shutil

import numpy as np

from fmzoo import files, npz

PLAN = 'plan.json'
# Of a plan or record: may change when a job goes on, or is known at its end.
FREE = ('code', 'codes', 'rows', 'pixels_sha256')
CHUNKS = '*[0-9]-*[0-9]'  # pattern of their names; no lock or temporary file has such a one

_log = logging.getLogger(__name__)


class Job:
  """A folder `<name>.partial` with the plan of some images and the chunks that are finished.

  A chunk holds `rows` images, the last one what is left; a file of another size counts as missing.
  Where there are chunks to go on with, `rows` are theirs, so that the others come out as they would
  have done. `codes` are the versions of the code that were at work on the chunks; plan and record
  hold them wherever they are not just `code`, the version of the last process.

  Args:
    path: of the finished file, `<name>.npz`; its record is `<name>.json`.
    plan: plain values, all that decides the images; `code`, `num_images`, `shape` (H, W, C) of an
      image and `stored`, the dtype of its numbers, among them.
    rows: images of a chunk.

  Raises:
    ValueError: if there are images of another plan, finished or not.
  """

  def __init__(self, path, plan, rows):
    self.path, self.rows = pathlib.Path(path), rows
    self.plan = json.loads(json.dumps(plan))  # as it is read back
    name = self.path.name.removesuffix('.npz')
    self.record = self.path.with_name(f'{name}.json')
    self.folder = self.path.with_name(f'{name}.partial')
    self.removed = self.path.with_name(f'{name}.removed')
    self.codes = [self.plan['code']]
    found = self._plan_in(self.folder / PLAN)
    if found and any(self.folder.glob(CHUNKS)):
      self.rows = found['rows']
      self.codes = self._codes_after(found)
    if not found and self.path.exists() and not self._plan_in(self.record):
      raise ValueError(
        f'{self.path} is there without {self.record.name}, which says what it is; move it away or'
        ' choose another workdir'
      )

  def _plan_in(self, file):
    """Returns the plan in a file, or None if there is no file; another plan is refused."""
    if not file.exists():
      return None
    found = files.read_json(file)
    for key in self.plan | found:
      if key not in FREE and self.plan.get(key) != found.get(key):
        raise ValueError(
          f'{file} is of other images: {_difference(key, found.get(key), self.plan.get(key))};'
          ' go on with what it was, or move these files away'
        )
    return found

  def _codes_after(self, found):
    """Returns the versions of the code at work on the chunks, those of the plan found first."""
    codes, code = found.get('codes', [found['code']]), self.plan['code']
    if not self.missing(range(self.chunks)):
      return codes  # nothing is left to be made by this one
    if code != found['code']:
      _log.warning(
        '%s: goes on with code %s, chunks there were made by %s; both will be in the record',
        self.folder, code, ', '.join(codes),
      )
    return codes if code in codes else [*codes, code]

  @property
  def is_finished(self):
    """Whether the finished file is there, and nothing is left to be done."""
    return self.path.exists() and not (self.folder / PLAN).exists()

  @property
  def chunks(self):
    """How many there are."""
    return math.ceil(self.plan['num_images'] / self.rows)

  def write_plan(self):
    """Says what the chunks are of, before the first of them.

    Chunks without a plan are removed: nothing says whose they are.
    """
    shutil.rmtree(self.removed, ignore_errors=True)
    strays = [] if (self.folder / PLAN).exists() else sorted(self.folder.glob(CHUNKS))
    if strays:
      _log.warning(
        '%s: %d chunks without %s, first %s, are removed and made again; nothing says what they'
        ' are of', self.folder, len(strays), PLAN, strays[0].name,
      )
    for stray in strays:
      stray.unlink()
    files.write_json(self.folder / PLAN, self._record())

  def _record(self):
    """Returns the plan and how the chunks were made."""
    codes = {} if self.codes == [self.plan['code']] else {'codes': self.codes}
    return self.plan | {'rows': self.rows} | codes

  def locked(self, process_index):
    """Keeps others away from a host's share, see files.locked."""
    return files.locked(self.folder, process_index, 'sample')

  def size(self, chunk):
    """Returns how many images a chunk has."""
    return min(self.rows, self.plan['num_images'] - chunk * self.rows)

  def missing(self, chunks):
    """Returns those of some chunks that are still to be made."""
    return [chunk for chunk in chunks if not self._is_done(chunk)]

  def _is_done(self, chunk):
    """Says whether a chunk is there and of its size."""
    file = self._file(chunk)
    size = math.prod(self._shape(chunk)) * self._dtype.itemsize
    return file.exists() and file.stat().st_size == size

  def _shape(self, chunk):
    """Returns [size, H, W, C] of a chunk."""
    return (self.size(chunk), *self.plan['shape'])

  @property
  def _dtype(self):
    """Of the numbers of an image."""
    return np.dtype(self.plan['stored'])

  def _file(self, chunk):
    """Returns the path of a chunk, named by its range of images."""
    first = chunk * self.rows
    return self.folder / f'{first:09d}-{first + self.size(chunk):09d}'

  def write(self, chunk, images):
    """Writes the images of a chunk, [size, H, W, C] as the plan says."""
    if images.shape != self._shape(chunk) or images.dtype != self._dtype:
      raise ValueError(
        f'chunk {chunk} got {images.shape} {images.dtype}, expected {self._shape(chunk)}'
        f' {self._dtype}'
      )
    with files.replacing(self._file(chunk), sync=True) as file:
      file.write(np.ascontiguousarray(images))

  def assemble(self, labels):
    """Writes the record and then the `.npz` of all chunks.

    Until it is whole it lies in the folder: what a kill leaves is written over, or removed with it.

    Args:
      labels: [N] int32.

    Raises:
      ValueError: if a chunk is missing.
    """
    if missing := self.missing(range(self.chunks)):
      raise ValueError(
        f'{self.folder}: {len(missing)} of {self.chunks} chunks are missing, first'
        f' {self._file(missing[0]).name}; run `sample` again, with all hosts on one file system'
      )
    digest = hashlib.sha256()  # of what the images are, by which they can be told from others
    for chunk in range(self.chunks):
      digest.update(self._file(chunk).read_bytes())
    files.write_json(self.record, {**self._record(), 'pixels_sha256': digest.hexdigest()})
    name = 'arr_0' if self._dtype == np.uint8 else 'latents'
    images = (
      np.fromfile(self._file(chunk), self._dtype).reshape(self._shape(chunk))
      for chunk in range(self.chunks)
    )
    temporary = self.folder / 'assembled.tmp'
    with files.replacing(self.path, sync=True, temporary=temporary) as file:
      npz.write(file, {
        name: (self._dtype, (len(labels), *self.plan['shape']), images),
        'labels': (labels.dtype, labels.shape, [labels]),
      })

  def remove(self):
    """Removes the folder, if there is one, once its images are elsewhere.

    It is renamed first, so that plan and chunks go together, whenever a kill comes; what that
    leaves is removed by the next job of this name.
    """
    shutil.rmtree(self.removed, ignore_errors=True)
    if self.folder.exists():
      self.folder.rename(self.removed)
    shutil.rmtree(self.removed, ignore_errors=True)


def _difference(key, found, asked):
  """Says in few words what two plans differ by: the key within, if they hold several."""
  if isinstance(found, dict) and isinstance(asked, dict):
    for part in found | asked:
      if found.get(part) != asked.get(part):
        return _difference(f'{key}.{part}', found.get(part), asked.get(part))
  return f'{key} was {str(found)[:80]} and is now {str(asked)[:80]}'

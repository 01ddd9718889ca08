"""Images in the making: chunks of them on disk, each whole or not at all, whoever made it."""

import contextlib
import fcntl
import json
import math
import pathlib
import shutil

import numpy as np

from fmzoo import files, npz

PLAN = 'plan.json'
FREE = ('code', 'rows')  # of a plan: may change when a job goes on


class Job:
  """A folder `<name>.partial` with the plan of some images and the chunks that are finished.

  A chunk holds `rows` images, the last one what is left; a file of another size counts as missing.
  Where there are chunks to go on with, `rows` are theirs, so that the others come out as they would
  have done.

  Args:
    path: of the finished file, `<name>.npz`; its record is `<name>.json`.
    plan: plain values, all that decides the images; `num_images`, `shape` (H, W, C) of an image and
      `stored`, the dtype of its numbers, among them.
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
    found = self._plan_in(self.folder / PLAN)
    if found and any(self.folder.glob('*[0-9]-*[0-9]')):
      self.rows = found['rows']
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

  @property
  def is_finished(self):
    """Whether the finished file is there, and nothing is left to be done."""
    return self.path.exists() and not (self.folder / PLAN).exists()

  @property
  def chunks(self):
    """How many there are."""
    return math.ceil(self.plan['num_images'] / self.rows)

  def write_plan(self):
    """Says what the chunks are of, before the first of them."""
    files.write_json(self.folder / PLAN, self.plan | {'rows': self.rows})

  @contextlib.contextmanager
  def locked(self, process_index):
    """Keeps others away from a host's share, where the file system can.

    Raises:
      ValueError: if another process is at work there.
    """
    self.folder.mkdir(parents=True, exist_ok=True)
    with open(self.folder / f'lock-{process_index}', 'w', encoding='ascii') as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        raise ValueError(
          f'{self.folder}: another `sample` is at work there; wait for its end'
        ) from error
      yield

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
    files.write_json(self.record, self.plan | {'rows': self.rows})
    name = 'arr_0' if self._dtype == np.uint8 else 'latents'
    images = (
      np.fromfile(self._file(chunk), self._dtype).reshape(self._shape(chunk))
      for chunk in range(self.chunks)
    )
    with files.replacing(self.path, sync=True) as file:
      npz.write(file, {
        name: (self._dtype, (len(labels), *self.plan['shape']), images),
        'labels': (labels.dtype, labels.shape, [labels]),
      })

  def remove(self):
    """Removes the folder, if there is one, once its images are elsewhere."""
    (self.folder / PLAN).unlink(missing_ok=True)  # first: without it nobody goes on
    shutil.rmtree(self.folder, ignore_errors=True)


def _difference(key, found, asked):
  """Says in few words what two plans differ by: the key within, if they hold several."""
  if isinstance(found, dict) and isinstance(asked, dict):
    for part in found | asked:
      if found.get(part) != asked.get(part):
        return _difference(f'{key}.{part}', found.get(part), asked.get(part))
  return f'{key} was {str(found)[:80]} and is now {str(asked)[:80]}'

"""Times how fast a recipe's rows are read, before any device sees them: rows per second.

With more and fewer reading processes, cold (the operating system has forgotten the files) and warm
(it was asked for the same rows just before). Cold there are only stored latents on a disk of this
machine, where the system can be told to forget, and enough of them that none is read twice.
"""

import itertools
import os
import pathlib
import time
from typing import NamedTuple

import numpy as np
from absl import logging

from fmzoo import sources
from fmzoo.data import pipeline

WORKERS = (0, 1, 2)
SECONDS = 4.0  # of reading for one figure, at most
SETTLED = 8  # batches before a warm figure, so that buffers have filled
FEWEST = 2 * SETTLED  # batches of an epoch for a cold figure, so that most are no buffer's


class Rate(NamedTuple):
  """What some reading processes reach."""

  workers: int  # reading processes beside this one; 0 reads in it
  first_seconds: float  # to the first batch
  cold: float | None  # rows per second; None where it cannot be measured
  warm: float  # rows per second


class Reading(NamedTuple):
  """What reading a recipe's rows takes."""

  rows: int
  row_bytes: int
  batch_size: int
  num_threads: int
  has_too_few: bool  # to read them cold
  rates: list  # of Rate


def measure(recipe, rows):
  """Reads a recipe's batches with 0, 1 and 2 workers and returns a Reading.

  Args:
    recipe: build.Recipe; data.name, batch_size, num_threads and path are used.
    rows: of sources.open_rows.
  """
  data = recipe.data
  size = sum(values.nbytes for values in rows.batch(np.arange(1)).values())
  files, epoch = shard_files(rows, data), len(rows) // data.batch_size
  has_too_few = bool(files) and epoch < FEWEST
  rates = [
    _measure(recipe, rows, workers, [] if has_too_few else files, epoch) for workers in WORKERS
  ]
  return Reading(len(rows), size, data.batch_size, data.num_threads, has_too_few, rates)


def _measure(recipe, rows, workers, files, epoch):
  """Returns the Rate of some workers."""
  logging.info('reading with %d worker(s)', workers)
  is_cold = forget(files)
  first, cold, count = rate(recipe, rows, workers, most=epoch if is_cold else None)
  settled = min(SETTLED, count // 2 - 1)  # of what was read, some must be left to time
  most = count if is_cold else None  # what comes after it is still cold
  _, warm, _ = rate(recipe, rows, workers, most, settled)
  return Rate(workers, first, cold if is_cold else None, warm)


def table(reading, wanted=None):
  """Returns a Reading as lines, a Markdown table among them; a cell that is unknown is empty.

  Args:
    reading: Reading.
    wanted: rows per second that a training step consumes, if it was measured.
  """
  lines = [
    f'{reading.rows} rows of {reading.row_bytes} bytes, batches of {reading.batch_size},'
    f' data.num_threads={reading.num_threads}', '',
  ]
  if reading.has_too_few:
    lines += [
      f'{reading.rows} rows are too few to read cold: {reading.rows // reading.batch_size} batches,'
      f' {FEWEST} are needed; lower data.batch_size', '',
    ]
  lines += [
    '| workers | first batch, s | rows/s, cold | rows/s, warm | MB/s, warm |',
    '|---|---|---|---|---|',
  ]
  for row in reading.rates:
    cold = '' if row.cold is None else f'{row.cold:.0f}'
    megabytes = row.warm * reading.row_bytes / 1e6
    lines.append(
      f'| {row.workers} | {row.first_seconds:.3g} | {cold} | {row.warm:.0f} | {megabytes:.3g} |'
    )
  if wanted is not None:
    times = ', '.join(f'{row.warm / wanted:.3g}' for row in reading.rates)
    lines += ['', f'The training step consumes {wanted:.0f} rows/s; read warm: {times} times that.']
  return lines


def shard_files(rows, data):
  """Returns the files on this machine that are read row by row; none where rows are in memory."""
  if data.name != 'latents':
    return []
  folder = pathlib.Path(sources.data_path(data))
  files = [folder / shard['name'] for shard in rows.manifest.shards]
  return [file for file in files if file.is_file()]  # those in a bucket are not


def forget(files):
  """Asks the operating system to drop what it keeps of files in memory.

  Returns:
    Whether there was anything to ask: there are files on a disk, and the system, such as Linux,
    has words for it.
  """
  if not (files and hasattr(os, 'posix_fadvise')) or any(map(in_memory, files)):
    return False
  for file in files:
    descriptor = os.open(file, os.O_RDONLY)
    try:
      os.fsync(descriptor)
      os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
      os.close(descriptor)
  return True


def in_memory(file, mounts='/proc/mounts'):
  """Says whether a file lies in a file system of the memory, which is never forgotten.

  Args:
    file: path.
    mounts: table of the file systems, where the operating system has one.
  """
  mounts, file = pathlib.Path(mounts), pathlib.Path(file).resolve()
  if not mounts.is_file():
    return False
  found = [line.split()[1:3] for line in mounts.read_text(encoding='utf-8').splitlines()]
  around = [
    (len(point), kind) for point, kind in found
    if pathlib.Path(point.replace('\\040', ' ')) in [file, *file.parents]
  ]
  # Of two on one point the later hides the earlier.
  return bool(around) and max(reversed(around), key=lambda pair: pair[0])[1] in ('tmpfs', 'ramfs')


def rate(recipe, rows, workers, most=None, settled=0):
  """Reads batches from the first on, for SECONDS.

  Args:
    recipe: build.Recipe.
    rows: of sources.open_rows.
    workers: reading processes.
    most: batches in all, `settled` + 2 or more; None for any number, over epochs.
    settled: batches after the first that are not timed.

  Returns:
    (seconds to the first batch, rows per second of those that are timed, batches read).
  """
  data, begun = recipe.data, time.perf_counter()
  batches = pipeline.batches(
    rows, batch_size=data.batch_size, seed=recipe.run.seed, num_threads=data.num_threads,
    num_workers=workers,
  )
  try:
    next(batches)
    first = time.perf_counter() - begun
    for _ in itertools.islice(batches, settled):
      pass
    count, begun = 0, time.perf_counter()
    for _ in itertools.islice(batches, None if most is None else most - settled - 1):
      count += 1
      if time.perf_counter() - begun > SECONDS:
        break
    return first, count * data.batch_size / (time.perf_counter() - begun), 1 + settled + count
  finally:
    batches.close()

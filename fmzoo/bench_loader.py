"""Times how fast a recipe's rows are read, before any device sees them: rows per second.

With more and fewer reading processes, cold (the operating system has forgotten the files) and warm
(it was asked for the same rows just before). Cold there are only stored latents on a disk of this
machine, where the system can be told to forget, and enough of them that none is read twice.
"""

import itertools
import os
import pathlib
import time

import numpy as np

from fmzoo import sources
from fmzoo.data import pipeline

WORKERS = (0, 1, 2)
SECONDS = 4.0  # of reading for one figure, at most
SETTLED = 8  # batches before a warm figure, so that buffers have filled
FEWEST = 2 * SETTLED  # batches of an epoch for a cold figure, so that most are no buffer's


def bench(recipe):
  """Reads a recipe's batches with 0, 1 and 2 workers and prints a table.

  A cell is empty where it cannot be measured.

  Args:
    recipe: build.Recipe; data.name, batch_size, num_threads and path are used.
  """
  rows, data = sources.open_rows(recipe), recipe.data
  size = sum(values.nbytes for values in rows.batch(np.arange(1)).values())
  files, epoch = shard_files(rows, data), len(rows) // data.batch_size
  print(
    f'{len(rows)} rows of {size} bytes, batches of {data.batch_size}, data.num_threads='
    f'{data.num_threads}', '', sep='\n',
  )
  if files and epoch < FEWEST:
    print(
      f'{len(rows)} rows are too few to read cold: {epoch} batches, {FEWEST} are needed; lower'
      ' data.batch_size\n'
    )
    files = []
  print(
    '| workers | first batch, s | rows/s, cold | rows/s, warm | MB/s, warm |',
    '|---|---|---|---|---|', sep='\n',
  )
  for workers in WORKERS:
    is_cold = forget(files)
    first, cold, count = rate(recipe, rows, workers, most=epoch if is_cold else None)
    settled = min(SETTLED, count // 2 - 1)  # of what was read, some must be left to time
    most = count if is_cold else None  # what comes after it is still cold
    _, warm, _ = rate(recipe, rows, workers, most, settled)
    print(
      f'| {workers} | {first:.3g} | {f"{cold:.0f}" if is_cold else ""} | {warm:.0f} |'
      f' {warm * size / 1e6:.3g} |'
    )


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
    Whether there was anything to ask: there are files, and the system, such as Linux, has words
    for it.
  """
  if not (files and hasattr(os, 'posix_fadvise')):
    return False
  for file in files:
    descriptor = os.open(file, os.O_RDONLY)
    try:
      os.fsync(descriptor)
      os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
      os.close(descriptor)
  return True


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

"""Times how fast a recipe's rows are read, before any device sees them: rows per second.

With more and fewer reading processes, cold (the operating system has forgotten the files) and warm.
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


def bench(recipe):
  """Reads a recipe's batches with 0, 1 and 2 workers and prints a table.

  Args:
    recipe: build.Recipe; data.batch_size, num_threads and path are used.
  """
  rows, data = sources.open_rows(recipe), recipe.data
  size = sum(values.nbytes for values in rows.batch(np.arange(1)).values())
  files = [file for file in pathlib.Path(sources.data_path(data)).rglob('*') if file.is_file()]
  print(
    f'{len(rows)} rows of {size} bytes, batches of {data.batch_size}, data.num_threads='
    f'{data.num_threads}', '',
    '| workers | first batch, s | rows/s, cold | rows/s, warm | MB/s, warm |',
    '|---|---|---|---|---|', sep='\n',
  )
  for workers in WORKERS:
    forget(files)
    first, cold = rate(recipe, rows, workers, settled=0)
    _, warm = rate(recipe, rows, workers, settled=SETTLED)
    print(f'| {workers} | {first:.2f} | {cold:.0f} | {warm:.0f} | {warm * size / 1e6:.0f} |')


def forget(files):
  """Asks the operating system to drop what it keeps of files in memory; Linux only."""
  for file in files:
    descriptor = os.open(file, os.O_RDONLY)
    try:
      os.fsync(descriptor)
      os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
      os.close(descriptor)


def rate(recipe, rows, workers, settled):
  """Returns (seconds to the first batch, rows per second after `settled` more batches).

  An epoch is not passed, so that cold rows are read once.
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
    most, count, begun = max(1, len(rows) // data.batch_size - settled - 1), 0, time.perf_counter()
    for _ in itertools.islice(batches, most):
      count += data.batch_size
      if time.perf_counter() - begun > SECONDS:
        break
    return first, count / (time.perf_counter() - begun)
  finally:
    batches.close()

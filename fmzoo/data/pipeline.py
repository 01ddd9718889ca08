"""A source of rows to batches: shuffled, split over processes, at any position.

The position is the step counter: what batch k holds is a function of the seed and k alone, so no
iterator state is ever saved.
"""

import re
import sys

import grain
import numpy as np
from absl import flags


def batches(
  source,
  *,
  batch_size,
  seed,
  start_step=0,
  own=None,
  shuffle=True,
  num_threads=2,
  num_workers=0,
):
  """Yields this process's rows of the global batches start_step, start_step + 1, ... without end.

  Global batch k is rows k B .. (k + 1) B - 1 of the epochs laid end to end, each with its own
  order, the same for every number of processes; a process reads its own of them and no others.

  Args:
    source: rows by index: `len(source)`, `source.batch(indices [n])` -> {name: array [n, ...]}.
    batch_size: B, global.
    seed: of the order, 0 or more.
    start_step: k of the first batch.
    own: indices [n] in a global batch of the rows of this process; None is all of them.
    shuffle: False keeps the source's order in every epoch.
    num_threads: that read ahead, in each worker; 0 reads in the caller's thread.
    num_workers: processes that read, batch by batch in turn; the source must be picklable. 0 reads
      in this one. Neither number changes a batch.

  Returns:
    Iterator of {name: [n, ...]} with a `close()` that ends the reading threads and workers.

  Raises:
    ValueError: if there are no rows, or a number is out of range.
  """
  _check(
    source, batch_size, own,
    {'run.seed': seed, 'start_step': start_step, 'data.num_threads': num_threads,
     'data.num_workers': num_workers},
  )
  indices = grain.MapDataset.range(len(source)).seed(seed)
  if shuffle:
    indices = indices.shuffle()
  if own is None:
    indices = indices.repeat()
  else:
    indices = Share(indices.repeat(), batch_size, own).indices()
  local = indices.batch(batch_size if own is None else len(own), drop_remainder=True)
  local = local[start_step:].map(source.batch)  # slicing is lazy
  # An element is a batch here, and grain's default would hold 500 of them in memory.
  options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
  rows = local.to_iter_dataset(options)
  if num_workers:
    if not flags.FLAGS.is_parsed():  # grain asks them for its debugging switches
      flags.FLAGS.mark_as_parsed()
    rows = rows.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
    )
  return _Batches(iter(rows), num_workers)


class _Batches:
  """grain's iterator, but for its words where a reading process has died."""

  def __init__(self, rows, num_workers):
    self._rows, self._num_workers = rows, num_workers

  def __iter__(self):
    return self

  def __next__(self):
    try:
      return next(self._rows)
    except RuntimeError as error:
      code = re.search(r'terminated unexpectedly with exit code (-?\d+)', str(error))
      if not code:
        raise
      raise ValueError(
        f'one of data.num_workers={self._num_workers} reading processes was ended from outside'
        f' (exit code {code[1]}; -9 often is a lack of memory); set fewer, or 0'
      ) from error

  def close(self):
    """Ends the reading threads and workers."""
    self._rows.close()


def check_fit(source, *, latent_shape, num_classes, latent_scale, feature_shape=None):
  """Compares what a source holds with what the config says.

  Args:
    source: has the attributes `name` (for the message), `latent_shape`, `num_classes`,
      `latent_scale` and `feature_shape`, () where it stores no features: that always fits, since
      the device may compute them.
    latent_shape: (H, W, C).
    num_classes: labels are 0 .. num_classes - 1.
    latent_scale: factor from stored moments to latents.
    feature_shape: (N, F), tokens of `model.patch` and `model.feature_dim`; None if the method
      needs no features.

  Raises:
    ValueError: names the key, both values and what to set.
  """
  size = '(data.latent_size, data.latent_size, data.channels)'
  pairs = [
    (size, tuple(latent_shape), tuple(source.latent_shape)),
    ('data.num_classes', num_classes, source.num_classes),
    ('data.latent_scale', latent_scale, source.latent_scale),
  ]
  if feature_shape is not None and source.feature_shape:
    key = 'features (tokens of model.patch, model.feature_dim)'
    pairs.append((key, tuple(feature_shape), tuple(source.feature_shape)))
  for key, wanted, found in pairs:
    if wanted != found:
      raise ValueError(
        f'{key}={wanted} does not fit {source.name}, which has {found}; set it to that or choose'
        ' other data'
      )


class Share:
  """One process's rows of every global batch; at a module's top, for processes to pickle it.

  Args:
    rows: grain.MapDataset of the rows of all processes, without end.
    batch_size: B.
    own: indices [n] in a batch.
  """

  def __init__(self, rows, batch_size, own):
    self.rows, self.batch_size, self.own = rows, batch_size, np.asarray(own)

  def indices(self):
    """Returns the grain.MapDataset of these rows."""
    return grain.MapDataset.range(sys.maxsize // self.batch_size * len(self.own)).map(self.row)

  def row(self, place):
    """Returns the row at a place among those of this process."""
    batch, place = divmod(place, len(self.own))
    return self.rows[batch * self.batch_size + int(self.own[place])]


def _check(source, batch_size, own, not_negative):
  """Raises ValueError for arguments of `batches` that make no sense."""
  if len(source) < 1:
    raise ValueError('the data set has no rows, at least 1 is needed; check data.name, data.path')
  if batch_size < 1:
    raise ValueError(f'data.batch_size={batch_size} must be at least 1')
  if own is not None and not (len(own) and min(own) >= 0 and max(own) < batch_size):
    raise ValueError(
      f'own={own}: rows of a global batch must be at least one, from 0 to {batch_size - 1}'
    )
  for key, value in not_negative.items():
    if value < 0:
      raise ValueError(f'{key}={value} must be 0 or more')

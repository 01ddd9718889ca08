"""Images to what the metrics need of them: statistics of Inception's activations, streamed.

A batch at a time is on the devices; sums are float64 on the host. Activations of parts of a set,
such as those of several hosts, are merged.
"""

import collections
import itertools
from typing import NamedTuple

import jax
import numpy as np

from fmzoo.metrics import inception_score, moments
from fmzoo.models import inception

CHUNK = 1024  # images whose activations are added to the statistics at a time
AHEAD = 2  # batches on their way to or on the devices


class Activations(NamedTuple):
  """What is kept of N images."""

  pool: moments.Moments  # of the features that FID compares, [D]
  spatial: moments.Moments  # of those that sFID compares, [E]
  score: inception_score.Splits  # of class probabilities, for the Inception score
  features: np.ndarray  # [<= N, D] float32 of every n-th image, for precision and recall


def make_program(config, method, rows, whole):
  """Compiles images to activations, when first called.

  Args:
    config: models.inception.Config.
    method: one of inception.INPUTS, how images become the network's inputs.
    rows, whole: shardings of batches and of parameters.

  Returns:
    (params, images [B, H, W, 1 or 3] uint8) -> pool [B, D], spatial [B, E], probabilities
    [B, classes], all float32; the last of logits without bias, as ADM's evaluator takes them.
  """
  net = inception.make(config)

  def run(params, images):
    """See make_program."""
    features = net.features(params, inception.inputs(images, method))
    probabilities = jax.nn.softmax(net.logits_without_bias(params, features.pool))
    return features.pool, features.spatial, probabilities

  compiled = jax.jit(run, in_shardings=(whole, rows), out_shardings=whole)
  # Of several hosts each has a mesh of its own, to which jit does not take arrays of the host.
  return lambda params, images: compiled(params, jax.device_put(images, rows))


def widths(config):
  """Returns {'pool': D, 'spatial': E} of a network.

  Args:
    config: models.inception.Config.
  """
  net = inception.make(config)
  shape = (1, inception.SIDE, inception.SIDE, inception.IMAGE_CHANNELS)
  images = jax.ShapeDtypeStruct(shape, 'float32')
  features = jax.eval_shape(net.features, jax.eval_shape(net.init, jax.random.key(0)), images)
  return {name: array.shape[1] for name, array in features._asdict().items()}


def measure(program, batches, *, batch_size, first=0, every=1, advance=None):
  """Streams images through Inception.

  Args:
    program: images [B, H, W, C] -> activations of them, as `make_program` gives them with its
      parameters bound.
    batches: of images in order, [<= B, H, W, C] uint8, of any lengths.
    batch_size: B, images at a time; the last are padded, so there is one compilation.
    first: index of the first image among all, which decides its split of the Inception score.
    every: the features of every n-th image are kept, counted from the first of all.
    advance: called with the number of images that are done, None where nobody watches.

  Returns:
    Activations.

  Raises:
    ValueError: if activations are not finite, or there are no images.
  """
  keeper, under_way = Keeper(first, every), collections.deque()
  for images in itertools.chain(rebatch(batches, batch_size), [None] * AHEAD):
    if images is not None:
      padded = np.resize(images, (batch_size, *images.shape[1:]))
      under_way.append((len(images), program(padded)))
    if under_way and (images is None or len(under_way) > AHEAD):
      count, parts = under_way.popleft()
      keeper.add(*(np.asarray(part)[:count] for part in parts))
      if advance:
        advance(count)
  return keeper.result()


def rebatch(batches, size):
  """Yields the rows of batches in order, `size` at a time; the last may be fewer."""
  held, count = [], 0
  for batch in batches:
    while len(batch):
      part, batch = batch[: size - count], batch[size - count :]
      held.append(part)
      count += len(part)
      if count == size:
        yield np.concatenate(held)
        held, count = [], 0
  if held:
    yield np.concatenate(held)


class Keeper:
  """Adds up activations in the order of images."""

  def __init__(self, first, every):
    self._next, self._every = first, every
    self._waiting, self._count, self._features, self._sums = [], 0, [], None

  def add(self, pool, spatial, probabilities):
    """Takes the next images' activations, each [n, ...] float32."""
    self._waiting.append((pool, spatial, probabilities))
    self._count += len(pool)
    if self._count >= CHUNK:
      self._flush()

  def result(self):
    """Returns the Activations of all that was added."""
    self._flush()
    if self._sums is None:
      raise ValueError('there are no images to measure; expected at least one')
    return Activations(*self._sums, np.concatenate(self._features))

  def _flush(self):
    """Adds what waits to the sums."""
    if not self._waiting:
      return
    pool, spatial, probabilities = (np.concatenate(part) for part in zip(*self._waiting))
    is_bad = ~(np.isfinite(pool).all(axis=1) & np.isfinite(spatial).all(axis=1))
    if is_bad.any():
      raise ValueError(
        f'activations of {is_bad.sum()} images are not finite, the first is image'
        f' {self._next + np.argmax(is_bad)}; see that eval.inception holds whole weights'
      )
    sums = (
      moments.of(pool), moments.of(spatial), inception_score.of(probabilities, first=self._next)
    )
    self._sums = sums if self._sums is None else _merged(self._sums, sums)
    # A copy: a view would keep all of them in memory.
    self._features.append(pool[-self._next % self._every :: self._every].copy())
    self._next += len(pool)
    self._waiting, self._count = [], 0


def _merged(first, second):
  """Returns the sums of two sets, (pool, spatial, score)."""
  return (
    moments.merge(first[0], second[0]), moments.merge(first[1], second[1]),
    inception_score.merge(first[2], second[2]),
  )


def merge(first, second):
  """Returns the Activations of two sets of images, those of the first before the second's."""
  features = np.concatenate([first.features, second.features])
  return Activations(*_merged(first[:3], second[:3]), features)

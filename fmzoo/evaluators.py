"""How images are measured: by a classifier of digits, or by Inception as ADM's evaluator does.

An evaluator does the work of the devices in `collect`, each host with its own images, and the rest
in `values`, on the first host alone, which training leaves to a thread.
"""

import functools
import os
import pathlib

import jax
import numpy as np
from absl import logging

from fmzoo import hashes, picture_stream, sources, writer
from fmzoo.convert import inception as official
from fmzoo.metrics import (
  activations,
  digits,
  frechet,
  inception_score,
  moments,
  precision_recall,
  protocol,
  reference,
)
from fmzoo.models import inception
from fmzoo.parallel import hosts
from fmzoo.parallel import mesh as meshes

NEIGHBOURS = 3  # of precision and recall, as in ADM's evaluator


def expect_enough(count, source):
  """Refuses fewer images than distances and neighbours can be computed of."""
  if count < reference.FEWEST:
    raise ValueError(
      f'{source} holds {count} images, expected {reference.FEWEST} or more, and for a distance that'
      f' means something {protocol.FULL}'
    )


def make(recipe, image_size):
  """Returns the evaluator that `eval.name` names.

  Args:
    recipe: build.Recipe.
    image_size: [height, width] of the images that it will see.

  Raises:
    ValueError: one line, if it measures nothing or a file that it needs is not there.
  """
  if recipe.eval.name == 'digits':
    return Digits()
  if recipe.eval.name == 'inception':
    return Inception(recipe, image_size)
  raise ValueError(
    f"eval.name='{recipe.eval.name}' measures nothing; set --config.eval.name=inception, or digits"
    ' for 8x8 digits'
  )


class Digits:
  """Accuracy and Fréchet distance of 8x8 digits, see metrics.digits."""

  settings = {'name': 'digits'}
  batch_size = 1000

  def collect(self, batches, *, first=0, advance=None):
    """Returns the images, [n, 8, 8, 1] uint8; see Inception.collect."""
    del first  # the hosts are in order
    kept = []
    for images in batches:
      kept.append(images)
      if advance:
        advance(len(images))
    return np.concatenate(kept)

  def merge(self, parts):
    """Returns what `collect` would have, had one host had the images of all."""
    return np.concatenate(parts)

  def values(self, images, labels):
    """Returns ({metric: number}, [notes]) of what was collected, and labels [N]."""
    if labels is None:
      raise ValueError(
        "eval.name='digits' compares images with the labels asked for, these have none; measure an"
        ' .npz of the command `sample`, or use --config.eval.name=inception'
      )
    return digits.evaluate_digits(images, labels), []


class Inception:
  """FID, sFID, Inception score, precision and recall, as ADM's evaluator computes them.

  All that can be refused is refused when it is made.

  Attributes:
    settings: of the protocol.
    batch_size: images at a time.
  """

  def __init__(self, recipe, image_size=None):
    """Reads weights and, where images of some size are compared with it, the reference."""
    config = recipe.eval
    path = config.inception or os.path.join(sources.data_root(), official.FILE)
    self.params, network = official.load(path), inception.OFFICIAL
    mesh = meshes.flat(recipe.mesh)
    self.distances, self.mesh = config.distances, meshes.of_this_host(mesh, at_most=mesh.size)
    self.batch_size = -(-config.batch_size // self.mesh.size) * self.mesh.size
    weights = hashes.file_sha256(path)
    if weights != official.SHA256:
      logging.warning(
        'eval.inception=%s has SHA-256 %s..., the official %s has %s...: these numbers compare with'
        ' no others', path, weights[:12], official.FILE, official.SHA256[:12],
      )
    self.network = {'inception_sha256': weights, 'resize': config.resize}
    self.program = activations.make_program(
      network, config.resize, meshes.rows_sharded(self.mesh), meshes.replicated(self.mesh)
    )
    self.settings = {'name': 'inception', **self.network}
    self.radii = None  # of the reference's features, once they are needed
    if image_size:
      self.reference = self._read(config.reference, activations.widths(network), image_size)
      self.settings |= {
        'reference': self.reference.protocol, 'inception_score_split': inception_score.SPLIT,
        'neighbours': NEIGHBOURS, 'distances': config.distances,
      }

  def collect(self, batches, *, first=0, every=1, advance=None):
    """Returns what `values` needs of images, on this host's devices.

    Args:
      batches: images in order, [<= n, H, W, 1 or 3] uint8.
      first: index of the first of them among those of all hosts.
      every: every n-th image is kept for precision and recall.
      advance: called with the number of images that are done, None where nobody watches.

    Returns:
      metrics.activations.Activations.
    """
    params = jax.device_put(self.params, meshes.replicated(self.mesh))
    return activations.measure(
      lambda images: self.program(params, images), batches, batch_size=self.batch_size,
      first=first, every=every, advance=advance,
    )

  def merge(self, parts):
    """Returns what `collect` would have, had one host had the images of all."""
    return functools.reduce(activations.merge, parts)

  def values(self, found, labels=None):
    """Returns ({metric: number}, [notes]) of what was collected; labels are not looked at."""
    del labels
    count, known = found.pool.count, self.reference
    logging.info('distances of %d images, minutes on a CPU where they are many', count)
    values, notes = {}, []
    for metric, gaussian in (('fid', known.pool), ('sfid', known.spatial)):
      statistics = found.pool if metric == 'fid' else found.spatial
      if gaussian is None:
        notes.append(f'no {metric}: eval.reference holds no statistics of those features')
        continue
      distance = frechet.distance(
        statistics.mean, moments.covariance(statistics), gaussian.mean, gaussian.covariance
      )
      values[protocol.metric_name(metric, count)] = distance.value
      values[f'{metric}_error'] = distance.error
      if count <= len(statistics.mean):
        notes.append(
          f'{metric} of {count} images: their covariance of {len(statistics.mean)} features has'
          f' rank {count - 1} at most, and the distance is far too high; generate more'
        )
    score = inception_score.score(found.score)
    values |= {'inception_score': score.mean, 'inception_score_std': score.std}
    if known.features is None:
      notes.append('no precision and recall: eval.reference holds neither images nor features')
    else:
      settings = {'k': NEIGHBOURS, 'half': self.distances == 'float16'}
      if self.radii is None:  # the same for every checkpoint
        self.radii = precision_recall.radii(known.features, **settings)
      pair = precision_recall.precision_recall(
        known.features, found.features, reference_radii=self.radii, **settings
      )
      values |= {'precision': pair.precision, 'recall': pair.recall}
    for note in notes:
      logging.warning(note)
    return values, notes

  def _read(self, path, widths, image_size):
    """Returns the reference for images of a size, with all that its own images can give."""
    if not path:
      raise ValueError(
        "eval.reference='' names no statistics of real images to compare with;"
        f' {reference.ADM}, and evaluate --make_reference=FILE.npz makes them of any pictures'
      )
    known = reference.read(path, widths)
    for key, value in self.network.items():
      if known.protocol.get(key, value) != value:
        raise ValueError(
          f"eval.reference={path} was made with {key} '{known.protocol[key]}', this evaluation has"
          f" '{value}'; use the same or make the reference again"
        )
    if known.has_images:
      with picture_stream.open_images(path) as images:
        known.protocol['image_size'] = list(images.shape[:2])
    if known.protocol.get('image_size', image_size) != image_size:
      height, width = known.protocol['image_size']
      raise ValueError(
        f'images of {image_size[0]} x {image_size[1]} pixels do not compare with eval.reference='
        f'{path}, made of {height} x {width}; use images or a reference of the same size'
      )
    if not known.has_images or not hosts.is_main():
      return known
    made = self._of_images(path, known.protocol['sha256'], widths)
    known.protocol['of_its_images'] = [
      name for name in ('pool', 'spatial', 'features') if getattr(known, name) is None
    ]  # and the others of those that somebody stored, of more images perhaps
    return known._replace(
      pool=known.pool or made.pool, spatial=known.spatial or made.spatial,
      features=made.features if known.features is None else known.features,
    )

  def _of_images(self, path, sha256, widths):
    """Returns the Reference that the images of a reference are; it is kept beside them."""
    key = f'{self.network["resize"]}-{self.network["inception_sha256"][:8]}'
    kept = pathlib.Path(f'{path.removesuffix(".npz")}.{sha256[:8]}-{key}.npz')
    if kept.exists():
      try:
        found = reference.read(kept, widths)
      except ValueError as error:
        raise ValueError(f'{kept} is damaged ({error}); remove it to have it made again') from error
      if found.protocol.get('of') != sha256:
        raise ValueError(f'{kept} is of other images than {path}; remove it to have it made again')
      return found
    logging.info('Inception sees the images of %s, once', path)
    with (
      picture_stream.open_images(path) as images, writer.Pace(len(images), unit='image') as pace,
    ):
      found = self.collect(
        images.batches(self.batch_size), every=reference.every(len(images)), advance=pace.update
      )
    try:
      reference.write(kept, found, {**self.network, 'of': sha256})
      logging.info('their activations are kept: %s', kept)
    except OSError as error:
      logging.warning('their activations cannot be kept, it will be done again: %s', error)
    return reference.of(found)

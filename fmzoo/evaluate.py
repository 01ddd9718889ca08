"""Checkpoint or images to metrics, with the protocol beside the numbers."""

import hashlib
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from fmzoo import evaluators, picture_stream, pictures, sample
from fmzoo.metrics import protocol
from fmzoo.parallel import hosts
from fmzoo.parallel import mesh as meshes


class Collected(NamedTuple):
  """All that `report` needs, on the host: the devices have done their part."""

  name: str  # of the result's folder
  found: Any  # what the evaluator collected
  labels: np.ndarray | None  # [N] int32 that were asked for, where there are any
  images: dict  # how the images came about
  values: dict  # {metric: number} that are known already


def evaluate(recipe, workdir, at_step=None, samples=None):
  """Measures a checkpoint of a workdir, or images on disk.

  Args:
    recipe: build.Recipe; section `eval` says what is measured and how.
    workdir: results go to its evaluations/.
    at_step: finished steps of the checkpoint; None is the newest.
    samples: ADM `.npz` or folder of PNGs; None generates eval.num_images from the checkpoint.

  Returns:
    {metric: float}; {} in all processes but the main one.

  Raises:
    ValueError: one line, if something is missing or does not fit.
  """
  evaluator = evaluators.make(recipe)
  if samples is not None:
    return report(workdir, evaluator, collect_files(evaluator, samples))
  mesh = meshes.make(recipe.mesh)
  params, done = sample.load_params(recipe, mesh, workdir, at_step)
  collected = collect(
    recipe, evaluator, sample.Sampler(recipe, mesh), params, done, weights=recipe.sample.weights
  )
  return report(workdir, evaluator, collected)


def collect_files(evaluator, path):
  """Shows the images of an `.npz`, or of a folder of PNGs, to an evaluator; returns Collected."""
  path, digest = pathlib.Path(path), hashlib.sha256()

  def hashed(batches):
    for batch in batches:
      digest.update(np.ascontiguousarray(batch))
      yield batch

  with picture_stream.open_images(path) as images:
    found = evaluator.collect(hashed(images.batches(evaluator.batch_size)), len(images))
    about = {
      'file': path.name, 'num_images': len(images), 'shape': list(images.shape),
      'pixels_sha256': digest.hexdigest(),
    }
    labels = images.labels
  beside = path.with_suffix('.json')  # the command `sample` writes it
  about |= json.loads(beside.read_text()) if beside.is_file() else {}
  return Collected(path.stem, found, labels, about, {})


def collect(recipe, evaluator, sampler, params, done, *, weights):
  """Generates eval.num_images and shows them to an evaluator.

  Args:
    recipe: build.Recipe.
    evaluator: of evaluators.make.
    sampler: sample.Sampler of the recipe.
    params: tree.
    done: finished steps of these parameters, for the protocol.
    weights: what they are, 'ema' or 'params', for the protocol.

  Returns:
    Collected.

  Raises:
    ValueError: if the network makes numbers that are not finite.
  """
  count, settings = recipe.eval.num_images, recipe.sample
  labels = sample.choose_labels(settings.labels, count, recipe.data.num_classes, settings.seed)
  batches = finite(sampler.batches(params, labels, settings.seed))
  found = evaluator.collect(batches, count)
  about = sample.protocol(
    recipe, params, done, labels=settings.labels, num_images=count, weights=weights
  )
  values = {'gmac_per_image': sampler.macs_per_image(params) / 1e9}
  return Collected(result_name(recipe, done, weights), found, labels, about, values)


def finite(batches):
  """Yields batches of images as uint8, and refuses numbers that pictures would hide."""
  first = 0
  for batch in batches:
    if not np.isfinite(batch).all():
      wrong = np.flatnonzero(~np.isfinite(batch).all(axis=(1, 2, 3)))
      raise ValueError(
        f'image {first + wrong[0]} and {len(wrong) - 1} others of {len(batch)} hold numbers that'
        ' are not finite: the network has diverged; measure an earlier checkpoint, --step'
      )
    first += len(batch)
    yield pictures.to_uint8(batch)


def result_name(recipe, done, weights):
  """Returns the folder, below evaluations/, of a measurement of a checkpoint."""
  chosen = sample.describe(recipe, weights=weights, labels=recipe.sample.labels)
  return f'step={done}_n={recipe.eval.num_images}_{recipe.eval.name}_{chosen}'


def report(workdir, evaluator, collected):
  """Computes the metrics, writes them with their protocol and says where.

  Returns:
    {metric: float}; {} in all processes but the main one.
  """
  if not hosts.is_main():
    return {}
  values, notes = evaluator.values(collected.found, collected.labels)
  values = {name: float(value) for name, value in (values | collected.values).items()}
  folder = pathlib.Path(workdir) / 'evaluations' / collected.name
  protocol.write_result(folder, values, {
    'images': collected.images, 'metrics': evaluator.settings, 'notes': notes,
    'code': protocol.code_version(),
  })
  shown = ', '.join(f'{name} {value:.4g}' for name, value in values.items())
  logging.info('%s: %s', shown, folder)
  return values


def compare(folders):
  """Prints two results side by side, and what differs in how they came about.

  Args:
    folders: two, with metrics.json and protocol.json.

  Raises:
    ValueError: one line, if there are not two or one of them is no result.
  """
  if len(folders) != 2:
    raise ValueError(f'--compare={",".join(folders)} names {len(folders)} results, expected A,B')
  first, second = folders
  (metrics, about), (others, about_other) = map(protocol.read_result, (first, second))
  print(f'A: {first}\nB: {second}\n')
  print(f'{"metric":<24} {"A":>12} {"B":>12}')
  for name in dict.fromkeys([*metrics, *others]):
    shown = (_shown(values.get(name)) for values in (metrics, others))
    print(f'{name:<24} {next(shown):>12} {next(shown):>12}')
  if differences := protocol.differences(about, about_other):
    print('\nprotocols differ, so the numbers do not compare unless this is what is compared:')
    for key, value, other in differences:
      print(f'  {key}: {value} | {other}')
  else:
    print('\nprotocols are the same')


def _shown(value):
  """Returns a number as a table has it; '' where there is none."""
  return '' if value is None else f'{value:.6g}'

"""Checkpoint or images to metrics, with the protocol beside the numbers."""

import hashlib
import pathlib
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from fmzoo import evaluators, files, picture_stream, pictures, sample, writer
from fmzoo import sampler as samplers
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
    samples: ADM `.npz` or folder of PNGs, which the first host measures alone; None generates
      eval.num_images from the checkpoint.

  Returns:
    {metric: float}; {} in all processes but the main one.

  Raises:
    ValueError: one line, if something is missing or does not fit.
  """
  if samples is not None:
    evaluator = evaluators.make(recipe)
    return report(workdir, evaluator, collect_files(evaluator, samples)) if hosts.is_main() else {}
  mesh = meshes.make(recipe.mesh)
  measurement = Measurement(recipe, mesh, samplers.Sampler(recipe, mesh))
  params, done = sample.load_params(recipe, mesh, workdir, at_step)
  collected = measurement.collect(params, done, weights=recipe.sample.weights)
  return report(workdir, measurement.evaluator, collected)


def collect_files(evaluator, path):
  """Shows the images of an `.npz`, or of a folder of PNGs, to an evaluator; returns Collected."""
  path, digest = pathlib.Path(path), hashlib.sha256()

  def hashed(batches):
    for batch in batches:
      digest.update(np.ascontiguousarray(batch))
      yield batch

  with (
    picture_stream.open_images(path) as images, writer.Pace(len(images), unit='image') as pace,
  ):
    found = evaluator.collect(hashed(images.batches(evaluator.batch_size)), advance=pace.update)
    about = {
      'file': path.name, 'num_images': len(images), 'shape': list(images.shape),
      'pixels_sha256': digest.hexdigest(),
    }
    labels = images.labels
  beside = path.with_suffix('.json')  # the command `sample` writes it
  about |= files.read_json(beside) if beside.is_file() else {}
  return Collected(path.stem, found, labels, about, {})


class Measurement:
  """All that measuring checkpoints takes, made and checked once.

  The images are those that `sample` would store, to the last bit.

  Args:
    recipe: build.Recipe; eval.num_images are generated.
    mesh: all devices.
    sampler: sampler.Sampler over them. Of several hosts, each makes its share on its own devices.

  Raises:
    ValueError: if latents are not decoded, labels cannot be, or the evaluator lacks something.
  """

  def __init__(self, recipe, mesh, sampler):
    if recipe.data.channels not in (1, 3) and not recipe.data.vae:
      raise ValueError(
        f"eval.name='{recipe.eval.name}' measures images, data.name='{recipe.data.name}' has"
        f' latents of {recipe.data.channels} channels; set data.vae=FILE.safetensors to decode them'
      )
    self.recipe, self.evaluator = recipe, evaluators.make(recipe)
    settings, self.count = recipe.sample, recipe.eval.num_images
    self.labels = sample.choose_labels(
      settings.labels, self.count, recipe.data.num_classes, settings.seed
    )
    self.rows = sample.chunk_rows(recipe, self.count)
    self.chunks = hosts.share(-(-self.count // self.rows))
    if not self.chunks:
      raise ValueError(f'eval.num_images={self.count} are too few to share between hosts')
    self.own = meshes.of_this_host(mesh, at_most=mesh.size)
    self.sampler = samplers.Sampler(recipe, self.own) if mesh.is_multi_process else sampler

  def collect(self, params, done, *, weights):
    """Generates images and shows them to the evaluator: the devices' part of the work.

    Args:
      params: tree, replicated over all devices.
      done: finished steps of these parameters, for the protocol.
      weights: what they are, 'ema' or 'params', for the protocol.

    Returns:
      Collected, of all hosts.

    Raises:
      ValueError: if the network makes numbers that are not finite.
    """
    first = self.chunks.start * self.rows
    share = min(self.chunks.stop * self.rows, self.count) - first
    with writer.Pace(share, unit='image') as pace:
      found = self.evaluator.collect(self.images(params), first=first, advance=pace.update)
    return Collected(
      name=result_name(self.recipe, done, weights),
      found=self.evaluator.merge(hosts.gather(found)),
      labels=self.labels,
      images=sample.protocol(
        self.recipe, params, done, labels=self.recipe.sample.labels, num_images=self.count,
        weights=weights,
      ),
      values={'gmac_per_image': self.sampler.macs_per_image(params) / 1e9},
    )

  def images(self, params):
    """Yields this host's images, uint8 [n, H, W, C], and refuses what pictures would hide."""
    params, wanted = meshes.copy_to(self.own, params), list(self.chunks)
    made = self.sampler.chunks(params, self.labels, self.recipe.sample.seed, self.rows, wanted)
    for number, images in made:
      wrong = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
      if wrong.size:
        raise ValueError(
          f'image {number * self.rows + wrong[0]} and {len(wrong) - 1} others of {len(images)} hold'
          ' numbers that are not finite: the network has diverged; measure an earlier --step'
        )
      yield pictures.to_uint8(images)


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

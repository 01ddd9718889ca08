"""Checkpoint or images to metrics, with the protocol beside the numbers."""

import hashlib
import pathlib
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from fmzoo import evaluators, files, hashes, picture_stream, pictures, sample, writer
from fmzoo import sampler as samplers
from fmzoo.metrics import protocol
from fmzoo.parallel import hosts
from fmzoo.parallel import mesh as meshes


class Stopped(Exception):
  """Somebody asked to give a measurement up."""


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
    return evaluate_files(recipe, workdir, samples) if hosts.is_main() else {}
  files.expect_writable('--workdir', workdir)
  mesh = meshes.flat(recipe.mesh)
  params, done = sample.load_params(recipe, mesh, workdir, at_step)
  measurement = Measurement(recipe, mesh, samplers.Sampler(recipe, mesh))
  collected = measurement.collect(params, done, weights=recipe.sample.weights)
  return report(workdir, measurement.evaluator, collected)


def evaluate_files(recipe, workdir, path):
  """Measures the images of an `.npz` or of a folder of PNGs; see `evaluate`."""
  path, digest = pathlib.Path(path).resolve(), hashlib.sha256()
  name = path.name.removesuffix('.npz')
  files.expect_writable('--workdir', workdir)
  with picture_stream.open_images(path) as images:
    evaluators.expect_enough(len(images), path)
    about = {'file': path.name, 'num_images': len(images), 'shape': list(images.shape)}
    record = record_of(path.with_name(f'{name}.json'), about)
    evaluator = evaluators.make(recipe, list(images.shape[:2]))
    with writer.Pace(len(images), unit='image') as pace:
      batches = hashes.passing(images.batches(evaluator.batch_size), digest)
      found = evaluator.collect(batches, advance=pace.update)
    about['pixels_sha256'] = digest.hexdigest()
    if record.get('pixels_sha256', digest.hexdigest()) != digest.hexdigest():
      raise ValueError(f'{path} holds other pixels than {name}.json says; move one of them away')
    return report(workdir, evaluator, Collected(name, found, images.labels, record | about, {}))


def record_of(path, about):
  """Returns how images came about, from the record that `sample` writes beside them, else {}.

  Args:
    path: of the record, if there is one.
    about: what the images are, for comparison.

  Raises:
    ValueError: if the record is of others.
  """
  if not path.is_file():
    return {}
  try:
    record = files.read_json(path)
  except ValueError:
    record = None
  if not isinstance(record, dict) or 'weights_sha256' not in record:
    logging.warning('%s is no record of images, it is left out', path)
    return {}
  for key in ('num_images', 'shape'):
    if record.get(key) != about[key]:
      raise ValueError(
        f'{path} is the record of other images: {key} is {record.get(key)} there and {about[key]}'
        f' in {about["file"]}; move one of them away'
      )
  return record


class Measurement:
  """All that measuring checkpoints takes, made and checked once.

  The images are those that `sample` would store, to the last bit if it makes as many at a time.

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
    self.recipe, params = recipe, sample.abstract_params(recipe, mesh)
    self.shape = list(sampler.image_shape(params))
    with hosts.together('evaluation'):
      self.evaluator = evaluators.make(recipe, self.shape[:2])
    settings, self.count = recipe.sample, recipe.eval.num_images
    self.labels = sample.choose_labels(
      settings.labels, self.count, recipe.data.num_classes, settings.seed
    )
    self.rows = samplers.chunk_rows(recipe, self.count)
    total = -(-self.count // self.rows)
    if total < hosts.count():
      raise ValueError(
        f'eval.num_images={self.count} are {total} chunks of {self.rows}, too few for'
        f' {hosts.count()} hosts; generate more, or lower sample.batch_size'
      )
    self.chunks = hosts.share(total)
    self.own = meshes.of_this_host(mesh, at_most=len(self.chunks))
    self.sampler = sampler if self.own == mesh else samplers.Sampler(recipe, self.own)
    self.macs = self.sampler.macs_per_image(params)
    protocol.code_version()  # now, and not hours later

  def collect(self, params, done, *, weights, stop=lambda: False):
    """Generates images and shows them to the evaluator: the devices' part of the work.

    Args:
      params: tree, replicated over all devices.
      done: finished steps of these parameters, for the protocol.
      weights: what they are, 'ema' or 'params', for the protocol.
      stop: asked before every chunk whether to give up.

    Returns:
      Collected, of all hosts, for `report`; None if it was given up.

    Raises:
      ValueError: if the network makes numbers that are not finite.
    """
    first = self.chunks.start * self.rows
    share = min(self.chunks.stop * self.rows, self.count) - first
    try:
      with hosts.together('evaluation'), writer.Pace(share, unit='image') as pace:
        digest = hashlib.sha256()
        images = hashes.passing(self._images(params, stop), digest)
        found = self.evaluator.collect(images, first=first, advance=pace.update)
    except Stopped:
      return None
    parts = hosts.gather(found)
    if not hosts.is_main():
      return Collected(result_name(self.recipe, done, weights), None, self.labels, {}, {})
    images = sample.protocol(
      self.recipe, params, done, labels=self.recipe.sample.labels, num_images=self.count,
      weights=weights,
    )
    return Collected(
      name=result_name(self.recipe, done, weights),
      found=self.evaluator.merge(parts),
      labels=self.labels,
      images={
        **images, 'rows': self.rows, 'shape': self.shape, 'stored': 'uint8',
        # Of several hosts, nobody has seen the pixels of all.
        **({'pixels_sha256': digest.hexdigest()} if hosts.count() == 1 else {}),
      },
      values={'gmac_per_image': self.macs / 1e9},
    )

  def _images(self, params, stop):
    """Yields this host's images, uint8 [n, H, W, C]."""
    params, wanted = meshes.on_own_devices(self.own, params), list(self.chunks)
    made = self.sampler.chunks(params, self.labels, self.recipe.sample.seed, self.rows, wanted)
    for _, images in made:
      if stop():
        raise Stopped
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


def compare(both):
  """Prints two results side by side, and what differs in how they came about.

  Args:
    both: 'A,B', folders with metrics.json and protocol.json; their names may hold commas, too.

  Raises:
    ValueError: one line, if there are not two such folders.
  """
  parts = both.split(',')
  pairs = [(','.join(parts[:i]), ','.join(parts[i:])) for i in range(1, len(parts))]
  found = [pair for pair in pairs if all(map(protocol.is_result, pair))]
  if not found:
    raise ValueError(
      f'--compare={both} does not name two results, expected A,B: folders with metrics.json and'
      ' protocol.json, such as a workdir has in evaluations/'
    )
  first, second = found[0]
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

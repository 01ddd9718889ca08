"""Checkpoint or samples to metrics, with the protocol beside the numbers."""

import pathlib

import numpy as np
from absl import logging

from fmzoo import pictures, sample
from fmzoo import sampler as samplers
from fmzoo.metrics import digits, protocol
from fmzoo.parallel import mesh as meshes


def evaluate(recipe, workdir, at_step=None, samples=None):
  """Measures a checkpoint of a workdir, or the images of an ADM `.npz`.

  Args:
    recipe: build.Recipe; `eval.name` says what is measured.
    workdir: results go to its evaluations/.
    at_step: finished steps of the checkpoint; None is the newest.
    samples: `.npz` with arr_0 (uint8 [n, H, W, C]) and labels; None generates from the checkpoint.

  Returns:
    {metric: float}.
  """
  if recipe.eval.name != 'digits':
    raise ValueError(
      f"eval.name='{recipe.eval.name}' measures nothing; set --config.eval.name=digits for digits"
    )
  if samples is not None:
    images, labels = pictures.load_npz(samples)
    values = digits.evaluate_digits(images, labels)
    return _report(
      pathlib.Path(workdir) / 'evaluations' / pathlib.Path(samples).stem, values,
      {'samples': str(samples), 'num_images': len(images)},
    )
  mesh = meshes.make(recipe.mesh)
  params, done = sample.load_params(recipe, mesh, workdir, at_step)
  return evaluate_params(
    recipe, workdir, samplers.Sampler(recipe, mesh), params, done, weights=recipe.sample.weights
  )


def evaluate_params(recipe, workdir, sampler, params, done, *, weights):
  """Generates eval.num_images with balanced labels and measures them.

  Args:
    recipe: build.Recipe.
    workdir: results go to its evaluations/.
    sampler: sampler.Sampler of the recipe.
    params: tree.
    done: finished steps of these parameters, for the protocol.
    weights: what they are, 'ema' or 'params', for the protocol.

  Returns:
    {metric: float}.
  """
  labels = sample.choose_labels(
    'balanced', recipe.eval.num_images, recipe.data.num_classes, recipe.sample.seed
  )
  images = pictures.to_uint8(sampler(params, labels, recipe.sample.seed, progress=True))
  values = digits.evaluate_digits(images, labels)
  values['gmac_per_image'] = sampler.macs_per_image(params) / 1e9
  folder = pathlib.Path(workdir) / 'evaluations' / result_name(recipe, done, weights)
  return _report(folder, values, {
    'step': int(done),
    'method': recipe.method_name,
    'weights': weights,
    'num_images': len(images),
    'labels': 'balanced',
    'seed': recipe.sample.seed,
    'sampler': {key: _plain(value) for key, value in recipe.sample_options.items()},
    'pixels': 'uint8',
    'code': protocol.code_version(),
  })


def result_name(recipe, done, weights):
  """Returns the folder, below evaluations/, of a measurement of a checkpoint."""
  return f'step={done}_n={recipe.eval.num_images}_{sample.describe(recipe, weights=weights)}'


def _plain(value):
  return list(value) if isinstance(value, tuple) else value


def _report(folder, values, settings):
  """Writes the result and says where it is."""
  values = {name: float(np.asarray(value)) for name, value in values.items()}
  protocol.write_result(folder, values, settings)
  shown = ', '.join(f'{name} {value:.4g}' for name, value in values.items())
  logging.info('%s: %s', shown, folder)
  return values

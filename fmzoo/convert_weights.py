"""Official weights to a checkpoint that every command takes, and back: the command `convert`."""

import json
import os
import pathlib
from typing import Any, NamedTuple

import jax
from absl import logging

from fmzoo import files, sample
from fmzoo.convert import bfm, names, soflow, soflow_unet, weights

CONVERTERS = {  # (method, network): names and layouts of its official weights
  ('bfm', 'blockwise'): bfm,
  ('bfm_frn', 'blockwise'): bfm,
  ('soflow', 'dit'): soflow,
  ('soflow', 'unet'): soflow_unet,
}
STEP = 0  # of an imported checkpoint: nothing was trained here


class Weights(NamedTuple):
  """What is stored of a state of which only the parameters are known."""

  params: Any


def convert(recipe, workdir, *, at_step=None, source=None, target=None):
  """Makes a workdir of official weights, or a file of official weights of a workdir.

  Args:
    recipe: build.Recipe.
    workdir: to make, or to take the checkpoint from.
    at_step: finished steps of the checkpoint to export; None is the newest.
    source: `.safetensors`, `.pt`, `.pth` or `.bin` file to import, or None.
    target: file to write, of one of these formats, or None.
  """
  if source is not None:
    import_weights(recipe, workdir, source)
  else:
    export_weights(recipe, workdir, target, at_step)


def import_weights(recipe, workdir, path):
  """Writes a checkpoint of parameters alone and config.json; to train, start another workdir there.

  Args:
    recipe: build.Recipe, whose network the weights must fit.
    workdir: folder without checkpoints; made if missing.
    path: official weights, see read_official.

  Raises:
    ValueError: if the weights do not fit or the workdir holds something else; nothing is written.
  """
  _expect_fresh(recipe, workdir)
  params = read_official(path, recipe)
  with sample.open_checkpoints(recipe, workdir, read_only=False) as checkpoints:
    files.write_config(workdir, recipe.config)
    checkpoints.save(STEP, Weights(params))
  logging.info(
    'checkpoint of step %d: %s; images of it: python -m fmzoo.main sample --workdir=%s',
    STEP, pathlib.Path(workdir) / 'checkpoints', workdir,
  )


def export_weights(recipe, workdir, path, at_step=None):
  """Writes a checkpoint's weights under their official names.

  Averaged ones where there are any, unless `sample.weights` asks for the last; frozen leaves as
  they are.

  Args:
    recipe: build.Recipe.
    workdir: of the run.
    path: file to write, see weights.save; must not exist.
    at_step: finished steps of the checkpoint; None is the newest.

  Raises:
    ValueError: if there is no such checkpoint, or the file exists.
  """
  _converter(recipe)
  weights.expect_writable(path)
  with sample.open_checkpoints(recipe, workdir) as checkpoints:
    params, done = checkpoints.restore_params(
      _abstract(recipe), ema=recipe.sample.weights == 'ema', step=at_step
    )
  logging.info('step %d of %s, sample.weights=%s', done, workdir, recipe.sample.weights)
  write_official(path, params, recipe)


def read_official(path, recipe):
  """Reads official weights.

  Args:
    path: `.safetensors`, `.pt`, `.pth` or `.bin`; never executed.
    recipe: build.Recipe, whose network they must fit. Of a training checkpoint, `sample.weights`
      chooses the averaged weights or the last.

  Returns:
    The parameters of `recipe.method`, float32, on the default device.

  Raises:
    ValueError: names every key that is missing or not expected and every tensor of another shape
      or dtype.
  """
  converter = _converter(recipe)
  with weights.opened(path, recipe.sample.weights) as tensors:
    try:
      leaves, structure = jax.tree.flatten(converter.from_official(
        tensors, recipe.network, recipe.data.channels, _abstract(recipe)
      ))
    except names.Misfit as error:
      raise ValueError(f'{path}: {error}') from error
    count = len(tensors)
  for i in range(len(leaves)):  # one after the other: two copies of a large network take too much
    leaves[i] = jax.block_until_ready(jax.device_put(leaves[i]))
  _log(path, count, leaves)
  return jax.tree.unflatten(structure, leaves)


def write_official(path, params, recipe):
  """Writes parameters of `recipe.method` to a new file under their official names.

  Raises:
    ValueError: if there is such a file, or it takes torch and there is none.
  """
  tensors = _converter(recipe).to_official(params, recipe.network, recipe.data.channels)
  weights.save(path, tensors)
  _log(path, len(tensors), params)


def _converter(recipe):
  """Returns the module that knows the official names of a recipe's network."""
  pair = (recipe.method_name, recipe.config['model']['name'])
  if pair not in CONVERTERS:
    known = ', '.join(' on '.join(pair) for pair in CONVERTERS)
    raise ValueError(
      f"method.name='{pair[0]}' on model.name='{pair[1]}' has no official weights to convert; those"
      f' of {known} can be'
    )
  return CONVERTERS[pair]


def _abstract(recipe):
  """Returns the method's parameters as shapes."""
  return jax.eval_shape(recipe.method.init, jax.random.key(0))


def _log(path, count, params):
  """Says how much was read or written."""
  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  logging.info('%s: %d tensors, %s parameters', path, count, f'{size:,}')


def _expect_fresh(recipe, workdir):
  """Refuses a workdir that holds checkpoints or the recipe of another run."""
  with sample.open_checkpoints(recipe, workdir) as checkpoints:
    if steps := checkpoints.steps():
      raise ValueError(
        f'{checkpoints.directory} holds checkpoints already (steps {steps}), which stay; choose'
        ' another --workdir for converted weights'
      )
  path = pathlib.Path(workdir) / 'config.json'
  if os.path.exists(path) and path.read_text().strip() != json.dumps(recipe.config, indent=2):
    raise ValueError(
      f'{path} is of another recipe, which stays; choose another --workdir for converted weights'
    )

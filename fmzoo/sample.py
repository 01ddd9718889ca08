"""Checkpoint to images on disk: labels, parameters, the command `sample` and its protocol."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import zlib

import jax
import numpy as np
from absl import logging

from fmzoo import checkpoint, files, hashes, npz, partial, paths, pictures, sources, writer
from fmzoo import sampler as samplers
from fmzoo.metrics import protocol as metrics_protocol
from fmzoo.parallel import hosts, rules
from fmzoo.parallel import mesh as meshes

NAME = 180  # longest description in a file name


def choose_labels(labels, count, num_classes, seed):
  """Returns [count] int32 labels.

  Args:
    labels: 'balanced' (0, 1, 2, ... in turn), 'random' (uniform, from the seed), or a comma list
      that is repeated, such as '3,1,4'.
    count: how many.
    num_classes: labels are 0 .. num_classes - 1.
    seed: of 'random'.

  Raises:
    ValueError: if a label is not a number or out of range.
  """
  if labels == 'balanced':
    return (np.arange(count) % num_classes).astype(np.int32)
  if labels == 'random':
    return np.random.default_rng(seed).integers(0, num_classes, count).astype(np.int32)
  try:
    chosen = [int(label) for label in labels.split(',')]
  except ValueError:
    chosen = []
  if not chosen or not all(0 <= label < num_classes for label in chosen):
    raise ValueError(
      f"sample.labels='{labels}' must be 'balanced', 'random' or a comma list of numbers from 0"
      f' to {num_classes - 1}'
    )
  return np.resize(np.array(chosen, np.int32), count)


def load_params(recipe, mesh, workdir, at_step=None):
  """Returns (params, step) of a workdir's newest good checkpoint, or of one that is named.

  Args:
    recipe: build.Recipe; `sample.weights` chooses averaged or last parameters.
    mesh: devices that get a copy each.
    workdir: of the run.
    at_step: finished steps of the checkpoint; None is the newest.

  Raises:
    ValueError: if there is no such checkpoint, or another kind of run wrote it.
  """
  with open_checkpoints(recipe, workdir) as checkpoints:
    return checkpoints.restore_params(
      abstract_params(recipe, mesh), ema=recipe.sample.weights == 'ema', step=at_step
    )


def open_checkpoints(recipe, workdir, *, identity=None, read_only=True):
  """Opens the checkpoints of a workdir; `identity` is the recipe's unless another is given.

  Raises:
    ValueError: if the workdir is an address or cannot be written.
  """
  paths.expect_local('workdir', workdir)
  return checkpoint.Checkpoints(
    pathlib.Path(workdir) / 'checkpoints',
    identity=recipe.identity if identity is None else identity,
    keep_last=recipe.log.keep_last, keep_steps=recipe.log.keep_steps, read_only=read_only,
  )


def abstract_params(recipe, mesh):
  """Returns the method's parameters as shapes, replicated over the mesh."""
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=meshes.replicated(mesh)
    ),
    jax.eval_shape(recipe.method.init, jax.random.key(0)),
  )


def describe(recipe, **chosen):
  """Returns what tells one sampling from another, short enough for a file name."""
  options = {**recipe.sample_options, **chosen, 'seed': recipe.sample.seed}
  parts = [f'{key}={value}' for key, value in options.items()]
  name = '_'.join(parts).replace(' ', '').replace('/', '-')
  return name if len(name) <= NAME else f'{name[: NAME - 9]}-{zlib.crc32(name.encode()):08x}'


def protocol(recipe, params, done, *, labels, num_images, weights):
  """Returns all that one needs to make the same images again, as plain values.

  Args:
    recipe: build.Recipe.
    params: tree; their hash is part of it.
    done: finished steps of these parameters.
    labels: as in `choose_labels`.
    num_images: how many.
    weights: 'ema' or 'params'.
  """
  data = recipe.data
  is_picture = bool(data.vae) or data.channels in (1, 3)
  return {
    'method': recipe.method_name,
    'step': int(done),
    'weights': weights,
    'weights_sha256': hashes.tree_sha256(params),
    'ema': dataclasses.asdict(recipe.ema) if weights == 'ema' else None,
    'num_images': num_images,
    'labels': labels,
    'seed': recipe.sample.seed,
    'sampler': {key: _plain(value) for key, value in recipe.sample_options.items()},
    'dtype': recipe.network.dtype,
    'precision': recipe.network.precision,
    'vae': _vae_protocol(data) if data.vae else None,
    'pixels': 'uint8: clip(127.5 x + 128, 0, 255), cut off' if is_picture else 'float32 latents',
    'recipe': recipe.identity,
    'code': metrics_protocol.code_version(),
  }


@functools.cache
def _vae_protocol(data):
  """Returns what decodes the latents: the file's name, its numbers, and how they are computed."""
  return {
    'file': pathlib.Path(data.vae).name,
    'decoder_sha256': hashes.tree_sha256(sources.load_vae(data)['decoder']),
    'dtype': data.vae_dtype,
    'latent_scale': data.latent_scale,
  }


def _plain(value):
  """Returns an option as JSON gives it back."""
  return [_plain(part) for part in value] if isinstance(value, (tuple, list)) else value


def sample(recipe, workdir, at_step=None):
  """Writes images of a checkpoint: an ADM `.npz`, a grid PNG and, if asked, a PNG each.

  Latents are decoded if `data.vae` is given, else written as they are, float32 under the name
  `latents`. Beside the `.npz` lies a `.json`, the `protocol` of the images. What was finished
  before a process was stopped or killed is gone on with, on any devices and hosts.

  Args:
    recipe: build.Recipe.
    workdir: of the run; images go to its samples/. All hosts must see it.
    at_step: finished steps of the checkpoint; None is the newest.

  Returns:
    Path of the `.npz`, or None if SIGTERM came before the last image.

  Raises:
    ValueError: one line, if there are other images of this name, or somebody is making them.
  """
  settings = recipe.sample
  labels = choose_labels(
    settings.labels, settings.num_images, recipe.data.num_classes, settings.seed
  )
  rows = samplers.chunk_rows(recipe, settings.num_images)
  files.expect_writable('--workdir', workdir)
  mesh = meshes.flat(recipe.mesh)
  own = meshes.of_this_host(mesh, at_most=math.ceil(settings.num_images / rows))
  sampler = samplers.Sampler(recipe, own)
  params, done = load_params(recipe, mesh, workdir, at_step)
  shape = sampler.image_shape(params)
  plan = protocol(
    recipe, params, done, labels=settings.labels, num_images=settings.num_images,
    weights=settings.weights,
  )
  plan |= {'shape': list(shape), 'stored': 'uint8' if shape[-1] in (1, 3) else 'float32'}
  path = pathlib.Path(workdir) / 'samples' / f'{_name(recipe, done)}.npz'
  job = partial.Job(path, plan, rows)
  with contextlib.ExitStack() as stack:
    if hosts.all_agree(job.is_finished):  # they may not see a file at once
      logging.info('%d images of step %d are there already: %s', len(labels), done, path)
    else:
      _begin(job, stack)
      with hosts.together('sample'):
        own_params = meshes.on_own_devices(own, params)
        is_whole = _generate(job, sampler, own_params, labels, settings.seed)
      if not hosts.all_agree(is_whole):  # a host may be done before the others stop
        return None
    with hosts.together('sample'):
      if hosts.is_main():
        _finish(job, recipe, labels)
  return path


def _name(recipe, done):
  """Returns what the files of a sampling are called."""
  settings, vae = recipe.sample, recipe.data.vae
  decoder = {'vae': pathlib.Path(vae).name} if vae else {}  # latents stay beside their images
  chosen = describe(recipe, weights=settings.weights, labels=settings.labels, **decoder)
  return f'step={done}_n={settings.num_images}_{chosen}'


def _begin(job, stack):
  """Locks this host's share, until the stack is left; all hosts refuse what one of them does."""
  with hosts.together('sample'):
    stack.enter_context(job.locked(jax.process_index()))
    if hosts.is_main():
      job.write_plan()


def _generate(job, sampler, params, labels, seed):
  """Makes the chunks of this host that are missing; returns whether all of them are there now."""
  share = hosts.share(job.chunks)
  missing = job.missing(share)
  total = sum(map(job.size, share))
  done = total - sum(map(job.size, missing))
  if done:
    logging.info('%d of %d images are there already: %s', done, total, job.folder)
  with hosts.Preemption() as stop, writer.Pace(total, done, unit='image') as pace:
    made = sampler.chunks(params, labels, seed, job.rows, missing)
    for number, (chunk, images) in enumerate(made, 1):
      job.write(chunk, pictures.pixels(images))
      done += len(images)
      pace.update(len(images))
      if stop.reached(number) and done < total:
        logging.warning(
          'stopped by SIGTERM after %d of %d images; the same command goes on', done, total
        )
        return False
  return True


def _finish(job, recipe, labels):
  """Turns chunks into the `.npz` and pictures, tells where they are, removes the chunks."""
  path, is_new = job.path, not job.is_finished
  if is_new:
    job.assemble(labels)
    _tell(path, job.plan, recipe.data.latent_scale)
  folder = path.with_name(path.name.removesuffix('.npz'))
  with npz.Reader(path) as reader:
    name = reader.names()[0]
    first = next(reader.rows(name, samplers.PREVIEW_ROWS * samplers.PREVIEW_COLUMNS))
    span = None if first.dtype == np.uint8 else pictures.colour_span(first)
    if is_new:
      shown = pictures.viewable(first, span)
      pictures.save_grid(folder.with_name(f'{folder.name}.png'), shown, samplers.PREVIEW_COLUMNS)
    if recipe.sample.png_folder:
      for start, images in zip(range(0, len(labels), job.rows), reader.rows(name, job.rows)):
        shown = pictures.viewable(images, span)
        pictures.save_folder(folder, shown, first=start, count=len(labels))
      logging.info('one PNG each: %s', folder)
  job.remove()


def _tell(path, plan, latent_scale):
  """Says what was written and, of latents, what they are still to become."""
  count, done = plan['num_images'], plan['step']
  if plan['stored'] == 'uint8':
    logging.info('%d images of step %d: %s and its grid, .png', count, done, path)
    return
  logging.warning(
    '%d latents of step %d, no images yet: %s (array latents, times data.latent_scale=%g) and'
    ' its grid in false colours, .png; --config.data.vae=FILE.safetensors decodes them',
    count, done, path, latent_scale,
  )


def initial_params(recipe, mesh, identity):
  """Returns fresh parameters with all that run.init_from holds in place of them.

  A second stage starts so: the first stage's averaged weights, and its own new subtree.

  Args:
    recipe: build.Recipe.
    mesh: that of the run, see parallel.rules.
    identity: what the run there must have in common with this one, build.stage_identity.

  Raises:
    ValueError: if run.init_from has no checkpoint, or one of another kind.
  """
  abstract = rules.abstract(jax.eval_shape(recipe.method.init, jax.random.key(0)), mesh)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  fresh = jax.jit(recipe.method.init, out_shardings=shardings)(jax.random.key(recipe.run.seed))
  with open_stage(recipe, identity) as checkpoints:
    held = checkpoints.subtrees()
    wanted = {k: v for k, v in abstract.items() if k in held}
    params, done = checkpoints.restore_params(wanted, ema=True)
  logging.info('parameters from step %d of %s', done, recipe.run.init_from)
  return {**fresh, **params}


def open_stage(recipe, identity):
  """Opens the checkpoints of run.init_from, whose run must have `identity` in common with this.

  Raises:
    ValueError: if there is none, or one of another kind.
  """
  checkpoints = open_checkpoints(recipe, recipe.run.init_from, identity=identity)
  try:
    checkpoints.check_newest(to_go_on=False)
  except ValueError as error:
    checkpoints.close()
    raise ValueError(f'run.init_from={recipe.run.init_from}: {error}') from error
  return checkpoints

"""Checkpoint to images: labels, noise by image index, one compiled sampler, one decoder."""

import functools
import math
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from fmzoo import checkpoint, cost, paths, pictures, sources, writer
from fmzoo.parallel import mesh as meshes

PREVIEW_COLUMNS = 10
PREVIEW_ROWS = 10
DECODED_ROWS = 8  # latents a device decodes at a time: at 256 x 256, 0.5 GB for each large array
NAME = 180  # longest description in a file name
STREAM = zlib.crc32(b'sample')  # keeps images apart from training with the same seed


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


class Decoder:
  """A frozen VAE that turns the latents of a recipe into images, a few rows at a time.

  Args:
    recipe: build.Recipe; `data.vae` names the weights.
    mesh: devices that share the rows; each keeps a copy of the weights.

  Raises:
    ValueError: one line, if the weights cannot be read or are of another network.
  """

  def __init__(self, recipe, mesh):
    params = sources.load_vae(recipe.data)
    whole, scale = meshes.replicated(mesh), recipe.data.latent_scale
    decode = sources.autoencoder(recipe.data).decode
    self.most = DECODED_ROWS * mesh.size
    self.params = jax.device_put({'decoder': params['decoder']}, whole)
    self.run = jax.jit(
      lambda params, latents: decode(
        params, jax.lax.with_sharding_constraint(latents, meshes.rows_sharded(mesh)) / scale
      ),
      in_shardings=(whole, whole), out_shardings=whole,
    )

  def __call__(self, latents, rows):
    """Returns images [n, H, W, 3] of latents [n, h, w, C], both float32 on the host.

    Args:
      latents: times data.latent_scale, as samplers make them.
      rows: of a whole batch, a multiple of the devices; so many, or fewer, are decoded at a time.
    """
    rows, images = min(rows, self.most), []
    for first in range(0, len(latents), rows):
      part = latents[first : first + rows]
      padded = np.resize(part, (rows, *part.shape[1:]))  # one shape, one compilation
      images.append(np.asarray(self.run(self.params, padded))[: len(part)])
    return np.concatenate(images)


class Sampler:
  """The recipe's sampler compiled once; image i depends on its seed, i and its label alone."""

  def __init__(self, recipe, mesh):
    self.recipe, self.mesh = recipe, mesh
    self.decode = Decoder(recipe, mesh) if recipe.data.vae else None
    rows = meshes.rows_sharded(mesh)
    self.sample = functools.partial(recipe.method.sample, **recipe.sample_options)

    def run(params, seed, first, labels):
      """Labels come whole, as several hosts can hand them over, and are cut over devices here."""
      keys = image_keys(seed, first, labels.shape[0])
      return self.sample(params, *jax.lax.with_sharding_constraint((keys, labels), (rows, rows)))

    whole = meshes.replicated(mesh)
    self.run = jax.jit(run, in_shardings=(whole, None, None, whole), out_shardings=whole)

  def __call__(self, params, labels, seed, progress=False):
    """Returns images of labels [n] as float32 [n, H, W, C] on the host."""
    return np.concatenate(list(self.batches(params, labels, seed, progress)))

  def batches(self, params, labels, seed, progress=False):
    """Yields images of labels [n] as float32 [<= batch, H, W, C] on the host.

    Those are latents as the method made them, where data are latents and there is no VAE.
    """
    size = min(self.recipe.sample.batch_size, len(labels))
    size = math.ceil(size / self.mesh.size) * self.mesh.size
    bar = writer.Progress(len(labels), 0, unit='image') if progress else None
    for first in range(0, len(labels), size):
      part = np.resize(labels[first : first + size], size)  # one shape, one compilation
      batch = np.asarray(self.run(params, seed, first, part))[: len(labels) - first]
      yield batch if self.decode is None else self.decode(batch, size)
      if bar:
        bar.update(len(batch))
    if bar:
      bar.close()

  def preview(self, params):
    """Returns a square of pictures, uint8 [n, H, W, 1 or 3]: one class a row, the noise fixed."""
    rows = np.arange(PREVIEW_ROWS * PREVIEW_COLUMNS) // PREVIEW_COLUMNS
    labels = (rows % self.recipe.data.num_classes).astype(np.int32)
    return pictures.viewable(self(params, labels, self.recipe.sample.seed))

  def macs_per_image(self, params):
    """Returns multiply-adds of one image: all network calls, guidance included."""
    count = 8  # part of the work may be shared by a batch
    labels = jax.ShapeDtypeStruct((count,), jnp.int32)
    keys = jax.eval_shape(lambda: image_keys(0, 0, count))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    return cost.matmul_flops(self.sample, abstract, keys, labels) / 2 / count


def image_keys(seed, first, count):
  """Returns keys [count] of the images first .. first + count - 1."""
  stream = jax.random.fold_in(jax.random.key(seed), STREAM)
  indices = first + jnp.arange(count)
  return jax.vmap(lambda index: jax.random.fold_in(stream, index))(indices)


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


def sample(recipe, workdir, at_step=None):
  """Writes images of a checkpoint: an ADM `.npz`, a grid PNG and, if asked, a PNG each.

  Latents are decoded if `data.vae` is given, else written as they are: see `pictures.save_npz`.

  Args:
    recipe: build.Recipe.
    workdir: of the run; images go to its samples/.
    at_step: finished steps of the checkpoint; None is the newest.

  Returns:
    Path of the `.npz`.
  """
  settings = recipe.sample
  labels = choose_labels(
    settings.labels, settings.num_images, recipe.data.num_classes, settings.seed
  )
  mesh = meshes.make(recipe.mesh)
  sampler = Sampler(recipe, mesh)
  params, done = load_params(recipe, mesh, workdir, at_step)
  images = np.concatenate([
    pictures.pixels(batch)
    for batch in sampler.batches(params, labels, settings.seed, progress=True)
  ])
  folder = pathlib.Path(workdir) / 'samples'
  vae_file = recipe.data.vae
  decoder = {'vae': vae_file} if vae_file else {}  # latents stay beside their images
  chosen = describe(recipe, weights=settings.weights, labels=settings.labels, **decoder)
  name = f'step={done}_n={len(images)}_{chosen}'
  path = folder / f'{name}.npz'
  pictures.save_npz(path, images, labels)
  shown = pictures.viewable(images[: PREVIEW_ROWS * PREVIEW_COLUMNS])
  pictures.save_grid(folder / f'{name}.png', shown, PREVIEW_COLUMNS)
  if images.dtype == np.uint8:
    logging.info('%d images of step %d: %s and its grid, .png', len(images), done, path)
  else:
    logging.warning(
      '%d latents of step %d, no images yet: %s (array latents, times data.latent_scale=%g) and'
      ' its grid in false colours, .png; --config.data.vae=FILE.safetensors decodes them',
      len(images), done, path, recipe.data.latent_scale,
    )
  if settings.png_folder:
    pictures.save_folder(folder / name, pictures.viewable(images))
    logging.info('one PNG each: %s', folder / name)
  return path


def initial_params(recipe, mesh, identity):
  """Returns fresh parameters with all that run.init_from holds in place of them.

  A second stage starts so: the first stage's averaged weights, and its own new subtree.

  Args:
    recipe: build.Recipe.
    mesh: devices that get a copy each.
    identity: what the run there must have in common with this one, build.stage_identity.

  Raises:
    ValueError: if run.init_from has no checkpoint, or one of another kind.
  """
  fresh = jax.jit(recipe.method.init, out_shardings=meshes.replicated(mesh))(
    jax.random.key(recipe.run.seed)
  )
  with open_stage(recipe, identity) as checkpoints:
    held = checkpoints.subtrees()
    wanted = {k: v for k, v in abstract_params(recipe, mesh).items() if k in held}
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

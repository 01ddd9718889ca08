"""Noise by image index, one compiled sampler, one decoder: parameters and labels to images."""

import functools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from fmzoo import cost, pictures, sources
from fmzoo.parallel import mesh as meshes

PREVIEW_COLUMNS = 10
PREVIEW_ROWS = 10
DECODED_ROWS = 8  # latents a device decodes at a time: at 256 x 256, 0.5 GB for each large array
ROWS = 64  # most images of a chunk, which one device makes: more are hardly faster
STREAM = zlib.crc32(b'sample')  # keeps images apart from training with the same seed


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
    rows, scale = meshes.rows_spec(mesh), recipe.data.latent_scale
    decode = sources.autoencoder(recipe.data).decode
    self.params = jax.device_put({'decoder': params['decoder']}, meshes.replicated(mesh))

    def run(params, latents):
      """Decodes the rows of one device."""
      return in_groups(lambda group: decode(params, group / scale), latents)

    self.run = jax.jit(
      jax.shard_map(
        run, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False
      ),
      out_shardings=_fetched(mesh),
    )

  def __call__(self, latents):
    """Returns images [n, H, W, 3] of latents [n, h, w, C], both float32 on the devices.

    Args:
      latents: times data.latent_scale, as samplers make them; n is a multiple of the devices.
    """
    return self.run(self.params, latents)


class Sampler:
  """The recipe's sampler compiled once; image i depends on its seed, i and its label alone.

  That is so to the last bit where a device makes as many rows at a time, which `chunks` takes care
  of; else numbers differ by their rounding, since other kernels are chosen for other shapes.
  """

  def __init__(self, recipe, mesh):
    self.recipe, self.mesh = recipe, mesh
    self.decode = Decoder(recipe, mesh) if recipe.data.vae else None
    rows = meshes.rows_sharded(mesh)
    self.sample = functools.partial(recipe.method.sample, **recipe.sample_options)

    def run(params, seed, indices, labels):
      """Makes the rows of one device: a program of its own, in which nothing is sent to others."""
      return self.sample(params, image_keys(seed, indices), labels)

    spec, whole = PartitionSpec(), meshes.replicated(mesh)
    cut = meshes.rows_spec(mesh)
    # Indices and labels come whole, as several hosts can hand them over, and are cut over devices.
    self.run = jax.jit(
      jax.shard_map(
        run, mesh=mesh, in_specs=(spec, spec, cut, cut), out_specs=cut, check_vma=False
      ),
      in_shardings=(whole, None, whole, whole),
      out_shardings=_fetched(mesh) if self.decode is None else rows,
    )

  def __call__(self, params, labels, seed):
    """Returns images of labels [n] as float32 [n, H, W, C] on the host.

    Those are latents as the method made them, where data are latents and there is no VAE.
    """
    size = min(self.recipe.sample.batch_size, len(labels))
    size = math.ceil(size / self.mesh.size) * self.mesh.size
    indices = (first + np.arange(size) for first in range(0, len(labels), size))
    dispatched = (self.dispatch(params, labels, seed, batch) for batch in indices)
    return np.concatenate([np.asarray(images) for images in ahead(dispatched)])[: len(labels)]

  def chunks(self, params, labels, seed, rows, wanted):
    """Yields (number, images) of chunks, each made by one device in a program of its size.

    Chunk k holds the images k rows .. (k + 1) rows - 1. It is the same to the last bit whatever the
    number of devices and whichever others are made.

    Args:
      params: tree, replicated over the mesh.
      labels: [N] int32 of all images.
      seed: of the noise.
      rows: images of a chunk, of which the last may have fewer.
      wanted: numbers of the chunks.

    Yields:
      Images are float32 [<= rows, H, W, C] on the host.

    Raises:
      ValueError: if they hold numbers that are not finite, which pictures would hide.
    """
    groups = [wanted[i : i + self.mesh.size] for i in range(0, len(wanted), self.mesh.size)]

    def dispatched():
      """Starts a chunk on each device; where too few are left, the last is made several times."""
      for group in groups:
        numbers = np.array(group + group[-1:] * (self.mesh.size - len(group)))
        indices = (numbers[:, None] * rows + np.arange(rows)).ravel()
        yield self.dispatch(params, labels, seed, indices)

    for group, images in zip(groups, ahead(dispatched())):
      parts = np.asarray(images)
      for place, number in enumerate(group):
        part = parts[place * rows : (place + 1) * rows][: len(labels) - number * rows]
        _expect_finite(part, number * rows)
        yield number, part

  def dispatch(self, params, labels, seed, indices):
    """Starts to make images, and returns without waiting for them.

    Args:
      params: tree, replicated over the mesh.
      labels: [N] int32 of all images.
      seed: of the noise.
      indices: [n] of the wanted ones; n is a multiple of the devices. Beyond N - 1 the last label
        is taken.

    Returns:
      Array on the devices, float32 [n, H, W, C]; decoded if there is a VAE.
    """
    chosen = labels[np.minimum(indices, len(labels) - 1)]
    latents = self.run(params, seed, indices.astype(np.int32), chosen)
    return latents if self.decode is None else self.decode(latents)

  def image_shape(self, params):
    """Returns (H, W, C) of an image."""
    count = self.mesh.size
    index = jax.ShapeDtypeStruct((count,), jnp.int32)
    latents = jax.eval_shape(self.run, params, 0, index, index)
    if self.decode is None:
      return latents.shape[1:]
    return jax.eval_shape(self.decode.run, self.decode.params, latents).shape[1:]

  def preview(self, params):
    """Returns a square of pictures, uint8 [n, H, W, 1 or 3]: one class a row, the noise fixed."""
    rows = np.arange(PREVIEW_ROWS * PREVIEW_COLUMNS) // PREVIEW_COLUMNS
    labels = (rows % self.recipe.data.num_classes).astype(np.int32)
    return pictures.viewable(self(params, labels, self.recipe.sample.seed))

  def macs_per_image(self, params):
    """Returns multiply-adds of one image: all network calls, guidance included."""
    count = 8  # part of the work may be shared by a batch
    labels = jax.ShapeDtypeStruct((count,), jnp.int32)
    keys = jax.eval_shape(lambda: image_keys(0, jnp.arange(count)))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    return cost.matmul_flops(self.sample, abstract, keys, labels) / 2 / count


def in_groups(decode, latents):
  """Decodes latents [n, h, w, C], DECODED_ROWS at a time, one group after the other."""
  count = min(DECODED_ROWS, len(latents))
  groups = -(-len(latents) // count)
  padded = jnp.resize(latents, (groups, count, *latents.shape[1:]))
  images = jax.lax.map(decode, padded)
  return images.reshape(-1, *images.shape[2:])[: len(latents)]


def chunk_rows(recipe, count):
  """Returns how many of `count` images a device makes at a time."""
  return min(ROWS, recipe.sample.batch_size, count)


def image_keys(seed, indices):
  """Returns keys [n] of the images with these indices, [n] int32."""
  stream = jax.random.fold_in(jax.random.key(seed), STREAM)
  return jax.vmap(lambda index: jax.random.fold_in(stream, index))(indices)


def ahead(dispatched):
  """Yields results of an iterator, having asked it for the one after: devices need not wait."""
  dispatched = iter(dispatched)
  waiting = next(dispatched, None)
  while waiting is not None:
    following = next(dispatched, None)
    yield waiting
    waiting = following


def _expect_finite(images, first):
  """Refuses images [n, H, W, C] of a network that has diverged; `first` is the first's index."""
  wrong = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
  if wrong.size:
    raise ValueError(
      f'image {first + wrong[0]} and {len(wrong) - 1} others of {len(images)} hold numbers that are'
      ' not finite: the network has diverged; use an earlier checkpoint, --step'
    )


def _fetched(mesh):
  """Returns the sharding of what a host fetches: whole where it lies on other hosts, too."""
  return meshes.replicated(mesh) if mesh.is_multi_process else meshes.rows_sharded(mesh)

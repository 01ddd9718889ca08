"""The command `prepare`: pictures, or moments stored elsewhere, to latents that recipes read.

Each host writes its share of the shards, and its devices share the rows of a batch. What is written
depends on the source, the VAE and the recipe alone, so a job that was killed goes on as if it had
not been.
"""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from fmzoo import inputs, paths, sources, writer
from fmzoo.convert import vae as official_vae
from fmzoo.data import images, manifests, shards
from fmzoo.parallel import hosts
from fmzoo.parallel import mesh as meshes

ENCODED_ROWS = 8  # images a device encodes at a time: at 256 x 256, 0.3 GB for each large array
MOST_ROWS = 2048  # of a shard, unless one asks for more
SHOWN = 5  # unreadable images that the last line names


def prepare(recipe, source, *, dtype='float16', shard_rows=None):
  """Writes the latents of a source to the folder that the recipe reads, `data.path`.

  Moments are those of `data.vae`, also of the mirror images where `data.flip`; images are kept
  beside them where the method aligns with features. Started again it goes on.

  Args:
    recipe: build.Recipe with data.name='latents'.
    source: what data.images.open_source takes.
    dtype: of the stored moments, 'float16' or 'float32'.
    shard_rows: images of a shard, which is what a kill loses at most; None is a sixteenth of them
      all, from 64 to MOST_ROWS.

  Returns:
    data.manifests.Manifest.

  Raises:
    ValueError: one line, if the source, the VAE or the folder does not fit the recipe.
  """
  data = recipe.data
  path = sources.data_path(data)
  if data.name != 'latents':
    raise ValueError(f"prepare writes latents, found data.name='{data.name}'; use another recipe")
  paths.expect_local('data.path', path, shards.REMEDY)  # before the listing, which may take long
  has_image = sources.is_aligned(recipe)
  rows = images.open_source(source, sources.image_size(data), with_pixels=has_image)
  _check(recipe, source, rows)
  encoder = None if rows.has_moments else Encoder(data)
  manifest = shards.empty_manifest(
    latent_shape=data.latent_shape, num_classes=data.num_classes, classes=rows.classes,
    vae=encoder.name if encoder else rows.vae, vae_hash=encoder.hash if encoder else '',
    vae_dtype=data.vae_dtype if encoder else '', scale=data.latent_scale, crop=rows.crop,
    dtype=dtype, mirrored=data.flip, source=rows.fingerprint(),
    image_shape=(*[sources.image_size(data)] * 2, 3) if has_image else (),
  )
  shard_rows = shard_rows or min(max(len(rows) // 16, 64), MOST_ROWS)
  job = _open_job(path, manifest, count=len(rows), rows_per_shard=shard_rows)
  if 0 < job.done() < len(rows):
    logging.info('%d of %d images are in finished shards, it goes on', job.done(), len(rows))
  with shards.locked(path, jax.process_index()):
    left = job.left(jax.process_index(), jax.process_count())
    with writer.Pace(sum(len(job.rows(shard)) for shard in left), unit='image') as pace:
      for shard in left:
        unreadable = []
        readable = _readable(rows, job.rows(shard), data.num_threads, unreadable, pace)
        stored = _rows(readable, encoder, has_image)
        job.write(shard, stored, unreadable)
  hosts.barrier('prepare')
  manifest = _on_main(job.finish) or manifests.read(path)
  _report(path, manifest)
  return manifest


def _open_job(path, manifest, **sizes):
  """Returns the shards.Job; one host writes its plan, the others compare theirs with it."""
  make = functools.partial(shards.Job, path, manifest, **sizes)
  return _on_main(make) or make()


def _on_main(function):
  """Returns what a function gives on the first host, None on others, which wait for it.

  If it fails there, they go on at once, to find out for themselves.
  """
  if not hosts.is_main():
    hosts.all_agree(True)
    return None
  is_done = False
  try:
    result = function()
    is_done = True
    return result
  finally:
    hosts.all_agree(is_done)


def _check(recipe, source, rows):
  """Refuses a source of other classes than the recipe's, or without what it needs."""
  data = recipe.data
  if rows.num_classes and rows.num_classes != data.num_classes:
    raise ValueError(
      f'data.num_classes={data.num_classes} does not fit --from={source}, which has'
      f' {rows.num_classes}; set it to that'
    )
  if rows.lowest_classes > data.num_classes:
    raise ValueError(
      f'data.num_classes={data.num_classes} is too low for --from={source}, which has labels up to'
      f' {rows.lowest_classes - 1}; set it to {rows.lowest_classes} or more'
    )
  if not rows.has_moments and not data.vae:
    raise ValueError(
      f"data.vae='' must name the weights that encode --from={source}, such as"
      ' diffusion_pytorch_model.safetensors of stabilityai/sd-vae-ft-mse'
    )
  if rows.has_moments and data.vae:
    logging.info('data.vae=%s is not used: --from=%s holds moments', data.vae, source)
  if rows.has_moments and data.flip:
    raise ValueError(
      f'data.flip=True needs moments of mirror images, --from={source} stores none; use False'
    )


class Encoder:
  """The VAE's encoder on all devices of this host.

  Attributes:
    name, hash: for the manifest.
    most: rows of a batch.
  """

  def __init__(self, data):
    params = sources.load_vae(data)
    self.name = official_vae.name_of(data.vae)
    self.hash = official_vae.encoder_hash(params['encoder'])
    mesh = meshes.local()
    self.most = ENCODED_ROWS * mesh.size
    self.params = jax.device_put({'encoder': params['encoder']}, meshes.replicated(mesh))
    encode = sources.autoencoder(data).encode

    def run(params, pixels):
      """uint8 [B, h, w, 3] to moments [B, H, W, 2 C], of the mirror image too where flipped."""
      x = inputs.from_pixels(pixels)
      moments = encode(params, x)
      return jnp.stack([moments, encode(params, x[:, :, ::-1])], axis=1) if data.flip else moments

    self.run = jax.jit(
      run, in_shardings=(meshes.replicated(mesh), meshes.rows_sharded(mesh)),
    )

  def __call__(self, pixels):
    """Starts to encode images [<= most, h, w, 3] uint8.

    Returns:
      [most, H, W, 2 C] float32, [most, 2, H, W, 2 C] where flipped, which numpy.asarray waits for;
      rows beyond those of the images mean nothing.
    """
    padded = np.resize(pixels, (self.most, *pixels.shape[1:]))  # one shape, one compilation
    return self.run(self.params, padded)


def _readable(rows, indices, num_threads, unreadable, pace):
  """Yields (name, row) of the images that can be read, in order; the names of others are kept."""
  for index, row in zip(indices, images.read_ahead(rows, indices, num_threads)):
    if isinstance(row, images.Unreadable):
      unreadable.append(row.name)
      logging.warning('left out, it cannot be read: %s (%s)', row.name, row.reason)
    else:
      yield rows.name_of(index), row
    pace.update()


def _rows(readable, encoder, has_image):
  """Yields (name, row to store); images are encoded, a batch being read while another is."""
  if encoder is None:
    for name, row in readable:
      yield name, _stored(row, row['moments'], has_image)
    return
  before = []
  while batch := list(itertools.islice(readable, encoder.most)):
    moments = encoder(np.stack([row['pixels'] for _, row in batch]))
    yield from _encoded(*before, has_image) if before else ()
    before = [batch, moments]
  yield from _encoded(*before, has_image) if before else ()


def _encoded(batch, moments, has_image):
  """Yields (name, row to store) of a batch, once its moments are there."""
  for (name, row), values in zip(batch, np.asarray(moments)):
    yield name, _stored(row, values, has_image)


def _stored(row, moments, has_image):
  """Returns a row as shards.encode takes it."""
  image = {'image': row['pixels']} if has_image else {}
  return {'moments': moments, 'label': row['label'], **image}


def _report(path, manifest):
  """Says what is there now, and what is not."""
  if not hosts.is_main():
    return
  size = sum(shard['bytes'] for shard in manifest.shards)
  logging.info(
    '%d images of %d classes in %d shards, %.1f MB: %s', manifest.count, manifest.num_classes,
    len(manifest.shards), size / 1e6, pathlib.Path(path) / 'manifest.json',
  )
  if left_out := manifest.unreadable:
    more = f' and {len(left_out) - SHOWN} more' if len(left_out) > SHOWN else ''
    logging.warning(
      '%d images could not be read and were left out: %s%s; all of them are named in manifest.json',
      len(left_out), ', '.join(left_out[:SHOWN]), more,
    )

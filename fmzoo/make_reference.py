"""Real images to the statistics that generated ones are compared with."""

import hashlib

import numpy as np
from absl import logging

from fmzoo import evaluators, files, hashes, picture_stream, pictures, sources, writer
from fmzoo.data import images
from fmzoo.metrics import protocol, reference
from fmzoo.parallel import hosts


def make_reference(recipe, path, source=None):
  """Writes the statistics of real images, for eval.reference; of several hosts, the first does.

  Args:
    recipe: build.Recipe; section `eval` says which Inception sees them, and how.
    path: `.npz` to write.
    source: `.npz` of images, or what data.images.open_source takes, pictures cropped to the size of
      those that the recipe generates; None is the recipe's own data.

  Raises:
    ValueError: one line, if the file is there already or the source has no pictures.
  """
  reference.expect_absent(path)
  files.expect_writable('--make_reference', path)
  if not hosts.is_main():
    return
  evaluator = evaluators.Inception(recipe)
  if source is None:
    count, batches, about = _recipe_images(recipe, evaluator.batch_size)
  elif source.endswith('.npz'):
    count, batches, about = _npz_images(source, evaluator.batch_size)
  else:
    count, batches, about = _source_images(recipe, source, evaluator.batch_size)
  evaluators.expect_enough(count, f'--from={source}')
  digest = hashlib.sha256()
  with writer.Pace(count, unit='image') as pace:
    found = evaluator.collect(
      hashes.passing(batches, digest), every=reference.every(count), advance=pace.update
    )
  about |= {
    'num_images': found.pool.count, 'pixels_sha256': digest.hexdigest(), **evaluator.network,
    'code': protocol.code_version(),
  }
  reference.write(path, found, about)
  logging.info('statistics of %d images: %s', found.pool.count, path)


def _npz_images(path, size):
  """Returns (count, batches, protocol) of an `.npz`."""
  def batches():
    """Yields the images."""
    with picture_stream.open_images(path) as opened:
      yield from opened.batches(size)

  with picture_stream.open_images(path) as opened:
    count, shape = len(opened), opened.shape
  return count, batches(), {'source': 'images', 'image_size': list(shape[:2])}


def _source_images(recipe, source, size):
  """Returns (count, batches, protocol) of pictures; those that cannot be read are left out."""
  data = recipe.data
  side = sources.image_size(data) if data.name == 'latents' else data.latent_size
  rows = images.open_source(source, side, with_pixels=True)
  about = {
    'source': rows.fingerprint(), 'crop': rows.crop, 'image_size': [side, side], 'unreadable': [],
  }

  def batches():
    """Yields the pictures that can be read."""
    held = []
    for row in images.read_ahead(rows, range(len(rows)), data.num_threads):
      if isinstance(row, images.Unreadable):
        about['unreadable'].append(row.name)
        logging.warning('left out, it cannot be read: %s (%s)', row.name, row.reason)
      else:
        held.append(row['pixels'])
      if len(held) == size:
        yield np.stack(held)
        held.clear()
    if held:
      yield np.stack(held)

  return len(rows), batches(), about


def _recipe_images(recipe, size):
  """Returns (count, batches, protocol) of the recipe's own data, if those are pictures."""
  rows = sources.open_rows(recipe)
  first = rows.batch(np.arange(1))
  key = next((name for name in ('pixels', 'image', 'latent') if name in first), None)
  if key is None or first[key].shape[-1] not in (1, 3):
    raise ValueError(
      f"data.name='{recipe.data.name}' holds no pictures to make a reference of; give"
      ' --from=SOURCE, such as the folder of pictures that the latents were made of'
    )

  def batches():
    """Yields the rows' pictures."""
    for start in range(0, len(rows), size):
      yield pictures.pixels(rows.batch(np.arange(start, min(start + size, len(rows))))[key])

  size_of = list(first[key].shape[1:3])
  return len(rows), batches(), {'source': f'data.name={recipe.data.name}', 'image_size': size_of}

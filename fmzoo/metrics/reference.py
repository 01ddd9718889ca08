"""Statistics of real images on disk: ADM's `.npz`, those with means and covariances alone, ours.

Ours hold what ADM's hold but for the images, in place of which they have the pool features of up to
`MOST_FEATURES` of them, and how they were made.
"""

import json
import os
import pathlib
import zipfile
from typing import NamedTuple

import numpy as np

from fmzoo import files, hashes
from fmzoo.metrics import moments

FEWEST = 4  # images that three neighbours can be found among
MOST_FEATURES = 10_000  # images of ADM's reference, whose neighbourhoods recall counts
NAMES = {  # ours: theirs; ADM and pytorch-fid, MeanFlow
  'pool': (('mu', 'sigma'), ('ref_mu', 'ref_sigma')),
  'spatial': (('mu_s', 'sigma_s'),),
}
REMEDY = (
  "expected an .npz with arr_0 (images, uint8 [n, H, W, 3]) or mu and sigma (or ref_mu, ref_sigma);"
  ' fetch it again, or make one with evaluate --make_reference'
)
ADM = (
  'ADM has them for ImageNet, VIRTUAL_imagenet256_labeled.npz at https://openaipublic.blob.core'
  '.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz'
)


class Gaussian(NamedTuple):
  """A normal distribution fitted to activations."""

  mean: np.ndarray  # [D] float64
  covariance: np.ndarray  # [D, D] float64


class Reference(NamedTuple):
  """What real images are to the metrics; None is not stored."""

  pool: Gaussian | None  # for FID
  spatial: Gaussian | None  # for sFID
  features: np.ndarray | None  # [N, D] float32, for precision and recall
  has_images: bool  # whether arr_0 can give what is None
  protocol: dict  # file name, its SHA-256 and, of our own, how it was made


def read(path, widths):
  """Reads statistics.

  Args:
    path: `.npz`.
    widths: {'pool': D, 'spatial': E} of the network that they are compared with.

  Returns:
    Reference.

  Raises:
    ValueError: one line, if the file is missing, damaged or of other sizes, or a number in it is
      not finite.
  """
  if os.path.isfile(path) and not zipfile.is_zipfile(path):
    raise ValueError(f'eval.reference={path} is no whole .npz; {REMEDY}')
  try:
    with np.load(path, allow_pickle=False) as arrays:
      stored = {name: arrays[name] for name in arrays.files if name not in ('arr_0', 'labels')}
      has_images = 'arr_0' in arrays.files
    made = json.loads(str(stored.get('protocol', '{}')))
  except FileNotFoundError as error:
    raise ValueError(f'eval.reference={path} is not there; {ADM}') from error
  except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
    raise ValueError(f'eval.reference={path} cannot be read: {error}; {REMEDY}') from error
  found = {kind: _gaussian(path, stored, kind, widths[kind]) for kind in NAMES}
  if not has_images and not found['pool']:
    raise ValueError(f'eval.reference={path} holds {sorted(stored)}; {REMEDY}')
  if not isinstance(made, dict):
    raise ValueError(f'eval.reference={path}: its protocol is {made}, expected {{...}}; {REMEDY}')
  features = stored.get('pool')
  if features is not None:
    _expect(path, 'pool', features, (max(features.size // widths['pool'], FEWEST), widths['pool']))
  protocol = {'file': pathlib.Path(path).name, 'sha256': hashes.file_sha256(path), **made}
  return Reference(found['pool'], found['spatial'], features, has_images, protocol)


def _gaussian(path, stored, kind, width):
  """Returns mean and covariance under one of their names, or None."""
  for mean, covariance in NAMES[kind]:
    if mean in stored and covariance in stored:
      _expect(path, mean, stored[mean], (width,))
      _expect(path, covariance, stored[covariance], (width, width))
      return Gaussian(
        np.asarray(stored[mean], np.float64), np.asarray(stored[covariance], np.float64)
      )
  return None


def _expect(path, name, array, shape):
  """Refuses an array of another shape, or with numbers that are none."""
  if array.shape != shape or array.dtype.kind != 'f':
    raise ValueError(
      f'eval.reference={path}: {name} is {array.dtype}{list(array.shape)}, expected floating point'
      f' {list(shape)}; use statistics of the same features'
    )
  if not np.isfinite(array).all():
    raise ValueError(
      f'eval.reference={path}: {np.sum(~np.isfinite(array))} numbers of {name} are not finite;'
      ' fetch or make it again'
    )


def of(activations, protocol=None):
  """Returns the Reference that the activations of real images are."""
  return Reference(
    *(Gaussian(m.mean, moments.covariance(m)) for m in (activations.pool, activations.spatial)),
    activations.features, False, protocol or {},
  )


def every(count):
  """Returns n, where the features of every n-th of `count` images are at most MOST_FEATURES."""
  return -(-count // MOST_FEATURES)


def write(path, activations, protocol):
  """Writes statistics as `read` reads them.

  Args:
    path: `.npz`; refused if it is there.
    activations: of all images; its features are those to keep.
    protocol: {name: plain value}, how they were made.

  Raises:
    ValueError: if there is such a file.
  """
  path = pathlib.Path(path)
  expect_absent(path)
  known = of(activations)
  with files.replacing(path) as file:
    np.savez(
      file, mu=known.pool.mean, sigma=known.pool.covariance, mu_s=known.spatial.mean,
      sigma_s=known.spatial.covariance, pool=known.features, protocol=json.dumps(protocol),
    )


def expect_absent(path):
  """Refuses to write where a file is already, and a name that numpy would change."""
  if pathlib.Path(path).suffix != '.npz':
    raise ValueError(f'--make_reference={path} must end in .npz')
  if os.path.lexists(path):
    raise ValueError(f'--make_reference={path} is there already and stays; name another file')

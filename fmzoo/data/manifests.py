"""The stored latent format: VAE moments of many images in ArrayRecord shards, and a manifest.

A folder holds `manifest.json` (`Manifest`) and the shards `latents-00000-of-00004.array_record`. A
record is, little-endian and without a header: the moments [H, W, 2 C] of an image, C mean channels
and then C standard deviations, unscaled; where `mirrored`, those of its mirror image; the patch
features [N, F] of a frozen encoder, if there are any; the image [h, w, 3] itself in bytes, if it is
kept; the label as int32.
"""

import dataclasses
import json
import math
import os
import pathlib
import re

import numpy as np

from fmzoo import paths
from fmzoo.data import buckets

VERSION = 3
DTYPES = {'float16': np.dtype('<f2'), 'float32': np.dtype('<f4')}
PARTIAL = 'partial'  # folder of a manifest's beginnings, see data/shards.py


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
  """What manifest.json holds; written last, so a folder with one is complete."""

  version: int  # of this format
  count: int  # rows in all shards
  shards: list  # {'name', 'count' (rows), 'bytes', 'sha256', 'first' (sha256 of its first record)}
  latent_shape: list  # [H, W, C]
  layout: str  # order of a latent's axes; 'HWC'
  dtype: str  # of the stored moments and features, 'float16' or 'float32'
  mirrored: bool  # moments of the mirror image follow those of the image
  num_classes: int  # labels are 0 .. num_classes - 1
  classes: list  # their names in that order; [] where they have none
  vae: str  # name of the VAE that made the moments
  vae_hash: str  # of its encoder's weights, convert.vae.encoder_hash; '' where nobody knows
  vae_dtype: str  # of its products, 'float32' or 'bfloat16'; '' where nobody knows
  scale: float  # latent = scale times a draw from the moments
  crop: str  # how images were cut before encoding
  encoder: str  # name of the frozen encoder that made the features; '' where none are stored
  feature_shape: list  # [N, F], patch tokens and their width; [] where none are stored
  image_shape: list  # [h, w, 3] of the stored images, uint8; [] where none are stored
  source: str  # what identifies the rows that it was made of; '' where nothing does
  unreadable: list  # names of images of the source that could not be read, and are left out


def record_dtype(manifest):
  """Returns the layout of a record as a packed structured dtype, its fields in their order."""
  height, width, channels = manifest.latent_shape
  number = DTYPES[manifest.dtype]
  moments = (height, width, 2 * channels)
  fields = [('moments', number, (2, *moments) if manifest.mirrored else moments)]
  if manifest.feature_shape:
    fields.append(('feature', number, tuple(manifest.feature_shape)))
  if manifest.image_shape:
    fields.append(('image', np.uint8, tuple(manifest.image_shape)))
  return np.dtype([*fields, ('label', '<i4')])


def read(path):
  """Returns the Manifest of a folder.

  Raises:
    ValueError: one line, if there is none, or it cannot be used.
  """
  text, problem = _manifest_text(path)
  if text is None:
    raise ValueError(
      f'data.path={path} {problem}; expected latents (manifest.json and ArrayRecord shards): make'
      " them with `prepare --from=PICTURES`, as section 'Data' of README.md shows, or set data.path"
    )
  try:
    values = json.loads(text)
    if values['version'] != VERSION:
      raise ValueError(f'version {values["version"]}, this fmzoo reads version {VERSION}')
    manifest = Manifest(**values)
    check(manifest)
    if sum(shard['count'] for shard in manifest.shards) != manifest.count:
      raise ValueError(f'count {manifest.count}, but its shards have another sum')
    if not manifest.count:
      raise ValueError('count 0, expected at least one row')
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise ValueError(
      f'data.path={path}: manifest.json cannot be used: {one_line(error)}; write the latents again'
    ) from error
  return manifest


def _manifest_text(path):
  """Returns (bytes of the manifest or None, what is wrong if there is none)."""
  if paths.is_bucket(path):
    return buckets.read(os.path.join(path, 'manifest.json')), 'holds no manifest.json'
  paths.expect_local('data.path', path)
  file = pathlib.Path(path) / 'manifest.json'
  if file.is_file():
    return file.read_bytes(), ''
  problem = 'holds no manifest.json' if file.parent.is_dir() else 'is not a folder'
  if (file.parent / PARTIAL).is_dir():
    problem += ': `prepare` did not finish there, the same command goes on'
  return None, problem


def _is_list(value, is_item):
  """Says whether a value is a list of such items."""
  return isinstance(value, list) and all(map(is_item, value))


def _is_text(value):
  """Says whether a value is a string."""
  return isinstance(value, str)


def _is_count(value):
  """Says whether a value is an integer above 0; True is none."""
  return type(value) is int and value > 0


def _is_file_name(value):
  """Says whether a value names a file of the folder; with a slash it could be one elsewhere."""
  plain = _is_text(value) and value == os.path.basename(value) and value.isprintable()
  return plain and value not in ('', '.', '..')


# A manifest may be of any hand. Kinds of values: (words, test, names of such fields).
SHARD_KINDS = (
  ('a file name without a folder', _is_file_name, ('name',)),
  ('a positive integer', _is_count, ('count', 'bytes')),
  ('64 hexadecimal digits', lambda value: _is_text(value) and re.fullmatch('[0-9a-f]{64}', value),
   ('sha256', 'first')),
)
KINDS = (
  ('a positive integer', _is_count, ('version', 'num_classes')),
  ('an integer, 0 or more', lambda value: value == 0 and type(value) is int or _is_count(value),
   ('count',)),
  ('a list of positive integers', lambda value: _is_list(value, _is_count),
   ('latent_shape', 'feature_shape', 'image_shape')),
  ('a string', _is_text, ('layout', 'dtype', 'vae', 'vae_hash', 'vae_dtype', 'crop', 'encoder',
                          'source')),
  ('a list of strings', lambda value: _is_list(value, _is_text), ('classes', 'unreadable')),
  ('true or false', lambda value: isinstance(value, bool), ('mirrored',)),
  ('a finite number above 0',
   lambda value: type(value) in (int, float) and 0 < value < math.inf, ('scale',)),
  ('a list of shards, objects', lambda value: _is_list(value, lambda item: isinstance(item, dict)),
   ('shards',)),
)


def _check_kinds(values, kinds, where):
  """Refuses {name: value} with other names than those of `kinds`, or values of another kind."""
  expected = [name for _, _, names in kinds for name in names]
  if values.keys() != set(expected):
    raise ValueError(
      f'{where}has {", ".join(sorted(values)) or "nothing"}; expected {", ".join(expected)}'
    )
  for words, fits, names in kinds:
    for name in names:
      if not fits(values[name]):
        raise ValueError(f'{where}{name} {repr(values[name])[:100]}, expected {words}')


def check(manifest):
  """Refuses a Manifest with fields of another kind, or which do not fit each other.

  Raises:
    ValueError: names the field and what is expected.
  """
  _check_kinds(vars(manifest), KINDS, '')
  for index, shard in enumerate(manifest.shards):
    _check_kinds(shard, SHARD_KINDS, f'shard {index}: ')
  if manifest.layout != 'HWC' or manifest.dtype not in DTYPES:
    raise ValueError(
      f'layout {manifest.layout!r}, dtype {manifest.dtype!r}; expected HWC,'
      f' {" or ".join(DTYPES)}'
    )
  if len(manifest.latent_shape) != 3:
    raise ValueError(f'latent_shape {manifest.latent_shape}, expected [H, W, C]')
  if bool(manifest.encoder) != bool(manifest.feature_shape):
    raise ValueError(
      f'encoder={manifest.encoder!r}, feature_shape={manifest.feature_shape}: expected both or'
      ' neither'
    )
  if len(manifest.feature_shape) not in (0, 2):
    raise ValueError(f'feature_shape {manifest.feature_shape}, expected [N, F]')
  if manifest.image_shape and (len(manifest.image_shape) != 3 or manifest.image_shape[2] != 3):
    raise ValueError(f'image_shape {manifest.image_shape}, expected [h, w, 3]')
  if manifest.classes and len(manifest.classes) != manifest.num_classes:
    raise ValueError(
      f'{len(manifest.classes)} names in classes, expected num_classes={manifest.num_classes}'
    )
  record_dtype(manifest)  # which numpy refuses where a record would be larger than it can be


def one_line(error):
  """Returns the words of an error, without line breaks and not endless."""
  return ' '.join(str(error).split())[:300]

"""Arrays to pictures on disk; a file is there complete or not at all."""

import math
import pathlib

import numpy as np

from fmzoo import files

TILE = 64  # least side of a picture in a grid, in pixels
GAP = 2  # between pictures of a grid, in pixels
GREY = 96  # of the gaps; neither the black nor the white of digits


def to_uint8(x):
  """Rounds [-1, 1] to 0 .. 255: clip(127.5 x + 128, 0, 255), then the fraction is cut off.

  That is the nearest integer to 127.5 (x + 1), halves upwards. A nan becomes 0.

  Args:
    x: float array.

  Returns:
    uint8 array of the same shape.
  """
  x = np.nan_to_num(np.clip(np.asarray(x, np.float32), -1, 1), nan=-1.0)
  return (127.5 * x + 128).astype(np.uint8)


def colour_span(latents):
  """Returns the 2nd and the 98th percentile of the first three channels, float [2, <= 3].

  Args:
    latents: [B, H, W, C] float.
  """
  return np.percentile(_first_channels(latents), (2, 98), axis=(0, 1, 2))


def false_colour(latents, span=None):
  """Shows the first three channels of latents as red, green and blue.

  A channel that is flat or missing is grey.

  Args:
    latents: [B, H, W, C] float.
    span: what becomes 0 and 255 in each channel, as `colour_span` returns it; None is that of
      these latents.

  Returns:
    [B, H, W, 3] uint8.
  """
  low, high = colour_span(latents) if span is None else span
  latents = _first_channels(latents)
  scaled = 2 * (latents - low) / np.where(high > low, high - low, 1) - 1
  scaled = np.where(high > low, scaled, 0.0)
  return to_uint8(np.pad(scaled, [(0, 0)] * 3 + [(0, 3 - scaled.shape[-1])]))


def _first_channels(latents):
  """Returns [B, H, W, <= 3] float32, what is not finite being 0."""
  return np.nan_to_num(np.asarray(latents, np.float32)[..., :3], posinf=0.0, neginf=0.0)


def viewable(x, span=None):
  """Turns what a model made into pictures: grey or RGB as they are, latents in false colours.

  Args:
    x: [B, H, W, C] float, in [-1, 1] where C is 1 or 3; or what `pixels` made of it.
    span: of the colours, see `false_colour`.

  Returns:
    [B, H, W, 1 or 3] uint8.
  """
  x = pixels(x)
  return x if x.dtype == np.uint8 else false_colour(x, span)


def pixels(x):
  """Turns grey or RGB images in [-1, 1] into uint8, a quarter of the memory; latents stay."""
  return to_uint8(x) if x.shape[-1] in (1, 3) and x.dtype != np.uint8 else x


def grid(images, columns, scale=None):
  """Lays pictures out in rows, with thin lines between them.

  Args:
    images: [B, H, W, 1 or 3] uint8.
    columns: pictures in a row.
    scale: each pixel becomes scale x scale; None makes the shorter side at least 64 pixels.

  Returns:
    [H', W', 1 or 3] uint8.
  """
  _check(images)
  if columns < 1:
    raise ValueError(f'columns={columns} must be at least 1')
  count, height, width, channels = images.shape
  scale = scale or math.ceil(TILE / min(height, width))
  tiles = images.repeat(scale, axis=1).repeat(scale, axis=2)
  step_down, step_right = height * scale + GAP, width * scale + GAP
  columns = min(columns, count)
  rows = math.ceil(count / columns)
  canvas = np.full([rows * step_down + GAP, columns * step_right + GAP, channels], GREY, np.uint8)
  for index, tile in enumerate(tiles):
    row, column = divmod(index, columns)
    top, left = GAP + row * step_down, GAP + column * step_right
    canvas[top : top + height * scale, left : left + width * scale] = tile
  return canvas


def save_grid(path, images, columns, scale=None):
  """Writes the `grid` of pictures [B, H, W, 1 or 3] uint8 as a PNG."""
  _save_png(path, grid(images, columns, scale))


def save_folder(folder, images, *, first=0, count=0):
  """Writes pictures as 00000.png, 00001.png, ... unscaled; those that are there stay.

  Args:
    folder: is made if missing.
    images: [B, H, W, 1 or 3] uint8.
    first: number of the first of them.
    count: of all pictures of the folder; beyond 100,000 the names have six digits and more.
  """
  _check(images)
  digits = max(5, len(str(count - 1)))
  for index, image in enumerate(images, first):
    path = pathlib.Path(folder) / f'{index:0{digits}d}.png'
    if not path.exists():
      _save_png(path, image)


def _check(images):
  shown = images.ndim == 4 and len(images) and images.shape[-1] in (1, 3)
  if images.dtype != np.uint8 or not shown:
    raise ValueError(
      f'pictures are [B, H, W, 1 or 3] uint8 with B of at least 1, found {images.shape}'
      f' {images.dtype}'
    )


def _save_png(path, image):
  """Writes [H, W, 1 or 3] uint8."""
  from PIL import Image

  with files.replacing(path) as file:
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format='PNG')

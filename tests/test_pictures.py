"""Pictures have the right pixels, the right size, and are on disk whole or not at all."""

import numpy as np
import pytest
from PIL import Image

from fmzoo import pictures


def random_images(count, height=8, width=8, channels=1):
  shape = (count, height, width, channels)
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_to_uint8_maps_the_ends_and_clips():
  x = np.array([-2, -1, 0, 1, 2], np.float32)
  np.testing.assert_array_equal(pictures.to_uint8(x), [0, 0, 128, 255, 255])
  assert pictures.to_uint8(x).dtype == np.uint8


def test_to_uint8_rounds_to_the_nearest_level():
  levels = np.arange(256)
  for shift in (-0.45, 0, 0.45):
    x = (levels + shift) / 127.5 - 1
    np.testing.assert_array_equal(pictures.to_uint8(x), levels)


def test_to_uint8_shows_what_is_not_finite():
  x = np.array([np.nan, np.inf, -np.inf])
  with np.errstate(all='raise'):
    np.testing.assert_array_equal(pictures.to_uint8(x), [0, 255, 0])


@pytest.mark.parametrize('channels', [2, 4, 16])
def test_false_colour_spreads_each_channel_over_the_whole_range(channels):
  latents = np.random.default_rng(0).standard_normal((5, 8, 8, channels))
  latents = latents * np.arange(1, channels + 1) * 100 - 50
  shown = pictures.false_colour(latents)
  assert shown.shape == (5, 8, 8, 3) and shown.dtype == np.uint8
  for channel in range(min(channels, 3)):
    assert shown[..., channel].min() == 0 and shown[..., channel].max() == 255
    assert 100 < shown[..., channel].mean() < 155
  order = latents[..., 0].ravel().argsort()
  assert (np.diff(shown[..., 0].ravel()[order].astype(int)) >= 0).all()


def test_false_colour_ignores_an_outlier_and_shows_flat_channels_grey():
  latents = np.random.default_rng(0).uniform(0, 1, (4, 8, 8, 2))
  latents[0, 0, 0, 0] = 1e6
  latents[..., 1] = 7.0
  shown = pictures.false_colour(latents)
  assert 100 < shown[..., 0].mean() < 155
  assert (shown[..., 1:] == 128).all()


def test_viewable_keeps_pictures_and_colours_latents():
  x = np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 4)).astype(np.float32)
  np.testing.assert_array_equal(pictures.viewable(x[..., :1]), pictures.to_uint8(x[..., :1]))
  np.testing.assert_array_equal(pictures.viewable(x[..., :3]), pictures.to_uint8(x[..., :3]))
  np.testing.assert_array_equal(pictures.viewable(x), pictures.false_colour(x))


def test_pixels_are_made_once_and_latents_stay():
  x = np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 4)).astype(np.float32)
  assert pictures.pixels(x) is x
  once = pictures.pixels(x[..., :3])
  np.testing.assert_array_equal(once, pictures.to_uint8(x[..., :3]))
  assert pictures.pixels(once) is once and pictures.viewable(once) is once


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('scale', [1, 3])
def test_grid_places_every_picture_row_by_row(channels, scale):
  images = random_images(5, 4, 6, channels)
  sheet = pictures.grid(images, 3, scale)
  gap, down, right = pictures.GAP, 4 * scale + pictures.GAP, 6 * scale + pictures.GAP
  assert sheet.shape == (2 * down + gap, 3 * right + gap, channels) and sheet.dtype == np.uint8
  covered = np.zeros(sheet.shape, bool)
  for index, image in enumerate(images):
    top, left = gap + index // 3 * down, gap + index % 3 * right
    where = np.s_[top : top + 4 * scale, left : left + 6 * scale]
    np.testing.assert_array_equal(sheet[where], image.repeat(scale, 0).repeat(scale, 1))
    covered[where] = True
  assert (sheet[~covered] == pictures.GREY).all()


@pytest.mark.parametrize('side,shown', [(8, 64), (32, 64), (48, 96), (64, 64), (256, 256)])
def test_grid_makes_small_pictures_visible(side, shown):
  sheet = pictures.grid(random_images(1, side, side), 10)
  assert sheet.shape == (shown + 2 * pictures.GAP, shown + 2 * pictures.GAP, 1)


@pytest.mark.parametrize('channels,mode', [(1, 'L'), (3, 'RGB')])
def test_saved_grid_is_the_grid(tmp_path, channels, mode):
  images = random_images(5, channels=channels)
  path = tmp_path / 'deep' / 'guidance=1.5_grid.png'
  pictures.save_grid(path, images, 2)
  with Image.open(path) as image:
    assert (image.format, image.mode) == ('PNG', mode)
    pixels = np.asarray(image).reshape(image.height, image.width, channels)
  np.testing.assert_array_equal(pixels, pictures.grid(images, 2))
  assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_saved_folder_has_a_picture_each(tmp_path):
  images = random_images(3, 4, 5, 3)
  pictures.save_folder(tmp_path / 'all', images)
  files = sorted((tmp_path / 'all').iterdir())
  assert [file.name for file in files] == ['00000.png', '00001.png', '00002.png']
  for file, image in zip(files, images):
    with Image.open(file) as saved:
      np.testing.assert_array_equal(np.asarray(saved), image)


def test_a_folder_is_filled_in_parts_and_what_is_there_stays(tmp_path):
  images = random_images(4)
  pictures.save_folder(tmp_path, images[2:], first=99_998, count=100_001)
  assert [file.name for file in sorted(tmp_path.iterdir())] == ['099998.png', '099999.png']
  before = (tmp_path / '099998.png').read_bytes()
  pictures.save_folder(tmp_path, images[:3], first=99_998, count=100_001)
  assert (tmp_path / '099998.png').read_bytes() == before
  with Image.open(tmp_path / '100000.png') as saved:
    np.testing.assert_array_equal(np.asarray(saved), images[2, :, :, 0])


def test_one_span_of_colours_serves_parts():
  latents = np.random.default_rng(0).standard_normal((6, 8, 8, 4)).astype(np.float32)
  latents[3:] *= 3
  span = pictures.colour_span(latents)
  parts = [pictures.viewable(part, span) for part in (latents[:3], latents[3:])]
  np.testing.assert_array_equal(np.concatenate(parts), pictures.false_colour(latents))


@pytest.mark.parametrize('images,columns,words', [
  (np.zeros((2, 8, 8, 1), np.float32), 1, 'float32'),
  (np.zeros((0, 8, 8, 1), np.uint8), 1, 'at least 1'),
  (np.zeros((2, 8, 8, 4), np.uint8), 1, r'\(2, 8, 8, 4\)'),
  (np.zeros((2, 8, 8), np.uint8), 1, r'\(2, 8, 8\)'),
  (np.zeros((2, 8, 8, 1), np.uint8), 0, 'columns=0'),
])
def test_what_is_no_picture_is_refused(images, columns, words):
  with pytest.raises(ValueError, match=words):
    pictures.grid(images, columns)

"""Augmentation against numbers recorded from the official code (tests/golden/soflow/README.md)."""

import jax
import numpy as np
import pytest

from fmzoo import augment
from tests import golden_files as files

PICTURES, NUMBERS = 1e-4, 1e-5  # limits of the README there, absolute
INFORMATIONAL = 'pad_x0x1y0y1'  # what the official code chose; ours is W - 1 always


@pytest.fixture(scope='module', params=['golden_root', 'written_root'])
def golden(request):
  """(config, arrays) of the folder, and of one of the reference's."""
  folder = request.getfixturevalue(request.param) / 'soflow'
  return files.config(folder), files.Arrays(folder / 'io.npz')


def cases(golden):
  """Yields (prefix, probability) of the cases, each of which config.json must describe."""
  config, arrays = golden
  probability = {case['pre']: case['p'] for case in config['aug']}
  found = {name.rpartition('.')[0] for name in arrays.names('aug.')}
  assert found and found == set(probability)
  yield from sorted(probability.items())


def draws_of(arrays, prefix, probability):
  """Returns the recorded random numbers of a case as Draws."""
  draws = {
    key: arrays[f'{prefix}.draw_{key}']
    for key in ('scale_n', 'scale_u', 'aniso_n', 'aniso_u', 'aniso_angle_u', 'aniso_rot_u')
  }
  is_applied = arrays[f'{prefix}.draw_xflip_u'] < 1e8 * probability  # always, as it seems
  return augment.Draws(
    flip=(is_applied & (arrays[f'{prefix}.draw_xflip_bit'] > 0)).reshape(-1),
    scale=draws['scale_n'], scale_uniform=draws['scale_u'],
    stretch=draws['aniso_n'], stretch_uniform=draws['aniso_u'],
    shift=arrays[f'{prefix}.draw_trans_n'].T,
    shift_uniform=arrays[f'{prefix}.draw_trans_u'].reshape(-1),
    angle_uniform=draws['aniso_angle_u'], rotate_uniform=draws['aniso_rot_u'],
  )


def test_pictures_and_labels(golden):
  _, arrays = golden
  for prefix, probability in cases(golden):
    draws = draws_of(arrays, prefix, probability)
    images = files.channels_last(arrays[f'{prefix}.images'])
    out, labels = jax.jit(augment.augment)(images, draws, probability)
    for value, name, limit in (
      (files.channels_first(out), 'out', PICTURES), (labels, 'labels', NUMBERS),
    ):
      expected = arrays[f'{prefix}.{name}']
      assert value.shape == expected.shape and value.dtype == np.float32
      np.testing.assert_allclose(value, expected, rtol=0, atol=limit, err_msg=f'{prefix}.{name}')


def test_matrices(golden):
  _, arrays = golden
  for prefix, probability in cases(golden):
    warp = augment.warp_of(draws_of(arrays, prefix, probability), probability)
    matrix = augment.inverse_matrix(warp, arrays[f'{prefix}.images'].shape[-1])
    np.testing.assert_allclose(
      matrix, arrays[f'{prefix}.G_inv'], rtol=0, atol=NUMBERS, err_msg=prefix
    )


def test_every_array_is_an_input_or_was_checked(golden):
  """Runs after the tests above in this file, which mark what they look at."""
  config, arrays = golden
  left = [
    name for name in arrays.unused() if name.startswith('aug.')
    and name not in config['input_keys'] and not name.endswith(f'.{INFORMATIONAL}')
  ]
  assert not left

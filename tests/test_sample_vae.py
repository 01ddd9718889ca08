"""Latents become images where `data.vae` names a decoder, and stay latents where none is."""

import contextlib
import pathlib
import re
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from fmzoo import main, pictures, sample, sources, train
from fmzoo import sampler as samplers
from fmzoo.convert import vae as official
from fmzoo.convert import weights
from fmzoo.data import shards
from fmzoo.models import vae
from fmzoo.parallel import mesh as meshes
from tests import tiny

SCALE = 0.18215
SIDE, CHANNELS, COUNT = 8, 4, 11
ROOT = pathlib.Path(__file__).parent.parent


def tiny_recipe(folder, **changes):
  """Returns SoFlow on latents of a folder, one device."""
  return tiny.recipe('soflow', **{
    'mesh__data': 1, 'data__name': 'latents', 'data__path': str(folder / 'latents'),
    'data__channels': CHANNELS, 'data__latent_scale': SCALE, 'data__num_threads': 0,
    'data__batch_size': 8, 'run__steps': 2, 'sample__num_images': COUNT, 'sample__batch_size': 4,
    **changes,
  })


@pytest.fixture(scope='module')
def small():
  """The tiny autoencoder in place of the official one."""
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(vae, 'SD_VAE', tiny.VAE)
    yield


@pytest.fixture(scope='module')
def folder(small, tmp_path_factory):
  """A folder with stored latents, an autoencoder's file and a run trained with previews."""
  folder = tmp_path_factory.mktemp('vae')
  rng = np.random.default_rng(0)
  moments = np.abs(rng.standard_normal((8, SIDE, SIDE, 2 * CHANNELS)))
  shards.write_latents(
    folder / 'latents', ({'moments': m, 'label': i} for i, m in enumerate(moments)),
    latent_shape=(SIDE, SIDE, CHANNELS), num_classes=10, vae='toy', vae_hash='', scale=SCALE,
    crop='none',
  )
  weights.save(folder / 'vae.safetensors', official.to_official(tiny.random_vae(), tiny.VAE))
  recipe = tiny_recipe(
    folder, data__vae=str(folder / 'vae.safetensors'), log__preview_every_steps=2,
    log__log_every_steps=1, sample__batch_size=100,
  )
  train.train(recipe, folder / 'run')
  return folder


def by_hand(latent):
  """Returns the uint8 images of latents, all of them decoded at once."""
  net = vae.make(tiny.VAE)
  return pictures.to_uint8(jax.jit(net.decode)(tiny.random_vae(), latent / np.float32(SCALE)))


def expect_equal(found, expected):
  """Compares uint8 images, of which rounding may have moved a pixel in a thousand by one."""
  assert found.shape == expected.shape and found.dtype == expected.dtype == np.uint8
  difference = np.abs(found.astype(int) - expected)
  assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
  assert expected.std() > 20, 'a flat picture shows nothing'


def run_sample(folder, *words):
  """Runs `fmzoo sample` in this process; returns the arrays of the new `.npz` and its path."""
  samples, workdir = folder / 'run' / 'samples', f'--workdir={folder / "run"}'
  before = set(samples.glob('*.npz'))
  with pytest.MonkeyPatch.context() as monkeypatch, contextlib.chdir(ROOT):
    monkeypatch.setattr(sys, 'argv', [
      'fmzoo', 'sample', workdir, f'--config.sample.num_images={COUNT}',
      '--config.sample.batch_size=4', *words,
    ])
    assert main.cli() == 0
  path, = set(samples.glob('*.npz')) - before
  with np.load(path) as arrays:
    return dict(arrays), path


def test_sample_writes_decoded_images_beside_latents(folder, monkeypatch):
  """Those of the command line equal its latents, divided by the scale and decoded by hand."""
  warnings = []
  monkeypatch.setattr(sample.logging, 'warning', lambda text, *args: warnings.append(text % args))
  plain, path = run_sample(folder, '--config.data.vae=')
  assert set(plain) == {'latents', 'labels'}
  assert plain['latents'].shape == (COUNT, SIDE, SIDE, CHANNELS)
  told, = warnings
  assert re.match(r'11 latents of step 2, no images yet: .*0\.18215.*--config.data.vae=', told)
  images, image_path = run_sample(folder, '--config.sample.png_folder=True')
  assert path != image_path and path.exists() and len(warnings) == 1
  assert set(images) == {'arr_0', 'labels'}
  assert images['arr_0'].shape == (COUNT, 2 * SIDE, 2 * SIDE, 3)
  expect_equal(images['arr_0'], by_hand(plain['latents']))
  np.testing.assert_array_equal(images['labels'], plain['labels'])
  grid = np.asarray(Image.open(image_path.with_suffix('.png')))
  np.testing.assert_array_equal(grid, pictures.grid(images['arr_0'], samplers.PREVIEW_COLUMNS))
  last = np.asarray(Image.open(image_path.with_suffix('') / f'{COUNT - 1:05d}.png'))
  np.testing.assert_array_equal(last, images['arr_0'][-1])


def test_previews_of_training_are_decoded(folder):
  recipe = tiny_recipe(folder, sample__batch_size=100)
  mesh = meshes.make(recipe.mesh)
  params, _ = sample.load_params(recipe, mesh, folder / 'run')
  labels = np.arange(100, dtype=np.int32) // 10
  images = by_hand(samplers.Sampler(recipe, mesh)(params, labels, recipe.sample.seed))
  shown = np.asarray(Image.open(folder / 'run' / 'samples' / 'step_0000002.png'))
  expect_equal(shown, pictures.grid(images, samplers.PREVIEW_COLUMNS))


def test_latents_are_decoded_a_few_at_a_time_on_every_device(folder, monkeypatch):
  """Never more rows than a device has room for; a group of the last ones is filled up."""
  monkeypatch.setattr(samplers, 'DECODED_ROWS', 3)
  recipe = tiny_recipe(folder, data__vae=str(folder / 'vae.safetensors'))
  latent = SCALE * np.random.default_rng(1).standard_normal((16, SIDE, SIDE, CHANNELS))
  latent = latent.astype(np.float32)
  expected, decode, seen = by_hand(latent), sources.autoencoder(recipe.data).decode, []

  def noted(params, rows):
    """Decodes, and keeps how many rows were asked for."""
    seen.append(len(rows))
    return decode(params, rows)

  monkeypatch.setattr(
    sources, 'autoencoder', lambda data: vae.make(tiny.VAE)._replace(decode=noted)
  )
  for devices, rows in ((1, 3), (2, 3), (8, 2)):
    seen.clear()
    decoder = samplers.Decoder(recipe, tiny.mesh(devices))
    expect_equal(pictures.to_uint8(decoder(latent)), expected)
    assert set(seen) == {rows}
    assert set(decoder.params) == {'decoder'}, 'the encoder takes memory for nothing'


@pytest.mark.parametrize('name,message', [
  ('missing.safetensors', r'data.vae: \S*missing.safetensors cannot be read as safetensors'),
  ('other.safetensors', r'data.vae: \S*other.safetensors: holds 0 of the 124 tensors'),
])
def test_a_wrong_file_stops_a_run_before_anything_is_written(folder, tmp_path, name, message):
  weights.save(tmp_path / 'other.safetensors', {'x': np.zeros(1, np.float32)})
  recipe = tiny_recipe(folder, data__vae=str(tmp_path / name))
  for command in (train.train, sample.sample):
    with pytest.raises(ValueError, match=message):
      command(recipe, tmp_path / 'run')
  assert not list((tmp_path / 'run').rglob('*.json'))


@pytest.mark.parametrize('changes,words', [
  ({'data__name': 'digits'}, "data.name='digits', data.channels=4"),
  ({'data__channels': 3}, "data.name='latents', data.channels=3"),
])
def test_a_decoder_of_other_data_is_refused(small, tmp_path, changes, words):
  with pytest.raises(ValueError) as error:
    tiny_recipe(tmp_path, data__vae='x.safetensors', **changes)
  assert str(error.value) == (
    f"data.vae='x.safetensors' decodes latents of 4 channels, not {words}; set data.vae=''"
  )

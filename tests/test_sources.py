"""A recipe gets rows that fit it, and features of its stored images; all else is one line."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from fmzoo import sample, sources, train
from fmzoo.convert import dinov2 as official_dinov2
from fmzoo.convert import vae as official_vae
from fmzoo.convert import weights
from fmzoo.data import prepare, shards
from fmzoo.models import dinov2, vae
from tests import tiny

SIDE, CLASSES, COUNT = 8, 3, 12  # of the pictures, twice that of their latents
TOKENS = 4  # of latents in patches of 2


@pytest.fixture(scope='module', autouse=True)
def small():
  """The tiny autoencoder and the tiny DINOv2 in place of the official ones."""
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(vae, 'SD_VAE', tiny.VAE)
    monkeypatch.setitem(
      dinov2.SIZES, tiny.DINOV2.width, (tiny.DINOV2.depth, tiny.DINOV2.heads)
    )
    yield


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """A folder with the weights of both, and of another autoencoder and another decoder."""
  folder, params = tmp_path_factory.mktemp('weights'), tiny.random_vae()
  other = tiny.random_vae(seed=1)
  for name, tree in {
    'vae': params, 'decoder': params | {'decoder': other['decoder']},
    'other': params | {'encoder': other['encoder']},
  }.items():
    weights.save(folder / f'{name}.safetensors', official_vae.to_official(tree, tiny.VAE))
  weights.save(folder / 'dinov2.safetensors', official_dinov2.to_official(
    tiny.random_dinov2(), tiny.DINOV2, 'hub'
  ))
  return folder


def write(path, **changes):
  """Writes random latents, each with its picture."""
  rng = np.random.default_rng(0)
  settings = {
    'latent_shape': (SIDE // 2, SIDE // 2, 4), 'num_classes': CLASSES, 'scale': 0.18215,
    'vae': 'tiny', 'crop': 'none', 'image_shape': (SIDE, SIDE, 3),
    'vae_hash': official_vae.encoder_hash(tiny.random_vae()['encoder']), **changes,
  }
  shape = (2, SIDE // 2, SIDE // 2, 8) if settings.get('mirrored') else (SIDE // 2, SIDE // 2, 8)
  rows = []
  for i in range(COUNT):
    row = {'moments': np.abs(rng.standard_normal(shape)), 'label': i % CLASSES}
    if settings['image_shape']:
      row['image'] = rng.integers(0, 256, settings['image_shape'], np.uint8)
    if settings.get('feature_shape'):
      row['feature'] = rng.standard_normal(settings['feature_shape'])
    rows.append(row)
  shards.write_latents(path, rows, **settings)
  return path


def recipe(files, path, method='bfm', **changes):
  """Returns a recipe that aligns with features of the stored pictures."""
  settings = {
    'data__name': 'latents', 'data__path': str(path), 'data__latent_size': SIDE // 2,
    'data__channels': 4, 'data__latent_scale': 0.18215, 'data__num_classes': CLASSES,
    'data__vae': str(files / 'vae.safetensors'), 'mesh__data': 1, 'data__batch_size': 6,
  }
  if method == 'bfm':
    settings['model__feature_dim'] = tiny.DINOV2.width
    settings['data__encoder'] = str(files / 'dinov2.safetensors')
  return tiny.recipe(method, **settings | changes)


def test_features_are_those_of_the_pictures_and_their_mirror_images(files, tmp_path):
  """Computed on the device, of the very side whose moments became the latent."""
  made = recipe(files, write(tmp_path, mirrored=True), data__flip=True)
  rows = sources.open_rows(made)
  prepare, frozen = sources.inputs(made, rows, tmp_path)
  batch = rows.batch(np.arange(COUNT))
  out = jax.jit(prepare)(frozen, batch, jax.random.split(jax.random.key(0), COUNT))
  config, params = official_dinov2.load(made.data.encoder, (2, 2))
  net = dinov2.make(config)
  both = [
    net.features(params, dinov2.preprocess(pixels, 2 * dinov2.PATCH))
    for pixels in (batch['image'], batch['image'][:, :, ::-1])
  ]
  assert both[0].shape == (COUNT, TOKENS, tiny.DINOV2.width)
  which = [  # 0 where the row was left as it is
    min((0, 1), key=lambda side: np.abs(out['feature'][i] - both[side][i]).max())
    for i in range(COUNT)
  ]
  assert set(which) == {0, 1}
  expected = [both[side][i] for i, side in enumerate(which)]
  np.testing.assert_allclose(out['feature'], expected, rtol=1e-4, atol=1e-4)
  means, deviations = np.split(batch['moments'][np.arange(COUNT), which], 2, axis=-1)
  distance = np.abs(out['latent'] / 0.18215 - means) / (deviations + 0.01)
  assert distance.max() < 6, 'latents are of the other side'


def test_from_a_folder_of_photographs_to_samples(files, tmp_path):
  """Prepared, aligned with features, trained, sampled and decoded, as README has it."""
  tiny.write_pictures(tmp_path / 'photographs', CLASSES, 8, SIDE)
  made = recipe(
    files, tmp_path / 'latents', data__flip=True, run__steps=3, log__log_every_steps=1,
    sample__num_images=5, sample__batch_size=5,
  )
  manifest = prepare.prepare(made, str(tmp_path / 'photographs'), shard_rows=5)
  assert manifest.count == 24 and manifest.mirrored and manifest.image_shape == [SIDE, SIDE, 3]
  train.train(made, tmp_path / 'run')
  lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').open()]
  assert [line['step'] for line in lines] == [1, 2, 3]
  assert all(np.isfinite(line['loss']) and line['alignment/cosine'] != 0 for line in lines)
  assert all(0 <= line['data_wait'] < 1 for line in lines)
  path = sample.sample(made, tmp_path / 'run')
  with np.load(path) as arrays:
    assert arrays['arr_0'].shape == (5, SIDE, SIDE, 3) and arrays['arr_0'].dtype == np.uint8
    assert len(np.unique(arrays['arr_0'])) > 10
  assert Image.open(path.with_suffix('.png')).mode == 'RGB'


def test_pictures_stay_on_disk_where_nothing_needs_them(files, tmp_path):
  rows = sources.open_rows(recipe(files, write(tmp_path), method='fm'))
  assert sorted(rows.batch(np.array([0]))) == ['label', 'moments']


def test_another_decoder_of_the_same_encoder_fits(files, tmp_path):
  """Fine-tuned decoders leave the latents as they are."""
  vae_file = str(files / 'decoder.safetensors')
  assert len(sources.open_rows(recipe(files, write(tmp_path), data__vae=vae_file))) == COUNT


@pytest.mark.parametrize('stored,changes,words', [
  ({}, {'data__vae': 'OTHER'}, "other.safetensors has an encoder with hash .* made by 'tiny' with"),
  ({}, {'data__flip': True}, 'data.flip=True needs moments of mirror images, .* has none'),
  ({}, {'data__latent_scale': 1.0}, 'data.latent_scale=1.0 does not fit'),
  ({}, {'data__num_classes': 4}, 'data.num_classes=4 does not fit .*, which has 3'),
  ({}, {'data__latent_size': 8}, r'data.encoder=.* needs stored images of \(16, 16, 3\), .*\(8, 8'),
  ({}, {'data__latent_size': 8, 'method': 'fm'}, r'data.latent_size.*\(8, 8, 4\) does not fit'),
  ({'image_shape': ()}, {}, r'data.encoder=.* needs stored images of \(8, 8, 3\), .* has none'),
  ({}, {'data__encoder': ''}, "no features of a frozen encoder are stored there, method 'bfm'"),
  ({'feature_shape': (4, 32), 'encoder': 'x', 'mirrored': True},
   {'data__encoder': '', 'data__flip': True}, 'holds no features of mirror images'),
  ({'feature_shape': (9, 32), 'encoder': 'x'}, {'data__encoder': ''}, r'\(4, 32\) does not fit'),
])
def test_latents_that_do_not_fit_are_refused(files, tmp_path, stored, changes, words):
  if changes.get('data__vae'):
    changes = changes | {'data__vae': str(files / 'other.safetensors')}
  with pytest.raises(ValueError, match=words) as error:
    sources.open_rows(recipe(files, write(tmp_path, **stored), **changes))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('changes,words', [
  ({'model__feature_dim': 64}, 'gives features of width 32, not model.feature_dim=64; set it'),
  ({'data__encoder': 'none.safetensors'}, 'data.encoder: none.safetensors cannot be read'),
])
def test_an_encoder_that_does_not_fit_is_refused(files, tmp_path, changes, words):
  made = recipe(files, write(tmp_path), **changes)
  with pytest.raises(ValueError, match=words):
    sources.inputs(made, sources.open_rows(made), tmp_path)


def test_a_run_goes_on_with_the_encoder_that_it_began_with(files, tmp_path):
  made = recipe(files, write(tmp_path))
  rows = sources.open_rows(made)
  for _ in range(2):
    sources.inputs(made, rows, tmp_path)
  other = str(tmp_path / 'other.safetensors')
  weights.save(other, official_dinov2.to_official(
    tiny.random_dinov2(seed=1), tiny.DINOV2, 'hub'
  ))
  with pytest.raises(ValueError, match='other.safetensors has weights with checksum .*, the run'):
    sources.inputs(recipe(files, tmp_path, data__encoder=other), rows, tmp_path)


def test_latents_of_an_unknown_vae_are_taken_aloud(files, tmp_path, caplog):
  with caplog.at_level('WARNING', logger='absl'):
    sources.open_rows(recipe(files, write(tmp_path, vae_hash='')))
  assert "made by 'tiny', whose weights nobody recorded; data.vae=" in caplog.text


@pytest.mark.parametrize('method,changes,words', [
  ('bfm', {'data__name': 'cifar10'}, "data.name='cifar10' has no features of a frozen encoder"),
  ('fm', {'data__encoder': 'x'}, "data.encoder='x' is for data.name='latents' and a method that"),
  ('bfm', {'data__encoder': 'x', 'data__name': 'digits'}, "found data.name='digits'"),
  ('fm', {'data__flip': True, 'data__name': 'digits'}, 'data.flip=True mirrors digits'),
  ('fm', {'data__vae_dtype': 'float16'}, "data.vae_dtype='float16' is unknown; use one of float32"),
])
def test_keys_that_select_nothing_are_refused(method, changes, words):
  with pytest.raises(ValueError, match=words):
    tiny.recipe(method, **changes)


def test_the_autoencoder_has_the_dtype_asked_for(files, tmp_path):
  data = recipe(files, tmp_path).data
  params, latents = tiny.random_vae(), np.ones((1, 2, 2, 4), np.float32)
  exact, rounded = (
    jax.jit(sources.autoencoder(dataclasses.replace(data, vae_dtype=dtype)).decode)(params, latents)
    for dtype in ('float32', 'bfloat16')
  )
  assert 1e-4 < np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()

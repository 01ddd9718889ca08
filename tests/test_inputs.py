"""What the device does before the loss, the digits encoder, and the cost counter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmzoo import augment, build, cost, encoders, inputs, sources, step
from fmzoo.data import digits, latents, pipeline, shards
from fmzoo.methods import base
from tests import tiny


def test_moments_become_scaled_latents():
  """Mean and spread of many draws are those stored, times the scale."""
  moments = np.zeros((4000, 2, 2, 4), np.float32)
  moments[..., :2], moments[..., 2:] = 3.0, 0.5
  keys = jax.random.split(jax.random.key(0), 4000)
  latent = inputs.make(0.2)((), {'moments': moments}, keys)['latent']
  assert latent.shape == (4000, 2, 2, 2)
  np.testing.assert_allclose((latent.mean(), latent.std()), (0.6, 0.1), rtol=0.02)


def test_inputs_replace_moments_and_add_features():
  prepare = inputs.make(1.0, lambda frozen, batch: batch['latent'] * frozen)
  batch = {'moments': np.ones((3, 2, 2, 2), np.float32) * [5, 0], 'label': np.arange(3)}
  out = prepare(2.0, batch, jax.random.split(jax.random.key(0), 3))
  assert set(out) == {'latent', 'label', 'feature'}
  np.testing.assert_allclose(out['feature'], 10.0)
  assert 'moments' in batch, 'the caller keeps its batch'


def some_pixels(size):
  """Returns a batch of random pictures."""
  pixels = np.random.default_rng(0).integers(0, 256, (size, 8, 8, 3), np.uint8)
  return {'pixels': pixels, 'label': np.arange(size, dtype=np.int32)}


def test_pixels_become_latents_in_range():
  """255 steps from -1 to 1, both of them reached."""
  values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
  out = inputs.make(1.0)((), {'pixels': values}, jax.random.split(jax.random.key(0), 1))
  assert set(out) == {'latent'} and out['latent'].dtype == np.float32
  np.testing.assert_allclose(
    out['latent'].reshape(-1), np.linspace(-1, 1, 256), rtol=0, atol=1e-6
  )
  assert out['latent'].min() == -1 and out['latent'].max() == 1


def test_pixels_are_augmented_with_the_probability_and_their_own_keys():
  batch, keys = some_pixels(64), jax.random.split(jax.random.key(1), 64)
  recipe = tiny.recipe('fm')
  recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, augment=0.25))
  prepare, frozen = sources.inputs(recipe, None, None)
  out = jax.jit(prepare)(frozen, batch, keys)
  assert set(out) == {'latent', 'label', 'augment'}
  own_keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys)[:, 2]
  expected, labels = jax.jit(
    lambda pixels: augment.augment(inputs.from_pixels(pixels), augment.draw(own_keys), 0.25)
  )(batch['pixels'])
  np.testing.assert_allclose(out['latent'], expected, rtol=0, atol=1e-5)
  np.testing.assert_allclose(out['augment'], labels, rtol=0, atol=1e-6)
  assert 0.3 < np.mean(out['augment'][:, 0]) < 0.7  # flips
  assert 0.1 < np.mean(out['augment'][:, 1] != 0) < 0.4  # scales


def test_a_row_is_mirrored_as_a_whole_half_of_the_time():
  """Its moments, and the image that the encoder sees; the other half stays as it is."""
  rng, count = np.random.default_rng(0), 200
  moments = rng.standard_normal((count, 2, 4, 4, 2)).astype(np.float16)
  moments[..., 1] = 0  # no spread, so that latents are the means
  image = rng.integers(0, 256, (count, 6, 6, 3), np.uint8)
  batch = {'moments': moments, 'image': image, 'label': np.arange(count)}
  keys = jax.random.split(jax.random.key(3), count)
  prepare = inputs.make(2.0, lambda frozen, batch: batch['image'], flip=True)
  out = jax.jit(prepare)((), batch, keys)
  assert set(out) == {'latent', 'label', 'feature'}
  chosen = (out['latent'] == 2 * moments[:, 1, ..., :1].astype(np.float32)).all((1, 2, 3))
  assert 0.4 < chosen.mean() < 0.6
  sides = np.where(chosen, 1, 0)
  np.testing.assert_array_equal(
    out['latent'], 2 * moments[np.arange(count), sides, ..., :1].astype(np.float32)
  )
  np.testing.assert_array_equal(
    out['feature'], np.where(chosen[:, None, None, None], image[:, :, ::-1], image)
  )


def test_pixels_are_mirrored_half_of_the_time():
  batch, keys = some_pixels(64), jax.random.split(jax.random.key(1), 64)
  plain = inputs.make(1.0)((), batch, keys)['latent']
  out = inputs.make(1.0, flip=True)((), batch, keys)['latent']
  chosen = (abs(out - plain) > 1e-3).any((1, 2, 3))
  assert 0.3 < chosen.mean() < 0.7
  expected = np.where(chosen[:, None, None, None], plain[:, :, ::-1], plain)
  np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize('changes,message', [
  ({}, "augment=0.5 needs data.name='cifar10', model.name='unet' and model.augment_dim=6, found"),
  ({'data__name': 'cifar10'}, "found .*'data.name': 'cifar10', 'model.name': 'dit'.*; use 0"),
  ({'data__augment': 1.5}, 'data.augment=1.5 must be from 0 to 1'),
])
def test_augmentation_that_does_not_fit_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    tiny.recipe('fm', **{'data__augment': 0.5, **changes})


def test_only_augmentation_may_differ_from_the_run_one_starts_from():
  """Going on with a run under another augmentation is another run; starting from one is not."""
  recipe = tiny.recipe('fm')
  assert recipe.identity['data.augment'] == 0.0 and recipe.identity['data.flip'] is False
  assert not {'data.augment', 'data.flip'} & set(build.stage_identity(recipe))


def test_a_stored_feature_reaches_the_loss_unchanged(tmp_path):
  """From disk through pipeline and train step; the loss hands it back as a metric."""
  rng = np.random.default_rng(0)
  features = rng.standard_normal((6, 3, 5)).astype(np.float32)
  shards.write_latents(
    tmp_path, ({'moments': np.ones((2, 2, 2)), 'feature': f, 'label': 0} for f in features),
    latent_shape=(2, 2, 1), num_classes=1, vae='toy', vae_hash='', scale=1.0, crop='none',
    dtype='float32', encoder='toy', feature_shape=(3, 5),
  )
  batches = pipeline.batches(
    latents.LatentSource(tmp_path), batch_size=6, seed=0, shuffle=False, num_threads=0
  )
  method = base.Method(
    init=lambda rng: {'all': jnp.zeros(())}, trainable=lambda params: {'all': True}, sample=None,
    period=1, inputs=('latent', 'feature'),
    loss=lambda params, batch, rng, step: (params['all'], {'feature': batch['feature']}),
  )
  tx = optax.sgd(0.0)
  train_step = jax.jit(step.make(method, tx, inputs.make(1.0), ema_decay=0.9))
  _, metrics = train_step(step.init_state(method, tx, jax.random.key(0)), next(batches), ())
  assert metrics['feature'].dtype == np.float32
  np.testing.assert_array_equal(metrics['feature'], features)


def test_no_gradient_flows_into_the_encoder():
  keys = jax.random.split(jax.random.key(0), 1)

  def loss(frozen):
    prepare = inputs.make(1.0, lambda frozen, batch: batch['latent'] * frozen)
    return prepare(frozen, {'latent': jnp.ones((1, 2, 2, 1))}, keys)['feature'].sum()

  assert float(jax.grad(loss)(2.0)) == 0.0


@pytest.mark.usefixtures('optimised')
def test_digits_encoder_learns_and_is_kept(tmp_path):
  source = digits.DigitsSource()
  encode, params = encoders.digits(tmp_path, source, 10, 0)
  images, labels = source.arrays()
  features, logits = encoders.digits_encoder.apply(params, images)
  assert (np.argmax(logits, axis=-1) == labels).mean() > 0.99
  assert features.shape == (1797, 16, 64)
  batch = {'latent': images[:2]}
  np.testing.assert_allclose(encode(params, batch), features[:2], rtol=1e-5, atol=1e-5)
  _, again = encoders.digits(tmp_path, None, 10, 5)  # nothing is trained a second time
  jax.tree.map(np.testing.assert_array_equal, params, again)
  (tmp_path / 'encoder.npz').write_bytes(b'PK damaged')
  with pytest.raises(ValueError, match='encoder.npz is damaged.*remove it'):
    encoders.digits(tmp_path, source, 10, 0)


@pytest.mark.parametrize('function,flops', [
  (lambda x: x @ x, 2 * 8**3),
  (lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=5)[0], 10 * 8**3),
  (lambda x: jax.lax.switch(jnp.int32(0), [lambda: x @ x, lambda: x @ x @ x]), 4 * 8**3),
  (lambda x: jax.checkpoint(lambda x: jnp.sin(x) @ x)(x), 2 * 8**3),
  (lambda x: jnp.einsum('ij,kj->ik', x[:2], x), 2 * 2 * 8 * 8),
  (lambda x: jax.vmap(lambda row: row @ x)(x), 2 * 8**3),
  (lambda x: x + 1, 0),
])
def test_flops_of_known_functions(function, flops):
  assert cost.matmul_flops(jax.jit(function), jnp.ones((8, 8))) == flops


def test_flops_of_a_convolution():
  """3 x 3, 2 to 4 channels, 8 x 8 outputs."""
  x, kernel = jnp.ones((1, 8, 8, 2)), jnp.ones((3, 3, 2, 4))
  dimensions = ('NHWC', 'HWIO', 'NHWC')
  count = cost.matmul_flops(
    lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), 'SAME', dimension_numbers=dimensions),
    x, kernel,
  )
  assert count == 2 * 64 * 4 * 9 * 2


def test_flops_of_an_unbounded_loop_are_refused():
  with pytest.raises(ValueError, match='while'):
    cost.matmul_flops(
      lambda x: jax.lax.while_loop(lambda x: x.sum() < 3, lambda x: x @ x, x), jnp.ones((2, 2))
    )

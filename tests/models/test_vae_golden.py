"""The VAE against numbers recorded from the official code (tests/golden/encoders/README.md)."""

import dataclasses
import json
import os
import zlib

import jax
import numpy as np
import pytest

from fmzoo.convert import vae as convert
from fmzoo.models import vae
from tests import golden_files as files
from tests import golden_weights, programs

NETWORK, ZERO = 3e-5, 1e-3  # limits of the README there, in units of the reference's rms
EXACT = 1e-6  # of what is no network: rounding of float32 alone
LARGEST = 5  # times the rms, of errors that are about normally distributed
INPUTS = {'image_u8'}
PARTS = {  # of the official network
  'encoder.': 34_163_592, 'decoder.': 49_490_179, 'quant_conv.': 72, 'post_quant_conv.': 20,
}


def pytest_generate_tests(metafunc):
  """Runs the tests on every autoencoder that config.json of the folder names."""
  if 'golden' in metafunc.fixturenames:
    names = files.networks(metafunc, 'vae_')
    metafunc.parametrize('golden', names, indirect=True, scope='module')


class Golden:
  """The arrays of a configuration, and the network with its synthetic weights."""

  def __init__(self, folder, name):
    config = files.config(folder)
    settings, self.scale = config[name], config[name]['scaling_factor']
    self.arrays = files.Arrays(folder / name)
    self.config = vae.Config(
      widths=tuple(settings['block_out_channels']), layers_per_block=settings['layers_per_block'],
      groups=settings['norm_num_groups'], latent_channels=settings['latent_channels'],
      dtype='float32', precision='highest',
    )
    self.shapes = golden_weights.table(folder / settings['keys'])
    tensors = golden_weights.tensors(folder / settings['keys'], config['salt'])
    self.params = jax.device_put(convert.from_official(tensors, self.config))
    self.net = vae.VAE(*(jax.jit(function) for function in vae.make(self.config)))

  def stages(self, part, x):
    """Returns {path of a module of the encoder or decoder: what it gives}."""
    network = {'encoder': vae.Encoder, 'decoder': vae.Decoder}[part](self.config)

    @jax.jit
    def run(params, x):
      """Applies the network and keeps what its modules give."""
      with jax.default_matmul_precision(self.config.precision):
        return network.apply({'params': params}, x, capture_intermediates=True)

    found = jax.tree.leaves_with_path(run(self.params[part], x)[1]['intermediates'])
    return {  # paths end in '__call__' and the number of the call
      (part, *(key.key for key in path[:-2])): value for path, value in found
    }

  def path_of(self, official):
    """Returns the path of the module of ours that holds all tensors of an official one."""
    paths = [
      entry.path[:-1] for entry in convert.entries(self.config)
      if entry.official.startswith(f'{official}.')
    ]
    return tuple(os.path.commonprefix(paths))


@pytest.fixture(scope='module')
def golden(golden_root, request):
  return Golden(golden_root / 'encoders', request.param)


def close(golden, name, actual, limit=NETWORK):
  """Compares with an array of the folder, in units of its rms."""
  files.close_by_rms(actual, golden.arrays[name], limit, name)


def close_to_posterior(golden, prefix, mean, log_variance, limit):
  """Compares mean, log-variance and, where it is recorded, standard deviation."""
  close(golden, f'{prefix}mean', mean, limit)
  close(golden, f'{prefix}logvar', log_variance, limit)
  if f'{prefix}std' in golden.arrays:
    close(golden, f'{prefix}std', np.exp(np.asarray(log_variance) / 2), limit)


def test_rule_of_the_weights(golden_root):
  folder = golden_root / 'encoders'
  check = json.loads((folder / 'rule_check.json').read_text())
  assert check['salt'] == files.config(folder)['salt']
  for entry in check['entries']:
    key, salt = entry['key'], check['salt']
    assert zlib.crc32((salt + key).encode()) == entry['crc32'], key
    tensor = golden_weights.tensor(key, entry['shape'], salt)
    np.testing.assert_array_equal(tensor.ravel()[:5], np.float32(entry['first5']), err_msg=key)
    found = np.mean(tensor, dtype=np.float64), np.std(tensor, dtype=np.float64)
    np.testing.assert_allclose(found, (entry['mean'], entry['std']), rtol=1e-6, err_msg=key)


def test_pixels_of_the_image(golden):
  close(golden, 'x', golden.arrays['image_u8'].astype(np.float32) / 127.5 - 1, EXACT)


def test_encoder(golden):
  """Mean, log-variance, spread and a scaled draw, of an image and of a grey one."""
  x, eps = golden.arrays['x'], golden.arrays['eps']
  for prefix, images, limit in (('', x, NETWORK), ('zero_', np.zeros_like(x[:1]), ZERO)):
    mean, std = np.split(np.asarray(golden.net.encode(golden.params, images)), 2, axis=-1)
    close_to_posterior(golden, prefix, mean, 2 * np.log(std), limit)
    if not prefix:
      close(golden, 'sample_scaled', golden.scale * (mean + std * eps))


def test_decoder(golden):
  z = golden.arrays['z']
  close(golden, 'dec', golden.net.decode(golden.params, z))
  close(golden, 'zero_dec', golden.net.decode(golden.params, np.zeros_like(z[:1])), ZERO)


def test_stages(golden):
  """What every block gives: every second pixel of the first image, or statistics of the whole."""
  a = golden.arrays
  stages = golden.stages('encoder', a['x']) | golden.stages('decoder', a['z'])
  named = a.names('stage/')
  assert named
  for name in named:
    value = np.asarray(stages[golden.path_of(name.removeprefix('stage/'))], np.float64)
    if a[name].ndim == 1:
      summary = value.mean(), value.std(), value.min(), value.max()
      first = a[name].size - len(summary)
      close(golden, name, np.concatenate([summary, value.ravel()[:first]]))
    else:
      close(golden, name, value[:1, ::2, ::2])


@pytest.mark.parametrize('direction', ['encode', 'decode'])
def test_bfloat16_products(golden, direction):
  """Means of latents and images against float32, which differ by what roundings add up to.

  Each of n products rounds two operands and its result by up to 2^-9 of their size, at most 2^-9 /
  sqrt(3) rms; independent errors add up like a random walk, sqrt(3 n) of them. Twice that is left
  for norms that make errors larger, LARGEST times it for the largest of 10^4 errors.
  """
  x = golden.arrays[{'encode': 'x', 'decode': 'z'}[direction]]
  config = dataclasses.replace(golden.config, dtype='bfloat16', precision='default')
  rounded = getattr(vae.make(config), direction)
  channels = slice(golden.config.latent_channels)  # the mean; images have no more
  want, have = (
    np.asarray(function(golden.params, x))[..., channels]
    for function in (getattr(golden.net, direction), jax.jit(rounded))
  )
  assert have.dtype == np.float32
  error, scale = have - want, np.sqrt(np.mean(want**2))
  rms, most = np.sqrt(np.mean(error**2)) / scale, np.abs(error).max() / scale
  bound = 2 * np.sqrt(len(programs.products(rounded, golden.params, x))) * 2**-9
  assert bound / 10 < rms < bound and most < LARGEST * bound


def test_log_variances_are_bounded(golden):
  """Moments beyond both bounds, where they are recorded."""
  if 'clamp_moments' in golden.arrays:
    moments = golden.arrays['clamp_moments']
    half = moments.shape[-1] // 2
    assert moments[..., half:].min() < -30 and moments[..., half:].max() > 20
    close_to_posterior(golden, 'clamp_', *vae.posterior(moments), EXACT)


def test_official_names_and_shapes(golden):
  params = jax.eval_shape(vae.make(golden.config).init, jax.random.key(0))
  assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(
    lambda leaf: leaf.shape, golden.params
  )
  found = convert.to_official(golden.params, golden.config)
  assert {key: tensor.shape for key, tensor in found.items()} == golden.shapes


def test_golden_parameters_of_the_official_network(golden_root):
  """Counted in shapes of our tree, part by part."""
  params = jax.eval_shape(vae.make(vae.SD_VAE).init, jax.random.key(0))
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(PARTS.values()) == 83_653_863
  counts = dict.fromkeys(PARTS, 0)
  for entry in convert.entries(vae.SD_VAE):
    leaf = params
    for name in entry.path:
      leaf = leaf[name]
    counts[next(part for part in PARTS if entry.official.startswith(part))] += leaf.size
  assert counts == PARTS
  shapes = golden_weights.table(golden_root / 'encoders' / 'vae_keys.csv')
  assert {entry.official for entry in convert.entries(vae.SD_VAE)} == set(shapes)


def test_every_array_is_an_input_or_was_checked(golden):
  """Runs after the tests above in this file, which mark what they look at."""
  left = set(golden.arrays.unused()) - INPUTS
  assert not left

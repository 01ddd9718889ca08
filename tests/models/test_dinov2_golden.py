"""DINOv2 against numbers recorded from the official code (tests/golden/encoders/README.md)."""

import dataclasses
import gc
import os
import re

import jax
import numpy as np
import pytest

from fmzoo.convert import dinov2 as convert
from fmzoo.models import dinov2
from tests import dinov2_reference, golden_weights
from tests import golden_files as files

NETWORK, REPA, POSITIONS = 2e-5, 2e-4, 5e-5  # limits of the README there, in units of the rms
EXACT = 1e-6  # of what is no network: rounding of float32 alone
INPUTS = {'image_u8', 'repa_image_u8', 'token_index', 'repa_rows'}
RUN = re.compile(r'(repa_)?(hf|hub)_(native|timm)(/tokens|/first\d+|/channel_mean)?')
STAGES = 'hf_native'  # the run of the recorded stages
TABLES = 'dinov2_pos_embed.npz'
PRODUCTS = 6  # of a block, one after the other on a token's way
LARGEST = 6  # times the rms, of 10^5 errors: 4.4 if they were all of one normal distribution
NUMBERS = 86_580_480  # of ViT-B/14


def pytest_generate_tests(metafunc):
  """Runs the tests on every DINOv2 of the folder's config.json, and on the reference's."""
  if 'golden' in metafunc.fixturenames:
    names = [*files.networks(metafunc, 'dinov2_'), dinov2_reference.NAME]
    metafunc.parametrize('golden', names, indirect=True, scope='module')


class Golden:
  """The arrays of a configuration, and the networks with its synthetic weights."""

  def __init__(self, folder, name):
    config = files.config(folder)
    self.folder, self.settings, self.salt = folder, config[name], config['salt']
    self.mean_std = config['mean'], config['std']
    self.arrays = files.Arrays(folder / name)
    settings = self.settings
    side = settings['train_image_size'] // settings['patch_size']
    assert settings['layer_norm_eps'] == 1e-6
    self.config = dinov2.Config(  # of the weights as they are in the file
      patch=settings['patch_size'], width=settings['hidden_size'], depth=settings['num_layers'],
      heads=settings['num_heads'], mlp_ratio=settings['mlp_ratio'], grid=(side, side),
      dtype='float32', precision='highest',
    )
    self._layout, self._params = None, None

  def table(self, layout):
    """Returns {official key: shape}."""
    return golden_weights.table(self.folder / self.settings[f'keys_{layout}'])

  def params(self, layout):
    """Returns the weights of a layout; those of one are kept at a time."""
    if self._layout != layout:
      self._layout, self._params = None, None
      gc.collect()
      tensors = golden_weights.tensors(self.folder / self.settings[f'keys_{layout}'], self.salt)
      self._layout, self._params = layout, convert.from_official(tensors, self.config)
    return self._params

  def images(self, run):
    """Returns the network's images of a run."""
    if run.startswith('repa_'):
      return np.asarray(preprocessed(self))
    return pixels(self)

  def network(self, run, **changes):
    """Returns (Config, parameters, images) of a run, with the positions of its images."""
    _, layout, method = RUN.fullmatch(run).groups()[:3]
    params, images = self.params(layout), self.images(run)
    grid = tuple(side // self.config.patch for side in images.shape[1:3])
    positions = dinov2.resample_positions(
      params['embed']['pos_embed'], grid, layout if method == 'native' else method
    )
    params = {**params, 'embed': {**params['embed'], 'pos_embed': positions}}
    return dataclasses.replace(self.config, grid=grid, **changes), params, images

  def runs(self, layout):
    """Returns {run: names of its arrays} of a layout."""
    found = {}
    for name in self.arrays.names():
      match = RUN.fullmatch(name)
      if match and match[2] == layout:
        found.setdefault(name.partition('/')[0], []).append(name)
    return found

  def path_of(self, official):
    """Returns (path of our module that holds all tensors of an official one, index of a block)."""
    known = [
      entry for entry in convert.entries(self.config, 'hf')
      if entry.official.startswith(f'{official}.')
    ]
    path = tuple(os.path.commonprefix([entry.path[:-1] for entry in known]))
    return path, known[0].index[:1]


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """A folder of another configuration, written by the float64 reference."""
  folder = tmp_path_factory.mktemp('written') / 'encoders'
  dinov2_reference.write_folder(folder)
  return folder


@pytest.fixture(scope='module')
def golden(golden_root, written, request):
  is_written = request.param == dinov2_reference.NAME
  return Golden(written if is_written else golden_root / 'encoders', request.param)


def close(golden, name, actual, limit):
  """Compares with an array of the folder, in units of its rms."""
  return files.close_by_rms(actual, golden.arrays[name], limit, name)


def pixels(golden):
  """Returns the images of the runs without preprocessing, normalised."""
  mean, std = (np.array(value) for value in golden.mean_std)
  return ((golden.arrays['image_u8'] / 255 - mean) / std).astype(np.float32)


def preprocessed(golden):
  """Returns the images of the runs with preprocessing."""
  side = golden.arrays['repa_pre_rows'].shape[2]
  return jax.jit(dinov2.preprocess, static_argnums=1)(golden.arrays['repa_image_u8'], side)


def part_of(golden, name, tokens):
  """Returns of tokens [B, 1 + N, D] what an array holds."""
  part = name.partition('/')[2]
  if not part:
    return tokens
  if part == 'tokens':
    return tokens[:, golden.arrays['token_index']]
  if part == 'channel_mean':
    return tokens[:, 1:].astype(np.float64).mean(1)
  return tokens[..., : int(part.removeprefix('first'))]


def summary(stage, size):
  """Returns statistics of a module's tokens and the first values of token 0 and token 100."""
  value = stage.astype(np.float64)
  statistics, first = (value.mean(), value.std(), value.min(), value.max()), (size - 4) // 2
  return np.concatenate([statistics, value[0, 0, :first], value[0, 100, :first]])


def test_pixels_of_the_image(golden):
  """ImageNet's constants, and an image that keeps its size."""
  np.testing.assert_array_equal((dinov2.MEAN, dinov2.STD), golden.mean_std)
  want = golden.arrays['x'] if 'x' in golden.arrays else pixels(golden)
  image = golden.arrays['image_u8']
  if image.shape[1] == image.shape[2]:
    files.close_by_rms(dinov2.preprocess(image, image.shape[1]), want, EXACT)
  if 'x' in golden.arrays:
    close(golden, 'x', pixels(golden), EXACT)


def test_preprocessing(golden):
  """Some rows of the resized image, where they are recorded."""
  if 'repa_pre_rows' in golden.arrays:
    rows = np.asarray(preprocessed(golden))[:, golden.arrays['repa_rows']]
    close(golden, 'repa_pre_rows', rows, REPA)


def test_stages(golden):
  """What the modules give: all of it, or statistics and the first values of two tokens."""
  config, params, images = golden.network(STAGES)
  network = dinov2.Transformer(config)

  @jax.jit
  def run(params, images):
    """Applies the network and keeps what its modules give."""
    with jax.default_matmul_precision(config.precision):
      return network.apply({'params': params}, images, capture_intermediates=True)

  found = jax.tree.leaves_with_path(run(params, images)[1]['intermediates'])
  stages = {  # paths end in '__call__', the number of the call and, for a block, that of the result
    tuple(key.key for key in path if hasattr(key, 'key'))[:-1]: np.asarray(value)
    for path, value in found
  }
  named = golden.arrays.names('stage/')
  assert named
  for name in named:
    path, index = golden.path_of(name.removeprefix('stage/'))
    stage, expected = stages[path][index], golden.arrays[name]
    close(golden, name, summary(stage, expected.size) if expected.ndim == 1 else stage, NETWORK)


@pytest.mark.parametrize('layout', ['hf', 'hub'])
def test_tokens(golden, layout):
  """Every recorded run of a layout, with the official positions and with timm's."""
  runs = golden.runs(layout)
  assert runs
  for run, named in runs.items():
    config, params, images = golden.network(run)
    tokens = np.asarray(jax.jit(dinov2.make(config).tokens)(params, images))
    assert tokens.dtype == np.float32
    for name in named:
      limit = REPA if run.startswith('repa_') else NETWORK
      close(golden, name, part_of(golden, name, tokens), limit)


def test_bfloat16_products(golden):
  """Patch features against float32: an error there is, and no more than roundings add up to.

  Each product rounds two operands and its result by up to 2^-9 of their size, at most 2^-9 /
  sqrt(3) rms; independent errors add up like a random walk. LayerScale makes them smaller.
  """
  config, params, images = golden.network('hub_timm')
  rounded = dataclasses.replace(config, dtype='bfloat16', precision='default')
  want, have = (
    np.asarray(jax.jit(dinov2.make(c).features)(params, images)) for c in (config, rounded)
  )
  assert have.dtype == np.float32
  error, scale = have - want, np.sqrt(np.mean(want**2))
  rms, most = np.sqrt(np.mean(error**2)) / scale, np.abs(error).max() / scale
  bound = np.sqrt(3 * (PRODUCTS * config.depth + 1) / 3) * 2**-9
  assert bound / 10 < rms < bound and most < LARGEST * bound


@pytest.mark.parametrize('layout', ['hub', 'hf'])
def test_official_names_and_shapes(golden, layout):
  params = jax.eval_shape(dinov2.make(golden.config).init, jax.random.key(0))
  zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(), leaf.shape), params)
  found = convert.to_official(zeros, golden.config, layout)
  assert {key: tensor.shape for key, tensor in found.items()} == golden.table(layout)


def test_golden_parameters_of_the_official_network():
  """Counted in shapes of our tree, and in tensors of both layouts."""
  width = 768
  depth, heads = dinov2.SIZES[width]
  config = dinov2.Config(
    patch=dinov2.PATCH, width=width, depth=depth, heads=heads, mlp_ratio=dinov2.MLP_RATIO,
    grid=(37, 37), dtype='float32', precision='highest',
  )
  params = jax.eval_shape(dinov2.make(config).init, jax.random.key(0))
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == NUMBERS
  counts = {layout: len(convert.entries(config, layout)) for layout in ('hf', 'hub')}
  assert counts == {'hf': 223, 'hub': 175}


@pytest.mark.parametrize('source', ['golden_root', 'written'])
def test_resampled_positions(golden_root, written, source):
  """All methods and grids that are recorded."""
  folder = written if source == 'written' else golden_root / 'encoders'
  arrays = files.Arrays(folder / TABLES)
  table = arrays['pos_embed']
  for name in arrays.names():
    if name != 'pos_embed':
      method, _, grid = name.partition('/')
      found = dinov2.resample_positions(table, tuple(map(int, grid.split('x'))), method)
      assert found.dtype == np.float32
      files.close_by_rms(found, arrays[name], POSITIONS, name)
  assert len(arrays.names()) > 1 and not arrays.unused()


@pytest.mark.parametrize('layout', ['hf', 'hub'])
def test_reference_gives_the_recorded_tokens(golden, layout):
  """The float64 reference, where all tokens are recorded."""
  name = f'{layout}_timm'
  if name not in golden.arrays:
    pytest.skip('some of the tokens are recorded, of a network too large for the reference')
  tensors = golden_weights.tensors(golden.folder / golden.settings[f'keys_{layout}'], golden.salt)
  if layout == 'hf':
    tensors = dinov2_reference.as_hub(tensors, golden.config.depth)
  found, _ = dinov2_reference.run(tensors, pixels(golden), golden.settings, 'timm')
  close(golden, name, found, NETWORK / 10)


def test_every_array_is_an_input_or_was_checked(golden):
  """Runs after the tests above in this file, which mark what they look at."""
  left = set(golden.arrays.unused()) - INPUTS
  assert not left

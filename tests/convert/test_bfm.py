"""Official BFM weights to our tree and back: bit for bit, the FRN optional, bad keys named."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import bfm_xl
from fmzoo.convert import bfm as convert
from fmzoo.convert import names
from fmzoo.models import blockwise, layers
from tests import tiny

CHANNELS = 3  # unequal to the patch area, so that a wrong order of patch entries shows
SHAPE, CLASSES = (4, 4, CHANNELS), 10
CONFIG = blockwise.Config(
  patch=2, width=16, heads=2, mlp_ratio=2.0, segments=3, segment_depth=2, feature_depth=2,
  frn_depth=1, lora_width=4, rotary_theta=10_000.0, feature_dim=12, projector_width=8,
  dtype='float32', precision='highest', attention='xla', remat=False, unroll=1,
)


@pytest.fixture(scope='module')
def params():
  net = blockwise.make(CONFIG, SHAPE, CLASSES)
  return jax.tree.map(np.asarray, tiny.warm(jax.jit(net.init)(jax.random.key(0))))


@pytest.fixture(scope='module')
def tensors(params):
  return convert.to_official(params, CONFIG, CHANNELS)


def read(tensors, config=CONFIG):
  net = blockwise.make(config, SHAPE, CLASSES)
  abstract = jax.eval_shape(net.init, jax.random.key(0))
  return convert.from_official(tensors, config, CHANNELS, abstract)


def assert_same(have, want):
  assert jax.tree.structure(have) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, have, want)


def without_frn(tree, prefix):
  return {key: value for key, value in tree.items() if not key.startswith(prefix)}


def test_round_trip_is_bit_equal(params, tensors):
  assert_same(read(tensors), params)


def test_weights_of_stage_one_have_no_residual_network(params, tensors):
  stage1, expected = without_frn(tensors, 'frn_blocks'), without_frn(params, 'frn')
  config = dataclasses.replace(CONFIG, frn_depth=0)
  assert_same(read(stage1, config), expected)
  for either in (config, CONFIG):
    assert_same(convert.to_official(expected, either, CHANNELS), stage1)


def test_weights_of_the_other_stage_are_refused_with_the_remedy(tensors):
  with pytest.raises(names.Misfit, match='model.frn_depth=0 .*1 blocks.*stage 2'):
    read(tensors, dataclasses.replace(CONFIG, frn_depth=0))
  with pytest.raises(names.Misfit, match='model.frn_depth=1 .*stage 1.*run.init_from'):
    read(without_frn(tensors, 'frn_blocks'))


@pytest.mark.parametrize('rename', [
  lambda key: f'module.{key}',
  lambda key: f'_orig_mod.{key}',
  lambda key: f'_orig_mod.module.{key}',
  lambda key: f'module._orig_mod.{key}',
  lambda key: key.replace('.attn.', '._orig_mod.attn.').replace('.mlp.', '._orig_mod.mlp.'),
])
def test_prefixes_of_wrappers_are_dropped(params, tensors, rename):
  renamed = {rename(key): value for key, value in tensors.items()}
  assert set(renamed) != set(tensors)
  assert_same(read(renamed), params)


def test_two_keys_for_one_tensor_are_refused(tensors):
  twice = {**tensors, 'module.t_embedder.mlp.0.bias': tensors['t_embedder.mlp.0.bias']}
  with pytest.raises(names.Misfit, match="'module.t_embedder.mlp.0.bias' is one of two"):
    read(twice)


def test_all_that_does_not_fit_is_named_together(tensors):
  wrong = {**tensors, 'x_embedder.more': np.zeros(1), 'frn_blocks.9.mlp.fc1.bias': np.ones(2)}
  del wrong['velocity_blocks.2.1.mlp.fc1.weight'], wrong['t_embedder.mlp.0.bias']
  wrong['t_embedder.mlp.2.bias'] = tensors['t_embedder.mlp.2.bias'].astype(np.float16)
  wrong['velocity_blocks.1.1.attn.qkv.weight'] = tensors['velocity_blocks.1.1.attn.qkv.weight'].T
  with pytest.raises(names.Misfit) as error:
    read(wrong)
  missing, rest = str(error.value).split('; not expected ')
  extra, other = rest.split('; of another shape or dtype ')
  assert missing.endswith('missing t_embedder.mlp.0.bias, velocity_blocks.2.1.mlp.fc1.weight')
  assert extra == 'frn_blocks.9.mlp.fc1.bias, x_embedder.more'
  assert other.startswith(
    't_embedder.mlp.2.bias is float16[16], expected float32[16], velocity_blocks.1.1.attn.qkv'
    '.weight is float32[16,48], expected float32[48,16]; '
  )


def test_half_a_residual_network_is_refused(tensors):
  wrong = {key: value for key, value in tensors.items() if key != 'frn_blocks.0.attn.q_norm.weight'}
  with pytest.raises(names.Misfit, match='missing frn_blocks.0.attn.q_norm.weight'):
    read(wrong)


@pytest.mark.parametrize('frn_depth,count', [(0, 723), (4, 771)])
def test_number_of_tensors_is_the_official_one(frn_depth, count):
  model = {k: v for k, v in bfm_xl.get_config().model.items() if k != 'name'}
  config = blockwise.Config(**{**model, 'frn_depth': frn_depth})
  keys = [entry.official for entry in convert.entries(config, 4)]
  assert len(keys) == len(set(keys)) == count


def test_official_layouts(tensors):
  """Shapes as PyTorch stores them: weight [out, in]."""
  shapes = {key: value.shape for key, value in tensors.items()}
  width, low = CONFIG.width, CONFIG.lora_width
  assert shapes['x_embedder.proj.weight'] == (width, 4 * CHANNELS)
  assert shapes['final_layer.linear.weight'] == (4 * CHANNELS, width)
  assert shapes['velocity_blocks.1.0.adaLN_modulation.1.weight'] == (low, 2 * width)
  assert shapes['representation_blocks.1.adaLN_modulation.2.weight'] == (6 * width, low)
  assert shapes['frn_blocks.0.adaLN_modulation.1.weight'] == (6 * width, width)
  assert shapes['frn_blocks.0.attn.q_norm.weight'] == (width // CONFIG.heads,)


def official_patches(image):
  """Cuts [C, H, W] into [N, C P P]: channel slowest, then row, then column of the patch."""
  channels, height, width = image.shape
  cut = image.reshape(channels, height // 2, 2, width // 2, 2).transpose(1, 3, 0, 2, 4)
  return cut.reshape(-1, channels * 4)


@pytest.mark.parametrize('official,ours', [
  ('x_embedder', 'velocity_patches'), ('representation_x_embedder', 'feature_patches')
])
def test_patch_embedders_agree_on_an_image(params, tensors, official, ours):
  image = np.random.default_rng(0).standard_normal((CHANNELS, 4, 4)).astype(np.float32)
  weight, bias = tensors[f'{official}.proj.weight'], tensors[f'{official}.proj.bias']
  expected = official_patches(image) @ weight.T + bias
  patches = layers.patchify(image.transpose(1, 2, 0)[None], 2)[0]
  np.testing.assert_allclose(
    patches @ params[ours]['kernel'] + params[ours]['bias'][None], expected, rtol=0, atol=1e-5
  )


def test_final_layer_agrees_on_an_image(params, tensors):
  tokens = np.random.default_rng(0).standard_normal((4, CONFIG.width)).astype(np.float32)
  weight, bias = tensors['final_layer.linear.weight'], tensors['final_layer.linear.bias']
  linear = params['final']['linear']
  image = layers.unpatchify((tokens @ linear['kernel'] + linear['bias'])[None], 2, 4, 4)[0]
  np.testing.assert_allclose(
    official_patches(np.asarray(image).transpose(2, 0, 1)), tokens @ weight.T + bias,
    rtol=0, atol=1e-5,
  )

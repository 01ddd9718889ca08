"""The name map of SoFlow's U-Net, both directions."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from fmzoo.convert import names
from fmzoo.convert import soflow_unet as convert
from fmzoo.models import unet
from tests import golden_files, tiny

CONFIG, CIFAR = tiny.UNET, tiny.CIFAR_UNET


def abstract(config, side=8):
  """Returns the parameters of a U-Net as shapes."""
  return jax.eval_shape(unet.make(config, (side, side, 3), 10).init, jax.random.key(0))


@pytest.fixture(scope='module')
def params():
  """Random leaves in the structure of a tiny U-Net."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), abstract(CONFIG)
  )


def read(tensors):
  return convert.from_official(tensors, CONFIG, 3, abstract(CONFIG))


def test_our_tree_comes_back_bit_equal(params):
  tensors = convert.to_official(params, CONFIG, 3)
  assert all(key.startswith('network.') for key in tensors)
  back = read(tensors)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_official_unet_weights_come_back_bit_equal(golden_root):
  folder = golden_root / 'soflow'
  tensors, u = load_file(folder / 'unet.safetensors'), golden_files.config(folder)['unet']
  config = unet.Config(
    width=u['model_channels'], multipliers=tuple(u['channel_mult']), blocks=u['num_blocks'],
    attention_resolutions=tuple(u['attn_resolutions']), dropout=0.3, augment_dim=6,
    dtype='float32', precision='highest', remat=False,
  )
  params = convert.from_official(tensors, config, 3, abstract(config, u['data_size']))
  assert 'filters' not in params
  back = convert.to_official(params, config, 3)
  assert set(back) == set(tensors)
  for key, tensor in tensors.items():
    assert back[key].dtype == tensor.dtype and back[key].flags.c_contiguous
    np.testing.assert_array_equal(back[key], tensor, err_msg=key)


def test_the_full_size_has_425_tensors_of_which_8_are_constants():
  shapes = abstract(CIFAR, 32)
  official = [entry.official for entry in convert.entries(shapes)]
  assert len(official) == len(set(official)) == 425
  filters = [name for name in official if name.endswith('.resample_filter')]
  assert sorted(filters) == sorted(
    f'{layer}.{part}.resample_filter' for part in ('conv0', 'skip')
    for layer in ('enc.16x16_down', 'enc.8x8_down', 'dec.16x16_up', 'dec.32x32_up')
  )
  assert len(official) - len(filters) == len(jax.tree.leaves(shapes))


def test_layouts_of_the_official_tensors(params):
  """Convolutions and the interleaved columns of attention: output 3 c + j is column C j + c."""
  tensors = convert.to_official(params, CONFIG, 3)
  kernel = params['encoder_8_conv']['kernel']
  assert tensors['network.enc.8x8_conv.weight'][5, 2, 0, 1] == kernel[0, 1, 2, 5]
  qkv = params['encoder_4_block0']['attention']['qkv']
  weight = tensors['network.enc.4x4_block0.qkv.weight']
  assert weight.shape == (48, 16, 1, 1)
  c, j = 5, 2
  np.testing.assert_array_equal(weight[3 * c + j, :, 0, 0], qkv['kernel'][0, 0, :, 16 * j + c])
  assert tensors['network.enc.4x4_block0.qkv.bias'][3 * c + j] == qkv['bias'][16 * j + c]


@pytest.mark.parametrize('rename', [
  lambda key: key.removeprefix('network.'),
  lambda key: f'module.{key}',
  lambda key: key.replace('network.', 'network._orig_mod.'),
])
def test_prefixes_are_optional(params, rename):
  tensors = convert.to_official(params, CONFIG, 3)
  renamed = {rename(key): value for key, value in tensors.items()}
  jax.tree.map(np.testing.assert_array_equal, read(renamed), params)


def test_another_filter_is_refused(params):
  tensors = convert.to_official(params, CONFIG, 3)
  key = 'network.dec.8x8_up.skip.resample_filter'
  tensors[key] = np.full((1, 1, 4, 4), 1 / 16, np.float32)
  with pytest.raises(names.Misfit, match='dec.8x8_up.skip.resample_filter is .*0.0625.*expected'):
    read(tensors)


def test_all_that_does_not_fit_is_named_together(params):
  tensors = convert.to_official(params, CONFIG, 3)
  del tensors['network.map_layer1.bias'], tensors['network.enc.4x4_down.conv0.resample_filter']
  tensors['network.enc.4x4_conv.weight'] = np.zeros(1, np.float32)
  tensors['network.map_augment.weight'] = np.zeros((32, 9), np.float32)
  with pytest.raises(names.Misfit) as error:
    read(tensors)
  assert str(error.value).startswith(
    'weights do not fit this network: missing enc.4x4_down.conv0.resample_filter, map_layer1.bias;'
    ' not expected enc.4x4_conv.weight; of another shape or dtype map_augment.weight is'
    ' float32[32,9], expected float32[32,6]; '
  )


def test_weights_without_augmentation(params):
  """A network without augmentation labels has neither our leaf nor the official tensor."""
  embedding = {k: v for k, v in params['embedding'].items() if k != 'augment'}
  tensors = convert.to_official({**params, 'embedding': embedding}, CONFIG, 3)
  assert 'network.map_layer0.weight' in tensors and 'network.map_augment.weight' not in tensors

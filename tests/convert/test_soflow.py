"""The name map of SoFlow's DiT, both directions."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from fmzoo.convert import names
from fmzoo.convert import soflow as convert
from fmzoo.models import dit
from tests import golden_files

PATCH, WIDTH, DEPTH, SIDE, CHANNELS, CLASSES = 2, 16, 3, 8, 4, 5
CONFIG = dit.Config(
  patch=PATCH, width=WIDTH, depth=DEPTH, heads=2, mlp_ratio=4.0, duration=True, dtype='float32',
  precision='highest', attention='xla', remat=False, unroll=1,
)


@pytest.fixture(scope='module')
def params():
  """Random leaves in the structure of a tiny DiT."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), abstract(CONFIG)
  )


def abstract(config, side=SIDE, channels=CHANNELS, classes=CLASSES):
  """Returns the parameters of a DiT as shapes."""
  net = dit.make(config, (side, side, channels), classes)
  return jax.eval_shape(net.init, jax.random.key(0))


def read(tensors):
  return convert.from_official(tensors, CONFIG, CHANNELS, abstract(CONFIG))


def test_our_tree_comes_back_bit_equal(params):
  tensors = convert.to_official(params, CONFIG, CHANNELS)
  assert len(tensors) == 16 + 10 * DEPTH
  assert all(key.startswith('network.') for key in tensors)
  back = read(tensors)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_official_weights_come_back_bit_equal(golden_root):
  folder = golden_root / 'soflow'
  tensors, d = load_file(folder / 'dit.safetensors'), golden_files.config(folder)['dit']
  config = dataclasses.replace(
    CONFIG, patch=d['patch'], width=d['hidden'], depth=d['depth'], heads=d['heads']
  )
  shapes = abstract(config, d['data_size'], d['channels'], d['num_classes'])
  params = convert.from_official(tensors, config, d['channels'], shapes)
  back = convert.to_official(params, config, d['channels'])
  assert set(back) == set(tensors)
  for key, tensor in tensors.items():
    assert back[key].dtype == tensor.dtype and back[key].flags.c_contiguous
    np.testing.assert_array_equal(back[key], tensor, err_msg=key)


def test_layouts_of_the_official_tensors(params):
  """Shapes of the specification's table, and one element of each that is more than transposed."""
  tensors = convert.to_official(params, CONFIG, CHANNELS)
  conv = tensors['network.x_embedder.proj.weight']
  assert conv.shape == (WIDTH, CHANNELS, PATCH, PATCH)
  row, column, channel, feature = 1, 0, 3, 5
  kernel = params['patches']['kernel']
  assert conv[feature, channel, row, column] == kernel[
    (row * PATCH + column) * CHANNELS + channel, feature
  ]
  for i in range(DEPTH):
    qkv = tensors[f'network.blocks.{i}.attn.qkv.weight']
    assert qkv.shape == (3 * WIDTH, WIDTH)
    np.testing.assert_array_equal(qkv.T, params['blocks']['core']['attn']['qkv']['kernel'][i])
  table = tensors['network.y_embedder.embedding_table.weight']
  assert table.shape == (CLASSES + 1, WIDTH)


@pytest.mark.parametrize('rename', [
  lambda key: key.removeprefix('network.'),
  lambda key: f'module.{key}',
  lambda key: key.replace('network.', 'network._orig_mod.'),
])
def test_prefixes_are_optional(params, rename):
  tensors = convert.to_official(params, CONFIG, CHANNELS)
  renamed = {rename(key): value for key, value in tensors.items()}
  jax.tree.map(np.testing.assert_array_equal, read(renamed), params)


def test_all_that_does_not_fit_is_named_together(params):
  tensors = convert.to_official(params, CONFIG, CHANNELS)
  del tensors['network.pos_embed'], tensors['network.blocks.1.mlp.fc2.bias']
  tensors['network.ema_decay'] = np.zeros(1)
  table = 'network.y_embedder.embedding_table.weight'
  tensors[table] = tensors[table][:-1]  # of a model without the null label
  with pytest.raises(names.Misfit) as error:
    read(tensors)
  assert str(error.value).startswith(
    'weights do not fit this network: missing blocks.1.mlp.fc2.bias, pos_embed; not expected'
    ' ema_decay; of another shape or dtype y_embedder.embedding_table.weight is float32[5,16],'
    ' expected float32[6,16]; '
  )


def test_long_lists_of_what_does_not_fit_are_cut():
  """However many keys a file has; each list says how many it leaves out."""
  with pytest.raises(names.Misfit) as error:
    read({f'x.{i:04d}': np.zeros(1, np.float32) for i in range(1000)})
  missing, extra = str(error.value).split('; not expected ')
  assert re.search(r'missing (\S+, ){8}and \d\d more$', missing)
  assert extra.startswith('x.0000, x.0001, ') and ', x.0007, and 992 more; ' in extra

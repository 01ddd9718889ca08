"""The name map of SoFlow's DiT, both directions."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from fmzoo.convert import soflow as convert
from fmzoo.models import dit

PATCH, WIDTH, DEPTH, SIDE, CHANNELS, CLASSES = 2, 16, 3, 8, 4, 5


@pytest.fixture(scope='module')
def params():
  """Random leaves in the structure of a tiny DiT."""
  net = dit.make(dit.Config(
    patch=PATCH, width=WIDTH, depth=DEPTH, heads=2, mlp_ratio=4.0, duration=True, dtype='float32',
    precision='highest', attention='xla', remat=False, unroll=1,
  ), (SIDE, SIDE, CHANNELS), CLASSES)
  shapes = jax.eval_shape(net.init, jax.random.key(0))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), shapes)


def test_our_tree_comes_back_bit_equal(params):
  tensors = convert.to_official(params, DEPTH, PATCH)
  assert len(tensors) == 16 + 10 * DEPTH
  assert all(key.startswith('network.') for key in tensors)
  back = convert.from_official(tensors, DEPTH, PATCH)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_official_weights_come_back_bit_equal(golden_root):
  tensors = load_file(golden_root / 'soflow' / 'dit.safetensors')
  depth = 1 + max(int(key.split('.')[2]) for key in tensors if key.startswith('network.blocks.'))
  patch = tensors['network.x_embedder.proj.weight'].shape[-1]
  back = convert.to_official(convert.from_official(tensors, depth, patch), depth, patch)
  assert set(back) == set(tensors)
  for key, tensor in tensors.items():
    assert back[key].dtype == tensor.dtype and back[key].flags.c_contiguous
    np.testing.assert_array_equal(back[key], tensor, err_msg=key)


def test_layouts_of_the_official_tensors(params):
  """Shapes of the specification's table, and one element of each that is more than transposed."""
  tensors = convert.to_official(params, DEPTH, PATCH)
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


def test_the_prefix_is_optional(params):
  tensors = convert.to_official(params, DEPTH, PATCH)
  bare = {key.removeprefix('network.'): value for key, value in tensors.items()}
  jax.tree.map(np.testing.assert_array_equal, convert.from_official(bare, DEPTH, PATCH), params)


def test_every_missing_and_unexpected_key_is_named(params):
  tensors = convert.to_official(params, DEPTH, PATCH)
  del tensors['network.pos_embed'], tensors['network.blocks.1.mlp.fc2.bias']
  tensors['network.ema_decay'] = np.zeros(1)
  with pytest.raises(ValueError) as error:
    convert.from_official(tensors, DEPTH, PATCH)
  for key in ('pos_embed', 'blocks.1.mlp.fc2.bias', 'ema_decay'):
    assert key in str(error.value)

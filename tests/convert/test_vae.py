"""The name map of Stable Diffusion's VAE, both directions, and what is no such file."""

import csv

import jax
import numpy as np
import pytest

from fmzoo.convert import names, weights
from fmzoo.convert import vae as convert
from fmzoo.models import vae
from tests import tiny

QUERY = 'encoder.mid_block.attentions.0.query.weight'


@pytest.fixture(scope='module')
def params():
  return tiny.random_vae()


@pytest.fixture
def tensors(params):
  return convert.to_official(params, tiny.VAE)


def read(tensors):
  return convert.from_official(tensors, tiny.VAE)


def assert_same(found, params):
  assert jax.tree.structure(found) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, found, params)


def test_our_tree_comes_back_bit_equal(params, tensors):
  assert_same(read(tensors), params)


def test_layouts_of_the_official_tensors(params, tensors):
  """One element of each kind that is more than renamed."""
  conv, ours = tensors['encoder.conv_in.weight'], params['encoder']['conv_in']['kernel']
  assert conv.shape == (8, 3, 3, 3) and conv[5, 1, 0, 2] == ours[0, 2, 1, 5]
  query = params['encoder']['middle']['attention']['q']['kernel']
  assert tensors[QUERY][1, 7] == query[7, 1]
  resize = params['decoder']['level_0']['resize']['kernel']
  np.testing.assert_array_equal(
    tensors['decoder.up_blocks.0.upsamplers.0.conv.weight'].transpose(2, 3, 1, 0), resize
  )
  shortcuts = sorted(key for key in tensors if key.endswith('conv_shortcut.weight'))
  assert [key.split('.conv')[0] for key in shortcuts] == [
    'decoder.up_blocks.1.resnets.0', 'encoder.down_blocks.1.resnets.0'
  ]


def test_newer_names_of_the_attention_are_read(params, tensors, golden_root):
  with open(golden_root / 'encoders' / 'vae_aliases.csv', newline='') as lines:
    aliases = {row['key']: row['alias'] for row in csv.DictReader(lines)}
  renamed = {aliases.get(key, key): tensor for key, tensor in tensors.items()}
  assert len(renamed.keys() - tensors.keys()) == len(aliases) == 16
  assert_same(read(renamed), params)


def test_attention_of_one_by_one_convolutions_is_read(params, tensors, tmp_path):
  """From a file, too, where tensors are read when it is their turn."""
  for key in tensors:
    if '.attentions.0.' in key and tensors[key].ndim == 2:
      tensors[key] = tensors[key][..., None, None]
  assert tensors[QUERY].ndim == 4
  assert_same(read(tensors), params)
  weights.save(tmp_path / 'x.safetensors', tensors)
  with weights.opened(tmp_path / 'x.safetensors') as opened:
    assert_same(read(opened), params)


def test_one_layer_under_two_names_is_refused(tensors):
  tensors[QUERY.replace('query', 'to_q')] = tensors[QUERY]
  with pytest.raises(names.Misfit, match=f'one of two keys for {QUERY}; keep one'):
    read(tensors)


def test_all_that_does_not_fit_is_named_together(tensors):
  del tensors['quant_conv.bias']
  tensors[QUERY] = tensors[QUERY][:, :-1]
  tensors['encoder.extra'] = tensors['decoder.conv_in.bias']
  with pytest.raises(names.Misfit) as error:
    read(tensors)
  assert str(error.value).startswith(
    'weights do not fit this network: missing quant_conv.bias; not expected encoder.extra; of'
    f' another shape or dtype {QUERY} is float32[16,15], expected float32[16,16]; '
  )


def test_a_file_is_read_as_the_official_network(params, tensors, tmp_path, monkeypatch):
  weights.save(tmp_path / 'x.safetensors', tensors)
  with pytest.raises(ValueError, match='x.safetensors: holds 122 of the 248 tensors'):
    convert.load(tmp_path / 'x.safetensors')
  monkeypatch.setattr(vae, 'SD_VAE', tiny.VAE)
  assert_same(convert.load(tmp_path / 'x.safetensors'), params)


@pytest.mark.parametrize('tensors,found', [
  ({f'blocks.{i}': np.zeros(2, np.float32) for i in range(300)}, r"300 others.*\['blocks.0'\]"),
  ({}, r'0 others, such as \[\]'),
])
def test_another_network_is_one_readable_line(tensors, found, tmp_path):
  weights.save(tmp_path / 'x.safetensors', tensors)
  with pytest.raises(ValueError, match=f'x.safetensors: holds 0 of the 248 .*{found}') as error:
    convert.load(tmp_path / 'x.safetensors')
  assert len(str(error.value)) < 400 and 'sd-vae-ft-ema' in str(error.value)

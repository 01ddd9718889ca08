"""The name maps of DINOv2, both layouts and both directions, and what is no such file."""

import jax
import numpy as np
import pytest

from fmzoo.convert import dinov2 as convert
from fmzoo.convert import names, weights
from fmzoo.models import dinov2
from tests import tiny, torch_pickle

LAYOUTS = ('hf', 'hub')
CLASS = {'hf': 'embeddings.cls_token', 'hub': 'cls_token'}
TABLE = {'hf': 'embeddings.position_embeddings', 'hub': 'pos_embed'}


@pytest.fixture(scope='module')
def params():
  return tiny.random_dinov2()


@pytest.fixture
def as_official(monkeypatch):
  """Has files of the tiny network read as if its size were an official one."""
  monkeypatch.setitem(dinov2.SIZES, 32, (tiny.DINOV2.depth, tiny.DINOV2.heads))


@pytest.fixture(params=LAYOUTS)
def layout(request):
  return request.param


@pytest.fixture
def tensors(params, layout):
  return convert.to_official(params, tiny.DINOV2, layout)


def read(tensors):
  return convert.from_official(tensors, tiny.DINOV2)


def assert_same(found, params):
  assert jax.tree.structure(found) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, found, params)


def write_torch(path, tensors):
  path.write_bytes(torch_pickle.zip_form(tensors))
  return path


def test_our_tree_comes_back_bit_equal(params, tensors):
  assert_same(read(tensors), params)


def test_official_tensors_come_back_bit_equal(tensors, layout):
  """The mask token, of which the network makes no use, included."""
  again = convert.to_official(read(tensors), tiny.DINOV2, layout)
  assert again.keys() == tensors.keys() and any('mask_token' in key for key in again)
  for key, tensor in tensors.items():
    np.testing.assert_array_equal(again[key], tensor, err_msg=key)


def test_layouts_of_the_official_tensors(params):
  """One element of each kind that is more than renamed; query, key and value in that order."""
  hub, hf = (convert.to_official(params, tiny.DINOV2, layout) for layout in ('hub', 'hf'))
  patches, kernel = hub['patch_embed.proj.weight'], params['embed']['patches']['kernel']
  assert patches.shape == (32, 3, 14, 14)
  assert patches[5, 1, 9, 2] == kernel[(9 * 14 + 2) * 3 + 1, 5]
  fused, ours = hub['blocks.1.attn.qkv.weight'], params['blocks']['attn']['qkv']
  assert fused.shape == (96, 32) and fused[70, 4] == ours['kernel'][1, 4, 70]
  parts = [f'encoder.layer.1.attention.attention.{name}' for name in ('query', 'key', 'value')]
  np.testing.assert_array_equal(np.concatenate([hf[f'{p}.weight'] for p in parts]), fused)
  np.testing.assert_array_equal(np.concatenate([hf[f'{p}.bias'] for p in parts]), ours['bias'][1])


@pytest.mark.parametrize('prefix', ['dinov2.', 'backbone.', 'module.', 'module.backbone.'])
def test_prefixes_are_dropped(params, tensors, prefix):
  assert_same(read({f'{prefix}{key}': tensor for key, tensor in tensors.items()}), params)


def test_other_parts_of_a_larger_network_are_left_out(params, tensors):
  """A classifier's export; within the prefix nothing is left out."""
  inside = {f'dinov2.{key}': tensor for key, tensor in tensors.items()}
  head = np.zeros((10, 32), np.float32)
  assert_same(read({**inside, 'classifier.weight': head}), params)
  with pytest.raises(names.Misfit, match='not expected head.weight; use'):
    read({**inside, 'dinov2.head.weight': head})


def chunked(tensors):
  """Numbers the blocks of the hub's layout as training does, a chunk each."""
  return {
    key.replace('blocks.', f'blocks.{key.split(".")[1]}.', 1) if key[:7] == 'blocks.' else key: t
    for key, t in tensors.items()
  }


def test_blocks_in_chunks_are_read(params):
  tensors = chunked(convert.to_official(params, tiny.DINOV2, 'hub'))
  assert 'blocks.1.1.attn.qkv.weight' in tensors
  assert_same(read(tensors), params)


def test_one_block_under_two_names_is_refused(params):
  tensors = convert.to_official(params, tiny.DINOV2, 'hub')
  tensors['blocks.0.1.norm1.bias'] = tensors['blocks.1.norm1.bias']
  with pytest.raises(names.Misfit, match='one of two keys for blocks.1.norm1.bias; keep one'):
    read(tensors)


def test_a_model_with_registers_is_refused(tensors, layout):
  key = CLASS[layout].replace('cls_token', 'register_tokens')
  tensors[key] = np.zeros((1, 4, 32), np.float32)
  with pytest.raises(names.Misfit, match=f"holds '{key}', a DINOv2 with registers, .*; use model"):
    read(tensors)


def test_all_that_does_not_fit_is_named_together(tensors, layout):
  cls = CLASS[layout]
  tensors['extra'] = tensors.pop(cls)
  table = TABLE[layout]
  tensors[table] = tensors[table][:, :, :-1]
  with pytest.raises(names.Misfit) as error:
    read(tensors)
  assert str(error.value).startswith(
    f'weights do not fit this network: missing {cls}; not expected extra; of another shape or'
    f' dtype {table} is float32[1,10,31], expected float32[1,10,32]; '
  )


def test_half_precision_is_refused(tensors, layout):
  tensors[CLASS[layout]] = tensors[CLASS[layout]].astype(np.float16)
  with pytest.raises(names.Misfit, match=r'cls_token is float16\[1,1,32\], expected float32'):
    read(tensors)


@pytest.mark.parametrize('ending', ['safetensors', 'pth'])
def test_a_file_is_read_with_positions_resampled_once(
  params, tensors, ending, tmp_path, as_official
):
  path = tmp_path / f'x.{ending}'
  write_torch(path, tensors) if ending == 'pth' else weights.save(path, tensors)
  config, found = convert.load(path, (2, 4))
  assert (config.width, config.depth, config.heads, config.grid) == (32, 2, 2, (2, 4))
  assert (config.patch, config.mlp_ratio, config.dtype, config.precision) == (
    14, 4, 'float32', 'highest'
  )
  positions = found['embed'].pop('pos_embed')
  want = {**params, 'embed': dict(params['embed'])}
  table = want['embed'].pop('pos_embed')
  assert_same(found, want)
  np.testing.assert_array_equal(positions, dinov2.resample_positions(table, (2, 4), 'timm'))
  _, found = convert.load(path, (2, 4), 'hub')
  np.testing.assert_array_equal(
    found['embed']['pos_embed'], dinov2.resample_positions(table, (2, 4), 'hub')
  )
  jax.tree.map(np.testing.assert_array_equal, jax.eval_shape(
    dinov2.make(config).init, jax.random.key(0)
  ), jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), found))


@pytest.mark.parametrize('width,depth,heads', [(384, 12, 6), (768, 12, 12), (1024, 24, 16)])
def test_sizes_are_recognised_by_their_width(width, depth, heads, monkeypatch, tmp_path):
  """From a file that has the table alone; what else it lacks is one line."""
  table = np.zeros((1, 1 + 37**2, width), np.float32)
  config = convert._recognise({'pos_embed': table})
  assert (config.width, config.depth, config.heads, config.grid) == (width, depth, heads, (37, 37))
  weights.save(tmp_path / 'x.safetensors', {'pos_embed': table})
  total = 7 + 14 * depth
  with pytest.raises(ValueError, match=f'x.safetensors: holds 1 of the {total} .* width {width}'):
    convert.load(tmp_path / 'x.safetensors', (16, 16))


@pytest.mark.parametrize('tensors,found', [
  ({f'blocks.{i}.w': np.zeros(2, np.float32) for i in range(300)},
   r"no position table 'pos_embed' or 'embeddings.position_embeddings' .*300 other .*'blocks.0.w'"),
  ({}, r'but 0 other tensors, such as \[\]'),
  ({'pos_embed': np.zeros((1, 256, 768), np.float32)}, r'shape \(1, 256, 768\), expected \('),
  ({'pos_embed': np.zeros(7, np.float32)}, r'shape \(7,\), expected'),
  ({'pos_embed': np.zeros((1, 10, 48), np.float32)}, 'is 48 channels wide, expected one of 384,'),
  ({'pos_embed': np.zeros((1, 197, 768), np.float32),
    **{f'layers.{i}.w': np.zeros(2, np.float32) for i in range(300)}},
   r"holds 1 of the 175 tensors .*without \['blocks.0.attn.proj.bias'\], and 300 others, such as"),
])
def test_another_network_is_one_readable_line(tensors, found, tmp_path):
  weights.save(tmp_path / 'x.safetensors', tensors)
  with pytest.raises(ValueError, match=f'x.safetensors: .*{found}') as error:
    convert.load(tmp_path / 'x.safetensors', (16, 16))
  assert len(str(error.value)) < 400 and 'facebook/dinov2-small' in str(error.value)
  assert '\n' not in str(error.value)


def test_pickles_of_training_need_their_network_taken_out(params, tmp_path, as_official):
  tensors = convert.to_official(params, tiny.DINOV2, 'hub')
  path = write_torch(tmp_path / 'x.pth', {'teacher': tensors})
  with pytest.raises(ValueError, match="x.pth has no tensors .* its keys are 'teacher'"):
    convert.load(path, (2, 2))

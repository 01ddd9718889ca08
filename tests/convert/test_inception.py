"""The official Inception to our tree: what is folded, what may lack, and what is no such file."""

import jax
import numpy as np
import pytest

from fmzoo.convert import inception as convert
from fmzoo.convert import names, weights
from fmzoo.models import inception
from tests import tiny, torch_pickle

UNIT = 'Mixed_6c.branch7x7_2'  # 1 x 7


@pytest.fixture
def tensors():
  return tiny.official_inception()


@pytest.fixture(scope='module')
def params():
  return tiny.random_inception()


@pytest.fixture
def as_official(monkeypatch):
  """Has the tiny network's files read as if it were the official one."""
  monkeypatch.setattr(inception, 'OFFICIAL', tiny.INCEPTION)


def read(tensors):
  return convert.from_official(tensors, tiny.INCEPTION)


def counters():
  """Returns what training counts, as files have it."""
  return {f'{unit}.bn.num_batches_tracked': np.array(7) for unit in tiny.INCEPTION.widths}


def assert_same(found, params):
  assert jax.tree.structure(found) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, found, params)


def refusal(tensors):
  """Returns the line of tensors that must be refused."""
  with pytest.raises(names.Misfit) as error:
    read(tensors)
  return str(error.value)


def test_our_tree_is_that_of_the_network(params):
  shapes = jax.eval_shape(inception.make(tiny.INCEPTION).init, jax.random.key(0))
  assert_same(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), params),
              jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), shapes))


def test_folded_norms_are_norms(tensors, params):
  """At one pixel: all weights of a window that is random, then the batch norm."""
  block, name = UNIT.split('.')
  kernel, bias = params[block][name]['kernel'], params[block][name]['bias']
  weight = tensors[f'{UNIT}.conv.weight']  # [O, I, 1, 7]
  assert kernel.shape == (1, 7, weight.shape[1], weight.shape[0])
  window = np.random.default_rng(0).standard_normal((1, 7, weight.shape[1]))
  scale, shift, mean, variance = (
    np.float64(tensors[f'{UNIT}.bn.{leaf}'])
    for leaf in ('weight', 'bias', 'running_mean', 'running_var')
  )
  plain = np.einsum('oihw,hwi->o', np.float64(weight), window)
  want = (plain - mean) / np.sqrt(variance + 0.001) * scale + shift
  np.testing.assert_allclose(
    np.einsum('hwio,hwi->o', np.float64(kernel), window) + bias, want, rtol=1e-6, atol=1e-6
  )


def test_folding_rounds_once():
  """A variance of which float32 products would lose the last digits."""
  unit = {'kernel': np.full((1, 1, 1, 1), 3, np.float32), 'weight': np.float32([7]),
          'bias': np.float32([1e-3]), 'running_mean': np.float32([11]),
          'running_var': np.float32([1e-4])}
  factor = 7 / np.sqrt(np.float64(np.float32(1e-4)) + 0.001)
  folded = convert.fold(unit)
  assert folded['kernel'].item() == np.float32(3 * factor)
  assert folded['bias'].item() == np.float32(np.float64(np.float32(1e-3)) - 11 * factor)
  assert folded['kernel'].dtype == folded['bias'].dtype == np.float32


def test_layer_of_the_classes_is_transposed(tensors, params):
  np.testing.assert_array_equal(params['fc']['kernel'], tensors['fc.weight'].T)
  np.testing.assert_array_equal(params['fc']['bias'], tensors['fc.bias'])


def test_counters_of_training_may_be_there(tensors, params):
  """All of them, or one."""
  assert_same(read({**tensors, **counters()}), params)
  one = f'{UNIT}.bn.num_batches_tracked'
  assert_same(read({**tensors, one: counters()[one]}), params)


def test_a_counter_of_no_unit_is_refused(tensors):
  name = 'AuxLogits.conv0.bn.num_batches_tracked'
  assert f'not expected {name};' in refusal({**tensors, name: np.array(0)})


def test_all_that_does_not_fit_is_named_together(tensors):
  tensors['extra'] = tensors.pop('Conv2d_1a_3x3.bn.running_var')
  tensors[f'{UNIT}.conv.weight'] = tensors[f'{UNIT}.conv.weight'].transpose(0, 1, 3, 2)
  o, i = (tiny.INCEPTION.widths[f'Mixed_6c.branch7x7_{j}'] for j in (2, 1))
  assert refusal(tensors).startswith(
    'weights do not fit this network: missing Conv2d_1a_3x3.bn.running_var; not expected extra; of'
    f' another shape or dtype {UNIT}.conv.weight is float32[{o},{i},7,1], expected'
    f' float32[{o},{i},1,7]; '
  )


def test_half_precision_is_refused(tensors):
  tensors['fc.bias'] = tensors['fc.bias'].astype(np.float16)
  assert 'fc.bias is float16[11], expected float32[11]' in refusal(tensors)


@pytest.mark.parametrize('form', ['safetensors', 'zip', 'legacy'])
def test_a_file_of_any_form_is_read(tensors, params, form, tmp_path, as_official):
  """With counters, which are integers, and without."""
  for i, held in enumerate((tensors, {**tensors, **counters()})):
    path = tmp_path / f'{i}.{"safetensors" if form == "safetensors" else "pth"}'
    if form == 'safetensors':
      weights.save(path, {key: np.asarray(tensor) for key, tensor in held.items()})
    else:
      path.write_bytes(getattr(torch_pickle, f'{form}_form')(held))
    assert_same(convert.load(path), params)


def test_a_missing_file_is_one_line_with_all_it_takes(tmp_path):
  path = tmp_path / 'encoders' / convert.FILE
  with pytest.raises(ValueError) as error:
    convert.load(path)
  line = str(error.value)
  assert line.startswith(f'{path} is no file; download {convert.FILE} (95628359 bytes, SHA-256 ')
  assert convert.SHA256 in line and line.endswith(f'from {convert.URL} to it')
  assert len(convert.SHA256) == 64 and convert.SHA256[:8] == convert.FILE[-12:-4]
  assert '\n' not in line


@pytest.mark.parametrize('tensors,found', [
  ({f'blocks.{i}.w': np.zeros(2, np.float32) for i in range(300)},
   'missing Conv2d_1a_3x3.bn.bias, .* and 464 more; not expected blocks.0.w, .* and 292 more; '),
  ({'fc.weight': np.zeros((1000, 2048), np.float32)},
   r'fc.weight is float32\[1000,2048\], expected float32\[1008,2048\]; '),
])
def test_another_network_is_one_readable_line(tensors, found, tmp_path):
  path = tmp_path / 'x.safetensors'
  weights.save(path, tensors)
  with pytest.raises(ValueError, match=f'x.safetensors: .*{found}') as error:
    convert.load(path)
  line = str(error.value)
  assert f'{convert.FILE} was expected, from https://' in line and '\n' not in line
  assert len(line) < 1000

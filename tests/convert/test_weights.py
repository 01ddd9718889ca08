"""Files of weights: read without executing or copying, written whole or not at all."""

import pickle
import struct
import sys

import numpy as np
import pytest
import safetensors.numpy

from fmzoo.convert import weights
from tests import torch_pickle


@pytest.fixture
def tensors():
  rng = np.random.default_rng(0)
  return {'b': rng.standard_normal((2, 3)).astype(np.float32), 'a': np.float32([1, -0.0, np.nan])}


def test_tensors_come_back_bit_equal(tensors, tmp_path):
  path = tmp_path / 'folder' / 'x.safetensors'
  weights.save(path, tensors)
  with weights.opened(path) as found:
    assert set(found) == set(tensors)
    for key, tensor in tensors.items():
      assert (found[key].shape, found[key].dtype) == (tensor.shape, 'float32')
      assert np.asarray(found[key]).tobytes() == tensor.tobytes()
  assert [file.name for file in path.parent.iterdir()] == ['x.safetensors']


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
  """A bfloat16 tensor, which numpy does not know, can still be named."""
  header = b'{"x":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
  path = tmp_path / 'x.safetensors'
  path.write_bytes(struct.pack('<Q', len(header)) + header + bytes(4))
  with weights.opened(path) as found:
    assert (found['x'].shape, found['x'].dtype) == ((2,), 'bfloat16')


def test_a_file_that_is_there_stays(tensors, tmp_path):
  path = tmp_path / 'x.safetensors'
  path.write_bytes(b'mine')
  with pytest.raises(ValueError, match='x.safetensors is there already'):
    weights.save(path, tensors)
  assert path.read_bytes() == b'mine' and len(list(tmp_path.iterdir())) == 1


def test_a_file_that_fails_leaves_nothing(tensors, tmp_path, monkeypatch):
  def fail(tensors, path, metadata):
    path.write_bytes(b'half')
    raise OSError('disk full')

  monkeypatch.setattr(safetensors.numpy, 'save_file', fail)
  with pytest.raises(OSError, match='disk full'):
    weights.save(tmp_path / 'x.safetensors', tensors)
  assert not list(tmp_path.iterdir())


class Trap:
  """Unpickled, it leaves a file behind."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (str(self.path), 'w')


def test_other_files_are_refused_and_not_executed(tensors, tmp_path):
  whole = safetensors.numpy.save(tensors)
  sprung = tmp_path / 'sprung'
  cases = {
    'pickle': pickle.dumps(Trap(sprung)), 'empty': b'', 'truncated': whole[:-1],
    'header': whole[:20], 'text': b'no weights at all',
  }
  for name, data in cases.items():
    (tmp_path / name).write_bytes(data)
  for name in (*cases, 'missing', '.'):
    with (
      pytest.raises(ValueError, match=r'cannot be read as safetensors \(.*\.safetensors file'),
      weights.opened(tmp_path / name),
    ):
      pass
  assert not sprung.exists()


def entries(path, chosen='ema'):
  """Returns {key: array} of a file of weights."""
  with weights.opened(path, chosen) as found:
    return {key: np.asarray(tensor) for key, tensor in found.items()}


def checkpoint(**parts):
  """Returns the file of a training checkpoint."""
  return torch_pickle.zip_form({**parts, 'optimizer': {'lr': 0.1}, 'finished_steps': 3})


@pytest.mark.parametrize('ending', ['.pt', '.pth', '.bin', '.PT'])
def test_averaged_or_last_weights_of_a_training_checkpoint(tensors, tmp_path, ending):
  path = tmp_path / f'x{ending}'
  path.write_bytes(checkpoint(model={'a': np.ones(2)}, ema_model=tensors))
  for chosen, expected in (('ema', tensors), ('params', {'a': np.ones(2)})):
    found = entries(path, chosen)
    assert list(found) == list(expected)
    for key in expected:
      np.testing.assert_array_equal(found[key], expected[key])
  assert set(entries(path)) == set(tensors)


def test_tensors_alone_are_taken_as_they_are(tensors, tmp_path):
  """Even if one of them is called like an entry."""
  path = tmp_path / 'x.pth'
  path.write_bytes(torch_pickle.legacy_form({**tensors, 'model': np.ones(2)}))
  for chosen in weights.ENTRIES:
    assert set(entries(path, chosen)) == {*tensors, 'model'}


@pytest.mark.parametrize('value,chosen,words', [
  ({'state': {'a': np.ones(2)}, 'step': 3}, 'ema',
   "no tensors under 'ema_model' (sample.weights='ema') and not tensors alone, its keys are"
   " 'state', 'step'; pass a file of model.state_dict()"),
  ({'model': {'a': np.ones(2)}}, 'ema', "'model'; --config.sample.weights=params takes 'model'"),
  ({'ema_model': {'a': np.ones(2)}}, 'params',
   "no tensors under 'model' (sample.weights='params') and not tensors alone, its keys are"
   " 'ema_model'; --config.sample.weights=ema takes 'ema_model'"),
  ({'ema_model': {'a': 1}}, 'ema', 'its keys are \'ema_model\'; pass'),
  ({'ema_model': {}}, 'ema', 'its keys are \'ema_model\'; pass'),
  ({'ema_model': {3: np.ones(2)}}, 'ema', 'its keys are \'ema_model\'; pass'),
  ({i: i for i in range(20)}, 'ema',
   "its keys are '0', '1', '2', '3', '4', '5', '6', '7', and 12 more; pass"),
  ([np.ones(2)], 'ema', 'its keys are none; pass'),
  ({}, 'ema', 'its keys are none; pass'),
])
def test_checkpoints_without_the_weights_asked_for(tmp_path, value, chosen, words):
  path = tmp_path / 'x.pt'
  path.write_bytes(torch_pickle.zip_form(value))
  with pytest.raises(ValueError) as error:
    entries(path, chosen)
  assert str(error.value).startswith(f'{path} has no tensors under ')
  assert words in str(error.value)


def test_without_torch_no_such_file_is_written(tensors, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  path = tmp_path / 'x.pt'
  for write in (lambda: weights.save(path, tensors), lambda: weights.expect_writable(path)):
    with pytest.raises(ValueError, match=r'x\.pt takes torch to write, .*; pip install torch, or'):
      write()
  weights.expect_writable(tmp_path / 'x.safetensors')
  assert not list(tmp_path.iterdir())


def test_torch_is_imported_by_nobody_else(tensors, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  path = tmp_path / 'x.pt'
  path.write_bytes(torch_pickle.zip_form(tensors))
  assert set(entries(path)) == set(tensors)


@pytest.fixture(params=['torch', 'stand-in'])
def torch(request, monkeypatch):
  """The package, where it is installed, and what behaves like it."""
  if request.param == 'torch':
    return pytest.importorskip('torch')
  monkeypatch.setitem(sys.modules, 'torch', torch_pickle.stand_in())
  return sys.modules['torch']


def test_written_for_torch_and_read_back(torch, tensors, tmp_path):
  path = tmp_path / 'folder' / 'x.pt'
  weights.save(path, tensors)
  assert [file.name for file in path.parent.iterdir()] == ['x.pt']
  found = entries(path)
  assert set(found) == set(tensors)
  for key, tensor in tensors.items():
    assert found[key].dtype == tensor.dtype and found[key].tobytes() == tensor.tobytes()
  with pytest.raises(ValueError, match=r'x\.pt is there already'):
    weights.save(path, tensors)
  with pytest.raises(ValueError, match="sample.weights=ema takes 'ema_model'"):
    entries(path, 'params')


def test_torch_that_fails_leaves_nothing(torch, tensors, tmp_path, monkeypatch):
  def fail(value, file):
    file.write(b'half')
    raise RuntimeError('disk full')

  monkeypatch.setattr(torch, 'save', fail)
  with pytest.raises(ValueError, match=r'x\.pt cannot be written \(disk full\); name a file'):
    weights.save(tmp_path / 'x.pt', tensors)
  assert not list(tmp_path.iterdir())

"""Safetensors files: read without executing or copying, written whole or not at all."""

import pickle
import struct

import numpy as np
import pytest
import safetensors.numpy

from fmzoo.convert import weights


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

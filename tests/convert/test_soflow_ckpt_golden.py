"""Both networks in a SoFlow training checkpoint against their recorded outputs."""

import jax
import numpy as np
import pytest

from fmzoo.convert import soflow as convert
from fmzoo.convert import torch_file, weights
from fmzoo.models import dit
from tests import golden_files as files

NETWORK = 2e-5  # limit of the README there
PREFIX = 'ckpt.'


class Golden:
  """The checkpoint, its arrays, and the network that config.json describes."""

  def __init__(self, folder):
    self.config = files.config(folder)
    self.arrays = files.Arrays(folder / 'io.npz')
    self.path = folder / 'dit_ckpt.pt'
    d = self.config['ckpt_dit']
    self.channels = d['channels']
    self.model = dit.Config(
      patch=d['patch'], width=d['hidden'], depth=d['depth'], heads=d['heads'], mlp_ratio=4.0,
      duration=True, dtype='float32', precision='highest', attention='xla', remat=False, unroll=1,
    )
    self.net = dit.make(
      self.model, (d['data_size'], d['data_size'], self.channels), d['num_classes']
    )
    self.abstract = jax.eval_shape(self.net.init, jax.random.key(0))
    self.apply = jax.jit(self.net.apply)

  def params(self, chosen):
    """Returns our tree of the weights that a value of sample.weights chooses."""
    with weights.opened(self.path, chosen) as tensors:
      return convert.from_official(tensors, self.model, self.channels, self.abstract)


@pytest.fixture(scope='module', params=['golden_root', 'written_root'])
def golden(request):
  return Golden(request.getfixturevalue(request.param) / 'soflow')


def test_outputs_of_both_networks(golden):
  a = golden.arrays
  x, t, s = files.channels_last(a['ckpt.x']), a['ckpt.t'], a['ckpt.s']
  labels = a['ckpt.y'].astype(np.int32)
  chosen_of = {entry: chosen for chosen, entry in weights.ENTRIES.items()}
  recorded = [name for name in a.names(PREFIX) if name.endswith('.net')]
  assert len(recorded) == len(chosen_of)
  for name in recorded:
    entry = name.removeprefix(PREFIX).removesuffix('.net')
    out = golden.apply(golden.params(chosen_of[entry]), x, t, t - s, labels)
    files.close(files.channels_first(out), a[name], NETWORK, name)


def test_weights_come_back_bit_equal(golden):
  for chosen, entry in weights.ENTRIES.items():
    back = convert.to_official(golden.params(chosen), golden.model, golden.channels)
    with torch_file.opened(golden.path) as checkpoint:
      assert set(back) == set(checkpoint[entry])
      for key, tensor in checkpoint[entry].items():
        np.testing.assert_array_equal(back[key], np.asarray(tensor), err_msg=key)


def test_what_else_a_training_checkpoint_holds(golden):
  """Steps, epochs, and moments of Adam of every trained parameter, in the order of the weights."""
  with torch_file.opened(golden.path) as checkpoint:
    assert {type(checkpoint[f'finished_{name}']) for name in ('steps', 'epochs')} == {int}
    shapes = [tensor.shape for tensor in checkpoint['model'].values()]
    moments = checkpoint['optimizer']['state']
    for i, state in moments.items():
      assert state['exp_avg'].shape == state['exp_avg_sq'].shape == shapes[i]
      assert np.asarray(state['step']) == checkpoint['finished_steps']
      assert np.all(np.asarray(state['exp_avg_sq']) >= 0)
    fixed = [i for i in range(len(shapes)) if i not in moments]
    assert [list(checkpoint['model'])[i] for i in fixed] == ['network.pos_embed']


def test_every_array_is_an_input_or_was_checked(golden):
  """Runs after the tests above in this file, which mark what they look at."""
  inputs = set(golden.config['input_keys'])
  assert golden.arrays.names(PREFIX)
  assert not [n for n in golden.arrays.unused() if n not in inputs and n.startswith(PREFIX)]

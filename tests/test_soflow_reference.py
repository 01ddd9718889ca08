"""The NumPy reference of SoFlow against the recorded folder, and the folders that it writes."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import bfm_golden_writer, tape
from tests import golden_files as files
from tests import soflow_augment_reference as augment
from tests import soflow_dit_reference as dit
from tests import soflow_golden_config as second
from tests import soflow_golden_writer as writer
from tests import soflow_reference as ref
from tests import soflow_unet_reference as unet

FOLDER = pathlib.Path(__file__).parent / 'golden' / 'soflow'
ELSEWHERE = ('ckpt.', 'crop.')  # networks of a checkpoint of their own, and image files
# Limits by the start of a name, none above the README's: what a recorded float32 number may be off,
# relative to the largest of its array.
LIMITS = {
  'con.mingap': 4e-4, 'con': 2e-5, 'ucon': 2e-5, 'vel': 1e-5, 'uvel': 1e-5, 'train': 1e-5,
  'dit': 2e-6, 'unet': 2e-6, 'sampler': 2e-6,
}
TABLE, WARP, LATENT = 2e-7, 1e-5, 1e-6  # absolute
LEARNT = 1e-3  # of a parameter or average after training steps, in units of the learning rate
MOVED = 1e-5  # of a trajectory, in units of its largest move


@pytest.fixture(scope='module')
def public():
  """(config, arrays, our outputs) of the recorded folder."""
  config = files.config(FOLDER)
  with np.load(FOLDER / 'io.npz') as arrays:
    arrays = dict(arrays)
  inputs = {name: arrays[name] for name in config['input_keys']}
  return config, arrays, writer.outputs(config, writer.load(FOLDER, config), inputs)


def test_every_recorded_array_is_an_input_or_computed(public):
  config, arrays, out = public
  assert not set(out) & set(config['input_keys'])
  known = {*config['input_keys'], *out}
  assert known - set(arrays) == set()
  assert [name for name in arrays if name not in known and not name.startswith(ELSEWHERE)] == []


def named(out, *starts):
  """The names of outputs that begin with one of `starts`; there must be some for each."""
  assert all(any(name.startswith(start) for name in out) for start in starts)
  return [name for name in out if name.startswith(starts)]


def test_recorded_tables_times_and_moves(public):
  config, arrays, out = public
  for name in named(out, 'sched.', 'rk.', 'time.', 'cfgdecay.', 'temb.', 'posembed.'):
    assert out[name].shape == arrays[name].shape, name
    np.testing.assert_allclose(out[name], arrays[name], rtol=0, atol=TABLE, err_msg=name)
  for name in named(out, 'rk.'):
    if name.endswith('.ratio'):
      np.testing.assert_allclose(out[name], arrays[name], rtol=1e-12, err_msg=name)
  for name in named(out, 'opt.', 'ema.'):
    start = ref.wide(arrays[f'{name.split(".")[0]}.p0'])
    files.close(out[name] - start, arrays[name] - start, MOVED, name)
  np.testing.assert_array_equal(out['pixel.u8'], arrays['pixel.u8'])
  np.testing.assert_allclose(out['latent.sample'], arrays['latent.sample'], rtol=0, atol=LATENT)


def test_recorded_augmentation(public):
  _, arrays, out = public
  for name in named(out, 'aug.'):
    kind = name.split('.')[-1]
    limit = {'out': WARP, 'pad_x0x1y0y1': 0}.get(kind, 1e-6)
    assert out[name].shape == arrays[name].shape, name
    np.testing.assert_allclose(out[name], arrays[name], rtol=0, atol=limit, err_msg=name)


def test_recorded_networks_losses_gradients_and_samplers(public):
  _, arrays, out = public
  for name in named(out, *(f'{start}.' for start in LIMITS)):
    limit = next(limit for start, limit in LIMITS.items() if name.startswith(f'{start}.'))
    files.close(out[name], arrays[name], limit, name)


def test_recorded_training_steps(public):
  config, arrays, out = public
  for name in named(out, 'train.'):
    if name.endswith('.scalars'):
      np.testing.assert_allclose(out[name], arrays[name], rtol=1e-5, err_msg=name)
    else:
      limit = LEARNT * config['train']['lr']
      np.testing.assert_allclose(out[name], arrays[name], rtol=0, atol=limit, err_msg=name)


def test_written_folder_has_the_recorded_schema(public, tmp_path):
  """Names, shapes and kinds of arrays and weights, from the recorded configuration."""
  config, arrays, _ = public
  writer.write_folder(tmp_path, config, seed=0)
  expected = {k: a for k, a in arrays.items() if not k.startswith('crop.')}
  with np.load(tmp_path / 'io.npz') as written:
    written = dict(written)
  assert {k: a.shape for k, a in written.items()} == {k: a.shape for k, a in expected.items()}
  kinds = {k: a.dtype.kind for k, a in expected.items()}
  assert {k: a.dtype.kind for k, a in written.items()} == kinds
  for name in ('dit', 'unet'):
    ours, theirs = (load_file(f / f'{name}.safetensors') for f in (tmp_path, FOLDER))
    assert {k: w.shape for k, w in ours.items()} == {k: w.shape for k, w in theirs.items()}
    assert all(w.dtype == np.float32 and w.all() for w in ours.values())
    for key in theirs:
      if key.endswith('resample_filter'):
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)
  ours, kept = files.config(tmp_path), [k for k in config['input_keys'] if k in expected]
  assert ours == {**config, 'input_keys': kept}


def test_written_folder_is_deterministic_and_follows_the_seed(written_root, tmp_path):
  config, first = second.SECOND_CONFIG, written_root / 'soflow'
  writer.write_folder(tmp_path, config, seed=0)
  for name in ('config.json', 'dit.safetensors', 'unet.safetensors'):
    assert (tmp_path / name).read_bytes() == (first / name).read_bytes(), name
  with np.load(tmp_path / 'io.npz') as ours, np.load(first / 'io.npz') as theirs:
    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    other = writer.synthetic_inputs(config, seed=[1, 2])
    assert not np.array_equal(other['dit.x'], theirs['dit.x'])


def test_second_configuration_stays_of_order_one(written_root):
  config = files.config(written_root / 'soflow')
  with np.load(written_root / 'soflow' / 'io.npz') as arrays:
    for name in set(arrays.files) - set(config['input_keys']):
      size = np.abs(arrays[name].astype(np.float64)).max()
      assert np.isfinite(size) and (size < 50 or name == 'pixel.u8'), f'{name}: {size}'
  assert json.loads(json.dumps(second.SECOND_CONFIG)) == {
    k: v for k, v in config.items() if k != 'input_keys'
  }


def test_second_augmentations_do_not_depend_on_the_padding(written_root):
  """Else an implementation with constant padding could not meet their limit."""
  with np.load(written_root / 'soflow' / 'io.npz') as arrays:
    for case in second.SECOND_CONFIG['aug']:
      pre, size = case['pre'], case['size']
      start = f'{pre}.draw_'
      draws = {k.removeprefix(start): arrays[k] for k in arrays if k.startswith(start)}
      out = augment.augment(arrays[f'{pre}.images'], draws, case['p'], pads=4 * [size - 1])
      np.testing.assert_allclose(out['out'], arrays[f'{pre}.out'], rtol=0, atol=1e-6)


def second_model(section, shapes):
  """A network of the second configuration with synthetic weights."""
  config = second.SECOND_CONFIG[section]
  weights = writer.synthetic_weights(shapes(config), seed=0)
  return ref.Model({k: ref.wide(w) for k, w in weights.items()}, config)


@pytest.mark.parametrize('section, shapes, make', [
  ('dit', second.dit_shapes, dit.dit), ('unet', second.unet_shapes, unet.unet),
])
def test_tape_agrees_with_central_differences(section, shapes, make):
  """One slope for each parameter of the network, of a random projection of its output."""
  model, rng = second_model(section, shapes), np.random.default_rng(0)
  x, t, s = writer.images(rng, model.config, 2), np.array([0.9, 0.4]), np.array([0.2, 0.4])
  labels = np.array([3, 3]) if section == 'dit' else None
  extra = None if section == 'dit' else rng.standard_normal((2, unet.AUGMENT))
  share = rng.standard_normal(x.shape)

  def loss(model):
    """The projection, and nothing else."""
    return (make(model).run(x, t, s, labels, extra) * share).sum(), None

  _, _, grads = ref.differentiated(loss, model)
  assert set(grads) == set(second.trained_names(shapes(model.config)))
  for key in list(grads)[:: 1 if section == 'dit' else 10]:
    direction = ref.wide(bfm_golden_writer.unit_direction(rng, grads[key].shape))
    ends = []
    for move in (1e-4, -1e-4):
      weights = {**model.weights, key: model.weights[key] + move * direction}
      ends.append(loss(model._replace(weights=weights))[0])
    slope, size = (ends[0] - ends[1]) / 2e-4, max(1, np.linalg.norm(grads[key]))
    assert abs(slope - np.vdot(grads[key], direction)) < 1e-6 * size, key


def test_tape_adds_what_an_entry_gives_in_every_place():
  """Repeated rows, broadcast operands, two uses of one array, and an array that is not used."""
  weights = {'a': np.arange(6.0).reshape(3, 2), 'b': np.array([[2.0], [5.0]]), 'c': np.ones(4)}

  def function(w):
    """sum over rows (0, 0, 2) of a, times b, and the squares of a."""
    rows = w['a'][np.array([0, 0, 2])]
    return (rows[None] * w['b'][:, None]).sum() + (w['a'] ** 2).sum(), 'rest'

  out, rest, grads = tape.value_and_gradient(function, weights)
  assert (out, rest) == (7 * 11 + 55, 'rest')
  np.testing.assert_array_equal(grads['a'], [[14, 16], [4, 6], [15, 17]])
  np.testing.assert_array_equal(grads['b'], [[11], [11]])
  np.testing.assert_array_equal(grads['c'], np.zeros(4))


def test_tape_stops_where_asked_and_refuses_what_it_does_not_know():
  weights = {'a': np.array([1.0, 2.0])}
  _, _, grads = tape.value_and_gradient(
    lambda w: ((w['a'] * tape.stop_gradient(w['a'])).sum(), None), weights
  )
  np.testing.assert_array_equal(grads['a'], [1, 2])
  with pytest.raises(AssertionError, match='cosh has no rule'):
    tape.value_and_gradient(lambda w: (np.cosh(w['a']).sum(), None), weights)

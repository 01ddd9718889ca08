"""The NumPy reference of BFM against the recorded folder, and the folders that it writes."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import bfm_golden_writer as writer
from tests import bfm_reference as ref
from tests import golden_files as files

FORWARD, SAMPLER, SLOPE = 2e-6, 1e-5, 5e-6
LARGEST_WHOLE_GRADIENT = 150  # entries


def arrays_of(folder):
  with np.load(folder / 'io.npz') as arrays:
    return dict(arrays)


@pytest.fixture(scope='module')
def public():
  """(Model, arrays) of the recorded folder."""
  folder = pathlib.Path(__file__).parent / 'golden' / 'bfm'
  return ref.load(folder), arrays_of(folder)


def is_derivative(name):
  return name.startswith(('train_grad', 'ft_grad'))


def test_every_recorded_output_is_reproduced(public):
  model, arrays = public
  inputs = writer.synthetic_inputs(model.config, seed=0)
  out = writer.outputs(model, {name: arrays[name] for name in inputs})
  assert set(arrays) == {*inputs, *out, *filter(is_derivative, arrays)}
  for name, value in out.items():
    if name.endswith('_calls'):
      np.testing.assert_allclose(value, arrays[name], rtol=0, atol=6e-8, err_msg=name)
    else:
      sampled = name.split('_')[0] in ('ode', 'frn', 'sde')
      files.close(value, arrays[name], SAMPLER if sampled else FORWARD, name)


def test_recorded_gradients_have_our_slopes(public):
  """All but the global norm, which a few directions cannot give."""
  model, arrays = public
  losses = {'train_grad': writer.total_loss(arrays), 'ft_grad': writer.frn_loss(arrays)}
  names = [name for name in arrays if is_derivative(name) and name != 'train_grad_global_norm']
  assert len(names) == len(model.config['grad_params'] + model.config['ft_grad_params'])
  rng = np.random.default_rng(0)
  for name in names:
    kind, key = name.split('/')
    directions = [writer.unit_direction(rng, arrays[name].shape) for _ in range(3)]
    ours = [ref.slope(losses[kind], model, key, d.astype(np.float64)) for d in directions]
    theirs = [np.vdot(arrays[name].astype(np.float64), d) for d in directions]
    files.close(ours, theirs, SLOPE, name)


def test_written_folder_has_the_recorded_schema(public, tmp_path):
  """Names, shapes and kinds, but with slopes where the recorded gradient is large."""
  model, arrays = public
  config = dict(model.config)
  for whole, sloped in (('grad_params', 'slope_params'), ('ft_grad_params', 'ft_slope_params')):
    small = [k for k in config[whole] if model.weights[k].size <= LARGEST_WHOLE_GRADIENT]
    config |= {whole: small, sloped: [k for k in config[whole] if k not in small]}
  writer.write_folder(tmp_path, config, seed=0)

  expected = {name: a for name, a in arrays.items() if name != 'train_grad_global_norm'}
  for stage, sloped in (('train', 'slope_params'), ('ft', 'ft_slope_params')):
    for key in config[sloped]:
      expected[f'{stage}_direction/{key}'] = expected.pop(f'{stage}_grad/{key}')
      expected[f'{stage}_slope/{key}'] = np.zeros(())
  written = arrays_of(tmp_path)
  assert {k: a.shape for k, a in written.items()} == {k: a.shape for k, a in expected.items()}
  assert {k: a.dtype.kind for k, a in written.items()} == {
    k: a.dtype.kind for k, a in expected.items()
  }
  assert json.loads((tmp_path / 'config.json').read_text()) == config
  tensors = load_file(tmp_path / 'weights.safetensors')
  assert {k: w.shape for k, w in tensors.items()} == {k: w.shape for k, w in model.weights.items()}
  assert all(w.dtype == np.float32 and w.all() for w in tensors.values())


def second_model():
  weights = writer.synthetic_weights(writer.SECOND_CONFIG, seed=0)
  wide = {key: value.astype(np.float64) for key, value in weights.items()}
  return ref.Model(wide, writer.SECOND_CONFIG)


def test_second_configuration_stays_of_order_one():
  model = second_model()
  arrays = writer.synthetic_inputs(model.config, seed=1)
  for name, value in writer.outputs(model, arrays).items():
    size = np.abs(value).max()
    assert np.isfinite(value).all() and 1e-2 < size < 30, f'{name}: {size}'


def test_whole_gradients_and_slopes_agree():
  config = writer.SECOND_CONFIG
  key, large = 'representation_blocks.0.attn.q_norm.weight', 'linear_projection.2.weight'
  few = {'grad_params': [key], 'slope_params': [key, large], 'ft_grad_params': []}
  model = second_model()._replace(config={**config, **few, 'ft_slope_params': []})
  out = writer.derivatives(model, writer.synthetic_inputs(config, seed=1), seed=2)
  slope = np.vdot(out[f'train_grad/{key}'], out[f'train_direction/{key}'])
  files.close(slope, out[f'train_slope/{key}'], 1e-7)
  assert out[f'train_direction/{large}'].shape == (12, 12)
  assert set(out) == {
    f'train_{kind}' for kind in (
      f'grad/{key}', f'direction/{key}', f'slope/{key}', f'direction/{large}', f'slope/{large}'
    )
  }


def test_second_guidance_limits_stay_off_the_grid_and_switch_inside_segments():
  config = writer.SECOND_CONFIG
  grids = [make(config, s) for make in (ref.segment_grid, ref.sde_grid) for s in range(4)]
  limits = np.array([config['interval'], config['frn_interval']])
  assert np.abs(limits.ravel()[:, None] - np.concatenate(grids)).min() > 1e-2
  runs = writer.sampler_outputs(second_model(), writer.synthetic_inputs(config, seed=1))
  for name, guided in (
    ('ode_interval', [[0, 1], [1, 1], [1, 0], [0, 0]]),
    ('frn_interval', [[0, 0], [0, 1], [1, 1], [1, 0]]),
  ):
    rows = writer.SAMPLER_ROWS * (1 + np.ravel(guided))
    np.testing.assert_array_equal(runs[f'{name}_calls'][:, 1], rows)

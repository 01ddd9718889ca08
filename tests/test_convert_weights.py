"""Official weights to a workdir that every command takes, and back."""

import json
import pickle
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from fmzoo import build, command_line, convert_weights, evaluate, files, main, sample, step, train
from fmzoo.parallel import mesh as meshes
from tests import tiny, torch_pickle


def command(*arguments):
  """Runs a command line in this process; returns its exit status."""
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr('sys.argv', ['fmzoo', *map(str, arguments)])
    return main.cli()


def official(path, method, **changes):
  """Writes official weights with noise on every leaf; returns (recipe, parameters)."""
  recipe = tiny.recipe(method, **changes)
  params = jax.jit(recipe.method.init)(jax.random.key(0))
  params = tiny.warm(jax.tree.map(np.asarray, params))
  convert_weights.write_official(path, params, recipe)
  return recipe, params


def prepared(workdir, recipe):
  """Makes a workdir that holds the recipe alone."""
  workdir.mkdir()
  files.write_config(workdir, recipe.config)
  return workdir


def images(workdir):
  """Returns the images of the one `.npz` in a workdir."""
  (path,) = (workdir / 'samples').glob('*.npz')
  with np.load(path) as arrays:
    return arrays['arr_0']


@pytest.fixture(scope='module')
def stages(tmp_path_factory):
  """(folder, recipe of stage 2, state): stage 1 is imported, stage 2 a checkpoint from there."""
  folder = tmp_path_factory.mktemp('stages')
  path, workdir = folder / 'stage1.safetensors', folder / 'stage1'
  prepared(workdir, official(path, 'bfm', mesh__data=1)[0])
  assert command('convert', f'--workdir={workdir}', f'--weights={path}') == 0
  recipe = tiny.recipe(
    'bfm_frn', mesh__data=1, run__init_from=str(workdir), sample__num_images=2
  )
  prepared(folder / 'stage2', recipe)
  with sample.open_checkpoints(recipe, folder / 'stage2', read_only=False) as checkpoints:
    state, _ = train.restore_or_init(recipe, meshes.make(recipe.mesh), checkpoints)
    state = state._replace(ema=tiny.warm(state.ema))  # what training would make of it
    checkpoints.save(2, state)
  return folder, recipe, state


def test_second_stage_starts_from_imported_weights(stages, tmp_path):
  folder, _, _ = stages
  expected, path = safetensors.numpy.load_file(folder / 'stage1.safetensors'), tmp_path / 'x'
  assert command('convert', f'--workdir={folder / "stage2"}', f'--export={path}') == 0
  found = safetensors.numpy.load_file(path)
  assert len(found) == len(expected) + 12
  for key, tensor in expected.items():
    np.testing.assert_array_equal(found[key], tensor, err_msg=key)


@pytest.mark.parametrize('weights', ['ema', 'params'])
def test_averaged_or_last_weights_are_exported(stages, weights, tmp_path):
  """Averaged where trained; what stage 2 freezes has no average."""
  folder, recipe, state = stages
  chosen, path = f'--config.sample.weights={weights}', tmp_path / 'x.safetensors'
  assert command('convert', f'--workdir={folder / "stage2"}', f'--export={path}', chosen) == 0
  found = convert_weights.read_official(path, recipe)
  expected = step.ema_params(state) if weights == 'ema' else state.params
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_exported_weights_come_back_as_the_same_images(stages, tmp_path):
  folder, recipe, _ = stages
  path, workdir = tmp_path / 'x.safetensors', prepared(tmp_path / 'imported', recipe)
  assert command('convert', f'--workdir={folder / "stage2"}', f'--export={path}') == 0
  assert command('convert', f'--workdir={workdir}', f'--weights={path}') == 0
  for place in (folder / 'stage2', workdir):
    assert command('sample', f'--workdir={place}') == 0
  np.testing.assert_array_equal(images(folder / 'stage2'), images(workdir))


def test_the_workdir_has_the_recipe_and_its_identity(stages):
  folder, _, _ = stages
  recipe = build.recipe(command_line.parse(['fmzoo', f'--workdir={folder / "stage1"}'])[1])
  with sample.open_checkpoints(recipe, folder / 'stage1') as checkpoints:
    assert checkpoints.steps() == [0]
    params, _ = checkpoints.restore_params(jax.eval_shape(recipe.method.init, jax.random.key(0)))
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


def test_soflow_both_ways_and_measured(tmp_path):
  """The position table is a leaf that is never trained: it is kept as it is in the file."""
  path, copy = tmp_path / 'x.safetensors', tmp_path / 'copy.safetensors'
  recipe, params = official(path, 'soflow', eval__name='digits')
  convert_weights.import_weights(recipe, tmp_path / 'w', path)
  values = evaluate.evaluate(recipe, tmp_path / 'w')
  assert 0 <= values['accuracy'] <= 1
  convert_weights.export_weights(recipe, tmp_path / 'w', copy)
  assert path.read_bytes() == copy.read_bytes()
  np.testing.assert_array_equal(
    safetensors.numpy.load_file(copy)['network.pos_embed'], params['pos_embed']
  )


@pytest.mark.parametrize('chosen', ['ema', 'params'])
def test_training_checkpoint_of_pytorch_and_back(tmp_path, chosen):
  """Averaged or last weights of a `.pt`, keys as a compiled wrapper names them; bit-equal."""
  folder = tmp_path / 'official'
  recipe, params = official(folder / 'ema.safetensors', 'soflow', sample__weights=chosen)
  convert_weights.write_official(folder / 'params.safetensors', tiny.warm(params, 2), recipe)
  files = {name: folder / f'{name}.safetensors' for name in ('ema', 'params')}
  ema, last = (safetensors.numpy.load_file(files[name]) for name in ('ema', 'params'))
  path, workdir, copy = tmp_path / 'x.pt', prepared(tmp_path / 'w', recipe), tmp_path / 'copy'
  path.write_bytes(torch_pickle.zip_form({
    'model': {f'module.{key}': tensor for key, tensor in last.items()},
    'ema_model': {key.replace('.', '._orig_mod.', 1): tensor for key, tensor in ema.items()},
    'optimizer': {'state': {1: {'exp_avg': np.ones(3)}}, 'param_groups': [{'betas': (0.9, 0.99)}]},
    'finished_steps': 3, 'finished_epochs': 0,
  }))
  assert command('convert', f'--workdir={workdir}', f'--weights={path}') == 0
  assert command('convert', f'--workdir={workdir}', f'--export={copy}') == 0
  other = {'ema': 'params', 'params': 'ema'}[chosen]
  assert copy.read_bytes() == files[chosen].read_bytes() != files[other].read_bytes()


def test_exported_for_pytorch_and_imported_again(stages, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', torch_pickle.stand_in())
  folder, recipe, _ = stages
  path, again, copy = tmp_path / 'x.pt', tmp_path / 'again', tmp_path / 'copy.safetensors'
  assert command('convert', f'--workdir={folder / "stage1"}', f'--export={path}') == 0
  prepared(again, tiny.recipe('bfm', mesh__data=1))
  assert command('convert', f'--workdir={again}', f'--weights={path}') == 0
  assert command('convert', f'--workdir={again}', f'--export={copy}') == 0
  assert copy.read_bytes() == (folder / 'stage1.safetensors').read_bytes()


# name: (arguments, words of the line); {stage1} was imported, {stage2} trained, {new} has a recipe
# of stage 1 alone and {frn} one of stage 2.
CASES = {
  'neither': (('convert', '--workdir={new}'), ('--weights', '--export')),
  'both': (('convert', '--workdir={new}', '--weights=x', '--export=y'), ('--weights', '--export')),
  'step of an import': (('convert', '--workdir={new}', '--weights=x', '--step=1'), ('--step',)),
  'weights of another command': (
    ('sample', '--workdir={stage1}', '--weights=x'), ('--weights', 'convert', 'sample')),
  'export of training': (('--workdir={new}', '--export=x'), ('--export', 'convert', 'train')),
  'missing': (
    ('convert', '--workdir={new}', '--weights={folder}/none.safetensors'), ('none.safetensors',)),
  'no safetensors': (
    ('convert', '--workdir={new}', '--weights={new}/config.json'),
    ('config.json', '.pt, .pth, .bin')),
  'checkpoint without averaged weights': (
    ('convert', '--workdir={new}', '--weights={folder}/last.pt'),
    ("last.pt has no tensors under 'ema_model'", '--config.sample.weights=params')),
  'pickle that runs something': (
    ('convert', '--workdir={new}', '--weights={folder}/trap.pt'),
    ("trap.pt cannot be read as a PyTorch file", "'builtins.eval'")),
  'export to .pt without torch': (
    ('convert', '--workdir={stage1}', '--export={folder}/x.pt'),
    ('x.pt takes torch to write', 'pip install torch')),
  'half precision': (
    ('convert', '--workdir={new}', '--weights={folder}/half.safetensors'),
    ('half.safetensors: ', 't_embedder.mlp.0.bias is float16[32], expected float32[32]')),
  'another width': (
    ('convert', '--workdir={new}', '--weights={folder}/wide.safetensors'),
    ('wide.safetensors: ', 't_embedder.mlp.0.bias is float32[64], expected float32[32]')),
  'residual network for stage 1': (
    ('convert', '--workdir={new}', '--weights={folder}/frn.safetensors'), ('model.frn_depth=0',)),
  'none for stage 2': (
    ('convert', '--workdir={frn}', '--weights={folder}/stage1.safetensors'),
    ('model.frn_depth=1', 'stage 1', 'run.init_from')),
  'import over checkpoints': (
    ('convert', '--workdir={stage1}', '--weights={folder}/stage1.safetensors'),
    ('stage1/checkpoints', '[0]', '--workdir')),
  'import over another recipe': (
    ('convert', '--workdir={new}', '--weights={folder}/stage1.safetensors',
     '--config.sample.num_steps=9'), ('config.json', '--workdir')),
  'export over a file': (
    ('convert', '--workdir={stage1}', '--export={folder}/stage1.safetensors'),
    ('stage1.safetensors is there already',)),
  'export of nothing': (
    ('convert', '--workdir={new}', '--export={folder}/x.safetensors'), ('new', 'checkpoint')),
  'export of no such step': (
    ('convert', '--workdir={stage1}', '--export={folder}/x.safetensors', '--step=7'), ('7', '[0]')),
  'no official weights': (
    ('convert', '--config=configs/sit_digits.py', '--weights=x'), ('fm', 'soflow')),
  'nor to write': (
    ('convert', '--config=configs/sit_digits.py', '--export=x', '--workdir={new}'), ('fm',)),
  'training on': (
    ('train', '--workdir={stage1}'),
    ('parameters alone', '--workdir', '--config.run.init_from={stage1}')),
}


@pytest.fixture(scope='module')
def places(stages):
  """Workdirs and files of the cases: {name: path}."""
  folder, recipe, _ = stages
  tensors = safetensors.numpy.load_file(folder / 'stage1.safetensors')
  key = 't_embedder.mlp.0.bias'
  bias = tensors[key]
  for name, wrong in (('half', bias.astype(np.float16)), ('wide', np.tile(bias, 2))):
    safetensors.numpy.save_file({**tensors, key: wrong}, folder / f'{name}.safetensors')
  convert_weights.export_weights(recipe, folder / 'stage2', folder / 'frn.safetensors')
  (folder / 'last.pt').write_bytes(torch_pickle.zip_form({'model': tensors}))
  (folder / 'trap.pt').write_bytes(torch_pickle.archive(pickle.dumps(eval, 4)))
  prepared(folder / 'new', tiny.recipe('bfm'))
  prepared(folder / 'frn', tiny.recipe('bfm_frn'))
  names = ('stage1', 'stage2', 'new', 'frn')
  return {'folder': folder, **{name: folder / name for name in names}}


def contents(folder):
  """Returns {path: bytes} of every file below a folder."""
  return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.parametrize('case', CASES)
def test_bad_input_is_one_line(case, places, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  arguments, words = CASES[case]
  before = contents(places['folder'])
  capsys.readouterr()
  assert command(*(argument.format(**places) for argument in arguments)) == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith('error: '), lines
  for word in words:
    assert word.format(**places) in lines[0], lines[0]
  assert contents(places['folder']) == before


def test_an_import_that_was_cut_off_can_be_repeated(tmp_path, monkeypatch):
  """The recipe is there, the checkpoint is not."""
  path, workdir = tmp_path / 'x.safetensors', tmp_path / 'w'
  recipe, _ = official(path, 'soflow')
  with monkeypatch.context() as patch:
    patch.setattr(convert_weights.sample.checkpoint.Checkpoints, 'save', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      convert_weights.import_weights(recipe, workdir, path)
  assert json.loads((workdir / 'config.json').read_text())['method']['name'] == 'soflow'
  convert_weights.import_weights(recipe, workdir, path)
  assert (workdir / 'checkpoints' / '0').is_dir()

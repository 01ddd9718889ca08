"""Bad input: one clear line, a non-zero exit, nothing on disk changed."""

import hashlib
import json
import pathlib
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fmzoo import command_line, files, main, pictures, sampler, train
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent
RECIPE = '--config=configs/sit_digits.py'
SMALL = (
  '--config.model.width=32', '--config.model.heads=2', '--config.model.depth=1',
  '--config.data.batch_size=32', '--config.run.steps=2', '--config.log.log_every_steps=1',
  '--config.log.preview_every_steps=0', '--config.eval.name=none',
)


def call(monkeypatch, capsys, *arguments):
  """Runs the command line in this process; returns (exit status, lines on stderr)."""
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(sys, 'argv', ['fmzoo', *arguments])
  capsys.readouterr()
  status = main.cli()
  return status, capsys.readouterr().err.strip().splitlines()


def png(path):
  """Returns the mode and the pixels of a picture on disk."""
  with Image.open(path) as image:
    return image.mode, np.asarray(image)


def contents(folder):
  """Returns {relative path: digest} of every file below a folder."""
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(pathlib.Path(folder).rglob('*')) if path.is_file()
  }


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A workdir in which a tiny SiT has trained two steps."""
  workdir = tmp_path_factory.mktemp('finished')
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'argv', ['fmzoo', RECIPE, *SMALL, f'--workdir={workdir}'])
    assert main.cli() == 0
  return workdir


# name: (arguments, words of the line); {workdir} has a finished run, {empty} has nothing.
CASES = {
  'second stage of another method': (
    ('--config=configs/bfm_digits_frn.py', '--config.run.init_from={workdir}',
     '--config.mesh.data=1', '--workdir={empty}/second'),
    ('run.init_from', 'model.name', 'dit', 'blockwise')),
  'unknown key': ((RECIPE, '--config.optim.lr=1'), ('lr',)),
  'unknown key of a stored recipe': (
    ('sample', '--workdir={workdir}', '--config.sample.num_step=4'), ('num_step',)),
  'unknown section of a stored recipe': (
    ('sample', '--workdir={workdir}', '--config.smaple.num_steps=4'), ('smaple',)),
  'unknown section': ((RECIPE, '--config.optimizer.lr=1'), ('optimizer',)),
  'not a number': ((RECIPE, '--config.run.steps=many'), ('run.steps', 'many')),
  'not an integer': ((RECIPE, '--config.run.steps=1.5'), ('run.steps', '1.5')),
  'unknown flag': ((RECIPE, '--wrokdir=x'), ('wrokdir',)),
  'unknown command': (('trian', RECIPE), ('trian', 'train')),
  'two commands': (('train', 'sample', RECIPE), ("'sample'", "'train'")),
  'a word too many': (('sample', 'digits'), ("'digits'", "'sample'", '--flag=value')),
  'a word behind the flags': (('sample', '--workdir={workdir}', '3'), ("'3'", "'sample'")),
  'no such recipe': (('--config=configs/sit_digit.py',), ('configs/sit_digit.py', 'configs/')),
  'no recipe': (('--config=README.md',), ('README.md',)),
  'recipe without a name': (('--config',), ('--config=',)),
  'argument of a recipe without': (
    ('--config=configs/sit_digits.py:xl',), ('sit_digits.py:xl', 'argument')),
  'key nearly right': (
    (RECIPE, '--config.run.step=5'), ('--config.run.step', "'run'", 'init_from, seed, steps')),
  'no recipe at all': (('sample', '--workdir={empty}'), ('--config', 'config.json')),
  'unknown method': ((RECIPE, '--config.method.name=gan'), ('method.name', 'gan', 'soflow')),
  'unknown model': ((RECIPE, '--config.model.name=cnn'), ('model.name', 'cnn', 'dit')),
  'unknown data': ((RECIPE, *SMALL, '--config.data.name=mnist', '--workdir={empty}'),
                   ('data.name', 'mnist', 'digits')),
  'unknown solver': ((RECIPE, '--config.sample.solver=rk9'), ('sample.solver', 'rk9', 'heun')),
  'recipe of two words': (('--config', 'configs/sit_digits.py', '--config.optim.lr=1'), ('lr',)),
  'checkpoint for train': ((RECIPE, '--step=3'), ('--step', 'train')),
  'samples without a name': (
    ('evaluate', '--workdir={workdir}', '--samples='), ('--samples=', 'empty')),
  'samples for sample': (('sample', '--workdir={workdir}', '--samples=x.npz'), ('--samples',)),
  'step and samples': (
    ('evaluate', '--workdir={workdir}', '--samples=x.npz', '--step=2'), ('--step', '--samples')),
  'path of noise': ((RECIPE, '--config.method.path=cubic'), ('method.path', 'cubic', 'trig')),
  'negative clip': ((RECIPE, '--config.optim.clip_norm=-1.0'), ('optim.clip_norm=-1.0', '0')),
  'no micro-batches': (
    (RECIPE, '--config.optim.accumulate_steps=0'), ('optim.accumulate_steps=0',)),
  'no batch of samples': ((RECIPE, '--config.sample.batch_size=0'), ('sample.batch_size=0',)),
  'never a log': ((RECIPE, '--config.log.log_every_steps=0'), ('log.log_every_steps=0',)),
  'steps below nought': ((RECIPE, '--config.run.steps=-5'), ('run.steps=-5',)),
  'seed too large': ((RECIPE, '--config.run.seed=99999999999'), ('run.seed', '4294967295')),
  'average of more than all': ((RECIPE, '--config.ema.decay=1.5'), ('ema.decay=1.5', '1')),
  'labels all dropped twice': (
    (RECIPE, '--config.method.label_dropout=10.0'), ('method.label_dropout=10.0',)),
  'unknown attention': ((RECIPE, '--config.model.attention=flash'), ('flash', 'xla')),
  'unknown dtype': ((RECIPE, '--config.model.dtype=bf16'), ('model.dtype', 'bf16', 'bfloat16')),
  'unknown precision': ((RECIPE, '--config.model.precision=exact'), ('exact', 'highest')),
  'no width': ((RECIPE, '--config.model.width=0'), ('model.width=0',)),
  'no blocks': ((RECIPE, '--config.model.depth=0'), ('model.depth=0',)),
  'one bound of an interval': (
    ('--config=configs/bfm_digits.py', '--config.sample.guidance_interval=(0.5,)'),
    ('sample.guidance_interval=(0.5,)', 'two')),
  'words in a tuple of numbers': (
    ('--config=configs/soflow_digits.py', "--config.method.time_mean=('a', 0.0, 0.0)"),
    ('method.time_mean=', "'a'")),
  'unknown evaluation': ((RECIPE, '--config.eval.name=digit'), ('eval.name', 'digit', 'digits')),
  'evaluation of other data': (
    (RECIPE, '--config.data.channels=4'), ('eval.name', '(8, 8, 4)')),
  'patch of the encoder': (
    ('--config=configs/bfm_digits.py', '--config.model.patch=4'), ('model.patch=4', '16')),
  'solution without duration': (
    ('--config=configs/soflow_digits.py', '--config.model.duration=False'),
    ('model.duration=False', 'True', 'soflow')),
  'velocity with duration': ((RECIPE, '--config.model.duration=True'), ('model.duration=True',)),
  'network of another method': (
    ('--config=configs/bfm_digits.py', '--config.method.name=fm'), ('model.name', 'dit')),
  'residual network in stage 1': (
    ('--config=configs/bfm_digits.py', '--config.model.frn_depth=1'), ('model.frn_depth=1', '0')),
  'stage 2 of nothing': (
    ('--config=configs/bfm_digits_frn.py', '--config.run.init_from='), ('run.init_from', 'bfm')),
  'unknown schedule': ((RECIPE, '--config.optim.schedule=step'), ('optim.schedule', 'cosine')),
  'unknown mesh mode': ((RECIPE, '--config.mesh.mode=pjit', '--workdir={empty}'),
                        ('mesh.mode', 'pjit', 'pmap')),
  'more devices than there are': ((RECIPE, '--config.mesh.data=99', '--workdir={empty}'),
                                  ('mesh.data', '99', '8')),
  'batch over devices': ((RECIPE, '--config.data.batch_size=50', '--workdir={empty}'),
                         ('data.batch_size=50', '48 or 56')),
  'batch over micro-batches': (
    (RECIPE, '--config.mesh.data=1', '--config.data.batch_size=50',
     '--config.optim.accumulate_steps=4', '--workdir={empty}'),
    ('optim.accumulate_steps', '48 or 52')),
  'empty batch': ((RECIPE, '--config.data.batch_size=0'), ('data.batch_size=0',)),
  'patch': ((RECIPE, '--config.model.patch=3'), ('model.patch=3',)),
  'heads': ((RECIPE, '--config.model.heads=3'), ('model.heads=3', '128')),
  'segments beyond the batch': (
    ('--config=configs/bfm_digits.py', '--config.data.batch_size=60', '--workdir={empty}'),
    ('data.batch_size=60', '48 or 96')),
  'guidance without dropped labels': (
    ('--config=configs/soflow_digits.py', '--config.method.guidance=2.0',
     '--config.method.label_dropout=0.0'), ('guidance', 'label_dropout')),
  'another method': (
    ('--config=configs/soflow_digits.py', *SMALL, '--workdir={workdir}'),
    ('method.name', 'fm', 'soflow', 'workdir')),
  'another width': (
    (RECIPE, *SMALL, '--config.model.width=64', '--workdir={workdir}'), ('width', '32', '64')),
  'another seed': ((RECIPE, *SMALL, '--config.run.seed=5', '--workdir={workdir}'), ('seed', '5')),
  'unwritable workdir': ((RECIPE, *SMALL, '--workdir={workdir}/config.json'), ('config.json',)),
  'no checkpoint': (('sample', RECIPE, *SMALL, '--workdir={empty}'), ('checkpoint', 'train')),
  'no such step': (('sample', '--workdir={workdir}', '--step=7'), ('7', '2')),
  'vae without latents': (
    (RECIPE, '--config.data.vae=x.safetensors'), ('data.vae', 'x.safetensors', 'data.name')),
  'vae of other latents': (
    (RECIPE, '--config.data.vae=x.safetensors', '--config.data.name=latents',
     '--config.eval.name=none'), ('data.channels=1', '4', 'data.vae')),
  'label out of range': (
    ('sample', '--workdir={workdir}', '--config.sample.labels=3,10'), ('3,10', '0 to 9')),
  'label not a number': (
    ('sample', '--workdir={workdir}', '--config.sample.labels=seven'), ('seven', 'balanced')),
  'no images': (('sample', '--workdir={workdir}', '--config.sample.num_images=0'),
                ('sample.num_images=0',)),
  'unknown weights': (
    ('sample', '--workdir={workdir}', '--config.sample.weights=best'), ('best', 'ema')),
  'nothing to measure': (('evaluate', '--workdir={workdir}'), ('eval.name', 'digits')),
  'no samples file': (
    ('evaluate', '--workdir={workdir}', '--config.eval.name=digits', '--samples={empty}/x.npz'),
    ('x.npz',)),
  'first stage missing': (
    ('--config=configs/bfm_digits_frn.py', '--config.run.init_from={empty}/stage1',
     '--config.data.batch_size=48', '--workdir={empty}'),
    ('stage1',)),
  'latents missing': (
    ('--config=configs/bfm_xl.py', '--config.data.path={empty}/latents', '--workdir={empty}'),
    ('data.path', 'latents')),
  'processes without a place to meet': (
    (RECIPE, '--processes=2'), ('--processes=2', '--coordinator=HOST:PORT', 'none of them')),
  'a place to meet without a port': (
    (RECIPE, '--coordinator=host', '--processes=2', '--process=0'), ('--coordinator=host', 'PORT')),
  'a process beyond the last': (
    (RECIPE, '--coordinator=a:1', '--processes=2', '--process=2'), ('--process=2', '0 to 1')),
  'processes of a command for one': (
    ('bench', RECIPE, '--processes=2'), ('--processes', "not of 'bench'")),
}


@pytest.mark.parametrize('case', CASES)
def test_bad_input_is_one_line(case, finished, tmp_path, monkeypatch, capsys):
  arguments, words = CASES[case]
  places = {'workdir': finished, 'empty': tmp_path}
  before = contents(finished)
  status, lines = call(monkeypatch, capsys, *(a.format(**places) for a in arguments))
  assert status == 2, lines
  assert len(lines) == 1 and lines[0].startswith('error: '), lines
  assert '\\n' not in lines[0] and 'Traceback' not in lines[0]
  for word in words:
    assert word in lines[0], lines[0]
  assert contents(finished) == before
  assert not [name for name in contents(tmp_path) if not name.startswith('checkpoints')]


@pytest.mark.parametrize('text', ['{"run": ', '[]', '3', '{}', '{"run": 3}'])
def test_broken_stored_config_is_one_line(text, tmp_path, monkeypatch, capsys):
  (tmp_path / 'config.json').write_text(text)
  status, lines = call(monkeypatch, capsys, 'sample', f'--workdir={tmp_path}')
  assert status == 2 and len(lines) == 1 and 'config' in lines[0]


def test_a_fault_of_fmzoo_is_not_dressed_up_as_bad_input(monkeypatch, capsys):
  def fail(*_):
    raise KeyError('a bug')

  monkeypatch.setattr('fmzoo.build.recipe', fail)
  with pytest.raises(KeyError):
    call(monkeypatch, capsys, RECIPE)


def test_recipes_may_take_an_argument(tmp_path):
  """FILE:ARG; what the recipe refuses is one line, too."""
  path = tmp_path / 'sized.py'
  path.write_text(
    'from configs import sit_digits\n'
    'def get_config(size):\n'
    '  if size not in ("s", "l"):\n'
    '    raise ValueError(f"size {size} is unknown; use s or l")\n'
    '  config = sit_digits.get_config()\n'
    '  config.model.width = {"s": 32, "l": 64}[size]\n'
    '  return config\n'
  )
  _, config, workdir, _ = command_line.parse(['fmzoo', f'--config={path}:l'])
  assert config.model.width == 64 and workdir == 'runs/sized_l'
  assert command_line.parse(['fmzoo', '--config', f'{path}:s'])[1].model.width == 32
  with pytest.raises(ValueError, match='sized.py:xl cannot be used: size xl is unknown'):
    command_line.parse(['fmzoo', f'--config={path}:xl'])


def test_every_command_and_flag_is_in_the_help(capsys):
  assert set(main.COMMANDS) == set(command_line.COMMANDS)
  assert main.run(['fmzoo', '--help']) == 0
  text = capsys.readouterr().out
  for command, names in command_line.COMMANDS.items():
    assert f'\n  {command} ' in text
    assert all(f'\n  --{name} ' in text for name in names)


def test_stopped_early_or_interrupted_is_told_by_the_exit_status(monkeypatch, capsys):
  """What has to start again sees 143 after SIGTERM and 130 after Ctrl-C, and 0 at the end."""

  def interrupt(*_):
    raise KeyboardInterrupt

  for end, expected in ((lambda recipe, _: SimpleNamespace(step=np.int32(3000)), 0),
                        (lambda recipe, _: SimpleNamespace(step=np.int32(2999)), 143),
                        (interrupt, 130)):
    monkeypatch.setattr(train, 'train', end)
    status, lines = call(monkeypatch, capsys, RECIPE, '--config.run.steps=3000')
    assert status == expected
  assert len(lines) == 1 and lines[0].startswith('stopped by Ctrl-C; the same command goes on')


def test_stored_config_is_read_back(finished, monkeypatch):
  monkeypatch.chdir(ROOT)
  _, config, workdir, _ = command_line.parse(
    ['fmzoo', 'sample', f'--workdir={finished}', '--config.sample.num_images=3']
  )
  assert config.model.width == 32 and config.sample.num_images == 3
  assert workdir == str(finished)
  assert config.to_dict()['log'] == json.loads(
    (finished / 'config.json').read_text(), object_hook=lambda d: {
      key: tuple(value) if isinstance(value, list) else value for key, value in d.items()
    })['log']


def test_cifar10_from_training_to_pictures_and_official_weights(
  cifar10_data, tmp_path, monkeypatch, capsys
):
  """Everything in colour, and nothing that measures it; recipes have tuples in their config.json.

  The tiny recipe as it is, since other tests compile its step, too.
  """
  workdir, again = tmp_path / 'run', tmp_path / 'again'
  monkeypatch.setattr(sampler, 'PREVIEW_ROWS', 1)
  recipe = tiny.recipe('soflow_unet', mesh__data=1, log__preview_every_steps=2)
  for folder in (workdir, again):
    folder.mkdir()
    files.write_config(folder, recipe.config)
  weights = [tmp_path / name for name in ('one.safetensors', 'two.safetensors')]
  for arguments in (
    ('train', f'--workdir={workdir}', '--config.run.steps=2'),
    ('sample', f'--workdir={workdir}', '--config.sample.num_images=10'),
    ('convert', f'--workdir={workdir}', f'--export={weights[0]}'),
    ('convert', f'--workdir={again}', f'--weights={weights[0]}'),
    ('convert', f'--workdir={again}', f'--export={weights[1]}'),
  ):
    status, lines = call(monkeypatch, capsys, *arguments)
    assert status == 0, lines
  assert weights[0].read_bytes() == weights[1].read_bytes()
  mode, preview = png(workdir / 'samples' / 'step_0000002.png')
  assert mode == 'RGB' and preview.shape == (68, 662, 3)  # ten pictures, each twice its size
  assert (preview[2:66, 2:66].std(axis=(0, 1)) > 50).all()  # noise in every colour, and not grey
  assert np.abs(np.diff(preview[2:66, 2:66].astype(int), axis=-1)).mean() > 50
  (path,) = (workdir / 'samples').glob('*.npz')
  images = np.load(path)['arr_0']
  assert images.shape == (10, 32, 32, 3) and images.dtype == np.uint8
  np.testing.assert_array_equal(pictures.grid(images, 10), preview)
  np.testing.assert_array_equal(png(path.with_suffix('.png'))[1], preview)
  status, lines = call(monkeypatch, capsys, 'evaluate', f'--workdir={workdir}')
  assert status == 2 and len(lines) == 1 and "eval.name='none' measures nothing" in lines[0]


def test_help_and_import_are_quick():
  """The bars are of an idle machine; one in three has to be below, since this one may be busy."""
  def output_within(bar, *arguments):
    times = []
    while len(times) < 3 and (not times or times[-1] >= bar):
      start = time.time()
      result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
      )
      times.append(time.time() - start)
    assert min(times) < bar, times
    return result.stdout

  text = output_within(2, '-m', 'fmzoo.main', '--help')
  assert 'evaluate' in text and '--workdir' in text
  output_within(1.5, '-c', 'import fmzoo')


def test_light_modules_need_jax_flax_optax_and_numpy_alone():
  """What an accelerator machine runs must not reach for the data and logging packages."""
  code = (
    'import sys\n'
    'class Refuse:\n'
    '  def find_spec(self, name, path=None, target=None):\n'
    '    if name.partition(".")[0] in ("grain", "tensorflow", "clu", "orbax", "sklearn", "PIL",'
    ' "tensorflow_datasets", "ml_collections", "array_record", "tqdm"):\n'
    '      raise ImportError(name)\n'
    'sys.meta_path.insert(0, Refuse())\n'
    'import fmzoo.build, fmzoo.step, fmzoo.inputs, fmzoo.cost\n'
    'import fmzoo.methods.fm, fmzoo.methods.soflow, fmzoo.methods.bfm, fmzoo.methods.bfm_frn\n'
    'import fmzoo.models.dit, fmzoo.models.blockwise, fmzoo.parallel.mesh, fmzoo.parallel.batch\n'
  )
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


@pytest.mark.parametrize('method', tiny.METHODS)
def test_every_method_builds_from_its_recipe(method):
  assert tiny.recipe(method).method_name == method

"""The notebook for Colab: its cells run, show pictures, and fail aloud."""

import importlib.metadata
import os
import pathlib
import subprocess

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / 'launch' / 'colab_tpu.ipynb'
SMALL = (
  '--config.model.width=32', '--config.model.heads=2', '--config.model.depth=1',
  '--config.model.unroll=1', '--config.data.batch_size=32', '--config.eval.num_images=20',
)


def cells():
  """Returns {id: cell} of the notebook as it is stored."""
  return {cell['id']: cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells}


def execute(monkeypatch, runs, *flags):
  """Executes the notebook in its own folder; returns {id: outputs} of its cells."""
  monkeypatch.setenv('FMZOO_STEPS', '4')
  monkeypatch.setenv('FMZOO_FLAGS', ' '.join((*SMALL, *flags)))
  monkeypatch.setenv('FMZOO_RUNS', str(runs))
  monkeypatch.setenv('FMZOO_WEIGHTS', str(runs))  # any workdir is one to sample from
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  folder = {'metadata': {'path': str(NOTEBOOK.parent)}}
  nbclient.NotebookClient(notebook, timeout=300, resources=folder).execute()
  return {cell['id']: cell.get('outputs', []) for cell in notebook.cells}


def text(outputs):
  """Returns what a cell printed."""
  return ''.join(output.text for output in outputs if output.output_type == 'stream')


def pictures(outputs):
  """Returns the kinds of what a cell displayed."""
  return [kind for output in outputs for kind in output.get('data', {}) if kind == 'image/png']


def test_the_notebook_trains_shows_pictures_and_tells_numbers(monkeypatch, tmp_path):
  outputs = execute(monkeypatch, tmp_path)
  assert 'nothing is installed' in text(outputs['needs'])
  assert str(ROOT / 'fmzoo' / '__init__.py') in text(outputs['devices'])
  assert 'step 4 of 4' in text(outputs['training'])
  for name in ('preview', 'samples', 'weights'):
    assert len(pictures(outputs[name])) == 1, name
  assert 'accuracy: ' in text(outputs['numbers']) and 'frechet: ' in text(outputs['numbers'])
  assert len(list(tmp_path.glob('colab_digits/samples/*.npz'))) == 2


def test_a_command_that_fails_fails_the_notebook(monkeypatch, tmp_path):
  with pytest.raises(nbclient.exceptions.CellExecutionError, match='CalledProcessError') as raised:
    execute(monkeypatch, tmp_path, '--config.optim.lr=1')
  assert "'lr' is no key of 'optim'" in str(raised.value)


def test_the_stored_notebook_holds_no_outputs():
  for name, cell in cells().items():
    if cell.cell_type == 'code':
      assert not cell.outputs and cell.execution_count is None, name
      assert not cell.source.startswith(('!', '%')) and '\n!' not in cell.source, name


def call(monkeypatch, *names, installed=None):
  """Runs some cells in this process; returns the commands they would have started.

  Args:
    installed: {package: version} in place of what is installed; None is missing.
  """
  monkeypatch.chdir(NOTEBOOK.parent)
  version, commands = importlib.metadata.version, []

  def found(package):
    if package not in (installed or {}):
      return version(package)
    if installed[package] is None:
      raise importlib.metadata.PackageNotFoundError(package)
    return installed[package]

  monkeypatch.setattr(importlib.metadata, 'version', found)
  space = {'display': lambda picture: None}
  for name in ('settings', 'code', *names):
    exec(compile(cells()[name].source, name, 'exec'), space)
    space['run'] = lambda *words: commands.append([str(word) for word in words])
  return commands


def test_what_is_missing_is_installed_beside_the_jax_that_is_there(monkeypatch):
  installed = {'clu': None, 'optax': '0.0.1', 'tensorflow-cpu': None, 'tensorflow': '2.99'}
  ((*pip, constraints, first, second),) = call(monkeypatch, 'needs', installed=installed)
  assert pip[1:] == ['-m', 'pip', 'install', '--quiet', '-c']
  assert [first.partition('>=')[0], second.partition('>=')[0]] == ['optax', 'clu']
  kept = pathlib.Path(constraints).read_text().splitlines()
  assert f'jax=={importlib.metadata.version("jax")}' in kept
  assert not [line for line in kept if not line.startswith(('jax', 'libtpu'))]


def test_a_jax_that_is_too_old_is_named_and_left_alone(monkeypatch):
  with pytest.raises(RuntimeError, match='expected jax>=.*newer runtime'):
    call(monkeypatch, 'needs', installed={'jax': '0.4.0', 'clu': None})


def test_without_official_weights_one_line_says_how_to_get_them(monkeypatch, tmp_path, capsys):
  monkeypatch.setenv('FMZOO_WEIGHTS', str(tmp_path))
  capsys.readouterr()
  assert call(monkeypatch, 'weights') == []
  (line,) = capsys.readouterr().out.splitlines()
  assert str(tmp_path) in line and 'convert --config=' in line


def test_without_checkout_the_repository_is_asked_for(monkeypatch, tmp_path):
  monkeypatch.setattr(pathlib.Path, 'cwd', lambda: tmp_path)
  with pytest.raises(FileNotFoundError, match='REPOSITORY=.*git address'):
    call(monkeypatch)


def test_a_repository_is_cloned_once(monkeypatch, tmp_path):
  origin = tmp_path / 'origin'
  (origin / 'fmzoo').mkdir(parents=True)
  (origin / 'fmzoo' / 'main.py').write_text('')
  git = ('git', '-c', 'user.name=a', '-c', 'user.email=a@b', '-C', str(origin))
  for words in (('init', '--quiet'), ('add', '.'), ('commit', '--quiet', '-m', 'a')):
    subprocess.run([*git, *words], check=True)
  monkeypatch.chdir(tmp_path)
  space = {'REPOSITORY': f'file://{origin}', 'os': os}
  for _ in range(2):
    exec(cells()['code'].source, space)
    assert space['ROOT'] == tmp_path / 'fmzoo_checkout'
    assert (space['ROOT'] / 'fmzoo' / 'main.py').exists()

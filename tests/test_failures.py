"""What a run does when its disk, its folder, its data or its numbers fail it."""

import contextlib
import json
import logging
import pathlib
import resource
import shutil
import time

import jax
import numpy as np
import pytest

from fmzoo import checkpoint, command_line, hooks, sources, train
from tests import tiny
from tests.test_resume import arrays, losses

COMPILED = {}


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
  """Has all runs here, which differ in what happens to them alone, share a program."""
  compile_step = train.compile_step

  def compile_once(recipe, *args):
    if recipe.method_name not in COMPILED:
      COMPILED[recipe.method_name] = compile_step(recipe, *args)
    return COMPILED[recipe.method_name]

  monkeypatch.setattr(train, 'compile_step', compile_once)


@pytest.fixture
def after(monkeypatch):
  """`after(n, act)` has `act()` run once step n is done, before its hooks and between saves."""
  acts, call = {}, hooks.Hooks.__call__

  def call_after(hooks, done, *args):
    if done in acts:
      while hooks.checkpoints._manager.is_saving_in_progress():
        time.sleep(0.01)
      acts.pop(done)()
    call(hooks, done, *args)

  monkeypatch.setattr(hooks.Hooks, '__call__', call_after)
  return acts.__setitem__


@contextlib.contextmanager
def small_files():
  """Yields what sets the size at which the system refuses to make a file larger."""
  former = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, former)


def short(**changes):
  """Six steps of the tiny baseline, every one in the log, every second one saved."""
  return tiny.recipe('fm', mesh__data=1, run__steps=6, log__log_every_steps=1, **changes)


def fails(recipe, workdir, message):
  """Trains and expects the one line of a refusal, which fmzoo itself wrote."""
  with pytest.raises(ValueError, match=message) as error:
    train.train(recipe, workdir)
  assert '\n' not in str(error.value) and command_line.raised_here(error.value)


def saved(workdir):
  return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())


def errors_of(caplog):
  return [r.message for r in caplog.records if r.levelno >= logging.ERROR and 'fmzoo' in r.pathname]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """(state, losses) of a run that nothing happens to."""
  workdir = tmp_path_factory.mktemp('whole')
  return arrays(train.train(short(), workdir)), losses(workdir)


def assert_goes_on(workdir, whole):
  """The same command ends where a run without failure does, bit for bit."""
  state = train.train(short(), workdir)
  jax.tree.map(np.testing.assert_array_equal, arrays(state), whole[0])
  assert losses(workdir) == whole[1]
  assert saved(workdir)[-1] == 6


# The disk.


def test_full_disk_while_saving_keeps_the_checkpoint_before(tmp_path, after, whole):
  """Step 4 fails in its thread, which is known at step 6, and that cannot be saved either."""
  with small_files() as limit:
    after(3, lambda: limit(60_000))
    fails(
      short(), tmp_path,
      r'checkpoints/6 cannot be written \(File too large\); free space there.* from step 2$',
    )
  assert '2' in {path.name for path in (tmp_path / 'checkpoints').iterdir()}
  assert_goes_on(tmp_path, whole)


def test_disk_full_for_a_while_costs_no_steps(tmp_path, after, caplog):
  with small_files() as limit:
    after(3, lambda: limit(60_000))
    after(5, lambda: limit(resource.RLIM_INFINITY))
    assert int(train.train(short(), tmp_path).step) == 6
  assert '6' in {path.name for path in (tmp_path / 'checkpoints').iterdir()}
  assert any('4 cannot be written (File too large)' in line for line in errors_of(caplog))


def test_full_disk_while_writing_metrics(tmp_path, after):
  """The line is torn, which the next start takes out."""
  metrics = tmp_path / 'metrics.jsonl'
  with small_files() as limit:
    after(4, lambda: limit(metrics.stat().st_size + 20))
    fails(
      short(), tmp_path,
      r"File too large: '.*metrics.jsonl'; free space .* the same command goes on from step 2$",
    )
  torn = metrics.read_text().splitlines()[-1]
  assert torn.startswith('{"step": 4,') and len(torn) == 20


@pytest.mark.parametrize('name', ['metrics.jsonl', 'samples'])
def test_place_that_takes_no_files(tmp_path, after, name):
  """The state in memory is saved before the run ends."""

  def block():
    if (tmp_path / name).exists():
      (tmp_path / name).rename(tmp_path / 'away')
      (tmp_path / name).mkdir()
    else:
      (tmp_path / name).write_text('')

  after(3, block)
  fails(
    short(log__preview_every_steps=3), tmp_path, rf'{name}.*; free space .* goes on from step 3$'
  )
  assert saved(tmp_path) == [2, 3]


# The folder.


def test_workdir_that_vanishes_is_made_again(tmp_path, after, caplog):
  workdir = tmp_path / 'run'
  after(3, lambda: workdir.rename(tmp_path / 'elsewhere'))
  train.train(short(), workdir)
  assert saved(workdir) == [4, 6]
  assert sorted(losses(workdir)) == [3, 4, 5, 6]
  assert (workdir / 'config.json').exists() and list(workdir.glob('events*'))
  assert any('config.json is gone' in line for line in errors_of(caplog))
  assert any('checkpoints is gone' in line for line in errors_of(caplog))


def test_folder_that_vanishes_under_a_save_is_saved_to_again(tmp_path, monkeypatch, caplog):
  """Also under the last one, which no other would make up for."""
  save, under = checkpoint.Checkpoints.save, {4, 6}

  def save_and_lose(checkpoints, step, state):
    begun, folder = save(checkpoints, step, state), pathlib.Path(checkpoints.directory)
    if step in under:
      under.remove(step)
      # Orbax makes its folders later; before that there is nothing to lose.
      while not any(folder.glob(f'{step}.*/*')) and not (folder / str(step)).exists():
        time.sleep(0.001)
      folder.rename(tmp_path / f'elsewhere-{step}')
    return begun

  monkeypatch.setattr(checkpoint.Checkpoints, 'save', save_and_lose)
  train.train(short(), tmp_path)
  assert saved(tmp_path) == [6]
  told = errors_of(caplog)  # the second where the save was quicker than the loss
  assert any('4 cannot be written' in line or 'checkpoints is gone' in line for line in told)


def test_file_in_place_of_the_checkpoints_ends_the_run(tmp_path, after):
  folder = tmp_path / 'checkpoints'

  def block():
    shutil.rmtree(folder)
    folder.write_text('')

  after(4, block)
  fails(
    short(), tmp_path,
    r'cannot write checkpoints to .*checkpoints \(File exists\).*the same command begins again$',
  )


# The data.


class Rows:
  """Rows of which the n-th batch cannot be read."""

  def __init__(self, rows, fails_at):
    self.rows, self.fails_at, self.calls = rows, fails_at, 0

  def __len__(self):
    return len(self.rows)

  def __getattr__(self, name):
    return getattr(self.rows, name)

  def batch(self, indices):
    self.calls += 1
    if self.calls == self.fails_at:
      raise ValueError(f'record {indices[0]} is damaged; write the latents again')
    return self.rows.batch(indices)


def test_record_that_cannot_be_read_costs_no_steps(tmp_path, monkeypatch, whole):
  """What was learned before it is saved; batches are read ahead, so some of them go unused."""
  open_rows = sources.open_rows

  with monkeypatch.context() as damaged:
    damaged.setattr(sources, 'open_rows', lambda recipe: Rows(open_rows(recipe), fails_at=6))
    with pytest.raises(ValueError, match='latents again; the same command goes on from step 3'):
      train.train(short(data__num_threads=0), tmp_path)
  assert saved(tmp_path) == [2, 3]
  assert_goes_on(tmp_path, whole)


def test_waiting_for_data_is_told_once(tmp_path, monkeypatch):
  """Not of the first log step, in which readers start."""
  told = []
  monkeypatch.setattr(hooks, 'SLOW_DATA', 0.0)
  monkeypatch.setattr(hooks.logging, 'warning', lambda text, *args: told.append(text % args))
  train.train(short(data__num_threads=0), tmp_path)
  waited = [line for line in told if 'waiting for data; more data.num_threads (0)' in line]
  assert len(waited) == 1 and waited[0].startswith('step 2: ')


# The numbers.


def test_burst_leaves_what_its_steps_had(tmp_path, monkeypatch):
  """The last good step and all that followed, across log steps; the state is not poisoned."""
  compile_step = train.compile_step

  def poisoned(*args):
    train_step = compile_step(*args)

    def run(state, batch, frozen):
      if int(state.step) in (1, 3, 4):
        batch = jax.tree.map(
          lambda rows: rows * np.float32('nan') if rows.dtype == np.float32 else rows, batch)
      return train_step(state, batch, frozen)

    return run

  monkeypatch.setattr(train, 'compile_step', poisoned)
  recipe = short(optim__max_bad_steps=2)
  with pytest.raises(ValueError, match=r'2 steps .*bad_steps/step_0000005.json .* from step 4$'):
    train.train(recipe, tmp_path)
  record = json.loads((tmp_path / 'bad_steps' / 'step_0000005.json').read_text())
  assert [step['step'] for step in record['steps']] == [3, 4, 5]
  assert [step['rows'] for step in record['steps']] == [[192, 287], [288, 383], [384, 479]]
  assert [step['loss'] for step in record['steps'][1:]] == ['nan', 'nan']
  good = record['steps'][0]
  norms = np.array(list(good['grad_norms'].values()))
  np.testing.assert_allclose(np.sqrt((norms**2).sum()), good['grad_norm'], rtol=1e-5)
  assert {'blocks', 'final'} <= set(good['grad_norms'])
  assert set(record['steps'][1]['grad_norms'].values()) == {'nan'}
  with checkpoint.Checkpoints(tmp_path / 'checkpoints', identity={}, read_only=True) as kept:
    params, _ = kept.restore_params(jax.eval_shape(lambda: tiny.init(recipe)), ema=False)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))

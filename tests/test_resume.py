"""A run that stops, however it stops, goes on bit for bit, and owes nothing in the end."""

import json
import pathlib

import jax
import numpy as np
import pytest

from fmzoo import build, checkpoint, command_line, encoders, evaluate, hooks, train
from tests import tiny
from tests.test_checkpoint import flip


def arrays(state):
  """Returns every array of a state on the host, the key as its data."""
  return jax.device_get(state._replace(rng=jax.random.key_data(state.rng)))


def losses(workdir):
  """Returns {step: loss} of metrics.jsonl."""
  lines = (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
  return {row['step']: row['loss'] for row in map(json.loads, lines) if 'loss' in row}


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  """`uninterrupted(recipe)` trains without a stop, once: (workdir, state)."""
  done = {}

  def of(recipe):
    key = recipe.method_name, recipe.network
    if key not in done:
      workdir = tmp_path_factory.mktemp(recipe.method_name)
      done[key] = workdir, arrays(train.train(recipe, workdir))
    return done[key]

  return of


@pytest.fixture(scope='module')
def compiled():
  """{(method, network): program of a step}."""
  return {}


@pytest.mark.parametrize('method', tiny.EVERY)
def test_stopped_and_resumed_equals_never_stopped(
  method, tmp_path, cifar10_data, monkeypatch, uninterrupted, compiled
):
  """Parameters, EMA, optimiser, key and the losses that follow, bit for bit.

  The U-Net has dropout, augmentation and an EMA of every third step, which the stop is between.
  Each workdir trains its own encoder of the digits, but not for long. What a stop does to the
  program of a step, nothing, test_killed.py shows of a real process; here it is compiled once.
  """
  monkeypatch.setattr(encoders, 'STEPS', 3)
  compile_step = train.compile_step

  def compile_once(recipe, *args):
    key = recipe.method_name, recipe.network
    if key not in compiled:
      compiled[key] = compile_step(recipe, *args)
    return compiled[key]

  monkeypatch.setattr(train, 'compile_step', compile_once)
  changes = {'log__log_every_steps': 1, 'mesh__data': 1, 'run__steps': 4}
  if method == 'bfm_frn':
    changes['run__init_from'] = str(uninterrupted(tiny.recipe('bfm', **changes))[0])
  recipe = tiny.recipe(method, **changes)
  workdir, whole = uninterrupted(recipe)
  with monkeypatch.context() as stopping:
    stopping.setattr(train.hosts.Preemption, 'reached', lambda self, done: done >= 2)
    train.train(recipe, tmp_path / 'parts')
  resumed = train.train(recipe, tmp_path / 'parts')
  jax.tree.map(np.testing.assert_array_equal, whole, arrays(resumed))
  assert losses(workdir) == losses(tmp_path / 'parts')
  assert sorted(losses(tmp_path / 'parts')) == [1, 2, 3, 4]


def test_flipped_bits_of_any_part_cost_a_checkpoint_and_no_more(tmp_path, caplog):
  """Each of the newest is damaged in another part; the run goes on before them, to the same end."""
  recipe = tiny.recipe(
    'fm', mesh__data=1, run__steps=5, log__checkpoint_every_steps=1, log__keep_last=5
  )
  whole = train.train(recipe, tmp_path)
  for step, part in {2: 'params', 3: 'ema', 4: 'opt_state', 5: 'run'}.items():
    files = (tmp_path / 'checkpoints' / str(step) / part).glob('d/*' if part == 'run' else '**/d/*')
    flip(max(files, key=lambda file: file.stat().st_size), 4 if part == 'run' else 64)
  again = train.train(recipe, tmp_path)
  jax.tree.map(np.testing.assert_array_equal, arrays(whole), arrays(again))
  loud = [r.message for r in caplog.records if r.pathname == checkpoint.__file__]
  for step in (2, 3, 4, 5):
    assert sum(f'checkpoints/{step} is damaged' in line for line in loud) == 1
  kept = {path.name for path in (tmp_path / 'checkpoints').iterdir()}
  assert kept == {'1', '2', '3', '4', '5', *(f'damaged-{step}-0' for step in (2, 3, 4, 5))}


def test_results_lost_with_the_last_process_are_made_up_for(tmp_path):
  """A run killed between its last save and its numbers owes them to the next start."""
  recipe = tiny.recipe(
    'fm', mesh__data=1, run__steps=2, eval__name='digits', log__preview_every_steps=2
  )
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(hooks.Hooks, 'preview', lambda self, done, state: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      train.train(recipe, tmp_path)
  results = tmp_path / 'evaluations' / evaluate.result_name(recipe, 2, 'ema')
  assert not results.exists()
  train.train(recipe, tmp_path)
  picture = tmp_path / 'samples' / 'step_0000002.png'
  assert picture.exists() and (results / 'metrics.json').exists()
  assert json.loads((results / 'protocol.json').read_text())['images']['weights'] == 'ema'
  picture.write_bytes(b'')
  train.train(recipe, tmp_path)  # everything is there: nothing is done twice
  assert picture.read_bytes() == b'' and not (results / 'earlier_1').exists()


def test_prolonged_run_stretches_its_schedules(tmp_path):
  """What follows run.steps follows it from a stored config, too."""
  config = tiny.config('soflow')
  (tmp_path / 'config.json').write_text(json.dumps(config.to_dict()))
  longer = command_line.parse(['fmzoo', f'--workdir={tmp_path}', '--config.run.steps=8'])[1]
  config.run.steps = 8
  rows, keys = tiny.batch(4), jax.random.split(jax.random.key(0), 4)
  ratios = []
  for recipe in (build.recipe(longer), build.recipe(config)):
    _, metrics = jax.jit(recipe.method.loss)(tiny.init(recipe), rows, keys, 6)
    ratios.append(metrics['consistency/middle_ratio'])
  assert ratios[0] == ratios[1] and float(ratios[0]) < 0.01

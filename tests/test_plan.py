"""A plan's figures against arithmetic and real rows; what it advises where memory is short."""

import json
import math
import os
import pathlib
import platform
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from fmzoo import main, plan, programs, sources
from fmzoo.parallel import batch as batches
from fmzoo.parallel import chips, rules
from fmzoo.parallel import mesh as meshes
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent
SIT = '--config=configs/sit_digits.py'


@pytest.fixture
def memory(monkeypatch):
  """Gives simulated devices some memory, and has 'fsdp' cut tiny arrays, too."""
  monkeypatch.setattr(rules, 'SMALLEST', 2)

  def give(num_bytes):
    chip = chips.CHIPS['v5e']._replace(usable_bytes=num_bytes)
    monkeypatch.setitem(chips.CHIPS, 'cpu', chip)

  return give


def shapes(row):
  return {name: (tuple(a.shape), np.dtype(a.dtype)) for name, a in row.items()}


def expect_planned_shapes(recipe):
  row = {name: a[0] for name, a in sources.open_rows(recipe).batch(np.arange(1)).items()}
  assert shapes(sources.abstract_row(recipe)) == shapes(row)


@pytest.mark.parametrize('method', ['fm', 'bfm'])
def test_rows_of_digits_have_the_planned_shapes(method):
  expect_planned_shapes(tiny.recipe(method))


def test_rows_of_pictures_have_the_planned_shapes(cifar10_data):
  expect_planned_shapes(tiny.recipe('soflow_unet'))


def test_state_is_counted_to_the_byte(memory):
  """By the compiler, all that the step is given is the state and its rows."""
  recipe = tiny.recipe('fm', mesh__fsdp=4, data__batch_size=8)
  mesh = meshes.make(recipe.mesh)
  inputs, _ = sources.abstract_inputs(recipe)
  state = programs.abstract_state(recipe, mesh)
  batch = batches.abstract(sources.abstract_row(recipe), 8, mesh, 'jit')
  step = meshes.compile_step(lambda _: programs.make_step(recipe, inputs), mesh, 'jit', state)
  given = step.lower(state, batch, ()).compile().memory_analysis().argument_size_in_bytes
  assert given == plan.bytes_of(state) + 8 // 8 * (8 * 8 * 4 + 4)
  whole = plan.bytes_of(programs.abstract_state(recipe, tiny.mesh(1)))
  assert whole / 4 <= plan.bytes_of(state) < whole / 3


def test_what_fits_is_not_changed(memory, capsys):
  memory(2**34)
  assert plan.plan(tiny.recipe('fm', mesh__data=2), 'cpu:2', mfu=0.5)
  lines = capsys.readouterr().out.splitlines()
  assert [line.split(' | ')[0] for line in lines[4:6]] == ['| training step', '| sampler']
  assert 'It fits as configured.' in lines
  assert 'days if 50% of' in lines[-1]


def first_line(found):
  return next(line for line in found['advice'] if line.startswith('It fits'))


def refused(recipe, unit):
  """Returns a step whose state, gradients and activations are of 4, 1 and 3 units; 2 are there."""
  return plan.Program(
    name='training step', mesh={}, settings=plan.settings_of(recipe), rows=8, flops=0,
    parameter_bytes=unit, state_bytes=4 * unit, work_bytes=4 * unit, available_bytes=2 * unit,
    collectives=None, compile_seconds=0,
  )


def test_cuts_and_recomputation_are_combined():
  recipe = tiny.recipe('fm', data__batch_size=8)
  first = refused(recipe, 4 * plan.num_parameters(recipe))
  kinds = [kind for kind, _, _ in plan.remedies(recipe, jax.devices(), first)]
  assert kinds == ['mesh.fsdp and model.remat'] and not recipe.network.remat


def test_a_mesh_is_found_where_memory_is_short(memory, capsys):
  """Between what one device of eight needs and what it needs where the state is cut."""
  recipe = tiny.recipe('fm', data__batch_size=8)
  as_it_is = plan.training_step(recipe, jax.devices(), None)
  memory(as_it_is.needed_bytes - as_it_is.state_bytes // 4)
  eight = plan.build.changed(recipe, {'mesh.data': 8})
  assert plan.plan(eight, 'cpu:8', as_json=True, with_sampler=False)
  found = json.loads(capsys.readouterr().out)
  assert first_line(found).startswith('It fits with --config.mesh.data=-1 --config.mesh.fsdp=')
  first, *others = found['programs']
  assert (first['fits'], others[-1]['fits']) == (False, True)
  assert others[-1]['mesh']['fsdp'] > 1 and math.prod(others[-1]['mesh'].values()) == 8
  kinds = {row['kind'] for row in others[-1]['collectives']}
  assert 'all-gather' in kinds and [row['kind'] for row in first['collectives']] == ['all-reduce']


def test_flops_are_those_of_one_device():
  recipe = tiny.recipe('fm', data__batch_size=8, sample__batch_size=8, sample__num_images=8)
  one, four = (plan.training_step(recipe, jax.devices()[:n], None).flops for n in (1, 4))
  assert one == 4 * four > 0
  one, four = (plan.sampler(recipe, jax.devices()[:n], None) for n in (1, 4))
  assert one.flops == four.flops > 0 and (one.rows, four.rows) == (8, 32)


def test_where_nothing_fits_it_says_so(monkeypatch, capsys):
  monkeypatch.setattr(plan, 'training_step', lambda recipe, *_: refused(recipe, 1000))
  assert not plan.plan(tiny.recipe('fm', data__batch_size=8), 'cpu:2')
  assert 'None of what was tried fits' in capsys.readouterr().out


@pytest.mark.parametrize('fsdp,asked', [(1, False), (2, True)])
def test_shared_weights_come_whole_to_their_products(memory, fsdp, asked):
  recipe = tiny.recipe('bfm', mesh__data=2, mesh__fsdp=fsdp)
  make_step, args = programs.abstract_step(recipe, meshes.make(recipe.mesh))
  step = meshes.compile_step(make_step, meshes.make(recipe.mesh), 'jit', args[0])
  assert ('sharding_constraint' in step.lower(*args).as_text()) == asked


def test_gradients_of_segments_stay_in_their_group():
  """Six groups of one device: only the shared parts are summed over all."""
  recipe = tiny.recipe('bfm', data__batch_size=36, model__segments=6, model__segment_depth=2)
  apart = plan.build.changed(recipe, {'mesh.segment': 6})
  whole, parts = (plan.training_step(r, jax.devices()[:6], None) for r in (recipe, apart))
  blocks = jax.eval_shape(recipe.method.init, jax.random.key(0))['segments']
  own = plan.bytes_of(blocks)
  assert whole.state_bytes - parts.state_bytes == 4 * own * 5 // 6  # parameters, EMA, two moments
  sent = [sum(row.bytes for row in program.collectives) for program in (whole, parts)]
  assert abs(sent[0] - sent[1] - own) < 0.02 * own


def command(*flags):
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_DISABLE_MOST_OPTIMIZATIONS': '0'}
  return subprocess.run(
    [sys.executable, '-m', 'fmzoo.main', 'plan', *flags], cwd=ROOT, env=environment, text=True,
    capture_output=True, timeout=300,
  )


@pytest.mark.skipif(
  (sys.platform, platform.machine()) != ('linux', 'x86_64'), reason='there is no libtpu'
)
def test_a_recipe_is_compiled_for_tpus():
  done = command(
    SIT, '--config.model.depth=1', '--topology=v5e:2x2', '--json',
    '--config.sample.guidance=2.0',  # whose halves must not change devices
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  step, sampler = found['programs']
  assert step['fits'] and step['mesh']['data'] == 4 and found['devices'] == 4
  reduced = sum(
    row['bytes'] for row in step['collectives']
    if (row['kind'], row['group_size']) == ('all-reduce', 4)
  )
  positions = 16 * 128  # a table that is not trained
  assert reduced == 4 * (found['parameters'] - positions + 1)  # every gradient, and the loss
  assert sampler['collectives'] == []


@pytest.mark.parametrize('flags,words', [
  (['--topology=v5e:3'], "topology 'v5e:3'"),
  (['--mfu=40'], '--mfu=40.0 must be'),
  (['--mfu=0.4', '--topology=cpu:2'], '--mfu=0.4 needs chips'),
  (['--topology=cpu:0'], "topology 'cpu:0'"),
  (['--config.mesh.mode=pmap'], "mesh.mode='pmap' is not planned"),
  (['--config.mesh.segment=2'], 'mesh.segment=2 .* use 1'),
])
def test_what_cannot_be_planned_is_one_line(flags, words, monkeypatch, capsys):
  """In this process, which has its devices; the environment that others would see is put back."""
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(os, 'environ', os.environ.copy())
  monkeypatch.setattr(sys, 'argv', ['fmzoo', 'plan', SIT, *flags])
  assert main.cli() == 2
  expect_refusal(capsys.readouterr().err, words)


def expect_refusal(told, words):
  (line,) = told.splitlines()
  assert line.startswith('error: ')
  assert re.search(words, line)


def test_a_process_gets_the_simulated_devices_that_it_plans_for():
  done = command(SIT, '--topology=cpu:3')
  assert done.returncode == 2
  expect_refusal(done.stderr, 'data.batch_size=128 .* use 126 or 129')

"""The command as people call it: tables and JSON that agree, ratios, refusals, bare machines."""

import json
import os
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from fmzoo import build, command_line, main, sources
from fmzoo.bench import ceiling, command, loader, measure, parts, report, suite
from fmzoo.parallel import mesh as meshes
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent.parent
RECIPE = '--config=configs/sit_digits.py'
MISSING = (
  'PIL', 'array_record', 'clu', 'grain', 'h5py', 'orbax', 'safetensors', 'sklearn', 'tensorboard',
  'tensorflow', 'tensorflow_datasets', 'tensorstore', 'torch', 'tqdm',
)


@pytest.fixture(autouse=True)
def short(monkeypatch):
  """Figures need not be good here: short runs, one small product for a ceiling, few reads."""
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(measure, 'SECONDS', 0.01)
  monkeypatch.setattr(ceiling, 'SIZES', {'cpu': (64,)})
  monkeypatch.setattr(ceiling, 'FLOPS', {'cpu': 1e6})
  monkeypatch.setattr(loader, 'WORKERS', (0,))
  monkeypatch.setattr(loader, 'SECONDS', 0.05)


def small(**changes):
  return tiny.recipe('fm', **{'mesh__data': 1, 'data__batch_size': 8, **changes})


def bench(recipe, capsys, *, chosen=None, as_json=False):
  """Returns what the command prints."""
  command.bench(recipe, chosen=chosen, runs=2, as_json=as_json)
  return capsys.readouterr().out


def cells(text):
  """Returns {first cell: the others} of all Markdown tables in a text."""
  rows = [line.strip('| ').split(' | ') for line in text.splitlines() if line.startswith('|')]
  return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_json_holds_the_figures_of_the_table(monkeypatch, capsys):
  """The same measurement printed twice."""
  made, measured = {}, measure.measure

  def once(programs, runs):
    name = programs[0].name
    if name not in made:
      made[name] = measured(programs, runs=runs)
    return made[name]

  monkeypatch.setattr(measure, 'measure', once)
  table = cells(bench(small(), capsys, chosen=['step', 'sampler']))
  found = json.loads(bench(small(), capsys, chosen=['step', 'sampler'], as_json=True))
  assert found['config']['sample']['num_steps'] == small().sample_options['num_steps']
  assert [program['program'] for program in found['programs']] == ['training step', 'sampler']
  for place, program in enumerate(found['programs']):
    for name, (heading, _) in report.FIGURES.items():
      if heading in table:
        assert table[heading][place] == report.cell(program, name)
      else:
        assert program[name] is None
  (rate,) = found['ceilings']
  assert table['float32'] == [
    rate['precision'], str(rate['size']), f'{rate["flops_per_second"] / 1e12:.3g}'
  ]


def test_reading_is_set_beside_the_training_step(capsys):
  text = bench(small(), capsys, chosen=['step', 'input'])
  rows = float(re.search(r'consumes (\d+) rows/s; read warm: ([\d.]+) times', text)[1])
  assert abs(rows / float(cells(text)['images/s'][0]) - 1) < 0.01
  assert 'consumes' not in bench(small(), capsys, chosen=['input'])


def test_without_data_the_rest_is_measured(tmp_path, capsys):
  recipe = small(
    data__name='latents', data__path=str(tmp_path / 'none'), data__batch_size=8,
  )
  text = bench(recipe, capsys)
  assert 'images/s' in text
  assert text.splitlines()[-1].startswith('Reading is not measured: data.path=')
  with pytest.raises(ValueError, match='data.path='):
    bench(recipe, capsys, chosen=['input'])


def test_without_grain_the_rest_is_measured(monkeypatch, capsys):
  def missing(recipe):
    raise ImportError("No module named 'grain'")

  monkeypatch.setattr(sources, 'open_rows', missing)
  assert "Reading is not measured: No module named 'grain'" in bench(small(), capsys)
  with pytest.raises(ValueError, match="--parts=input: No module named 'grain'"):
    bench(small(), capsys, chosen=['input'])


def compared(capsys, *recipes, chosen=None):
  command.compare(recipes, chosen=chosen, runs=5, as_json=True)
  return json.loads(capsys.readouterr().out)['parts']


def test_a_recipe_is_as_fast_as_itself(monkeypatch, capsys):
  monkeypatch.setattr(measure, 'SECONDS', 0.1)
  step, sampler = compared(capsys, small(), small(), chosen=['step', 'sampler'])
  for part in (step, sampler):
    assert part['multiply_adds'] == 1 and part['promise'] == part['time']
    assert 0.4 < part['time'] < 2.5


def test_twice_the_steps_are_twice_the_multiply_adds(capsys):
  (found,) = compared(capsys, small(), small(sample__num_steps=8))
  assert found['multiply_adds'] == 2
  assert found['promise'] == found['time'] / 2
  assert [program['rows'] for program in found['programs']] == [10, 10]


def test_images_are_compared_and_not_batches(capsys):
  (found,) = compared(capsys, small(), small(data__batch_size=16), chosen=['step'])
  assert found['multiply_adds'] == pytest.approx(1, rel=1e-3)
  assert [program['rows'] for program in found['programs']] == [8, 16]


def test_ratios_are_told_in_words(capsys):
  command.compare([small(), small()], chosen=None, runs=3, as_json=False)
  text = capsys.readouterr().out
  assert re.search(
    r'A: fm, width 32 against B: fm, width 32: 1\.000 times fewer multiply-adds an image, [\d.]+'
    r' times faster \(median of 3 pairs\), [\d.]+% of what the multiply-adds promise', text)
  assert len(cells(text)['images/s']) == 2


def test_recipes_of_one_name_are_told_apart():
  names = command.names_of([small(), small(sample__num_steps=9, data__batch_size=16)])
  assert names == [
    'A: fm, width 32, sample.num_steps=4, data.batch_size=8',
    'B: fm, width 32, sample.num_steps=9, data.batch_size=16',
  ]
  names = command.names_of([small(), small(model__width=64)])
  assert names == ['A: fm, width 32', 'B: fm, width 64']


def test_a_sampler_that_does_less_than_is_counted_is_not_compared():
  recipe = tiny.recipe('bfm', sample__guidance=2.0, sample__guidance_interval=(0.0, 0.5))
  with pytest.raises(ValueError, match=r'sample.guidance_interval=\(0.0, 0.5\)'):
    command.compare([recipe, recipe], chosen=None, runs=1, as_json=False)
  assert parts.has_certain_cost(tiny.recipe('bfm', sample__guidance=2.0))


@pytest.mark.parametrize('words', [
  ('--compare', 'configs/sit_digits.py', 'configs/soflow_digits.py'),
  ('--config=configs/sit_digits.py', '--compare=configs/soflow_digits.py'),
  ('--config=configs/sit_digits.py', '--compare', 'configs/soflow_digits.py'),
])
def test_two_recipes_are_given_in_two_ways(words):
  keys = ('--config.sample.num_steps=2', '--compare.sample.num_steps=3')
  name, config, _, values = command_line.parse(['fmzoo', 'bench', *words, *keys])
  assert name == 'bench'
  assert (config.method.name, config.sample.num_steps) == ('fm', 2)
  assert (values.compare.method.name, values.compare.sample.num_steps) == ('soflow', 3)


def test_evaluations_are_compared_as_ever():
  _, _, _, values = command_line.parse(['fmzoo', 'evaluate', '--compare=a,b'])
  assert values.compare == 'a,b'


@pytest.mark.parametrize('words,refusal', [
  ((RECIPE, '--parts=step,eval'), "--parts=step,eval: 'eval' is no part; use some of step,sampler"),
  ((RECIPE, '--parts='), '--parts='),
  ((RECIPE, f'--compare={RECIPE[9:]}', '--parts=input'), 'reading is not compared'),
  ((RECIPE, '--compare', 'configs/a.py', 'configs/b.py'), 'makes three recipes, expected two'),
  ((RECIPE, '--compare=configs/none.py'), "--compare=configs/none.py: there is no recipe"),
  ((RECIPE, '--compare=configs/bfm.py:s', '--compare.sample.step=1'), '--compare.sample.step'),
  ((RECIPE, '--suite'), 'is no part of what --suite measures'),
  (('--suite', '--parts=step'), '--parts and --suite exclude each other'),
  ((RECIPE, '--precision', '--parts=step'), '--parts and --precision exclude each other'),
  ((RECIPE, '--parts=input', '--runs=3'), '--runs=3 is of programs, --parts=input measures'),
  ((RECIPE, '--topology=v5e:1x1'), "--topology is a flag of plan, not of 'bench'"),
])
def test_what_is_not_understood_is_one_line(words, refusal, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['fmzoo', 'bench', *words])
  assert main.cli() == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ') and refusal in line


def test_a_case_that_fails_does_not_stop_the_others(monkeypatch, capsys):
  """The batch of the first cannot be split into groups of its segments."""
  monkeypatch.setattr(suite, 'LATENTS', 4_000)
  changes = {
    'model.width': 32, 'model.heads': 2, 'mesh.data': 1, 'model.unroll': 1, 'sample.num_steps': 1,
  }
  wrong = changes | {'optim.accumulate_steps': 5}
  cases = [
    suite.Case(name, 'configs/sit_digits.py', chosen, {'cpu': suite.Batch(1, 2)})
    for name, chosen in (('wrong', wrong), ('right', changes))
  ]
  cases.append(suite.Case('of another device', 'configs/sit_digits.py', {}, {'tpu': None}))
  suite.run(runs=1, cases=cases)
  text = capsys.readouterr().out
  steps, samplers = (cells(part) for part in text.split('## ')[1:3])
  assert steps['wrong'][0].startswith('data.batch_size=8 cannot be split')
  assert steps['right'][0] == '8' and samplers['wrong'][0] == '2'
  assert 'of another device' not in steps and '## Reading' in text
  assert 'fmzoo bench --suite --runs=1' in text


def test_a_suite_of_nothing_fails(monkeypatch, capsys):
  monkeypatch.setattr(suite, '_reading', lambda: (None, 'not here'))
  wrong = suite.Case('wrong', 'configs/sit_digits.py', {'model.width': -1}, suite.OWN)
  with pytest.raises(ValueError, match=r'--suite measured none of its 1 case\(s\) on cpu'):
    suite.run(runs=1, cases=[wrong])
  assert '| wrong | model.width=-1' in capsys.readouterr().out


def test_standing_cases_build_with_the_batches_they_name(monkeypatch):
  """But for the trial trace of their samplers, which takes a second each."""
  monkeypatch.setattr(build, 'jax', SimpleNamespace(
    eval_shape=lambda *_: None, random=jax.random, ShapeDtypeStruct=jax.ShapeDtypeStruct))
  for case in suite.CASES:
    for place, batch in case.batches.items():
      recipe = suite.recipe_of(case, place)
      assert batch.step % 12 == 0
      if batch.step:
        meshes.check_batch(
          recipe.data.batch_size, meshes.make(recipe.mesh), recipe.method.period,
          recipe.optim.accumulate_steps,
        )
        assert recipe.data.batch_size == batch.step * jax.device_count()
        assert recipe.sample.batch_size == batch.images
      else:
        own = build.recipe(command_line.recipe_config('config', case.recipe))
        assert recipe.data.batch_size == own.data.batch_size
  places = {place for case in suite.CASES for place in case.batches}
  assert places == set(suite.RUNS)


def test_programs_are_measured_where_little_is_installed():
  """No package but those that an accelerator machine has, which is told by a command that ends."""
  script = f"""
import sys
for name in {MISSING}: sys.modules[name] = None
from fmzoo import main
from fmzoo.bench import ceiling, suite
ceiling.SIZES, ceiling.FLOPS = {{'cpu': (64,)}}, {{'cpu': 1e6}}
sys.argv = ['fmzoo', 'bench', '{RECIPE}', '--runs=1', '--config.model.width=32',
  '--config.model.heads=2', '--config.model.depth=1', '--config.sample.num_steps=1',
  '--config.data.batch_size=8']
sys.exit(main.cli())
"""
  done = subprocess.run(
    [sys.executable, '-c', script], cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)},
    text=True, capture_output=True, timeout=600,
  )
  assert done.returncode == 0, done.stderr
  assert cells(done.stdout)['programs started by a call'] == ['1', '1']
  assert 'Reading is not measured' in done.stdout

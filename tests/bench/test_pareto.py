"""Points of every method: counted as stated, drawn, and refused before anything is run."""

import builtins
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from fmzoo import build, command_line, main
from fmzoo.bench import ceiling, measure, pareto, parts
from fmzoo.models import vae
from tests import tiny

SMALL = {
  'SiT': ('fm', {}), 'BFM': ('bfm', {'sample.sampler': 'ode'}), 'BFM with FRN': ('bfm_frn', {}),
  'SoFlow': ('soflow', {}),
}


@pytest.fixture
def small(monkeypatch):
  """Two numbers of steps of tiny networks on digits; a program takes a millisecond an image.

  What it takes to time one is in test_measure.py.
  """

  def recipe_of(curve, steps, place):
    method, changes = SMALL[curve.name]
    plain = {'sample.guidance': 1.0} if curve.is_guided else {}
    return build.changed(
      tiny.recipe(method, mesh__data=1), {**changes, **plain, 'sample.num_steps': steps}
    )

  curves = [curve._replace(steps=curve.steps[:2]) for curve in pareto.curves('s')]
  monkeypatch.setattr(pareto, 'curves', lambda size: curves)
  monkeypatch.setattr(pareto, 'recipe_of', recipe_of)
  monkeypatch.setattr(pareto.vae, 'SD_VAE', tiny.VAE)
  monkeypatch.setattr(measure, 'measure', lambda programs, runs, **options: [
    SimpleNamespace(seconds=np.full(runs, 1e-3 * program.rows)) for program in programs
  ])
  monkeypatch.setattr(jax, 'clear_caches', lambda: None)  # what methods share is traced once
  monkeypatch.setattr(ceiling, 'SIZES', {'cpu': (64,)})
  monkeypatch.setattr(ceiling, 'FLOPS', {'cpu': 1e6})


def test_points_follow_from_the_counts(small, tmp_path, capsys):
  """Twice the steps, twice the multiply-adds; guidance doubles them, but for SoFlow's."""
  plot = tmp_path / 'plot.png'
  pareto.run('s', runs=1, plot=str(plot), as_json=True)
  *points, decoder = json.loads(capsys.readouterr().out)['points']
  by_name = {}
  for point in points:
    by_name.setdefault(point['name'], []).append(point)
    assert point['latency'] == pytest.approx(1e-3) and point['images'] == pareto.IMAGES['cpu']
    assert point['throughput'] == pytest.approx(1e3) and point['mfu'] > 0
  assert list(by_name) == list(SMALL) and decoder['gmac'] > 0
  for name, (one, two) in by_name.items():
    factor = 1 if name == 'SoFlow' else 2
    assert one['guided_gmac'] == pytest.approx(factor * one['gmac'], rel=0.02)
    assert two['calls'] == 2 * one['calls']
    if name == 'BFM with FRN':  # the second step of a segment has no feature network
      assert one['gmac'] < two['gmac'] < 2 * one['gmac']
    else:
      assert two['gmac'] == pytest.approx(2 * one['gmac'], rel=0.02)
  with Image.open(plot) as image:
    assert min(image.size) > 300 and len(image.convert('RGB').getcolors(1 << 20)) > 50


def test_the_table_has_a_line_for_every_point(small, monkeypatch, capsys):
  point = pareto.Point('SiT', 6, 1.25, 2.5, 4, 0.5, 8.0, 7.0, 9.0, 0.75)
  monkeypatch.setattr(pareto, '_point', lambda curve, *_: point._replace(name=curve.name))
  monkeypatch.setattr(pareto, '_decoder', lambda *_: point._replace(name='decoder'))
  pareto.run('s', runs=1)
  lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| ')]
  assert 'images/s, 4 at a time' in lines[0] and len(lines) == 1 + 8 + 1
  assert lines[1] == '| SiT | 6 | 1.25 | 2.5 | 500 | 8 (7, 9) | 75.0% |'
  assert '| decoder |' in lines[-1]


def test_a_point_that_fails_is_a_row_and_the_others_go_on(small, monkeypatch, tmp_path, capsys):
  """And so it is drawn without; where none is left, the command fails."""
  def point(curve, steps, *_):
    if curve.name == 'BFM' or steps > only:
      raise RuntimeError('RESOURCE_EXHAUSTED:\nout of memory')
    return pareto.Point(curve.name, steps, 1.25, 2.5, 4, 0.5, 8.0, 7.0, 9.0, 0.75)

  def decoder(*_):
    raise OSError('no weights')

  only, plot = 100, tmp_path / 'a.png'
  monkeypatch.setattr(pareto, '_point', point)
  monkeypatch.setattr(pareto, '_decoder', decoder)
  pareto.run('s', runs=1, plot=str(plot))
  text = capsys.readouterr().out
  assert text.count('| RESOURCE_EXHAUSTED: out of memory |') == 2
  assert text.count('75.0%') == 6 and '| decoder of 256 x 256 | 1 | no weights |' in text
  assert plot.stat().st_size > 0
  only = 0
  with pytest.raises(ValueError, match='--pareto=s measured none of its 8 points'):
    pareto.run('s', runs=1, as_json=True)
  assert json.loads(capsys.readouterr().out)['points'][0] == {
    'name': 'SiT', 'calls': 6, 'error': 'RESOURCE_EXHAUSTED: out of memory'
  }


def test_one_image_is_waited_for_and_many_are_not(monkeypatch):
  asked = []

  def measured(programs, **options):
    asked.append((programs[0].rows, options))
    return [SimpleNamespace(seconds=np.array([1.0, 2.0, 4.0]) * programs[0].rows)]

  monkeypatch.setattr(measure, 'measure', measured)
  monkeypatch.setattr(ceiling, 'rates', lambda flops, mesh: {
    kind: SimpleNamespace(flops_per_second=1.0) for kind in flops})
  one, many = (pareto.decoder_program(tiny.VAE, 4, images) for images in (1, 3))
  point = pareto._measured('decoder', 1, one, many, runs=3)
  assert asked == [
    (1, {'runs': 3, 'calls': 1, 'with_dispatches': False}),
    (3, {'runs': 3, 'with_dispatches': False}),
  ]
  assert (point.latency, point.throughput, point.lowest, point.highest) == (2.0, 0.5, 0.25, 1.0)


@pytest.mark.parametrize('size', command_line.SIZES)
def test_every_size_has_its_recipes(size, monkeypatch):
  """With as many calls of BFM as of SiT; SoFlow's width is theirs."""
  if size != 's':  # a trial trace of the sampler takes a second each
    monkeypatch.setattr(build, 'jax', SimpleNamespace(
      eval_shape=lambda *_: None, random=jax.random, ShapeDtypeStruct=jax.ShapeDtypeStruct))
  curves = pareto.curves(size)
  recipes = [pareto.recipe_of(curve, curve.steps[0], 'cpu') for curve in curves]
  assert len({recipe.network.width for recipe in recipes}) == 1
  calls = [[curve.calls * steps for steps in curve.steps] for curve in curves]
  assert calls[0] == calls[1] == calls[2]
  for recipe in recipes:
    assert (recipe.mesh.data, recipe.mesh.fsdp, recipe.mesh.segment) == (1, 1, 1)
    assert recipe.sample_options.get('guidance', 1.0) == 1.0
    assert parts.has_certain_cost(recipe)


def test_the_decoder_multiplies_what_its_convolutions_do():
  """At one resolution of one width: two residual blocks and an attention in the middle."""
  program = pareto.decoder_program(tiny.VAE, 4, images=3)
  assert program.rows == 3
  once = pareto.decoder_program(tiny.VAE, 4, images=1)
  assert sum(program.flops.values()) == 3 * sum(once.flops.values())
  assert vae.SD_VAE.factor == 8  # 32 pixels of a latent are the 256 that the table names


def test_a_plot_that_cannot_be_drawn_is_refused_first(monkeypatch):
  monkeypatch.setattr(pareto, '_point', lambda *args: pytest.fail('it was run'))
  with pytest.raises(ValueError, match=r'--plot=a.svg must end in .png'):
    pareto.run('s', plot='a.svg')
  with pytest.raises(ValueError, match=r"--plot=none/a.png: there is no folder 'none'; make it"):
    pareto.run('s', plot='none/a.png')
  imported = builtins.__import__

  def without(name, *args, **kwargs):
    if name.startswith('matplotlib'):
      raise ImportError(name)
    return imported(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', without)
  with pytest.raises(ValueError, match=r"needs matplotlib.*pip install 'fmzoo\[plot\]'"):
    pareto.run('s', plot='a.png')


@pytest.mark.parametrize('flags,problem', [
  (['--pareto=m'], 'should be one of'),
  (['--plot=a.png', '--suite'], 'give that, too, or drop the flag'),
  (['--pareto=s', '--suite'], 'exclude each other'),
  (['--pareto=s', '--config=configs/sit_digits.py'], 'is no part of what --pareto measures'),
])
def test_flags_that_make_no_sense_are_refused(flags, problem):
  with pytest.raises(ValueError, match=problem):
    command_line.parse(['fmzoo', 'bench', *flags])


def test_the_command_hands_its_flags_over(monkeypatch):
  calls = []
  monkeypatch.setattr(pareto, 'run', lambda size, **options: calls.append((size, options)))
  assert main.run(['fmzoo', 'bench', '--pareto=xl', '--plot=a.png', '--runs=3']) == 0
  assert calls == [('xl', {'plot': 'a.png', 'runs': 3, 'as_json': False})]

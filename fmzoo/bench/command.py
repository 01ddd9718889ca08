"""The command `bench`: parts of a recipe, or the programs of two recipes in turn."""

import json

import jax
import numpy as np

from fmzoo import sources
from fmzoo.bench import ceiling, measure, parts, report

TELLING = ('sample.num_steps', 'sample.guidance')  # first of what tells two recipes apart
TOLD = 3  # keys that are named
PARTS = ('step', 'sampler', 'input')


def chosen_parts(words, default):
  """Returns the parts that a comma list names, `default` where it is None.

  Raises:
    ValueError: if there is no such part, or none at all.
  """
  if words is None:
    return default
  unknown = [word for word in words if word not in PARTS]
  if unknown or not words:
    raise ValueError(
      f"--parts={','.join(words)}: '{','.join(unknown)}' is no part; use some of"
      f' {",".join(PARTS)}'
    )
  return tuple(part for part in PARTS if part in words)


def bench(recipe, *, chosen, runs, as_json):
  """Measures parts of a recipe and prints what they reach.

  Args:
    recipe: build.Recipe.
    chosen: names of PARTS; None is all that can be measured here.
    runs: timed runs of each program.
    as_json: prints JSON in place of tables.

  Raises:
    ValueError: one line, if a part that was asked for cannot be measured.
  """
  measure.expect_one_process()
  wanted = chosen_parts(chosen, PARTS)
  reading = excuse = None
  if 'input' in wanted:
    reading, excuse = read(recipe, is_optional=chosen is None)
  figures, rates = figures_of(recipe, wanted, runs)
  name = name_of(recipe)
  if as_json:
    print(json.dumps({
      'recipe': name, 'config': recipe.config, 'device': report.device(), 'jax': jax.__version__,
      'programs': list(figures.values()), 'ceilings': rates,
      'input': reading and plain_reading(reading), 'input_missing': excuse,
    }, indent=2))
    return
  lines = [f'{name}; {report.device()}; jax {jax.__version__}']
  if figures:
    lines += ['', *report.table(figures), '', *report.rates_table(rates)]
  if 'sampler' in figures and not parts.has_certain_cost(recipe):
    lines += ['', 'Guidance acts in some steps alone: the sampler multiplies less than is counted.']
  if reading:
    step = figures.get('training step')
    lines += ['', *reading_lines(reading, step and step['rows_per_second'])]
  print(*lines, *(['', excuse] if excuse else []), sep='\n')


def name_of(recipe):
  """Returns a recipe in a few words."""
  return f'{recipe.method_name}, width {recipe.network.width}'


def names_of(recipes):
  """Returns two recipes in a few words, with what differs in them where those are the same."""
  names, configs = [name_of(recipe) for recipe in recipes], [_flat(r.config) for r in recipes]
  if names[0] == names[1]:
    keys = sorted(configs[0].keys() | configs[1].keys(), key=lambda key: key not in TELLING)
    first, second = configs
    differing = [key for key in keys if first.get(key) != second.get(key)][:TOLD]
    names = [
      ', '.join([name, *(f'{key}={config.get(key)}' for key in differing)])
      for name, config in zip(names, configs)
    ]
  return [f'{letter}: {name}' for letter, name in zip('AB', names)]


def _flat(config):
  """Returns {dotted key: value} of the sections of a config."""
  return {
    f'{section}.{key}': value for section, values in config.items() for key, value in values.items()
  }


def figures_of(recipe, chosen, runs):
  """Returns ({program: figures}, ceilings) of the programs among parts of a recipe, plain values.

  One is measured after the other, so that each has the memory for itself.
  """
  measured = []
  for part in chosen:
    if part in parts.PROGRAMS:
      measured += measure.measure([parts.PROGRAMS[part](recipe)], runs=runs)
  return _figures(measured)


def _figures(measured):
  """Returns ({program: figures}, ceilings) as plain values; see `figures_of`."""
  kinds = {kind for one in measured for kind in one.program.flops}
  rates = ceiling.rates(kinds, measured[0].program.mesh) if measured else {}
  figures = {one.program.name: report.plain(one, rates) for one in measured}
  return figures, report.plain_rates(rates)


def read(recipe, *, is_optional):
  """Returns (loader.Reading or None, why there is none).

  Raises:
    ValueError: one line, if there is nothing to read or no grain, and reading was asked for.
  """
  try:
    rows = sources.open_rows(recipe)
  except (ImportError, OSError, ValueError) as error:
    if is_optional:
      return None, f'Reading is not measured: {" ".join(str(error).split())}'
    if not isinstance(error, ImportError):
      raise
    raise ValueError(f'--parts=input: {error}; install fmzoo with all it needs') from error
  from fmzoo.bench import loader  # with grain, which an accelerator machine may lack

  return loader.measure(recipe, rows), None


def plain_reading(reading):
  """Returns a loader.Reading as JSON knows it."""
  return reading._asdict() | {'rates': [rate._asdict() for rate in reading.rates]}


def reading_lines(reading, wanted=None):
  """Returns a loader.Reading as lines; `wanted` is what a training step consumes, or None."""
  from fmzoo.bench import loader

  return loader.table(reading, wanted)


def compare(recipes, *, chosen, runs, as_json):
  """Measures programs of two recipes run by run in turn and prints both and their ratios.

  Args:
    recipes: two build.Recipe. Both make as many images at a time as the first.
    chosen: names of 'step' and 'sampler'; None is 'sampler'.
    runs: timed runs of each, in turn.
    as_json: prints JSON in place of tables.

  Raises:
    ValueError: if reading is to be compared, or a sampler that does less than is counted.
  """
  measure.expect_one_process()
  chosen = chosen_parts(chosen, ('sampler',))
  if 'input' in chosen:
    raise ValueError(f'--parts={",".join(chosen)}: reading is not compared; use step,sampler')
  if 'sampler' in chosen:
    _expect_certain_cost(recipes)
  names = names_of(recipes)
  results, lines = [], [f'{report.device()}; jax {jax.__version__}']
  for part in chosen:
    options = {'images': parts.images_each(recipes[0])} if part == 'sampler' else {}
    programs = [parts.PROGRAMS[part](recipe, **options) for recipe in recipes]
    measured = measure.measure(programs, runs=runs)
    pairs = [_figures([one]) for one in measured]
    rows = [figures[programs[0].name] for figures, _ in pairs]
    ratios = ratios_of(measured)
    results.append({'programs': rows, 'ceilings': [rates for _, rates in pairs], **ratios})
    lines += [
      '', f'{programs[0].name}:', '', *report.table(dict(zip(names, rows))), '',
      *told(names, ratios, runs),
    ]
  if as_json:
    print(json.dumps({
      'recipes': names, 'configs': [recipe.config for recipe in recipes], 'device': report.device(),
      'jax': jax.__version__, 'parts': results,
    }, indent=2))
  else:
    print(*lines, sep='\n')


def _expect_certain_cost(recipes):
  """Refuses samplers whose multiply-adds say little of what they do."""
  for recipe in recipes:
    if not parts.has_certain_cost(recipe):
      raise ValueError(
        f"sample.guidance_interval={recipe.sample_options['guidance_interval']} cannot be compared"
        ' by its multiply-adds; use (0.0, 1.0)'
      )


def ratios_of(measured):
  """Returns what the second of two takes of what the first does, for an image: plain values.

  Args:
    measured: two measure.Measured that ran in turn.

  Returns:
    {'time': median over pairs of runs, 'multiply_adds', 'promise': the one divided by the other}.
  """
  first, second = (one.program for one in measured)
  images = first.rows / second.rows
  time = float(np.median(measured[1].seconds / measured[0].seconds)) * images
  macs = sum(second.flops.values()) / sum(first.flops.values()) * images
  return {'time': time, 'multiply_adds': macs, 'promise': time / macs}


def told(names, ratios, runs):
  """Returns the values of `ratios_of` in words."""
  return [
    f'{names[0]} against {names[1]}: {ratios["multiply_adds"]:.3f} times fewer multiply-adds an'
    f' image, {ratios["time"]:.3f} times faster (median of {runs} pairs), {ratios["promise"]:.1%}'
    ' of what the multiply-adds promise',
  ]

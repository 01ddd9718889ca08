"""The standing cases of docs/benchmarks.md, measured one after the other on the device at hand."""

import datetime
import importlib.metadata
import json
import platform
import tempfile
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from fmzoo import build, command_line
from fmzoo.bench import ceiling, command, measure, parts, report

RUNS = {'cpu': 5, 'gpu': 20, 'tpu': 20}
COLUMNS = (  # of report.FIGURES
  'rows', 'devices', 'seconds', 'rows_per_second', 'gmac_per_row', 'flops_per_second', 'mfu',
  'float32_share', 'memory_bytes', 'trace_seconds', 'compile_seconds', 'dispatches', 'compilations',
)
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy')
LATENTS = 24_000  # rows that are written to be read, 16 kB each


class Batch(NamedTuple):
  """How many rows a device gets; 0 is what the recipe says."""

  step: int  # of a training step; a multiple of 12, which suits every method
  images: int  # of a call of the sampler


class Case(NamedTuple):
  """A recipe that is measured, its training step and its sampler."""

  name: str
  recipe: str  # FILE or FILE:ARG
  changes: dict  # {dotted key: value}
  batches: dict  # {platform it is measured on: Batch}


OWN = {'cpu': Batch(0, 0)}
BATCHES = {  # by size of the network; GPUs of 80 GB or more, TPUs of 16
  's': {'cpu': Batch(12, 2), 'gpu': Batch(384, 64), 'tpu': Batch(96, 64)},
  'b': {'gpu': Batch(192, 64), 'tpu': Batch(48, 64)},
  'l': {'gpu': Batch(96, 64), 'tpu': Batch(24, 32)},
  'xl': {'gpu': Batch(96, 64), 'tpu': Batch(24, 32)},
}
PLAIN = {'sample.guidance': 1.0}
EQUAL = PLAIN | {'sample.num_steps': 48}  # calls, as many as BFM's
BFM = PLAIN | {'sample.sampler': 'ode', 'sample.num_steps': 8}  # in each of 6 segments
FRN = PLAIN | {'sample.sampler': 'ode_frn', 'sample.num_steps': 8}
SOFLOW = {'s': 'b4', 'b': 'b2', 'l': 'l2', 'xl': 'xl2'}  # there is no S
CASES = (
  Case('SiT, digits', 'configs/sit_digits.py', {}, OWN),
  Case('BFM, digits', 'configs/bfm_digits.py', {}, OWN),
  Case('BFM with FRN, digits', 'configs/bfm_digits_frn.py', {}, OWN),
  Case('SoFlow, digits', 'configs/soflow_digits.py', {}, OWN),
  *(
    case for size, batches in BATCHES.items() for case in (
      Case(f'SiT-{size.upper()}', f'configs/sit.py:{size}', EQUAL, batches),
      Case(f'BFM-{size.upper()}', f'configs/bfm.py:{size}', BFM, batches),
      Case(f'BFM-{size.upper()} with FRN', f'configs/bfm_frn.py:{size}', FRN, batches),
      Case(f'SoFlow-{SOFLOW[size].upper()}', f'configs/soflow.py:{SOFLOW[size]}', {}, batches),
    )
  ),
)
ON_CPU = {'model.dtype': 'float32', 'model.remat': False}  # of networks made for accelerators


def run(*, runs=None, as_json=False, cases=CASES):
  """Measures the standing cases of this platform and prints Markdown tables, one of each part.

  Args:
    runs: timed runs of each program; None is RUNS.
    as_json: prints JSON in place of tables.
    cases: of Case.

  Raises:
    ValueError: one line, if recipes are not found here, or in the end if no case was measured.
  """
  measure.expect_one_process()
  measure.expect_recipes('suite')
  place = jax.devices()[0].platform
  runs = RUNS[place] if runs is None else runs
  chosen = [case for case in cases if place in case.batches]
  results, rates = [], {}
  for number, case in enumerate(chosen):
    logging.info('case %d of %d: %s', number + 1, len(chosen), case.name)
    results += [_result(case, part, place, runs, rates) for part in parts.PROGRAMS]
    jax.clear_caches()  # compiled programs take memory, too
  reading, excuse = _reading()
  about = {
    'date': datetime.date.today().isoformat(), 'device': report.device(), 'versions': versions(),
    'command': f'fmzoo bench --suite --runs={runs}{" --json" if as_json else ""}',
  }
  if as_json:
    print(json.dumps(about | {
      'cases': results, 'ceilings': report.plain_rates(rates),
      'input': reading and command.plain_reading(reading), 'input_missing': excuse,
    }, indent=2))
  else:
    print(*lines(about, results, report.plain_rates(rates)), sep='\n')
    read = command.reading_lines(reading) if reading else [excuse]
    print('', '## Reading', '', *read, sep='\n')
  if not any('figures' in result for result in results):
    raise ValueError(
      f'--suite measured none of its {len(chosen)} case(s) on {place}; their rows say why'
    )


def recipe_of(case, place):
  """Returns the build.Recipe of a case on a platform, its batch times the devices."""
  config = command_line.recipe_config('config', case.recipe)
  on_cpu = ON_CPU if place == 'cpu' and config.model.dtype == 'bfloat16' else {}
  batch, count = case.batches[place], jax.device_count()
  sizes = {'data.batch_size': batch.step * count} if batch.step else {}
  sizes |= {'sample.batch_size': batch.images} if batch.images else {}
  config.update_from_flattened_dict(case.changes | on_cpu | sizes)
  return build.recipe(config)


def _result(case, part, place, runs, rates):
  """Returns the figures of a part of a case as plain values, or why there are none.

  Args:
    case: Case.
    part: of parts.PROGRAMS.
    place: platform.
    runs: timed runs.
    rates: {kind: ceiling.Rate}, to which those that are new are added.
  """
  about = {'name': case.name, 'recipe': case.recipe, 'changes': case.changes, 'part': part}
  figures, reason = measure.attempt(
    f'{case.name}, {part}',
    lambda: _measured(parts.PROGRAMS[part](recipe_of(case, place)), runs, rates),
  )
  return about | ({'error': reason} if figures is None else {'figures': figures})


def _measured(program, runs, rates):
  """Returns the figures of a program as plain values, and adds to the ceilings."""
  (measured,) = measure.measure([program], runs=runs)
  rates |= ceiling.rates(program.flops, program.mesh)
  return report.plain(measured, rates)


def _reading():
  """Returns (loader.Reading of made-up latents in a temporary folder, why there is none)."""
  try:
    from fmzoo.data import shards
  except ImportError as error:
    return None, f'Reading is not measured: {error}'
  logging.info('writing %d rows of latents to read', LATENTS)
  moments = np.abs(np.random.default_rng(0).standard_normal((64, 32, 32, 8)))
  with tempfile.TemporaryDirectory() as folder:
    shards.write_latents(
      f'{folder}/latents',
      ({'moments': moments[i % len(moments)], 'label': i % 1000} for i in range(LATENTS)),
      latent_shape=(32, 32, 4), num_classes=1000, vae='synthetic', vae_hash='', scale=0.18215,
      crop='none', rows_per_shard=2048,
    )
    config = command_line.recipe_config('config', 'configs/sit.py:s')
    config.data.path = f'{folder}/latents'
    return command.read(build.recipe(config), is_optional=True)


def versions():
  """Returns {package: version} of what the figures depend on."""
  return {'python': platform.python_version()} | {
    name: importlib.metadata.version(name) for name in PACKAGES
  }


def lines(about, results, rates):
  """Returns the suite as lines of Markdown: what was measured where, then a table of each part.

  Args:
    about: date, device, versions and command.
    results: of the cases, plain values.
    rates: ceilings, plain values.
  """
  known = ', '.join(f'{name} {version}' for name, version in about['versions'].items())
  text = [f"{about['device']}, {about['date']}; {known}.", '', '```bash', about['command'], '```']
  for part, heading in (('step', 'Training steps'), ('sampler', 'Samplers')):
    rows = {
      row['name']: row.get('figures', row.get('error')) for row in results if row['part'] == part
    }
    text += ['', f'## {heading}', '', *report.wide_table(rows, COLUMNS)]
  return [*text, '', '## Ceilings', '', *report.rates_table(rates)]

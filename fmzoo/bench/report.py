"""What was measured, as plain values for JSON and, the same values, as Markdown tables."""

import os
import platform

import jax
import numpy as np

from fmzoo.bench import ceiling


def plain(measured, rates):
  """Returns the figures of a program as {name: plain value}, None where one is not known.

  Args:
    measured: measure.Measured.
    rates: {kind: ceiling.Rate} of the devices that it ran on.
  """
  program = measured.program
  seconds = float(np.median(measured.seconds))
  flops, spent = (sum(count.values()) for count in (program.flops, program.spent))
  wide = sum(count for (dtype, _), count in program.flops.items() if dtype == 'float32')
  return {
    'program': program.name, 'rows': program.rows, 'devices': program.mesh.size,
    'trace_seconds': measured.trace_seconds, 'compile_seconds': measured.compile_seconds,
    'seconds': [seconds, float(measured.seconds.min()), float(measured.seconds.max())],
    'runs': len(measured.seconds), 'calls': measured.calls,
    'rows_per_second': program.rows / seconds,
    'gmac_per_row': flops / 2e9 / program.rows, 'flops': flops,
    'spent_flops': None if program.spent == program.flops else spent,
    'flops_per_second': flops / seconds,
    'mfu': ceiling.least_seconds(program.flops, rates) / seconds,
    'float32_share': wide / flops,
    'memory_bytes': measured.memory_bytes, 'peak_bytes': measured.peak_bytes,
    'process_bytes': measured.process_bytes, 'dispatches': measured.dispatches,
    'compilations': measured.compilations,
    'products': [
      {'dtype': dtype, 'precision': precision, 'flops': count}
      for (dtype, precision), count in program.flops.items()
    ],
  }


def _gigabytes(value):
  """Returns bytes as GB = 1e9 of them."""
  return f'{value / 1e9:.3g}'


def _tera(value):
  """Returns a number in units of 1e12."""
  return f'{value / 1e12:.3g}'


def _times(value):
  """Returns seconds as milliseconds: median (lowest, highest)."""
  median, low, high = (f'{1e3 * seconds:.4g}' for seconds in value)
  return f'{median} ({low}, {high})'


def _share(value):
  """Returns a share in per cent."""
  return f'{value:.1%}'


FIGURES = {  # name: (what a table calls it, how it shows it)
  'rows': ('rows or images of a call', str),
  'devices': ('devices', str),
  'trace_seconds': ('tracing, s', '{:.1f}'.format),
  'compile_seconds': ('compiling, s', '{:.1f}'.format),
  'seconds': ('ms of a call: median (lowest, highest)', _times),
  'runs': ('timed runs', str),
  'calls': ('calls of a run', str),
  'rows_per_second': ('images/s', '{:.4g}'.format),
  'gmac_per_row': ('GMAC of a row or image', '{:.4g}'.format),
  'flops': ('TFLOP of a call, all devices', _tera),
  'spent_flops': ('TFLOP with what is recomputed, all devices', _tera),
  'flops_per_second': ('TFLOP/s of all devices', _tera),
  'mfu': ('MFU, of the measured ceiling', _share),
  'float32_share': ('products in float32', _share),
  'memory_bytes': ('GB of a device, by the compiler', _gigabytes),
  'peak_bytes': ('GB in use on a device at most', _gigabytes),
  'process_bytes': ('GB of the process at most', _gigabytes),
  'dispatches': ('programs started by a call', '{:g}'.format),
  'compilations': ('compilations while timing', str),
}


def cell(figures, name):
  """Returns a figure of `plain` as a table shows it; nothing if it is not known."""
  return '' if figures[name] is None else FIGURES[name][1](figures[name])


def row(cells):
  """Returns a line of a Markdown table."""
  return f'| {" | ".join(cells)} |'


def table(columns):
  """Returns figures of programs as lines of a Markdown table, a program a column.

  Args:
    columns: {heading: figures of `plain`}; those that none of them has are left out.
  """
  names = [name for name in FIGURES if any(c[name] is not None for c in columns.values())]
  return [
    row(['', *columns]), '|---' * (1 + len(columns)) + '|',
    *(
      row([FIGURES[name][0], *(cell(figures, name) for figures in columns.values())])
      for name in names
    ),
  ]


def wide_table(rows, names):
  """Returns figures of programs as lines of a Markdown table, a program a line.

  Args:
    rows: {name of a line: figures of `plain`, or in words why there are none}.
    names: of FIGURES, the columns.
  """
  lines = [row(['', *(FIGURES[name][0] for name in names)]), '|---' * (1 + len(names)) + '|']
  for heading, figures in rows.items():
    cells = (
      [figures, *[''] * (len(names) - 1)] if isinstance(figures, str)
      else [cell(figures, name) for name in names]
    )
    lines.append(row([heading, *cells]))
  return lines


def plain_rates(rates):
  """Returns measured ceilings as plain values; see ceiling.Rate."""
  return [rate._asdict() for rate in rates.values()]


def rates_table(rates):
  """Returns the values of `plain_rates` as lines of a Markdown table."""
  lines = [
    '| ceiling: products of | precision | square matrices of | TFLOP/s of all devices |',
    '|---|---|---|---|',
  ]
  for rate in rates:
    reached = _tera(rate['flops_per_second'])
    lines.append(row([rate['dtype'], rate['precision'], str(rate['size']), reached]))
  return lines


def device():
  """Returns in words what there is to compute with."""
  devices = jax.devices()
  words = f'{len(devices)} x {devices[0].device_kind}'
  if devices[0].platform != 'cpu':
    return words
  model = platform.processor() or platform.machine()
  if os.path.exists('/proc/cpuinfo'):
    with open('/proc/cpuinfo', encoding='utf-8') as lines:
      names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    model = names[0] if names else model
  has_shares = hasattr(os, 'sched_getaffinity')  # which tells what this process may use
  cores = len(os.sched_getaffinity(0)) if has_shares else os.cpu_count()
  return f'{words}, {cores} cores of {model}'

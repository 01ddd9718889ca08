"""Words of a command line to a config: commands, flags, recipe files and stored configs."""

import json
import os
import pathlib
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags

COMMANDS = ('train', 'sample', 'evaluate')
USAGE = """\
fmzoo: blockwise flow matching and solution flow models in JAX.

  python -m fmzoo.main [COMMAND] --config=FILE[:ARG] [--workdir=DIR] [--config.section.key=value]

commands
  train      train, preview, checkpoint, evaluate; the same command again goes on (default)
  sample     checkpoint to images: .npz, grid PNG and, with --config.sample.png_folder, PNGs
  evaluate   checkpoint, or --samples=FILE.npz, to metrics and protocol.json

flags
  --config   recipe, such as configs/soflow_digits.py; without it the workdir's config.json
  --workdir  where the run lives; default runs/<recipe name>
  --step     checkpoint to use, in finished steps; default the newest (sample, evaluate)
  --samples  images to measure (evaluate)

Keys and their meaning: configs/base.py. Data: data/ here, or FMZOO_DATA_DIR.
"""


def asks_for_help(argv):
  """Says whether a command line is a cry for help."""
  return any(argument in ('help', '-h', '--help', '-help') for argument in argv[1:])


def raised_here(error):
  """Says whether fmzoo itself refused the input: then the line says all, else it is a fault."""
  trace = error.__traceback__
  while trace.tb_next:
    trace = trace.tb_next
  return trace.tb_frame.f_globals.get('__name__', '').partition('.')[0] in ('fmzoo', '__main__')


def parse(argv):
  """Returns (command, config, workdir, flag values) of a command line.

  Raises:
    ValueError: one line for an unknown command, flag or key, a wrong type or a missing file.
  """
  sys.path.insert(0, os.getcwd())  # recipes import configs.base
  values = flags.FlagValues()
  flags.DEFINE_string('workdir', None, 'where the run lives', flag_values=values)
  flags.DEFINE_integer('step', None, 'checkpoint, in finished steps', flag_values=values)
  flags.DEFINE_string('samples', None, 'images to measure', flag_values=values)
  recipe = flag_value(argv, 'config')
  stored = stored_config(argv) if recipe is None else None
  try:
    if recipe is None:
      config_flags.DEFINE_config_dict(
        'config', stored, 'recipe', flag_values=values, sys_argv=argv
      )
    else:
      config_flags.DEFINE_config_file(
        'config', None, 'recipe', flag_values=values, sys_argv=argv
      )
    _, *positional = values(argv)
    config = values.config
  except (
    flags.Error, AttributeError, KeyError, TypeError, ImportError, OSError, ValueError
  ) as error:
    raise ValueError(f'{error} (known keys: configs/base.py; --help shows the flags)') from error
  command = positional[0] if positional else 'train'
  if len(positional) > 1 or command not in COMMANDS:
    raise ValueError(f"command '{' '.join(positional)}' is unknown; use one of {COMMANDS}")
  for name, takes in (('step', ('sample', 'evaluate')), ('samples', ('evaluate',))):
    if values[name].present and command not in takes:
      raise ValueError(f"--{name} is a flag of {' and '.join(takes)}, not of '{command}'; drop it")
  if values['step'].present and values['samples'].present:
    raise ValueError('--step and --samples exclude each other: measure a checkpoint or a file')
  return command, config, values.workdir or default_workdir(recipe), values


def flag_value(argv, name):
  """Returns the last value of a flag before it is parsed, `--name=value` or `--name value`."""
  found = None
  for argument, after in zip(argv[1:], [*argv[2:], '']):
    flag, has_value, value = argument.partition('=')
    if flag in (f'-{name}', f'--{name}'):
      found = value if has_value else after
  return found


def default_workdir(recipe):
  """Returns runs/<recipe name>, with the recipe's argument if it has one."""
  path, _, argument = recipe.partition(':')
  return str(pathlib.Path('runs') / '_'.join(filter(None, (pathlib.Path(path).stem, argument))))


def stored_config(argv):
  """Returns the config of the workdir that a command line without --config names."""
  path = pathlib.Path(flag_value(argv, 'workdir') or '.') / 'config.json'
  if not path.is_file():
    raise ValueError(
      f'no recipe: give --config=configs/soflow_digits.py, say, or a --workdir=DIR with a'
      f' config.json (looked for {path})'
    )
  try:
    stored = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(
      f'{path} is not a config: {error}; give --config=RECIPE to write it again'
    ) from error
  if not isinstance(stored, dict):
    raise ValueError(f'{path} is not a config: it has no sections; give --config=RECIPE')
  return ConfigDict(tuples(stored))


def tuples(value):
  """Turns the lists of a parsed JSON value into tuples, as recipes have them."""
  if isinstance(value, dict):
    return {key: tuples(item) for key, item in value.items()}
  return tuple(tuples(item) for item in value) if isinstance(value, list) else value

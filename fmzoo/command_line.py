"""Words of a command line to a config: commands, flags, recipe files and stored configs."""

import importlib.util
import itertools
import json
import os
import pathlib
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags

from fmzoo import paths

HOSTS = ('coordinator', 'processes', 'process')  # flags that say who works together
COMMANDS = {  # and the flags that each takes beside --config and --workdir
  'train': HOSTS,
  'sample': ('step', *HOSTS),
  'evaluate': ('step', 'samples', 'make_reference', 'from', 'compare', *HOSTS),
  'prepare': ('from', 'dtype', 'shard_rows', *HOSTS),
  'convert': ('step', 'weights', 'export'),
  'plan': ('topology', 'mfu', 'json', 'sampler'),
  'bench': ('parts', 'runs', 'json', 'compare', 'suite', 'pareto', 'plot', 'precision'),
}
EXCLUSIVE = {  # pairs of flags, and what to choose between
  ('step', 'samples'): 'measure a checkpoint or a file',
  ('step', 'make_reference'): 'a reference is made of real images',
  ('samples', 'make_reference'): 'a reference is made of --from=SOURCE',
  ('compare', 'step'): 'results that are there are compared',
  ('compare', 'samples'): 'results that are there are compared',
  ('compare', 'make_reference'): 'results that are there are compared',
  ('weights', 'export'): 'read a file of official weights or write one',
  ('step', 'weights'): 'a checkpoint is chosen for --export',
  ('compare', 'precision'): 'compare recipes or policies of rounding',
  ('compare', 'suite'): 'compare two recipes or measure the standing cases',
  ('parts', 'precision'): 'measure programs or policies of rounding',
  ('json', 'precision'): 'policies of rounding come as a table',
  ('precision', 'suite'): 'measure policies of rounding or the standing cases',
  ('parts', 'suite'): 'the standing cases say what of them is measured',
  ('compare', 'pareto'): 'compare two recipes or all methods',
  ('pareto', 'precision'): 'measure all methods or policies of rounding',
  ('pareto', 'suite'): 'measure all methods over steps or the standing cases',
  ('parts', 'pareto'): 'of all methods the samplers are measured',
}
PATHS = (  # flags that name a file or folder
  'workdir', 'samples', 'weights', 'export', 'from', 'make_reference', 'plot',
)
WITHOUT_RECIPE = ('compare', 'suite', 'pareto')  # flags that need no --config
SIZES = ('s', 'b', 'l', 'xl')  # of --pareto
USAGE = """\
fmzoo: blockwise flow matching and solution flow models in JAX.

  python -m fmzoo.main [COMMAND] --config=FILE[:ARG] [--workdir=DIR] [--config.section.key=value]

commands
  train      train, preview, checkpoint, evaluate; the same command again goes on (default)
  sample     checkpoint to images: .npz, grid PNG and, with --config.sample.png_folder, PNGs
  evaluate   checkpoint, or --samples, to metrics and protocol.json; --make_reference; --compare
  prepare    pictures (--from) to latents in data.path, as the recipe needs them; again: goes on
  convert    official weights to a workdir (--weights), or a checkpoint to such a file (--export)
  plan       compiles training step and sampler for a TPU slice (--topology): memory, FLOPs,
             traffic between chips; needs no TPU and no data; exit status 3 if nothing fits
  bench      times training step, sampler and reading: images/s, FLOPs, MFU, memory, compilation; or
             two recipes in turn (--compare A B), the standing cases (--suite), or what an image
             costs by every method over numbers of steps (--pareto)

flags
  --config   recipe, such as configs/soflow_digits.py; without it the workdir's config.json
  --workdir  where the run lives; default runs/<recipe name>
  --step     checkpoint to use, in finished steps; default the newest (sample, evaluate, convert)
  --samples  images to measure: ADM .npz or folder of PNGs (evaluate)
  --make_reference  .npz to write with the statistics of real images, those of --from or else the
             recipe's data; config.eval.reference then reads it (evaluate)
  --compare  two results, A,B: folders in evaluations/; prints them and what differs in how they
             came about (evaluate). Two recipes, A B, or one beside --config: measured run by run in
             turn; keys of the second as --compare.section.key=value (bench)
  --from     a folder of pictures (class folders or none), tfds:NAME[:SPLIT], SoFlow's .hdf5 or a
             folder with images/ and vae-sd/ as for REPA (prepare; evaluate --make_reference, which
             takes an .npz of images, too)
  --dtype    of stored moments, float16 (default) or float32 (prepare)
  --shard_rows  images in a shard, what a kill loses at most; default a sixteenth of them all, from
             64 to 2048 (prepare)
  --weights  official .safetensors, or .pt, to read into a new workdir; of a training checkpoint
             config.sample.weights, ema or params, chooses ema_model or model (convert)
  --export   .safetensors to write, or .pt where torch is installed, official names and layouts;
             config.sample.weights (convert)
  --topology slice to plan for: v4, v5e, v5p or v6e and its shape, such as v5e:2x4 (default), or
             cpu:8 for simulated devices (plan)
  --mfu      share of the chips' peak at which plan tells the days of training, such as 0.4; it
             is an assumption, so there is no default (plan)
  --sampler  whether the sampler is compiled, too: --nosampler saves the time (plan)
  --json     prints JSON in place of tables (plan, bench)
  --parts    what to measure, of step,sampler,input; default all three, with --compare the sampler;
             only input needs data (bench)
  --runs     timed runs of each program or policy, not of reading; default 20, on a CPU 5 with
             --suite and 3 with --pareto (bench)
  --suite    in place of a recipe: the standing cases of docs/benchmarks.md for this device (bench)
  --pareto   in place of a recipe: s, b, l or xl, the size at which SiT, BFM, its FRN and SoFlow
             sample with fewer and more steps (bench)
  --plot     .png to draw what --pareto measures into; needs matplotlib (bench)
  --precision  in place of that: what rounding does to SoFlow's loss and what it costs; trained
             parameters of --workdir if it has a checkpoint, else random ones (bench)
  --coordinator  HOST:PORT where several processes meet, a free port of process 0; Cloud TPU pods,
             SLURM and indexed Kubernetes jobs need none of these three (train, sample, evaluate,
             prepare)
  --processes  how many there are
  --process  which of them this is, from 0

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
  # By file: frames of a reading process come without their module's name.
  return pathlib.Path(__file__).parent in pathlib.Path(trace.tb_frame.f_code.co_filename).parents


def parse(argv):
  """Returns (command, config, workdir, flag values) of a command line.

  Raises:
    ValueError: one line for an unknown command, flag or key, a wrong type or a missing file.
  """
  leading = command_of(itertools.takewhile(lambda word: not word.startswith('-'), argv[1:]))
  sys.path.insert(0, os.getcwd())  # recipes import configs.base
  for name in PATHS:
    value = flag_value(argv, name)
    paths.expect_local(f'--{name}', value)
    if value == '':
      raise ValueError(f'--{name}= is empty, expected a path; drop the flag or give one')
  other = None
  if leading == 'bench':
    other, argv = without_recipe(two_recipes(argv), 'compare')
  recipe, argv = without_recipe(argv, 'config')
  if recipe is not None:
    recipes = {'config': recipe_config('config', recipe)}
  else:
    is_needed = all(flag_value(argv, name) is None for name in WITHOUT_RECIPE)
    recipes = {'config': stored_config(argv) if is_needed else ConfigDict()}
  if other is not None:
    recipes['compare'] = recipe_config('compare', other)
  values = flag_values(has_recipe_to_compare=other is not None)
  for name, chosen in recipes.items():
    expect_known_keys(name, chosen, argv)
  try:
    for name, chosen in recipes.items():
      config_flags.DEFINE_config_dict(name, chosen, 'recipe', flag_values=values, sys_argv=argv)
    _, *words = values(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f'{error} (known keys: configs/base.py; --help shows the flags)') from error
  command = command_of(words)
  if command == 'bench' and command != leading and flag_value(argv, 'compare') is not None:
    raise ValueError("--compare before 'bench' is not understood; write fmzoo bench --compare A B")
  for name in ('suite', 'pareto'):
    if values[name].value and recipe is not None:
      raise ValueError(f'--config={recipe} is no part of what --{name} measures; drop one of them')
  own = [name for names in COMMANDS.values() for name in names]
  given = {name for name in own if name in values and values[name].present}
  check_flags(command, given | recipes.keys() & {'compare'})
  if values.parts == ['input'] and values['runs'].present:
    raise ValueError(
      f'--runs={values.runs} is of programs, --parts=input measures reading alone; drop one of them'
    )
  check_hosts({name: values[name].value for name in HOSTS})
  workdir = values.workdir or (default_workdir(recipe) if recipe is not None else '.')
  return command, values.config, workdir, values


def flag_values(has_recipe_to_compare):
  """Returns the flags of all commands, not parsed yet; --compare is none where it is a recipe."""
  values = flags.FlagValues()
  for name in PATHS:
    flags.DEFINE_string(name, None, 'see USAGE', flag_values=values)
  flags.DEFINE_integer('step', None, 'see USAGE', flag_values=values)
  flags.DEFINE_enum('dtype', 'float16', ('float16', 'float32'), 'see USAGE', flag_values=values)
  flags.DEFINE_integer('shard_rows', None, 'see USAGE', flag_values=values, lower_bound=1)
  flags.DEFINE_string('topology', 'v5e:2x4', 'see USAGE', flag_values=values)
  flags.DEFINE_boolean('sampler', True, 'see USAGE', flag_values=values)
  flags.DEFINE_float('mfu', None, 'see USAGE', flag_values=values)
  flags.DEFINE_string('coordinator', None, 'see USAGE', flag_values=values)
  flags.DEFINE_integer('processes', None, 'see USAGE', flag_values=values, lower_bound=1)
  flags.DEFINE_integer('process', None, 'see USAGE', flag_values=values, lower_bound=0)
  for name in ('precision', 'suite', 'json'):
    flags.DEFINE_boolean(name, False, 'see USAGE', flag_values=values)
  if not has_recipe_to_compare:
    flags.DEFINE_string('compare', None, 'see USAGE', flag_values=values)
  flags.DEFINE_enum('pareto', None, SIZES, 'see USAGE', flag_values=values)
  flags.DEFINE_list('parts', None, 'see USAGE', flag_values=values)
  flags.DEFINE_integer('runs', 20, 'see USAGE', flag_values=values, lower_bound=1)
  return values


def two_recipes(argv):
  """Returns a command line whose `--compare A B` is written `--config=A --compare=B`.

  Raises:
    ValueError: if there is a --config, too.
  """
  for place, word in enumerate(argv):
    both = argv[place + 1 : place + 3]
    if word in ('-compare', '--compare') and len(both) == 2 and not both[1].startswith('-'):
      if flag_value(argv, 'config') is not None:
        raise ValueError(
          f'--compare {" ".join(both)} beside --config={flag_value(argv, "config")} makes three'
          ' recipes, expected two; drop one'
        )
      return [
        *argv[:place], f'--config={both[0]}', f'--compare={both[1]}', *argv[place + 3 :]
      ]
  return argv


def command_of(words):
  """Returns the command that the words beside the flags name; there may be one, or none."""
  command, *stray = [*words] or ['train']
  if command not in COMMANDS:
    raise ValueError(f"command '{command}' is unknown; use one of {', '.join(COMMANDS)}")
  if stray:
    raise ValueError(
      f"'{' '.join(stray)}' after the command '{command}' is not understood; drop it, or write it"
      ' as --flag=value (--help shows the flags)'
    )
  return command


def check_flags(command, given):
  """Refuses flags of another command and flags that exclude each other.

  Args:
    command: of COMMANDS.
    given: names of those on the command line, beside --config and --workdir.
  """
  for name in sorted(given.difference(COMMANDS[command])):
    takers = ' and '.join(taker for taker, names in COMMANDS.items() if name in names)
    raise ValueError(f"--{name} is a flag of {takers}, not of '{command}'; drop it")
  for (first, second), choice in EXCLUSIVE.items():
    if {first, second} <= given:
      raise ValueError(f'--{first} and --{second} exclude each other: {choice}')
  if 'plot' in given and 'pareto' not in given:
    raise ValueError("--plot draws what --pareto=SIZE measures; give that, too, or drop the flag")
  if command == 'evaluate' and 'from' in given and 'make_reference' not in given:
    raise ValueError("'evaluate' takes --from=SOURCE only with --make_reference=FILE; see --help")
  if command == 'prepare' and 'from' not in given:
    raise ValueError("'prepare' needs --from=SOURCE, such as a folder of pictures; see --help")
  if command == 'convert' and not given & {'weights', 'export'}:
    raise ValueError(
      "'convert' needs --weights=FILE.safetensors to read official weights into the workdir, or"
      ' --export=FILE.safetensors to write its checkpoint as such; .pt files will do as well'
    )


def check_hosts(given):
  """Refuses flags of HOSTS that do not say where processes meet.

  Args:
    given: {name: value, None where it was not given} of HOSTS.
  """
  if all(value is None for value in given.values()) or given['processes'] == 1:
    return
  shown = ' '.join(f'--{name}={value}' for name, value in given.items() if value is not None)
  if None in given.values():
    raise ValueError(
      f'{shown} does not say where processes meet; give --coordinator=HOST:PORT, --processes=N and'
      ' --process=I, or none of them'
    )
  host, _, port = given['coordinator'].rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise ValueError(
      f'--coordinator={given["coordinator"]} must be HOST:PORT, such as 10.0.0.2:8476'
    )
  if given['process'] >= given['processes']:
    raise ValueError(f'{shown}: expected a process from 0 to {given["processes"] - 1}')


def without_recipe(argv, name):
  """Returns (value of the last flag `name` or None, the command line without it)."""
  rest, words = [], iter(argv)
  recipe = None
  for word in words:
    flag, has_value, value = word.partition('=')
    if flag in (f'-{name}', f'--{name}'):
      recipe = value if has_value else next(words, '')
    else:
      rest.append(word)
  return recipe, rest


def recipe_config(flag, recipe):
  """Returns the config of a recipe, FILE or FILE:ARG."""
  path, has_argument, argument = recipe.partition(':')
  if not (path.endswith('.py') and pathlib.Path(path).is_file()):
    raise ValueError(
      f"--{flag}={recipe}: there is no recipe '{path}'; fmzoo's are in configs/, such as"
      ' configs/soflow_digits.py'
    )
  spec = importlib.util.spec_from_file_location('recipe', path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    return module.get_config(argument) if has_argument else module.get_config()
  except (AttributeError, ImportError, TypeError, ValueError) as error:
    raise ValueError(f'--{flag}={recipe} cannot be used: {error}') from error


def expect_known_keys(flag, config, argv):
  """Refuses `--config.section.key` of a section or a key that the recipe does not have."""
  for word in argv[1:]:
    dotted = word.partition('=')[0].lstrip('-')
    if not word.startswith('-') or not dotted.startswith(f'{flag}.'):
      continue
    node, above = config, 'the recipe'
    for name in dotted.split('.')[1:]:
      if not hasattr(node, 'keys') or '[' in name:
        break
      if name not in node:
        raise ValueError(
          f"--{dotted}: '{name}' is no key of {above}; it has {', '.join(sorted(node))}"
        )
      node, above = node[name], f"'{name}'"


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

"""Flags to config to command; no logic."""

import os
import signal
import sys
import traceback

from fmzoo import command_line
from fmzoo.parallel import ends

STOPPED = 128 + signal.SIGTERM  # exit status where SIGTERM ended a command early, all of it saved
DOES_NOT_FIT = 3  # of a plan without a layout that fits
INTERRUPTED = 128 + signal.SIGINT  # of Ctrl-C
REFUSED = 2  # bad input
FAULT = 1  # python's own, of what nobody expected


def run(argv):
  """Parses the flags, builds the recipe, hands over to the command; returns the exit status."""
  if command_line.asks_for_help(argv):
    print(command_line.USAGE)
    return 0
  command, config, workdir, values = command_line.parse(argv)
  if command == 'plan':
    _without_accelerators(values.topology)
  from fmzoo import build, program_cache, writer  # after help and bad flags: jax takes its time
  from fmzoo.parallel import hosts

  writer.setup_logging()
  if command in ('plan', 'bench'):  # which tell how long it takes to compile
    with program_cache.left_alone():
      return _measure(command, config, workdir, values) or 0
  if command == 'evaluate' and values.compare is not None:
    return _compare(values.compare) or 0
  if 'process' in command_line.COMMANDS[command]:
    _meet(command, values)
  if hosts.count() == 1:  # several would wait for those that compile
    program_cache.keep()
  status = COMMANDS[command](build.recipe(config), workdir, values) or 0
  hosts.finish()
  return status


def _measure(command, config, workdir, values):
  """Runs what leaves nothing in a workdir."""
  from fmzoo import build

  if command == 'bench' and (values.suite or values.pareto):
    return _standing(values)
  return COMMANDS[command](build.recipe(config), workdir, values)


def _meet(command, values):
  """See parallel.hosts.start; of several processes one tells how it goes."""
  from fmzoo import writer
  from fmzoo.parallel import hosts

  flags = {name: values[name].value for name in command_line.HOSTS}
  # As on one host: only these two do more at SIGTERM than to end.
  in_order = command in ('train', 'sample')
  if hosts.start(**flags, stops_in_order=in_order) and not hosts.is_main():
    writer.only_warnings()


def _train(recipe, workdir, values):
  """See train.train; the status says whether it was stopped early."""
  from fmzoo import train

  state = train.train(recipe, workdir)
  return STOPPED if int(state.step) < recipe.run.steps else 0


def _sample(recipe, workdir, values):
  """See sample.sample; the status says whether it was stopped early."""
  from fmzoo import sample

  return STOPPED if sample.sample(recipe, workdir, values.step) is None else 0


def _evaluate(recipe, workdir, values):
  """See evaluate.evaluate and make_reference.make_reference."""
  from fmzoo import evaluate

  if values.make_reference:
    from fmzoo import make_reference

    return make_reference.make_reference(recipe, values.make_reference, values['from'].value)
  evaluate.evaluate(recipe, workdir, values.step, values.samples)


def _compare(folders):
  """See evaluate.compare."""
  from fmzoo import evaluate

  evaluate.compare(folders)


def _prepare(recipe, workdir, values):
  """See data.prepare.prepare."""
  from fmzoo.data import prepare

  prepare.prepare(recipe, values['from'].value, dtype=values.dtype, shard_rows=values.shard_rows)


def _convert(recipe, workdir, values):
  """See convert_weights.convert."""
  from fmzoo import convert_weights

  convert_weights.convert(
    recipe, workdir, at_step=values.step, source=values.weights, target=values.export
  )


def _plan(recipe, workdir, values):
  """See plan.plan; the status says whether it fits."""
  from fmzoo import plan

  fits = plan.plan(
    recipe, values.topology, mfu=values.mfu, as_json=values.json, with_sampler=values.sampler
  )
  return 0 if fits else DOES_NOT_FIT


def _without_accelerators(topology):
  """Has jax leave alone what this machine has; it must not have started yet."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  # A slice that is planned is described nowhere; libtpu complains unless it is told something.
  os.environ |= {'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost',
                 'TPU_ACCELERATOR_TYPE': 'v5litepod-8'}
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'  # it only compiles
  kind, _, count = topology.partition(':')
  if kind == 'cpu' and count.isdecimal() and int(count):
    os.environ['JAX_NUM_CPU_DEVICES'] = count


def _bench(recipe, workdir, values):
  """See bench.command.bench and compare, and precision.report."""
  if values.precision:
    from fmzoo import precision

    return precision.report(recipe, workdir, runs=values.runs)
  from fmzoo import build
  from fmzoo.bench import command

  options = {'chosen': values.parts, 'runs': values.runs, 'as_json': values.json}
  if values.compare is not None:
    return command.compare([recipe, build.recipe(values.compare)], **options)
  command.bench(recipe, **options)


def _standing(values):
  """See bench.suite.run and bench.pareto.run, which bring recipes of their own."""
  from fmzoo.bench import pareto, suite

  options = {'runs': values.runs if values['runs'].present else None, 'as_json': values.json}
  if values.suite:
    return suite.run(**options)
  pareto.run(values.pareto, plot=values.plot, **options)


COMMANDS = {
  'train': _train, 'sample': _sample, 'evaluate': _evaluate, 'prepare': _prepare,
  'convert': _convert, 'plan': _plan, 'bench': _bench,
}


def cli():
  """Runs the command line and returns its exit status.

  One of several processes that fails ends here and now, lest the others wait for it.
  """
  try:
    status = attempt()
  except Exception:
    if ends.is_watched():
      traceback.print_exc()
      ends.leave(FAULT)
    raise
  if status in (REFUSED, INTERRUPTED):
    ends.leave(status, told=True)
  return status


def attempt():
  """Runs the command line; bad input is one line, a fault is not."""
  try:
    return run(sys.argv)
  except KeyboardInterrupt:
    print(
      'stopped by Ctrl-C; the same command goes on, or, what it only computes, begins again',
      file=sys.stderr,
    )
    return INTERRUPTED
  except (ValueError, OSError) as error:
    if isinstance(error, ValueError) and not command_line.raised_here(error):
      raise
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    return REFUSED


if __name__ == '__main__':
  sys.exit(cli())

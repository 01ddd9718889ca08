"""Flags to config to command; no logic."""

import sys

from fmzoo import command_line


def run(argv):
  """Parses the flags, builds the recipe and hands over to the command."""
  if command_line.asks_for_help(argv):
    print(command_line.USAGE)
    return
  command, config, workdir, values = command_line.parse(argv)
  from fmzoo import build, writer  # after help and bad flags: jax takes its time

  writer.setup_logging()
  recipe = build.recipe(config)
  if command == 'train':
    from fmzoo import train

    train.train(recipe, workdir)
  elif command == 'sample':
    from fmzoo import sample

    sample.sample(recipe, workdir, values.step)
  else:
    from fmzoo import evaluate

    evaluate.evaluate(recipe, workdir, values.step, values.samples)


def cli():
  """Runs the command line and returns its exit status; bad input is one line, a fault is not."""
  try:
    run(sys.argv)
  except (ValueError, OSError) as error:
    if isinstance(error, ValueError) and not command_line.raised_here(error):
      raise
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(cli())

"""Numbers on disk, never without how they came about."""

import itertools
import json
import math
import os
import pathlib
import subprocess

import fmzoo


def write_result(folder, metrics, protocol):
  """Writes metrics.json and protocol.json.

  Another result that was there goes to earlier_1, earlier_2, ... beside them. A number that is not
  finite is null, which JSON can hold.

  Args:
    folder: made if missing.
    metrics: {name: number}.
    protocol: {name: plain value}, all that one needs to measure the same again.
  """
  folder = pathlib.Path(folder)
  metrics = {name: float(value) for name, value in metrics.items()}
  texts = {  # in the order of writing: no metrics without their protocol
    'protocol.json': json.dumps(protocol, indent=2),
    'metrics.json': json.dumps(
      {name: value if math.isfinite(value) else None for name, value in metrics.items()}, indent=2
    ),
  }
  folder.mkdir(parents=True, exist_ok=True)
  _set_aside(folder, texts)
  for name, text in texts.items():
    temporary = folder / f'{name}.{os.getpid()}.tmp'
    temporary.write_text(text + '\n')
    os.replace(temporary, folder / name)


def code_version():
  """Returns `git describe` of the checkout this package is in, else its release number."""
  root = pathlib.Path(fmzoo.__file__).parent.parent
  if (root / '.git').exists():  # Not any repository further up: it would be somebody else's.
    try:
      described = subprocess.run(
        ['git', '-C', str(root), 'describe', '--always', '--tags', '--dirty'],
        capture_output=True, text=True, timeout=5, check=True,
      )
      return described.stdout.strip()
    except (OSError, subprocess.SubprocessError):
      return fmzoo.__version__  # no git, no commit, or a file system too slow to wait for
  return fmzoo.__version__


def _set_aside(folder, texts):
  """Moves the files of another result to a folder of their own."""
  present = {name for name in texts if (folder / name).exists()}
  if all((folder / name).read_text() == texts[name] + '\n' for name in present):
    return
  names = (folder / f'earlier_{number}' for number in itertools.count(1))
  earlier = next(name for name in names if not name.exists())
  earlier.mkdir()
  for name in sorted(present):
    os.replace(folder / name, earlier / name)

"""Numbers on disk, never without how they came about."""

import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import subprocess

import fmzoo
from fmzoo import files

FULL = 50_000  # images of the field's FID; a distance of fewer or more is named after its number
FILED = ('images.file', 'images.pixels_sha256')  # told where images were in a file, and of one host
ABSENT = 'not told'  # in place of a value that one of two protocols does not have


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
    with files.replacing(folder / name) as file:
      file.write((text + '\n').encode())


def is_result(folder):
  """Says whether a folder is one of `write_result`, and complete."""
  return (pathlib.Path(folder) / 'metrics.json').is_file()  # written last


def read_result(folder):
  """Reads what `write_result` wrote.

  Returns:
    (metrics, protocol).

  Raises:
    ValueError: one line, if there is no result or it is damaged.
  """
  try:
    metrics, protocol = (
      json.loads((pathlib.Path(folder) / f'{name}.json').read_text())
      for name in ('metrics', 'protocol')
    )
  except (OSError, ValueError) as error:
    raise ValueError(
      f'{folder} holds no result: {error}; expected a folder with metrics.json and protocol.json,'
      ' such as a workdir has in evaluations/'
    ) from error
  return metrics, protocol


def differences(first, second):
  """Returns [(dotted key, value, other value)] of what differs between two protocols, sorted."""
  first, second = _flat(first), _flat(second)
  for key in FILED:
    if not (key in first and key in second):
      first.pop(key, None), second.pop(key, None)
  return [
    (key, first.get(key, ABSENT), second.get(key, ABSENT))
    for key in sorted(first.keys() | second.keys())
    if first.get(key, ABSENT) != second.get(key, ABSENT)
  ]


def _flat(tree, above=''):
  """Turns nested dicts into one with dotted keys."""
  flat = {}
  for key, value in tree.items():
    inside = isinstance(value, dict) and value
    flat |= _flat(value, f'{above}{key}.') if inside else {f'{above}{key}': value}
  return flat


def metric_name(metric, count):
  """Returns the name of a distance that depends on the number of images, such as 'fid-5000'."""
  return metric if count == FULL else f'{metric}-{count}'


@functools.cache
def code_version():
  """Returns `git describe` of the checkout this package is in, else its release number.

  It is looked at once in a process, when the code that runs has just been read. Changes that are
  not committed add '-dirty' and the first digits of their SHA-256.
  """
  root = pathlib.Path(fmzoo.__file__).parent.parent
  if not (root / '.git').exists():  # Not any repository further up: it would be somebody else's.
    return fmzoo.__version__
  try:
    described = _git(root, 'describe', '--always', '--tags', '--dirty').decode().strip()
    if not described.endswith('-dirty'):
      return described
    return f'{described}-{hashlib.sha256(_git(root, "diff", "HEAD")).hexdigest()[:8]}'
  except (OSError, subprocess.SubprocessError):
    return fmzoo.__version__  # no git, no commit, or a file system too slow to wait for


def _git(root, *arguments):
  """Returns what a git command prints."""
  command = ['git', '-C', str(root), *arguments]
  return subprocess.run(command, capture_output=True, timeout=5, check=True).stdout


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

"""Where compiled programs are kept, so that a second start compiles nothing again."""

import contextlib
import hashlib
import os
import pathlib
import platform
import tempfile

import jax
from absl import logging

CPU_LINES = ('model name', 'flags', 'Features', 'CPU implementer', 'CPU part')  # of /proc/cpuinfo


def keep():
  """Has jax store what it compiles in `folder`, and look there first.

  jax stores what took a second or longer, under a key of the program, the versions, the flags and
  the devices. Where JAX_COMPILATION_CACHE_DIR says where, nothing is changed. A folder that cannot
  be written is not used.
  """
  if jax.config.jax_compilation_cache_dir:
    return
  try:
    place = folder()
    place.mkdir(parents=True, exist_ok=True, mode=0o700)  # what lies there is run
    with tempfile.TemporaryFile(dir=place):
      pass
  except (OSError, RuntimeError) as error:  # the latter where the user has no home
    logging.info('compiled programs are not kept: %s', error)
    return
  jax.config.update('jax_compilation_cache_dir', str(place))
  # Those of XLA itself end a run where they cannot be written, as on a disk that is full.
  jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')


@contextlib.contextmanager
def left_alone():
  """Has jax compile whatever is asked for, also where JAX_COMPILATION_CACHE_DIR is set."""
  before = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  try:
    yield
  finally:
    jax.config.update('jax_enable_compilation_cache', before)


def folder():
  """Returns this machine's own folder in the user's cache, XDG_CACHE_HOME or ~/.cache.

  Raises:
    RuntimeError: if the user has no home.
  """
  root = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(root) / 'fmzoo' / 'programs' / _machine()


def _machine():
  """Names the processor: a program of a CPU may have instructions that another one lacks."""
  words = [platform.machine(), platform.processor()]
  if os.path.exists('/proc/cpuinfo'):
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    words += sorted({line for line in lines if line.startswith(CPU_LINES)})
  return f'{platform.machine()}-{hashlib.sha256(" ".join(words).encode()).hexdigest()[:12]}'

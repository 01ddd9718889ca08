"""Where compiled programs are kept, so that a second start compiles nothing again."""

import hashlib
import os
import pathlib
import platform

import jax


def keep():
  """Has jax store what it compiles, and look there first.

  In `folder`, unless JAX_COMPILATION_CACHE_DIR says where. jax stores what took a second or longer,
  under a key of the program, the versions, the flags and the devices.
  """
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir', str(folder()))


def folder():
  """Returns this machine's own folder in the user's cache, XDG_CACHE_HOME or ~/.cache."""
  root = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(root) / 'fmzoo' / 'programs' / _machine()


def _machine():
  """Names the processor: a program of a CPU may have instructions that another one lacks."""
  words = [platform.machine(), platform.processor()]
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    words += sorted({line for line in lines if line.startswith(('model name', 'flags'))})
  except OSError:
    pass  # of Linux only; elsewhere what platform tells is all there is
  return f'{platform.machine()}-{hashlib.sha256(" ".join(words).encode()).hexdigest()[:12]}'

"""Compiled programs are kept where they belong and found again, or left alone."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from fmzoo import main, program_cache

START = """
import jax
from fmzoo import program_cache
program_cache.keep()
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rpartition('/')[2]))
jax.block_until_ready(jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8))))
print(*map(events.count, ('cache_hits', 'cache_misses')), program_cache.folder())
"""


def start(home):
  """Returns (programs found, programs compiled, folder) of a process."""
  environment = {**os.environ, 'XDG_CACHE_HOME': str(home)}
  del environment['JAX_COMPILATION_CACHE_DIR']
  hits, misses, folder = subprocess.run(
    [sys.executable, '-c', START], env=environment, capture_output=True, text=True, check=True
  ).stdout.split()
  return int(hits), int(misses), pathlib.Path(folder)


def test_a_second_start_compiles_nothing(tmp_path):
  hits, misses, folder = start(tmp_path)
  assert hits == 0 and misses > 0
  assert folder.is_relative_to(tmp_path / 'fmzoo') and folder.stat().st_mode & 0o077 == 0
  assert start(tmp_path)[:2] == (misses, 0)


@pytest.fixture
def nowhere():
  """No folder was asked for."""
  before = jax.config.jax_compilation_cache_dir
  jax.config.update('jax_compilation_cache_dir', None)
  yield
  jax.config.update('jax_compilation_cache_dir', before)


def test_a_folder_that_cannot_be_written_is_not_used(nowhere, tmp_path, monkeypatch):
  (tmp_path / 'fmzoo').write_text('')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  program_cache.keep()
  assert jax.config.jax_compilation_cache_dir is None


def test_a_user_without_a_home_keeps_nothing(nowhere, monkeypatch):
  def homeless():
    raise RuntimeError('Could not determine home directory.')

  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  monkeypatch.setattr(pathlib.Path, 'home', homeless)
  program_cache.keep()
  assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_was_asked_for_stays():
  before = jax.config.jax_compilation_cache_dir
  assert before
  program_cache.keep()
  assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.parametrize('command,kept', [('train', True), ('plan', False), ('bench', False)])
def test_commands_that_time_the_compiler_leave_the_cache_alone(command, kept, monkeypatch):
  calls = []
  monkeypatch.setattr(program_cache, 'keep', lambda: calls.append('kept'))
  monkeypatch.setattr(main, '_without_accelerators', lambda topology: None)
  monkeypatch.setitem(
    main.COMMANDS, command, lambda *args: calls.append(jax.config.jax_enable_compilation_cache)
  )
  assert main.run(['fmzoo', command, '--config=configs/sit_digits.py']) == 0
  assert calls == (['kept', True] if kept else [False])
  assert jax.config.jax_enable_compilation_cache

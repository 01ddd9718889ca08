"""Compiled programs are kept where they belong and found again."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from fmzoo import main, program_cache

TWICE = """
import jax
from fmzoo import program_cache
program_cache.keep()
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8)))
jax.clear_caches()
events.clear()
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8)))
print(events.count('/jax/compilation_cache/cache_hits'), program_cache.folder())
"""


def test_a_program_is_compiled_once_and_kept_in_the_users_cache(tmp_path):
  environment = {**os.environ, 'XDG_CACHE_HOME': str(tmp_path)}
  del environment['JAX_COMPILATION_CACHE_DIR']
  told = subprocess.run(
    [sys.executable, '-c', TWICE], env=environment, capture_output=True, text=True, check=True
  ).stdout.split()
  assert int(told[0]) >= 1  # jnp.ones is a program, too
  folder = pathlib.Path(told[1])
  assert folder.is_relative_to(tmp_path / 'fmzoo') and any(folder.iterdir())


def test_a_folder_that_was_asked_for_stays(monkeypatch):
  before = jax.config.jax_compilation_cache_dir
  assert before
  program_cache.keep()
  assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.parametrize('command,kept', [('train', True), ('plan', False), ('bench', False)])
def test_commands_that_time_the_compiler_leave_the_cache_alone(command, kept, monkeypatch):
  calls = []
  monkeypatch.setattr(program_cache, 'keep', lambda: calls.append(command))
  monkeypatch.setattr(main, '_without_accelerators', lambda topology: None)
  monkeypatch.setitem(main.COMMANDS, command, lambda *args: 0)
  assert main.run(['fmzoo', command, '--config=configs/sit_digits.py']) == 0
  assert bool(calls) == kept

"""A result is two files that belong together, and an older one is never lost."""

import json
import re
import subprocess

import numpy as np
import pytest

import fmzoo
from fmzoo.metrics import protocol


def read(folder):
  """Returns (metrics, protocol) of a folder."""
  return tuple(json.loads((folder / f'{n}.json').read_text()) for n in ('metrics', 'protocol'))


def test_what_is_written_is_read(tmp_path):
  folder = tmp_path / 'a' / 'b'
  protocol.write_result(folder, {'accuracy': np.float32(0.5), 'frechet': 1}, {'seed': 0})
  assert read(folder) == ({'accuracy': 0.5, 'frechet': 1.0}, {'seed': 0})
  assert sorted(file.name for file in folder.iterdir()) == ['metrics.json', 'protocol.json']


def test_numbers_that_are_not_finite_are_null(tmp_path):
  protocol.write_result(tmp_path, {'frechet': float('nan'), 'loss': float('inf')}, {})
  text = (tmp_path / 'metrics.json').read_text()
  assert json.loads(text, parse_constant=pytest.fail) == {'frechet': None, 'loss': None}


def test_another_result_moves_the_earlier_one_aside(tmp_path):
  for seed in range(3):
    protocol.write_result(tmp_path, {'accuracy': seed / 2}, {'seed': seed})
  assert read(tmp_path) == ({'accuracy': 1.0}, {'seed': 2})
  assert read(tmp_path / 'earlier_1') == ({'accuracy': 0.0}, {'seed': 0})
  assert read(tmp_path / 'earlier_2') == ({'accuracy': 0.5}, {'seed': 1})


def test_the_same_result_again_changes_nothing(tmp_path):
  for _ in range(2):
    protocol.write_result(tmp_path, {'accuracy': 0.5}, {'seed': 0})
  assert sorted(file.name for file in tmp_path.iterdir()) == ['metrics.json', 'protocol.json']


def test_a_protocol_that_is_no_json_leaves_the_earlier_result(tmp_path):
  protocol.write_result(tmp_path, {'accuracy': 0.5}, {'seed': 0})
  with pytest.raises(TypeError):
    protocol.write_result(tmp_path, {'accuracy': 0.6}, {'seed': object()})
  assert read(tmp_path) == ({'accuracy': 0.5}, {'seed': 0})


@pytest.fixture
def package(tmp_path, monkeypatch):
  """Makes the package believe that it lives below a folder of its own."""
  monkeypatch.setattr(fmzoo, '__file__', str(tmp_path / 'fmzoo' / '__init__.py'))
  monkeypatch.setattr(protocol, 'code_version', protocol.code_version.__wrapped__)
  return tmp_path


def git(folder, *arguments):
  identity = ['-c', 'user.name=a', '-c', 'user.email=a@example.org', '-c', 'commit.gpgsign=false']
  subprocess.run(['git', '-C', str(folder), *identity, *arguments], check=True)


def test_code_version_of_a_checkout_is_its_commit(package):
  git(package, 'init', '-q')
  (package / 'file').write_text('a')
  git(package, 'add', 'file')
  git(package, 'commit', '-qm', 'a')
  assert re.fullmatch('[0-9a-f]{7,}', protocol.code_version())
  versions = []
  for text in ('b', 'c'):
    (package / 'file').write_text(text)
    versions.append(protocol.code_version())
  assert re.fullmatch('[0-9a-f]{7,}-dirty-[0-9a-f]{8}', versions[0]) and len(set(versions)) == 2


def test_code_version_without_a_checkout_is_the_release(package):
  assert protocol.code_version() == fmzoo.__version__


def test_code_version_of_an_installed_package_is_not_that_of_the_repository_around(package):
  git(package.parent, 'init', '-q')
  assert protocol.code_version() == fmzoo.__version__


def test_code_version_without_git_or_commit_is_the_release(package, monkeypatch):
  git(package, 'init', '-q')
  assert protocol.code_version() == fmzoo.__version__
  monkeypatch.setenv('PATH', '')
  assert protocol.code_version() == fmzoo.__version__

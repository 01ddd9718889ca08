"""The table of reading speeds: well formed, true of sources of known speed, empty where unknown."""

import os
import pathlib
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest

from fmzoo import sources
from fmzoo.bench import loader
from fmzoo.data import latents, shards
from tests import tiny

ROWS, BATCH = 160, 8
PAUSE = 0.02  # seconds
HEAD = '| workers | first batch, s | rows/s, cold | rows/s, warm | MB/s, warm |'


class Slow(latents.LatentSource):
  """Latents of which each batch takes a while."""

  def batch(self, indices):
    time.sleep(PAUSE)
    return super().batch(indices)


class Remembering(latents.LatentSource):
  """Latents of which a batch takes a while unless all of its rows were read since `forget`."""

  def __init__(self, path):
    super().__init__(path)
    self.known = set()

  def batch(self, indices):
    if not self.known.issuperset(indices.tolist()):
      time.sleep(PAUSE)
    self.known.update(indices.tolist())
    return super().batch(indices)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Random latents in shards of 50."""
  path, rng = tmp_path_factory.mktemp('data') / 'latents', np.random.default_rng(0)
  moments = np.abs(rng.standard_normal((ROWS, 4, 4, 4)))
  shards.write_latents(
    path, ({'moments': row, 'label': i % 5} for i, row in enumerate(moments)), rows_per_shard=50,
    latent_shape=(4, 4, 2), num_classes=5, vae='toy', vae_hash='', scale=0.5, crop='none',
  )
  return path


@pytest.fixture
def recipe(folder, monkeypatch):
  """Of these latents; a figure takes a fifth of a second at most, with no process but this one."""
  monkeypatch.setattr(loader, 'WORKERS', (0,))
  monkeypatch.setattr(loader, 'SECONDS', 0.2)
  monkeypatch.setattr(loader, 'in_memory', lambda file: False)  # wherever tests write
  return tiny.recipe(
    'fm', data__name='latents', data__path=str(folder), data__latent_size=4, data__channels=2,
    data__num_classes=5, data__latent_scale=0.5, data__batch_size=BATCH, data__num_threads=1,
  )


def bench(recipe):
  """Returns (lines before the table, its cells by row)."""
  lines = loader.table(loader.measure(recipe, sources.open_rows(recipe)))
  start = lines.index(HEAD)
  assert re.fullmatch(r'(\|-+){5}\|', lines[start + 1].replace(' ', ''))
  table = [[cell.strip() for cell in line.split('|')] for line in lines[start + 2 :]]
  assert all(len(row) == 7 and row[0] == row[6] == '' for row in table)
  return lines[:start], [row[1:6] for row in table]


def test_every_worker_count_has_its_positive_numbers(recipe, monkeypatch):
  monkeypatch.undo()
  monkeypatch.setattr(loader, 'in_memory', lambda file: False)
  monkeypatch.setattr(loader, 'SECONDS', 0.05)
  before, table = bench(recipe)
  assert before == ['160 rows of 132 bytes, batches of 8, data.num_threads=1', '']
  assert [row[0] for row in table] == ['0', '1', '2']
  cold = hasattr(os, 'posix_fadvise')
  for _, *cells in table:
    assert (cells[1] != '') == cold
    assert all(float(cell) > 0 for cell in cells if cell)


def test_rates_are_those_of_the_source(recipe, folder, monkeypatch):
  """A batch a pause, and no more: what buffers held does not count."""
  monkeypatch.setattr(sources, 'open_rows', lambda recipe: Slow(folder))
  _, [[_, first, cold, warm, megabytes]] = bench(recipe)
  for rate in (cold, warm):
    assert 0.3 * BATCH / PAUSE < float(rate) < 1.2 * BATCH / PAUSE
  assert float(megabytes) == pytest.approx(float(warm) * 132 / 1e6, rel=0.02)
  assert float(first) >= PAUSE


def test_warm_rows_were_read_before_and_cold_ones_were_not(recipe, folder, monkeypatch):
  """Also in a second line, which the first must not warm."""
  rows, asked = Remembering(folder), []

  def forget(files):
    asked.append(files)
    rows.known.clear()
    return True

  monkeypatch.setattr(sources, 'open_rows', lambda recipe: rows)
  monkeypatch.setattr(loader, 'forget', forget)
  monkeypatch.setattr(loader, 'WORKERS', (0, 0))
  monkeypatch.setattr(loader, 'SECONDS', 8 * PAUSE)  # half of an epoch
  _, table = bench(recipe)
  for _, _, cold, warm, _ in table:
    assert float(cold) < 1.2 * BATCH / PAUSE and float(warm) > 3 * float(cold)
  names = sorted(file.name for file in folder.glob('*.array_record'))
  assert [[file.name for file in files] for files in asked] == [names, names]


def test_reading_ends_where_it_is_told(recipe, folder):
  rows, epoch = latents.LatentSource(folder), ROWS // BATCH
  assert loader.rate(recipe, rows, 0, most=epoch)[2] == epoch
  assert loader.rate(recipe, rows, 0, most=7, settled=5)[2] == 7
  assert loader.rate(recipe, rows, 0)[2] > epoch


def test_nothing_is_cold_where_the_system_cannot_forget(recipe, monkeypatch):
  monkeypatch.delattr(os, 'posix_fadvise', raising=False)
  _, [[_, _, cold, warm, _]] = bench(recipe)
  assert cold == '' and float(warm) > 0


def test_nothing_is_cold_in_memory(recipe, monkeypatch):
  digits = tiny.recipe('fm', data__batch_size=500)  # three batches are an epoch
  before, [[_, _, cold, warm, _]] = bench(digits)
  assert cold == '' and float(warm) > 0 and len(before) == 2


def test_nothing_is_cold_in_a_file_system_of_the_memory(recipe, monkeypatch):
  monkeypatch.setattr(loader, 'in_memory', lambda file: True)
  _, [[_, _, cold, warm, _]] = bench(recipe)
  assert cold == '' and float(warm) > 0


def test_the_innermost_file_system_says_where_a_file_lies(tmp_path):
  folder, mounts = tmp_path.resolve(), tmp_path / 'mounts'
  mounts.write_text(f'root / ext4 rw 0 0\ntmp {folder}/ram tmpfs rw 0 0\n')
  assert loader.in_memory(folder / 'ram' / 'a', mounts)
  assert not loader.in_memory(folder / 'ramble', mounts)
  mounts.write_text(mounts.read_text() + f'disk {folder}/ram ext4 rw 0 0\n')
  assert not loader.in_memory(folder / 'ram' / 'a', mounts)
  assert not loader.in_memory(folder / 'ram' / 'a', tmp_path / 'none')


def test_rows_in_a_bucket_have_no_files(folder, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  rows = latents.LatentSource(folder)
  data = SimpleNamespace(name='latents', path='gs://bucket/latents')
  assert loader.shard_files(rows, data) == []
  found = loader.shard_files(rows, SimpleNamespace(name='latents', path=str(folder)))
  assert sorted(found) == sorted(pathlib.Path(folder).glob('*.array_record'))


def test_too_few_rows_are_not_called_cold(recipe, folder, monkeypatch):
  monkeypatch.setattr(loader, 'FEWEST', ROWS // BATCH + 1)
  before, [[_, _, cold, warm, _]] = bench(recipe)
  assert before[2] == (
    '160 rows are too few to read cold: 20 batches, 21 are needed; lower data.batch_size'
  )
  assert cold == '' and float(warm) > 0

"""What a run tells: events, metrics.jsonl across a kill, the bar, the log."""

import io
import json
import logging
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging

from fmzoo import writer


@pytest.fixture(scope='module', autouse=True)
def tensorflow_is_imported():
  """Pays for the import once, outside of the tests."""
  import clu.metric_writers  # noqa: F401


def read_lines(folder):
  return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def read_events(folder):
  from tensorboard.backend.event_processing import event_accumulator

  events = event_accumulator.EventAccumulator(os.fspath(folder), size_guidance={'tensors': 0})
  events.Reload()
  return events


def read_scalars(folder, name):
  """[(step, value)] of one tag in the events."""
  from tensorboard.util import tensor_util

  events = read_events(folder).Tensors(name)
  return [(event.step, float(tensor_util.make_ndarray(event.tensor_proto))) for event in events]


def test_scalars_are_one_line_a_call_and_events(tmp_path):
  with writer.Writer(tmp_path / 'run') as out:
    out.scalars(1, {'loss': 0.5, 'segment_0/mse': jnp.float32(0.25)})
    out.scalars(np.int64(2), {'loss': np.float32(0.125)})
  assert read_lines(tmp_path / 'run') == [
    {'step': 1, 'loss': 0.5, 'segment_0/mse': 0.25},
    {'step': 2, 'loss': 0.125},
  ]
  assert read_scalars(tmp_path / 'run', 'loss') == [(1, 0.5), (2, 0.125)]


def test_line_is_on_disk_before_close(tmp_path):
  out = writer.Writer(tmp_path)
  out.scalars(7, {'loss': 1.0})
  assert read_lines(tmp_path) == [{'step': 7, 'loss': 1.0}]
  out.close()


def test_numbers_that_are_not_finite_are_null(tmp_path):
  with writer.Writer(tmp_path) as out:
    out.scalars(3, {'a': float('nan'), 'b': jnp.inf, 'c': -np.inf, 'd': 0.0})
  assert (tmp_path / 'metrics.jsonl').read_text() == (
    '{"step": 3, "a": null, "b": null, "c": null, "d": 0.0}\n'
  )
  assert np.isnan(read_scalars(tmp_path, 'a')[0][1])


def test_images_come_back_exactly(tmp_path):
  from PIL import Image

  image = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
  with writer.Writer(tmp_path) as out:
    out.images(5, {'samples': image})
  event = read_events(tmp_path).Tensors('samples')[0]
  decoded = Image.open(io.BytesIO(event.tensor_proto.string_val[2]))
  assert event.step == 5
  np.testing.assert_array_equal(np.asarray(decoded), image)


def test_only_the_main_process_writes(tmp_path):
  with writer.Writer(tmp_path / 'run', False, resume_step=0) as out:
    out.scalars(1, {'loss': 0.5})
    out.images(1, {'x': np.zeros((2, 2, 3), np.uint8)})
  assert list(tmp_path.iterdir()) == []


def test_second_close_does_nothing(tmp_path):
  out = writer.Writer(tmp_path)
  out.close()
  out.close()


# Going on after a kill.


def test_resume_leaves_one_line_per_step(tmp_path):
  with writer.Writer(tmp_path) as out:
    for step in (10, 20, 30):
      out.scalars(step, {'loss': step})
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 40, "lo')
  with writer.Writer(tmp_path, resume_step=20) as out:
    out.scalars(30, {'loss': 31.0})
  assert read_lines(tmp_path) == [
    {'step': 10, 'loss': 10.0},
    {'step': 20, 'loss': 20.0},
    {'step': 30, 'loss': 31.0},
  ]
  assert (tmp_path / 'metrics.cut.jsonl').read_text() == (
    '{"step": 30, "loss": 30.0}\n{"step": 40, "lo\n'
  )


def test_start_without_resume_keeps_all_but_torn_lines(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1, "loss": 1.0}\n\0\0\xff\n"text"\n{"step": 2, "loss": 2.0}')
  with writer.Writer(tmp_path) as out:
    out.scalars(3, {'loss': 3.0})
  assert [line['step'] for line in read_lines(tmp_path)] == [1, 2, 3]


def test_untouched_file_is_not_rewritten(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1, "loss": 1.0}\n')
  inode = path.stat().st_ino
  writer.Writer(tmp_path, resume_step=1).close()
  assert path.stat().st_ino == inode
  assert not (tmp_path / 'metrics.cut.jsonl').exists()


def test_kill_while_trimming_loses_no_line(tmp_path, monkeypatch):
  lines = ['{"step": 1, "loss": 1.0}', '{"step": 2, "loss": 2.0}']
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')

  def killed(source, target):
    raise KeyboardInterrupt

  monkeypatch.setattr(writer.os, 'replace', killed)
  with pytest.raises(KeyboardInterrupt):
    writer.Writer(tmp_path, resume_step=1)
  monkeypatch.undo()
  assert (tmp_path / 'metrics.jsonl').read_text().splitlines() == lines
  writer.Writer(tmp_path, resume_step=1).close()
  assert (tmp_path / 'metrics.jsonl').read_text().splitlines() == lines[:1]
  assert set((tmp_path / 'metrics.cut.jsonl').read_text().splitlines()) == {lines[1]}
  assert not (tmp_path / 'metrics.jsonl.tmp').exists()


# Bar and log.


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_bar_on_a_terminal(monkeypatch):
  monkeypatch.setattr(sys, 'stderr', Terminal())
  with writer.Progress(8, start=5, unit='image') as progress:
    progress.update(3, loss=0.5)
  shown = sys.stderr.getvalue()
  assert '8/8' in shown and '5/8' in shown and 'image' in shown and 'loss=0.5' in shown


def test_no_bar_in_a_log(monkeypatch):
  monkeypatch.setattr(sys, 'stderr', io.StringIO())
  with writer.Progress(8) as progress:
    progress.update(8, loss=0.5)
    progress.describe(loss=0.25)
  assert sys.stderr.getvalue() == ''


def record(package, level):
  path = writer.__file__ if package == 'fmzoo' else f'/site-packages/{package}/module.py'
  return logging.LogRecord('absl', level, path, 1, 'text', (), None)


@pytest.mark.parametrize(
  'package, level, shown',
  [
    ('fmzoo', logging.INFO, True),
    ('orbax', logging.INFO, False),
    ('jax', logging.INFO, False),
    ('orbax', logging.WARNING, True),
    ('jax', logging.ERROR, True),
  ],
)
def test_log_shows_our_lines_and_all_warnings(package, level, shown):
  assert writer.OwnLines().filter(record(package, level)) is shown


def test_line_clears_the_open_bar(monkeypatch):
  monkeypatch.setattr(sys, 'stderr', Terminal())
  with writer.Progress(8):
    before = sys.stderr.getvalue()
    writer.OwnLines().filter(record('orbax', logging.INFO))
    assert sys.stderr.getvalue() == before
    writer.OwnLines().filter(record('fmzoo', logging.INFO))
    cleared = sys.stderr.getvalue()[len(before) :]
  assert cleared and cleared.strip() == '' and cleared.endswith('\r')


def test_pace_tells_rate_and_time_left_now_and_then(monkeypatch):
  """What was there already is no work of this process."""
  times, lines = iter([0.0, 5.0, 29.0, 31.0, 40.0, 61.5]), []
  monkeypatch.setattr(writer.time, 'monotonic', lambda: next(times))
  monkeypatch.setattr(writer.logging, 'info', lambda text, *values: lines.append(text % values))
  with writer.Pace(50_000, 10_000, unit='image') as pace:
    for _ in range(5):
      pace.update(2480)
  assert lines == [
    '17,440 of 50,000 images, 240.0 images/s, 136 s left',
    '22,400 of 50,000 images, 201.6 images/s, 137 s left',
  ]


def test_pace_draws_a_bar_on_a_terminal(monkeypatch):
  monkeypatch.setattr(sys, 'stderr', Terminal())
  monkeypatch.setattr(writer, 'SECONDS_PER_LINE', 0)
  monkeypatch.setattr(writer.logging, 'info', lambda *_: pytest.fail('a bar is enough'))
  with writer.Pace(8, 6, unit='image') as pace:
    pace.update(2)
  assert '6/8' in sys.stderr.getvalue() and '8/8' in sys.stderr.getvalue()


def test_setup_logging_twice_adds_one_filter(monkeypatch):
  handler = absl_logging.get_absl_handler()
  monkeypatch.setattr(handler, 'filters', [])
  monkeypatch.setattr(logging.getLogger(), 'handlers', [])
  verbosity = absl_logging.get_verbosity()
  writer.setup_logging()
  writer.setup_logging()
  assert [type(filter_) for filter_ in handler.filters] == [writer.OwnLines]
  assert logging.getLogger().handlers == [handler]
  assert absl_logging.get_verbosity() == absl_logging.INFO
  absl_logging.set_verbosity(verbosity)


QUIET = """
import sys
from fmzoo import writer
assert 'tensorflow' not in sys.modules and 'clu' not in sys.modules and 'tqdm' not in sys.modules
writer.setup_logging()
with writer.Writer(sys.argv[1], resume_step=0) as out:
  out.scalars(1, {'loss': 1.0})
"""


def test_a_writer_imports_tensorflow_late_and_the_log_holds_our_line_alone(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "loss": 2.0}\n')
  root = os.path.dirname(os.path.dirname(writer.__file__))
  hidden = ('TF_CPP_MIN_LOG_LEVEL', 'TF_ENABLE_ONEDNN_OPTS')
  done = subprocess.run(
    [sys.executable, '-c', QUIET, os.fspath(tmp_path)],
    cwd=root,
    env={k: v for k, v in os.environ.items() if k not in hidden},
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  )
  assert done.stdout == ''
  assert done.stderr.count('\n') == 1 and 'lines after step 0 were moved aside' in done.stderr


def test_tracebacks_of_a_failed_save_are_left_out():
  """They come from every thread of orbax; its warnings and errors without one are shown."""
  shown = writer.OwnLines().filter
  for place, info, expected in [
    ('/x/orbax/checkpoint/future.py', (ValueError, ValueError('x'), None), False),
    ('/x/orbax/checkpoint/future.py', None, True),
    ('/x/jax/core.py', (ValueError, ValueError('x'), None), True),
  ]:
    record = logging.LogRecord('absl', logging.ERROR, place, 1, 'failed', (), info)
    assert shown(record) == expected

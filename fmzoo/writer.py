"""What a run tells: numbers and images on disk, a bar on a terminal, our own lines in the log."""

import json
import math
import os
import sys
import time

from absl import flags, logging

SECONDS_PER_LINE = 30  # of the log, where there is no terminal for a bar


def _step_of(line):
  """Step of one line of metrics.jsonl, or None if a killed process left it torn."""
  try:
    return json.loads(line)['step']
  except (ValueError, KeyError, TypeError):
    return None


def _trim(path, resume_step):
  """Cuts the lines after `resume_step`, and torn ones, from a metrics file.

  The run is about to repeat those steps. What is cut goes to a file beside it, first, and the rest
  replaces the file in one move: whenever the process is killed, every line is in one of the two.
  """
  if not os.path.exists(path):
    return
  with open(path, encoding='utf-8', errors='replace') as file:
    text = file.read()
  kept, cut = [], []
  for line in text.splitlines():
    step = _step_of(line)
    stays = step is not None and (resume_step is None or step <= resume_step)
    (kept if stays else cut).append(line + '\n')
  if cut:
    _write_synced(path.removesuffix('.jsonl') + '.cut.jsonl', 'a', cut)
    logging.info('%s: %d lines after step %s were moved aside', path, len(cut), resume_step)
  if ''.join(kept) != text:  # Also where only the last line's end is missing.
    _write_synced(path + '.tmp', 'w', kept)
    os.replace(path + '.tmp', path)


def _write_synced(path, mode, lines):
  with open(path, mode, encoding='utf-8') as file:
    file.writelines(lines)
    file.flush()
    os.fsync(file.fileno())


def _append(path, line):
  """Adds a line to a file, made again if it has vanished; a kill after this loses nothing."""
  os.makedirs(os.path.dirname(path), exist_ok=True)
  try:
    with open(path, 'ab', buffering=0) as file:  # nothing is left to write by close
      rest = line.encode()
      while rest:  # on a full disk the first write may do a part, the second one says why
        rest = rest[file.write(rest) :]
  except OSError as error:
    error.filename = path
    raise


def _event_writer(workdir):
  """clu's writer of TensorBoard events, in a thread; TensorFlow is imported here, quietly."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  from clu import metric_writers

  return metric_writers.AsyncWriter(metric_writers.SummaryWriter(os.fspath(workdir)))


class Writer:
  """Scalars and images of a run: TensorBoard events, and a line of metrics.jsonl per call.

  A line is `{"step": 100, "loss": 0.25, ...}`; a number that is not finite is null there, which
  JSON can hold and every reader takes for missing (TensorBoard keeps nan and inf).

  Args:
    workdir: folder for both; made if missing.
    is_main: False in all processes but one: nothing is opened or written.
    resume_step: the step the run goes on from; later lines are moved to metrics.cut.jsonl, so that
      no step is told twice. None keeps every line.
  """

  def __init__(self, workdir, is_main=True, *, resume_step=None):
    self._is_main = is_main
    if not is_main:
      return
    os.makedirs(workdir, exist_ok=True)
    path = os.path.join(workdir, 'metrics.jsonl')
    _trim(path, resume_step)
    self._path, self._folder, self._told = path, workdir, False
    self._events = _event_writer(workdir)

  def scalars(self, step, values):
    """Writes numbers of one step; `values` is {name: float or scalar array}, fetched here."""
    if not self._is_main:
      return
    values = {name: float(value) for name, value in values.items()}
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    if self._told and not os.path.exists(self._path):  # the folder was moved or removed
      self._events.close()
      self._events = _event_writer(self._folder)
    self._told = True
    _append(self._path, json.dumps({'step': int(step), **finite}, allow_nan=False) + '\n')
    self._events.write_scalars(int(step), values)

  def images(self, step, images):
    """Writes images of one step to the events; `images` is {name: uint8 [H, W, C]}."""
    if self._is_main:
      self._events.write_images(int(step), images)

  def close(self):
    """Flushes and closes; a second call does nothing."""
    if self._is_main:
      self._is_main = False
      self._events.close()

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()


class Progress:
  """A bar on a terminal; elsewhere nothing, since a log is better served by lines.

  Dispatch is asynchronous: a bar is only honest if its caller fetches a number now and then.

  Args:
    total: how many units there are.
    start: how many are done already.
    unit: what is counted.
  """

  shown = True  # unless `only_warnings`
  _open_bars = set()

  def __init__(self, total, start=0, unit='step'):
    self._bar = None
    if self.shown and sys.stderr.isatty():
      import tqdm

      self._bar = tqdm.tqdm(total=total, initial=start, unit=unit, dynamic_ncols=True)
      self._open_bars.add(self._bar)

  def update(self, n=1, **postfix):
    """Counts `n` more units; `postfix` is shown behind the bar."""
    if self._bar is not None:
      self._bar.update(n)
      self.describe(**postfix)

  def describe(self, **postfix):
    """Shows names and values behind the bar until the next ones come."""
    if self._bar is not None and postfix:
      self._bar.set_postfix(postfix, refresh=False)

  @classmethod
  def make_room(cls):
    """Clears the bars before another line is written; their next update draws them below it."""
    for bar in list(cls._open_bars):  # other threads open and close some
      bar.clear()

  def close(self):
    """Leaves the bar as it is."""
    if self._bar is not None:
      self._bar.close()
      self._open_bars.discard(self._bar)

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()


class Pace:
  """Tells how far long work is: a bar on a terminal, elsewhere a line now and then.

  Args:
    total: how many units there are.
    start: how many are done already.
    unit: what is counted; an s makes it many.
  """

  def __init__(self, total, start=0, *, unit):
    self._total, self._start, self._done, self._unit = total, start, start, unit
    self._begun = self._told = time.monotonic()
    self._bar = Progress(total, start, unit)

  def update(self, n=1):
    """Counts `n` more units."""
    self._bar.update(n)
    self._done += n
    now = time.monotonic()
    if not sys.stderr.isatty() and now - self._told >= SECONDS_PER_LINE:
      self._told = now
      rate = (self._done - self._start) / (now - self._begun)
      logging.info(
        '%s of %s %ss, %.1f %ss/s, %.0f s left', f'{self._done:,}', f'{self._total:,}', self._unit,
        rate, self._unit, (self._total - self._done) / rate,
      )

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self._bar.close()


class OwnLines:
  """Log filter: lines of this package, and from warnings upwards those of everybody.

  But for errors with their traceback that orbax tells from each of its threads, hundreds of lines:
  checkpoint.py says in one what they are about.
  It is also where a line learns that it will be written, so open bars make room for it here.
  """

  def __init__(self):
    self._package = os.path.dirname(os.path.abspath(__file__)) + os.sep

  def filter(self, record):
    """Says whether a record is shown."""
    own = os.path.abspath(record.pathname).startswith(self._package)
    known = bool(record.exc_info) and f'{os.sep}orbax{os.sep}' in record.pathname
    shown = own or (record.levelno >= logging.converter.STANDARD_WARNING and not known)
    if shown:
      Progress.make_room()
    return shown


def setup_logging():
  """Shows our own INFO lines and everybody's warnings; only the command line calls this.

  Orbax alone would write 45 lines for every checkpoint.
  """
  if not flags.FLAGS.is_parsed():  # Else absl begins with a warning of its own.
    flags.FLAGS.mark_as_parsed()
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  if not any(isinstance(filter_, OwnLines) for filter_ in handler.filters):
    handler.addFilter(OwnLines())


def only_warnings():
  """Leaves bars and INFO lines to the process that tells for all."""
  logging.set_verbosity(logging.WARNING)
  Progress.shown = False

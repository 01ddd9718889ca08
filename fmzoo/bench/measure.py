"""Compiles programs, runs them in turn and tells what they took: time, memory, dispatches."""

import contextlib
import dataclasses
import gc
import math
import pathlib
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from fmzoo.parallel import mesh as meshes

SECONDS = 0.2  # of a run, at least
TRACED = 3  # calls whose dispatches are counted
COMPILED = '/jax/core/compile/backend_compile_duration'  # the event of a compilation
DISPATCHED = 'PjitFunction('  # begins the names of what jax's profiler tells of a dispatch


class Program(NamedTuple):
  """A program that can be called again and again."""

  name: str  # 'training step' or 'sampler'
  rows: int  # of a batch, or images, over all devices
  mesh: Mesh
  function: Callable  # jitted, not compiled yet
  shapes: tuple  # of its arguments
  arguments: Callable  # () -> its first arguments, on the devices
  following: Callable  # (arguments, results) -> (the next arguments, results to wait for)
  flops: dict  # {(dtype, precision): of a call}, over all devices, nothing recomputed
  spent: dict  # the same with what is recomputed
  # What a refusal for want of memory calls the program, its arguments and results, and its remedy.
  memory_words: tuple = ('a step', 'state and batch', meshes.SHRINK_STEP)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
  """What a program took; times are wall-clock."""

  program: Program
  trace_seconds: float  # to a program that can be compiled
  compile_seconds: float
  calls: int  # of a run
  seconds: np.ndarray  # [runs], of a call
  dispatches: float | None  # of a call; None where the profiler of a device does not tell
  compilations: int  # while timing
  memory_bytes: int | None  # of one device, by the compiler; None where it does not tell
  # None where nobody tells, or where something before this program took more.
  peak_bytes: int | None  # most that was in use on a device
  process_bytes: int | None  # most memory of this process, on a CPU


class Running:
  """A compiled program and its arguments, which calls may replace.

  Args:
    program: Program.

  Raises:
    ValueError: one line, if the devices have no memory for it.
  """

  def __init__(self, program):
    self.program = program
    logging.info('%s: compiling', program.name)
    jax.clear_caches()  # its products were counted: what that has traced would be found again
    begun = time.perf_counter()
    lowered = program.function.lower(*program.shapes)
    self.trace_seconds = time.perf_counter() - begun
    self.compiled = lowered.compile()
    self.compile_seconds = time.perf_counter() - begun - self.trace_seconds
    meshes.expect_memory(self.compiled, program.mesh, *program.memory_words)
    self.peaks = peaks(program.mesh)  # before it takes any memory
    self.args = program.arguments()
    self.run(1)
    self.calls = math.ceil(SECONDS / self.run(1))

  def run(self, calls):
    """Returns the seconds that each of some calls took, all their results included."""
    begun, kept = time.perf_counter(), []
    for _ in range(calls):
      self.args, results = self.program.following(self.args, self.compiled(*self.args))
      kept.append(results)
    jax.block_until_ready((self.args, kept))
    return (time.perf_counter() - begun) / calls


def measure(programs, *, runs, calls=None, with_dispatches=True):
  """Measures programs that are run in turn, once each, `runs` times.

  Args:
    programs: of Program; all of them must fit in the memory together.
    runs: timed runs of each.
    calls: of a run; None is as many as take SECONDS, which are waited for together.
    with_dispatches: whether dispatches are counted, for which calls are traced in the end.

  Returns:
    [Measured], like `programs`.

  Raises:
    ValueError: one line, if the devices have no memory for a program.
  """
  running = [Running(program) for program in programs]
  for one in running:
    one.calls = calls or one.calls
    logging.info(
      '%s: compiled in %.1f s; %d runs of %d calls', one.program.name,
      one.trace_seconds + one.compile_seconds, runs, one.calls,
    )
  seconds, compilations = np.zeros((len(running), runs)), [0] * len(running)
  for run in range(runs):
    for place, one in enumerate(running):
      with counting_compilations() as compiled:
        seconds[place, run] = one.run(one.calls)
      compilations[place] += len(compiled)
  return [
    Measured(
      program=one.program, trace_seconds=one.trace_seconds, compile_seconds=one.compile_seconds,
      calls=one.calls, seconds=taken, compilations=count,
      dispatches=dispatches(one) if with_dispatches else None,
      memory_bytes=meshes.needed_bytes(one.compiled), **risen(one.peaks, peaks(one.program.mesh)),
    )
    for one, taken, count in zip(running, seconds, compilations)
  ]


@contextlib.contextmanager
def counting_compilations():
  """Yields a list that has one element more for every compilation, whoever asks for it."""
  found = []

  def listener(event, _seconds, **_):
    """Hears what jax tells."""
    if event == COMPILED:
      found.append(event)

  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    yield found
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)


def dispatches(running):
  """Returns how many programs a call starts, its own included, as jax's profiler saw it.

  Args:
    running: Running.

  Returns:
    None where the profiler does not tell of this device.
  """
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level, options.host_tracer_level = 0, 2
  options.device_tracer_level = 0
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, profiler_options=options):
      running.run(TRACED)
    files = [str(path) for path in pathlib.Path(folder).rglob('*.xplane.pb')]
    planes = [plane for file in files for plane in jax.profiler.ProfileData.from_file(file).planes]
    count = sum(_outermost(line.events) for plane in planes for line in plane.lines)
  return count / TRACED if count else None


def _outermost(events):
  """Returns how many dispatches are among the events of a thread; one may tell of itself twice."""
  spans = sorted(
    (event.start_ns, -event.duration_ns) for event in events if event.name.startswith(DISPATCHED)
  )
  count, end = 0, float('-inf')
  for start, negative in spans:
    if start >= end:
      count, end = count + 1, start - negative
  return count


def peaks(mesh):
  """Returns {'peak_bytes', 'process_bytes'} of Measured."""
  stats = [device.memory_stats() or {} for device in mesh.local_devices]
  known = [found['peak_bytes_in_use'] for found in stats if 'peak_bytes_in_use' in found]
  own = None
  if mesh.local_devices[0].platform == 'cpu':
    unit = 1 if sys.platform == 'darwin' else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  return {'peak_bytes': max(known, default=None), 'process_bytes': own}


def risen(before, after):
  """Returns those of `peaks` that have risen, None for the others: they are of something else."""
  return {
    name: None if value is None or value <= (before[name] or 0) else value
    for name, value in after.items()
  }


def attempt(name, function):
  """Calls a function that measures something, and lets the next go on where it fails.

  Args:
    name: of what is measured, for the log.
    function: without arguments.

  Returns:
    (what it returns, None), or (None, in one line why it failed).
  """
  try:
    return function(), None
  except (ValueError, OSError, RuntimeError) as error:  # the last of jax: out of memory
    reason = ' '.join(str(error).split())[:200]
  logging.warning('%s: %s', name, reason)
  gc.collect()  # only here, where no traceback holds the arrays any more
  return None, reason


def expect_one_process():
  """Refuses processes that work together, each of which would time but its part."""
  if jax.process_count() > 1:
    raise ValueError(
      f"{jax.process_count()} processes work together, 'bench' measures what one does; start it on"
      ' a machine that has its devices for itself'
    )


def expect_recipes(flag):
  """Refuses a folder without the recipes that --suite and --pareto measure."""
  if not pathlib.Path('configs').is_dir():
    raise ValueError(
      f'--{flag} measures recipes of configs/, which {pathlib.Path.cwd()} lacks; call it in the'
      ' root of the repository'
    )

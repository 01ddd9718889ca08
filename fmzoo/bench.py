"""Times the samplers of two recipes in turn, in one run, and compares them with their FLOPs.

Times on a machine that does other things are worth little alone; their ratios, run by run in turn,
hold. Needs jax, flax, optax and numpy only.
"""

import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmzoo import cost


class Timing(NamedTuple):
  """What a sampler took."""

  gmac: float  # multiply-adds of matrix products, 1e9, per image
  seconds: np.ndarray  # [runs], of a whole batch
  compile_seconds: float  # first call, tracing and compilation included
  batch: int  # images

  @property
  def gflops(self):
    """1e9 FLOPs of matrix products per second, at the median."""
    return 2 * self.gmac * self.batch / np.median(self.seconds)


def bench(recipes, *, runs):
  """Times the samplers of recipes and prints a table; the batch is the first one's.

  Args:
    recipes: of build.Recipe.
    runs: timed runs of each, in turn.

  Raises:
    ValueError: if guidance acts in some steps only: what such a run costs cannot be counted.
  """
  for recipe in recipes:
    guided = recipe.sample_options.get('guidance', 1.0) > 1
    interval = tuple(recipe.sample_options.get('guidance_interval', (0.0, 1.0)))
    if guided and interval != (0.0, 1.0):
      raise ValueError(
        f'sample.guidance_interval={interval} cannot be compared by its multiply-adds; use'
        ' (0.0, 1.0)'
      )
  timings = samplers(recipes, batch=recipes[0].sample.batch_size, runs=runs)
  print(*table(recipes, timings), sep='\n')


def samplers(recipes, *, batch, runs):
  """Times samplers with fresh parameters, one after the other `runs` times.

  Args:
    recipes: of build.Recipe.
    batch: images at a time.
    runs: timed calls of each, after one that compiles.

  Returns:
    [Timing], like `recipes`.
  """
  calls, gmacs, first = [], [], []
  for recipe in recipes:
    params = jax.jit(recipe.method.init)(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), batch)
    labels = jnp.arange(batch, dtype=jnp.int32) % recipe.data.num_classes
    sample = functools.partial(recipe.method.sample, **recipe.sample_options)
    gmacs.append(cost.matmul_flops(sample, params, keys, labels) / 2e9 / batch)
    calls.append(functools.partial(jax.jit(sample), params, keys, labels))
    first.append(_seconds(calls[-1]))
  seconds = np.array([[_seconds(call) for call in calls] for _ in range(runs)])
  return [Timing(*row, batch) for row in zip(gmacs, seconds.T, first)]


def _seconds(call):
  """Returns what a call took, its result included."""
  start = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - start


def table(recipes, timings):
  """Returns the comparison as lines of a Markdown table: the first against each of the others."""
  names = [f'{recipe.method_name}, width {recipe.network.width}' for recipe in recipes]
  lines = [
    f'Device: {jax.devices()[0].device_kind}; images in a batch: {timings[0].batch}',
    '',
    '| recipe | GMAC/image | s/batch, median (lowest, highest) | GFLOP/s | first call, s |',
    '|---|---|---|---|---|',
  ]
  for name, timing in zip(names, timings):
    median, low, high = (f(timing.seconds) for f in (np.median, np.min, np.max))
    lines.append(
      f'| {name} | {timing.gmac:.2f} | {median:.3f} ({low:.3f}, {high:.3f}) |'
      f' {timing.gflops:.0f} | {timing.compile_seconds:.1f} |'
    )
  ours = timings[0]
  for name, other in zip(names[1:], timings[1:]):
    macs, gain = other.gmac / ours.gmac, np.median(other.seconds / ours.seconds)
    lines += ['', (
      f'{names[0]} against {name}: {macs:.3f} times fewer multiply-adds, {gain:.3f} times faster'
      f' (median of {len(ours.seconds)} pairs), {gain / macs:.1%} of what the multiply-adds promise'
    )]
  return lines

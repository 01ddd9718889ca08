"""Build, restore, loop, hooks: the only file that knows all the others."""

import contextlib
import functools
import time

import jax
import numpy as np
from absl import logging

from fmzoo import build, files, programs, sample, sources
from fmzoo import evaluate as evaluation
from fmzoo import hooks as hooking
from fmzoo import rows as row_order
from fmzoo import sampler as samplers
from fmzoo.data import pipeline
from fmzoo.parallel import batch as batches
from fmzoo.parallel import hosts
from fmzoo.parallel import mesh as meshes


def train(recipe, workdir):
  """Trains a recipe in a workdir, going on from its newest checkpoint if there is one.

  Leaves checkpoints/, samples/, metrics.jsonl, TensorBoard events and, where the recipe has an
  evaluation, evaluations/ in the workdir.

  Args:
    recipe: build.Recipe.
    workdir: folder; made if missing.

  Returns:
    step.TrainState at the end (or where SIGTERM stopped it).
  """
  method, settings = recipe.method, recipe.run
  mesh = meshes.make(recipe.mesh)
  meshes.check_hosts(mesh)
  meshes.check_batch(recipe.data.batch_size, mesh, method.period, recipe.optim.accumulate_steps)
  rows = sources.open_rows(recipe)
  flat = meshes.flat(recipe.mesh)
  sampler = samplers.Sampler(recipe, flat)
  measurement = evaluation.Measurement(recipe, flat, sampler) if evaluates(recipe) else None
  checkpoints = sample.open_checkpoints(recipe, workdir, read_only=False)
  begun = time.time()
  with contextlib.ExitStack() as stack:
    stack.enter_context(checkpoints)
    preemption = stack.enter_context(hosts.Preemption())
    check_start(recipe, checkpoints)
    inputs, frozen = sources.inputs(recipe, rows, workdir)
    frozen = jax.device_put(frozen, meshes.replicated(mesh))
    row = {name: values[0] for name, values in rows.batch(np.arange(1)).items()}
    train_step = compile_step(recipe, mesh, inputs, frozen, row)
    state, start = restore_or_init(recipe, mesh, checkpoints)
    if hosts.is_main():
      files.write_config(workdir, recipe.config)
    source = stack.enter_context(contextlib.closing(pipeline.batches(
      rows, batch_size=recipe.data.batch_size, seed=settings.seed, start_step=start,
      own=own_rows(recipe, mesh), num_threads=recipe.data.num_threads,
      num_workers=recipe.data.num_workers,
    )))
    device_batches = batches.ahead(source, mesh, recipe.mesh.mode)
    hooks = stack.enter_context(hooking.Hooks(
      recipe, workdir, sampler, checkpoints, measurement, start=start,
      stop=lambda: preemption.noticed,
    ))
    state, done = run_steps(
      train_step, state, device_batches, frozen, hooks, start=start, preemption=preemption
    )
  logging.info(
    'steps %d to %d took %.1f minutes, previews and evaluation included: %s',
    start, done, (time.time() - begun) / 60, workdir,
  )
  return state


def run_steps(train_step, state, device_batches, frozen, hooks, *, start, preemption):
  """Returns (state, finished steps) at the end, or where SIGTERM came; the loop itself.

  Raises:
    OSError, ValueError: what a hook or the data met, and how the run goes on.
  """
  done = start
  try:
    hooks.catch_up(start, state)
    for done in range(start + 1, hooks.recipe.run.steps + 1):
      with hooks.waiting():
        batch = next(device_batches)
      state, metrics = train_step(state, batch, frozen)
      stopping = preemption.reached(done)
      hooks(done, state, metrics, stopping)
      if stopping:
        logging.warning('stopped by SIGTERM after step %d; the same command goes on', done)
        break
    hooks.settle(done, state)
  except OSError as error:
    raise ValueError(
      f'{error}; free space or see to the folder, {hooks.rescue(state, error)}'
    ) from error
  except ValueError as error:
    error.args = (f'{error}; {hooks.rescue(state, error)}',)  # still a refusal, or else a fault
    raise
  return state, done


def check_start(recipe, checkpoints):
  """Refuses what the run cannot start from, before anything takes its time."""
  if checkpoints.steps():
    checkpoints.check_newest(to_go_on=True)
  elif recipe.run.init_from:
    sample.open_stage(recipe, build.stage_identity(recipe)).close()


def compile_step(recipe, mesh, inputs, frozen, row):
  """Returns the compiled train step of a recipe, for batches of rows like `row`."""
  state = programs.abstract_state(recipe, mesh)
  train_step = meshes.compile_step(
    functools.partial(programs.make_step, recipe, inputs), mesh, recipe.mesh.mode, state
  )
  if recipe.mesh.mode == 'pmap' and jax.process_count() > 1:
    return train_step  # jax lowers it with arrays only, of each host's own rows
  batch = batches.abstract(row, recipe.data.batch_size, mesh, recipe.mesh.mode)
  return meshes.compile_ahead(train_step, mesh, state, batch, frozen)


def restore_or_init(recipe, mesh, checkpoints):
  """Returns (state, finished steps): the newest good checkpoint, or step 0."""
  restored = checkpoints.restore(programs.abstract_state(recipe, mesh))
  if restored is not None:
    logging.info('goes on from the checkpoint of step %d', restored[1])
    return restored
  params = None
  if recipe.run.init_from:
    params = sample.initial_params(recipe, mesh, build.stage_identity(recipe))
  return programs.fresh_state(recipe, mesh, params), 0


def own_rows(recipe, mesh):
  """Returns the indices in a global batch of this host's rows, place by place; None is all."""
  size, method = recipe.data.batch_size, recipe.method
  own = row_order.order(size, method.period, method.groups)[meshes.places(mesh, size)]
  return None if np.array_equal(own, np.arange(size)) else own


def evaluates(recipe):
  """Says whether training measures what it has learned, at its end at least."""
  return recipe.eval.name != 'none' and recipe.eval.every_steps >= 0

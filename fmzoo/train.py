"""Build, restore, loop, hooks: the only file that knows all the others."""

import concurrent.futures
import contextlib
import pathlib
import time

import jax
import numpy as np
from absl import logging

from fmzoo import build, files, pictures, sample, sources, step, writer
from fmzoo import evaluate as evaluation
from fmzoo import sampler as samplers
from fmzoo.data import pipeline
from fmzoo.metrics import protocol
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
  sampler = samplers.Sampler(recipe, mesh)
  measurement = evaluation.Measurement(recipe, mesh, sampler) if evaluates(recipe) else None
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
      write_config(recipe, workdir)
    source = stack.enter_context(contextlib.closing(pipeline.batches(
      rows, batch_size=recipe.data.batch_size, seed=settings.seed, start_step=start,
      process_index=jax.process_index(), process_count=jax.process_count(),
      num_threads=recipe.data.num_threads, num_workers=recipe.data.num_workers,
    )))
    device_batches = batches.ahead(source, mesh, recipe.mesh.mode)
    hooks = stack.enter_context(Hooks(
      recipe, workdir, sampler, checkpoints, measurement, start=start,
      stop=lambda: preemption.noticed,
    ))
    hooks.catch_up(start, state)
    done = start
    for done in range(start + 1, settings.steps + 1):
      with hooks.waiting():
        batch = next(device_batches)
      state, metrics = train_step(state, batch, frozen)
      stopping = preemption.reached(done)
      hooks(done, state, metrics, stopping)
      if stopping:
        logging.warning('stopped by SIGTERM after step %d; the same command goes on', done)
        break
  logging.info(
    'steps %d to %d took %.1f minutes, previews and evaluation included: %s',
    start, done, (time.time() - begun) / 60, workdir,
  )
  return state


def check_start(recipe, checkpoints):
  """Refuses what the run cannot start from, before anything takes its time."""
  if checkpoints.steps():
    checkpoints.check_newest(to_go_on=True)
  elif recipe.run.init_from:
    sample.open_stage(recipe, build.stage_identity(recipe)).close()


def compile_step(recipe, mesh, inputs, frozen, row):
  """Returns the compiled train step of a recipe, for batches of rows like `row`."""
  train_step = meshes.compile_step(
    lambda axis_name: step.make(
      recipe.method, recipe.tx, inputs, ema_decay=recipe.ema.decay, ema_ramp=recipe.ema.ramp,
      ema_every=recipe.ema.every_steps,
      accumulate_steps=recipe.optim.accumulate_steps, axis_name=axis_name,
    ), mesh, recipe.mesh.mode,
  )
  if recipe.mesh.mode == 'pmap' and jax.process_count() > 1:
    return train_step  # jax lowers it with arrays only, of each host's own rows
  batch = batches.abstract(row, recipe.data.batch_size, mesh, recipe.mesh.mode)
  return meshes.compile_ahead(train_step, mesh, abstract_state(recipe, mesh), batch, frozen)


def init_state(recipe, params=None):
  """Returns the state before the first step; `params` default to fresh ones."""
  return step.init_state(recipe.method, recipe.tx, jax.random.key(recipe.run.seed), params)


def abstract_state(recipe, mesh):
  """Returns the shapes of a recipe's state, replicated over the mesh."""
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=meshes.replicated(mesh)),
    jax.eval_shape(lambda: init_state(recipe)),
  )


def restore_or_init(recipe, mesh, checkpoints):
  """Returns (state, finished steps): the newest good checkpoint, or step 0."""
  restored = checkpoints.restore(abstract_state(recipe, mesh))
  if restored is not None:
    logging.info('goes on from the checkpoint of step %d', restored[1])
    return restored
  params = None
  if recipe.run.init_from:
    params = sample.initial_params(recipe, mesh, build.stage_identity(recipe))
  init = jax.jit(lambda params: init_state(recipe, params), out_shardings=meshes.replicated(mesh))
  return init(params), 0


def evaluates(recipe):
  """Says whether training measures what it has learned, at its end at least."""
  return recipe.eval.name != 'none' and recipe.eval.every_steps >= 0


def write_config(recipe, workdir):
  """Writes the workdir's config.json, by which other commands know the run."""
  files.write_json(pathlib.Path(workdir) / 'config.json', recipe.config)


class Hooks:
  """What happens between steps: log, preview, evaluate, checkpoint, each with its own period."""

  def __init__(self, recipe, workdir, sampler, checkpoints, measurement, *, start, stop):
    self.recipe, self.workdir, self.checkpoints = recipe, pathlib.Path(workdir), checkpoints
    self.sampler, self.measurement, self.stop, self.saved = sampler, measurement, stop, start
    self.measuring, self.thread = [], concurrent.futures.ThreadPoolExecutor(1)
    self.pending, self.started, self.since, self.waited = [], time.time(), start, 0.0
    self.writer = writer.Writer(workdir, jax.process_index() == 0, resume_step=start)
    self.progress = writer.Progress(recipe.run.steps, start)

  def __enter__(self):
    return self

  def __exit__(self, kind, *error):
    with contextlib.ExitStack() as stack:
      stack.callback(self.writer.close)
      stack.callback(self.progress.close)
      stack.callback(self.thread.shutdown, cancel_futures=True)
      if kind is not KeyboardInterrupt:  # the devices have done their part of the numbers
        self.tell_measured(wait=True)

  def __call__(self, done, state, metrics, stopping):
    log, last = self.recipe.log, stopping or done == self.recipe.run.steps
    self.pending.append(metrics)
    self.progress.update(1)
    if last or done % log.log_every_steps == 0:
      self.log(done)
    if last or due(done, log.checkpoint_every_steps):
      self.save(done, state)
    if stopping:
      return
    if log.preview_every_steps and self.due(done, log.preview_every_steps):
      self.preview(done, state)
    if self.measurement and self.due(done, self.recipe.eval.every_steps):
      self.save(done, state)  # it takes long, and a process may not live as long
      self.evaluate(done, state)

  def save(self, done, state):
    """Saves the state of a step, once."""
    if done != self.saved:
      self.checkpoints.save(done, state)
      self.saved = done

  @contextlib.contextmanager
  def waiting(self):
    """Counts the time of its body as time that the run waited for data."""
    begun = time.perf_counter()
    yield
    self.waited += time.perf_counter() - begun

  def due(self, done, every_steps):
    """Says whether pictures or numbers of step `done` are wanted: at the end they always are."""
    return done == self.recipe.run.steps or due(done, every_steps)

  def catch_up(self, done, state):
    """Makes the picture and the numbers that a run stopped after its last save still owes."""
    if done > self.recipe.run.steps:
      logging.warning('run.steps=%d are done, %d in all', self.recipe.run.steps, done)
      return
    owes_picture = done == self.recipe.run.steps and self.recipe.log.preview_every_steps
    # All hosts make pictures and numbers together, or none: they may not see a file at once.
    if owes_picture and not hosts.all_agree(self.picture(done).exists()):
      self.preview(done, state)
    if done and self.measurement and self.due(done, self.recipe.eval.every_steps):
      name = evaluation.result_name(self.recipe, done, 'ema')
      if not hosts.all_agree(protocol.is_result(self.workdir / 'evaluations' / name)):
        self.evaluate(done, state)

  def log(self, done):
    """Fetches the metrics since the last log step: the only place that waits for the device.

    What is written is their mean over the steps that counted, and how many did not.
    """
    fetched = jax.device_get(self.pending)
    good = [m for m in fetched if not m['bad_steps']] or fetched
    values = {name: mean_of_numbers([m[name] for m in good]) for name in fetched[0]}
    values['bad_steps'] = sum(bool(m['bad_steps']) for m in fetched)
    seconds = time.time() - self.started
    values['steps_per_second'] = (done - self.since) / seconds
    values['data_wait'] = self.waited / seconds  # share of the time; previews and the like count
    self.pending, self.started, self.since, self.waited = [], time.time(), done, 0.0
    self.writer.scalars(done, values)
    self.tell_measured()
    left = (self.recipe.run.steps - done) / values['steps_per_second']
    self.progress.describe(loss=values['loss'])
    logging.info(
      'step %d of %d: loss %.5g, gradient norm %.4g, %.1f steps/s, %d s left',
      done, self.recipe.run.steps, values['loss'], values['grad_norm'],
      values['steps_per_second'], left,
    )
    norms = {name for name in values if name.endswith('/grad_norm')}
    untrained = sorted(name for name in norms if not values[name])
    if untrained and done > 1:  # before the first step most gates are closed
      logging.warning(
        'no gradient since the last log step, these parts are not trained: %s', ', '.join(untrained)
      )
    bad = max(int(m['bad_steps']) for m in fetched)
    if bad >= self.recipe.optim.max_bad_steps:
      raise ValueError(
        f'{bad} steps in a row up to step {done} had a loss or gradient that is not finite'
        f' (optim.max_bad_steps={self.recipe.optim.max_bad_steps}); nothing was updated in them:'
        ' lower optim.learning_rate or set optim.clip_norm, the last good checkpoint is kept'
      )

  def preview(self, done, state):
    """Writes a grid of samples of the averaged weights, the same noise every time."""
    images = self.sampler.preview(step.ema_params(state))
    if not hosts.is_main():
      return
    pictures.save_grid(self.picture(done), images, samplers.PREVIEW_COLUMNS)
    self.writer.images(done, {'samples': pictures.grid(images, samplers.PREVIEW_COLUMNS)})
    logging.info('preview: %s', self.picture(done))

  def picture(self, done):
    """Returns the path of a step's preview."""
    return self.workdir / 'samples' / f'step_{done:07d}.png'

  def evaluate(self, done, state):
    """Measures the averaged weights; training waits for the devices' part of it alone."""
    collected = self.measurement.collect(
      step.ema_params(state), done, weights='ema', stop=self.stop
    )
    if collected is None:
      logging.warning('SIGTERM: the evaluation of step %d is given up', done)
      return
    self.measuring.append((done, self.thread.submit(self.report, collected)))

  def report(self, collected):
    """Does the host's part of an evaluation, by the host's processor where jax has it."""
    try:
      device = jax.local_devices(backend='cpu')[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
      device = None
    with jax.default_device(device):
      return evaluation.report(self.workdir, self.measurement.evaluator, collected)

  def tell_measured(self, wait=False):
    """Writes the numbers of evaluations that are ready, or of all of them."""
    while self.measuring and (wait or self.measuring[0][1].done()):
      done, report = self.measuring.pop(0)
      if not report.done():
        logging.info('waiting for the numbers of step %d', done)
      self.writer.scalars(
        done, {f'eval/{name}': value for name, value in report.result().items()}
      )


def mean_of_numbers(values):
  """Returns the mean of what is not nan (a metric of rows that a step had none of), else nan."""
  numbers = [value for value in values if not np.isnan(value)]
  return float(np.mean(numbers)) if numbers else float('nan')


def due(done, every_steps):
  """Says whether a hook with this period runs after step `done`; period 0 never runs."""
  return every_steps > 0 and done % every_steps == 0

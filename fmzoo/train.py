"""Build, restore, loop, hooks: the only file that knows all the others."""

import concurrent.futures
import contextlib
import functools
import math
import pathlib
import time

import jax
import numpy as np
from absl import logging

from fmzoo import build, files, pictures, sample, sources, step, writer
from fmzoo import evaluate as evaluation
from fmzoo import rows as row_order
from fmzoo import sampler as samplers
from fmzoo.data import pipeline
from fmzoo.metrics import protocol
from fmzoo.parallel import batch as batches
from fmzoo.parallel import hosts, rules
from fmzoo.parallel import mesh as meshes

SLOW_DATA = 0.2  # share of the time spent waiting for data from which on it is told


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
      write_config(recipe, workdir)
    source = stack.enter_context(contextlib.closing(pipeline.batches(
      rows, batch_size=recipe.data.batch_size, seed=settings.seed, start_step=start,
      own=own_rows(recipe, mesh), num_threads=recipe.data.num_threads,
      num_workers=recipe.data.num_workers,
    )))
    device_batches = batches.ahead(source, mesh, recipe.mesh.mode)
    hooks = stack.enter_context(Hooks(
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
  state = abstract_state(recipe, mesh)
  train_step = meshes.compile_step(
    functools.partial(make_step, recipe, inputs), mesh, recipe.mesh.mode, state
  )
  if recipe.mesh.mode == 'pmap' and jax.process_count() > 1:
    return train_step  # jax lowers it with arrays only, of each host's own rows
  batch = batches.abstract(row, recipe.data.batch_size, mesh, recipe.mesh.mode)
  return meshes.compile_ahead(train_step, mesh, state, batch, frozen)


def make_step(recipe, inputs, axis_name=None):
  """Returns the train step of a recipe, see step.make."""
  return step.make(
    recipe.method, recipe.tx, inputs, ema_decay=recipe.ema.decay, ema_ramp=recipe.ema.ramp,
    ema_every=recipe.ema.every_steps, accumulate_steps=recipe.optim.accumulate_steps,
    axis_name=axis_name,
  )


def init_state(recipe, params=None):
  """Returns the state before the first step; `params` default to fresh ones."""
  return step.init_state(recipe.method, recipe.tx, jax.random.key(recipe.run.seed), params)


def abstract_state(recipe, mesh):
  """Returns the shapes of a recipe's state, cut over the mesh by `parallel.rules`."""
  return rules.abstract(jax.eval_shape(lambda: init_state(recipe)), mesh)


def restore_or_init(recipe, mesh, checkpoints):
  """Returns (state, finished steps): the newest good checkpoint, or step 0."""
  restored = checkpoints.restore(abstract_state(recipe, mesh))
  if restored is not None:
    logging.info('goes on from the checkpoint of step %d', restored[1])
    return restored
  params = None
  if recipe.run.init_from:
    params = sample.initial_params(recipe, mesh, build.stage_identity(recipe))
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(recipe, mesh))
  return jax.jit(lambda params: init_state(recipe, params), out_shardings=shardings)(params), 0


def own_rows(recipe, mesh):
  """Returns the indices in a global batch of this host's rows, place by place; None is all."""
  size, method = recipe.data.batch_size, recipe.method
  own = row_order.order(size, method.period, method.groups)[meshes.places(mesh, size)]
  return None if np.array_equal(own, np.arange(size)) else own


def evaluates(recipe):
  """Says whether training measures what it has learned, at its end at least."""
  return recipe.eval.name != 'none' and recipe.eval.every_steps >= 0


def write_config(recipe, workdir):
  """Writes the workdir's config.json, by which other commands know the run."""
  files.write_json(pathlib.Path(workdir) / 'config.json', recipe.config)


class NotFinite(ValueError):
  """Too many steps in a row had a loss or a gradient that is not finite."""


class Hooks:
  """What happens between steps: log, preview, evaluate, checkpoint, each with its own period."""

  def __init__(self, recipe, workdir, sampler, checkpoints, measurement, *, start, stop):
    self.recipe, self.workdir, self.checkpoints = recipe, pathlib.Path(workdir), checkpoints
    self.sampler, self.measurement, self.stop, self.saved = sampler, measurement, stop, start
    self.measuring, self.thread = [], concurrent.futures.ThreadPoolExecutor(1)
    self.start, self.burst, self.told_slow = start, [], False
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
      self.keep_workdir()
      self.checkpoints.save(done, state)
      self.saved = done

  def settle(self, done, state):
    """Waits for the last save; one that failed is made once more, since the state is still here."""
    if done > self.start:
      self.checkpoints.save(done, state)

  def keep_workdir(self):
    """Makes a workdir again that was taken away, so that what is saved in it can be used."""
    if hosts.is_main() and not (self.workdir / 'config.json').exists():
      logging.error(
        '%s/config.json is gone, was the folder moved or removed? Training goes on, what it writes'
        ' from now on is there', self.workdir
      )
      write_config(self.recipe, self.workdir)

  def rescue(self, state, error):
    """Saves the good state that a failure leaves in memory; says where the same command goes on.

    Several hosts cannot: those without a failure wait in a step and not here. Nor is there a good
    state after a burst of steps that were none.
    """
    is_good = not isinstance(error, NotFinite) and not state.step.is_deleted()
    try:
      if is_good and hosts.count() == 1:
        self.save(int(state.step), state)
      self.checkpoints.wait()
    except (OSError, ValueError) as second:
      logging.error('the steps since the last checkpoint are lost: %s', second)
    newest = self.checkpoints.newest()
    where = 'begins again' if newest is None else f'goes on from step {newest}'
    return f'the same command {where}'

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
    fetched, first = jax.device_get(self.pending), self.since == self.start
    norms_of_parts = [m.pop('grad_norms') for m in fetched]
    good = [m for m in fetched if not m['bad_steps']] or fetched
    values = {name: mean_of_numbers([m[name] for m in good]) for name in fetched[0]}
    values['bad_steps'] = sum(bool(m['bad_steps']) for m in fetched)
    seconds = time.time() - self.started
    values['steps_per_second'] = (done - self.since) / seconds
    values['data_wait'] = self.waited / seconds  # share of the time; previews and the like count
    self.pending, self.started, self.since, self.waited = [], time.time(), done, 0.0
    self.keep_workdir()
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
    if not first:  # that is when readers start
      self.warn_of_waiting(done, values['data_wait'])
    self.expect_finite(done, fetched, norms_of_parts)

  def warn_of_waiting(self, done, share):
    """Says once that the devices wait for data."""
    if share > SLOW_DATA and not self.told_slow:
      self.told_slow = True
      data = self.recipe.data
      logging.warning(
        'step %d: %d %% of the time since the last log step went by waiting for data; more'
        ' data.num_threads (%d) or data.num_workers (%d) may help, `bench --loader` measures it',
        done, 100 * share, data.num_threads, data.num_workers,
      )

  def expect_finite(self, done, fetched, norms_of_parts):
    """Ends a run of too many bad steps in a row, and leaves on disk what they had in common."""
    limit, worst = self.recipe.optim.max_bad_steps, 0
    for number, metrics in enumerate(fetched, done - len(fetched) + 1):
      if not metrics['bad_steps'] and worst < limit:
        self.burst = []  # begins with the last good step, to compare with
      worst = max(worst, int(metrics['bad_steps']))
      self.burst.append((number, metrics | {'grad_norms': norms_of_parts[number - done - 1]}))
    if worst < limit:
      return
    path = self.workdir / 'bad_steps' / f'step_{done:07d}.json'
    if hosts.is_main():
      files.write_json(path, burst_record(self.recipe, self.burst))
    raise NotFinite(
      f'{worst} steps in a row up to step {done} had a loss or gradient that is not finite'
      f' (optim.max_bad_steps={limit}); nothing was updated in them, {path} says what they had:'
      ' lower optim.learning_rate or set optim.clip_norm, the last good checkpoint is kept'
    )

  def weights(self, state):
    """Returns the averaged weights, a whole copy on every device."""
    return meshes.whole(step.ema_params(state), self.sampler.mesh)

  def preview(self, done, state):
    """Writes a grid of samples of the averaged weights, the same noise every time."""
    images = self.sampler.preview(self.weights(state))
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
      self.weights(state), done, weights='ema', stop=self.stop
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


def burst_record(recipe, burst):
  """Returns plain values of the steps of a burst, [(number, metrics)], for a file.

  Row r is the r-th of the epochs laid end to end, each in its own order of data and run.seed.
  """
  size = recipe.data.batch_size

  def plain(value):
    """Numbers of trees; JSON has none that is not finite."""
    if isinstance(value, dict):
      return {name: plain(item) for name, item in value.items()}
    value = float(value)
    return value if math.isfinite(value) else str(value)

  steps = [
    {'step': number, 'rows': [(number - 1) * size, number * size - 1], **plain(metrics)}
    for number, metrics in burst
  ]
  return {'seed': recipe.run.seed, 'batch_size': size, 'steps': steps}


def mean_of_numbers(values):
  """Returns the mean of what is not nan (a metric of rows that a step had none of), else nan."""
  numbers = [value for value in values if not np.isnan(value)]
  return float(np.mean(numbers)) if numbers else float('nan')


def due(done, every_steps):
  """Says whether a hook with this period runs after step `done`; period 0 never runs."""
  return every_steps > 0 and done % every_steps == 0

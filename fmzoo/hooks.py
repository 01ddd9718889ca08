"""What happens between training steps: log, preview, evaluate, save, and what a failure leaves."""

import concurrent.futures
import contextlib
import math
import pathlib
import time

import jax
import numpy as np
from absl import logging

from fmzoo import evaluate as evaluation
from fmzoo import files, pictures, step, writer
from fmzoo import sampler as samplers
from fmzoo.metrics import protocol
from fmzoo.parallel import hosts
from fmzoo.parallel import mesh as meshes

SLOW_DATA = 0.2  # share of the time spent waiting for data from which on it is told


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
    self.checkpoints.check()
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
      files.write_config(self.workdir, self.recipe.config)

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
        ' data.num_threads (%d) or data.num_workers (%d) may help, `bench --parts=input` tells',
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

"""Saves and restores everything a run needs, onto any sharding.

A step is a folder with the items `params`, `ema`, `opt_state` and `run` (step counter, key, bad
steps), each readable alone, and `meta`: who wrote it, and shape, dtype and checksum of every leaf.
Converted weights are `params` and `meta`: enough to sample and to start from, not to go on.
A leaf is stored under its dotted path in the state (`params.blocks.qkv.kernel`), so a None or an
optimiser's empty state needs no place in the file. The data position is the step.
"""

import contextlib
import itertools
import json
import os
import tempfile

import jax
import orbax.checkpoint as ocp
from absl import logging

from fmzoo import checksums, manager
from fmzoo.parallel import hosts

_FORMAT = 1  # of the layout above


def _expect_writable(directory):
  try:
    os.makedirs(directory, exist_ok=True)
    tempfile.TemporaryFile(dir=directory).close()
  except OSError as error:
    raise ValueError(
      f'cannot write checkpoints to {directory} ({error.strerror}); choose another --workdir.'
    ) from error


class _Damaged(Exception):
  """A step cannot be read, or does not hold what was written."""


def _agreed(read):
  """Calls `read`; raises _Damaged in every process if it fails in any of them."""
  try:
    result, reason = read(), None
  except (MemoryError, jax.errors.JaxRuntimeError):
    raise  # The machine's fault, not the file's.
  except Exception as error:  # A damaged file has no common error class.
    result, reason = None, f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
  if not hosts.all_agree(reason is None):
    raise _Damaged(reason or 'unreadable on another host')
  return result


class Checkpoints:
  """The checkpoints of one run; a context manager that waits for the last save.

  Args:
    directory: where the steps lie, on a local or network file system; made if missing.
    identity: what a checkpoint must have in common with this run, JSON values (method, model, ...).
      Only the keys given here are compared when reading: {} reads the checkpoints of any run.
    keep_last: how many of the newest steps are kept; at least 1.
    keep_steps: steps that are kept for ever.
    read_only: nothing on disk is changed: no save, nothing made, cleared up or set aside.

  Raises:
    ValueError: if `keep_last` is below 1 or the directory cannot be written.
  """

  def __init__(self, directory, *, identity, keep_last=1, keep_steps=(), read_only=False):
    if keep_last < 1:
      raise ValueError(f'keep_last={keep_last} would delete the newest checkpoint; use 1 or more.')
    self.directory = os.path.abspath(directory)  # Orbax fails in its thread on a relative path.
    self._identity = json.loads(json.dumps(identity))  # Tuples become lists, as in the file.
    self._read_only, self._saving, self._broken = read_only, None, False
    if not read_only:
      _expect_writable(self.directory)
    self._manager = manager.Manager(
      self.directory, keep_last=keep_last, keep_steps=keep_steps, read_only=read_only
    )

  def save(self, step, state):
    """Starts to save a state; returns once the state may be donated, while files are written.

    What went wrong with the save before is only known now. This one is then waited for: if it is
    on disk, nothing is lost but the older step. No step is deleted before a newer one is complete.
    One of several hosts cannot try again, since the others still wait for the save before.

    Args:
      step: int, how many steps the state has behind it.
      state: NamedTuple with the fields params, ema, opt_state and any others.

    Returns:
      True, or False if that step is there already and nothing was done.

    Raises:
      ValueError: if the directory is read-only or already holds a newer step, or if this step or
        the one before it cannot be written.
    """
    if self._read_only:
      raise ValueError(f'{self.directory} was opened to read; save with read_only=False.')
    failed = self._failed_before(step)
    newest = self._manager.latest_step()
    if step in self._manager.all_steps():
      return False
    if newest is not None and newest > step:  # Orbax would skip this save without a word.
      raise ValueError(
        f'{self.directory} already holds step {newest}, cannot save step {step} after it; restore '
        'first, or choose another --workdir.'
      )
    named = checksums.named(state)
    sums = checksums.sums(named)
    leaves = {name: [checksums.spec(leaf), sums[name]] for name, leaf in named.items()}
    meta = {'format': _FORMAT, 'step': step, 'identity': self._identity, 'leaves': leaves}
    items = {item: ocp.args.PyTreeSave(part) for item, part in checksums.by_item(named).items()}
    items['meta'] = ocp.args.JsonSave({**meta, 'crc32': checksums.crc32(meta)})
    with self._writing(step):
      self._manager.save(step, args=ocp.args.Composite(**items))
    if failed:
      self.wait()
    return True

  def _failed_before(self, step):
    """Waits for the save before; says aloud if it failed, or if all that was saved is gone."""
    try:
      self.wait()
    except ValueError as error:
      if self._broken:
        raise
      logging.error('%s; trying to save step %d', error, step)
      return True
    if not os.path.isdir(self.directory):
      logging.error(
        '%s is gone, was it moved or removed? It is made again for step %d', self.directory, step
      )
      _expect_writable(self.directory)
      self._manager.reload()  # or it takes for saved what is no longer there
    return False

  @contextlib.contextmanager
  def _writing(self, step):
    """Turns what a failed save raises into one line; it surfaces when the save is waited for.

    Once a save has failed on one of several hosts nothing is waited for there, see `check`.
    """
    self._saving = step
    try:
      yield
    except Exception as error:  # Orbax and tensorstore have no common class for it.
      self._broken = hosts.count() > 1
      if isinstance(error, (MemoryError, jax.errors.JaxRuntimeError)):
        raise  # The machine's fault, not the disk's.
      raise ValueError(
        f'checkpoint {self._path(step)} cannot be written ({manager.reason(error)}); free space'
        ' there, or see that the folder takes files'
      ) from error

  def restore(self, abstract_state):
    """Reads the newest whole step; newer ones that are damaged are renamed, never deleted.

    Args:
      abstract_state: the state with a jax.ShapeDtypeStruct, with sharding, for every array.

    Returns:
      (state, step), or None if there is no checkpoint.

    Raises:
      ValueError: if a checkpoint belongs to another run or holds parameters alone, or all are
        damaged; nothing is renamed.
    """
    steps = self.steps()
    if not steps:
      return None
    abstract = checksums.named(abstract_state)

    def select(step, leaves):
      """Takes what is asked for of the stored tree."""
      if {checksums.item(name) for name in abstract} != {'params'}:
        self._expect_training(step, leaves)
      self._expect_same_leaves(step, leaves, abstract)
      return abstract

    leaves, step, damaged = self._newest_whole(steps, select)
    if damaged and not self._read_only:
      self._set_aside(damaged)
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), step

  def restore_params(self, abstract_params, *, ema=True, step=None):
    """Reads parameters alone, to sample or to start from; changes nothing on disk.

    Args:
      abstract_params: parameters with a jax.ShapeDtypeStruct for every array; subtrees at the top
        of the stored parameters that are not in it are left out.
      ema: whether to take the averaged leaf wherever there is one (frozen leaves have none).
      step: int, or None for the newest whole one.

    Returns:
      (params, step).

    Raises:
      ValueError: if there is no such checkpoint, it belongs to another run, or it is damaged.
    """
    steps = self.steps()
    if not steps:
      raise ValueError(f'no checkpoint in {self.directory}; train first or pass another --workdir.')
    if step is not None and step not in steps:
      raise ValueError(f'no step {step} in {self.directory}; available steps: {steps}.')
    abstract = checksums.named({'params': abstract_params})
    subtrees = {checksums.subtree(name) for name in abstract}

    def select(step, leaves):
      """Takes what is asked for of the stored tree."""
      asked = {name: leaf for name, leaf in leaves.items() if checksums.subtree(name) in subtrees}
      self._expect_same_leaves(step, asked, abstract)
      averaged = {name: 'ema' + name.removeprefix('params') for name in abstract}
      return {
        averaged[name] if ema and averaged[name] in leaves else name: leaf
        for name, leaf in abstract.items()
      }

    leaves, step, _ = self._newest_whole(steps if step is None else [step], select)
    return jax.tree.unflatten(jax.tree.structure(abstract_params), leaves), step

  def check_newest(self, *, to_go_on):
    """Refuses the newest readable checkpoint if another kind of run wrote it, or if there is none.

    Reads its record alone, not its arrays.

    Args:
      to_go_on: whether it must hold a whole state, and not parameters alone.
    """
    for step in reversed(self.steps()):
      with contextlib.suppress(_Damaged):  # a restore says aloud what is wrong with it
        meta = _agreed(lambda step=step: self._meta(step))
        self._expect_same_run(step, meta)
        if to_go_on:
          self._expect_training(step, meta['leaves'])
        return
    if not self.steps():
      raise ValueError(
        f'no checkpoint in {self.directory}; train there first, or name another place.'
      )

  def subtrees(self):
    """Names of the top-level subtrees of the parameters in the newest readable checkpoint."""
    for step in reversed(self.steps()):
      with contextlib.suppress(_Damaged):  # restore_params says aloud what is wrong with it
        names = (name.split('.') for name in _agreed(lambda step=step: self._meta(step))['leaves'])
        return {parts[1] for parts in names if parts[0] == 'params'}
    raise ValueError(
      f'no checkpoint in {self.directory}; train there first, or name another place.'
    )

  def _newest_whole(self, steps, select):
    """Reads the newest step that can be trusted: (arrays, step, damaged newer steps).

    `select(step, {name: (spec, checksum)})` returns {name: abstract leaf} of the arrays to read, or
    raises ValueError if the checkpoint is of another kind, which is no damage.
    """
    damaged = {}
    for step in reversed(steps):
      try:
        return self._load(step, select), step, list(damaged)
      except _Damaged as reason:
        logging.error('checkpoint %s is damaged and skipped: %s', self._path(step), reason)
        damaged[step] = reason
    raise ValueError(
      f'no whole checkpoint in {self.directory}, damaged: '
      + '; '.join(f'step {step} ({reason})' for step, reason in damaged.items())
      + '; bring back a copy, or choose another --workdir.'
    )

  def _load(self, step, select):
    """Arrays of a step in the order of the selection, checked against their checksums."""
    meta = _agreed(lambda: self._meta(step))
    self._expect_same_run(step, meta)
    wanted = select(step, meta['leaves'])
    args = {
      item: manager.restore_args(leaves) for item, leaves in checksums.by_item(wanted).items()
    }

    def read():
      """Reads one checkpoint."""
      items = self._manager.restore(step, args=ocp.args.Composite(**args))
      return {name: items[checksums.item(name)][name] for name in wanted}

    named = _agreed(read)
    for name, value in checksums.sums(named).items():
      if value != meta['leaves'][name][1]:
        raise _Damaged(f"checksum of leaf '{name}' differs")
    return list(named.values())

  def _meta(self, step):
    """The record of a step; raises anything if it is damaged."""
    meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
    if meta.pop('crc32') != checksums.crc32(meta):
      raise ValueError('checksum of meta differs')
    if meta['step'] != step:
      raise ValueError(f'the folder holds step {meta["step"]}')
    return meta

  def _expect_same_run(self, step, meta):
    found = {'format': meta['format'], **meta['identity']}
    for key, expected in {'format': _FORMAT, **self._identity}.items():
      if found.get(key) != expected:
        raise ValueError(
          f'checkpoint {self._path(step)} was written by {key} {found.get(key)!r}, this config '
          f'asks for {expected!r}; choose another --workdir, or the config it was written with.'
        )

  def _expect_training(self, step, leaves):
    """Refuses a checkpoint of converted weights."""
    if {checksums.item(name) for name in leaves} == {'params'}:
      raise ValueError(
        f'checkpoint {self._path(step)} holds parameters alone (converted weights), no training to'
        ' go on with; train in another --workdir with'
        f' --config.run.init_from={os.path.dirname(self.directory)}'
      )

  def _expect_same_leaves(self, step, leaves, abstract):
    """Compares before reading, since orbax casts to another dtype without a word."""
    found = {name: spec for name, (spec, _) in leaves.items()}
    expected = {name: checksums.spec(leaf) for name, leaf in abstract.items()}
    for name in (*expected, *found):
      if found.get(name) != expected.get(name):
        raise ValueError(
          f"checkpoint {self._path(step)} holds leaf '{name}' as {found.get(name, 'absent')}, "
          f'this config makes it {expected.get(name, "absent")}; choose another --workdir, or the '
          'config it was written with.'
        )

  def _set_aside(self, steps):
    """Renames damaged steps to names the manager does not list."""
    if hosts.is_main():
      for step in steps:
        names = (self._path(f'damaged-{step}-{n}') for n in itertools.count())
        target = next(name for name in names if not os.path.exists(name))
        os.rename(self._path(step), target)
        logging.error('checkpoint %s was renamed to %s', self._path(step), target)
    hosts.barrier('fmzoo_checkpoint_set_aside')
    self._manager.reload()

  def _path(self, name):
    return os.path.join(self.directory, str(name))

  def steps(self):
    """All finished steps, rising; waits for a running save."""
    self.wait()
    return sorted(self._manager.all_steps())

  def newest(self):
    """The newest step on disk, or None; also after a save that failed."""
    if not os.path.isdir(self.directory):
      return None
    self._manager.reload()
    return self._manager.latest_step()

  def check(self):
    """Raises ValueError if one of several hosts, this one, could not do its part of a save.

    To be called at every step. The others wait for this part, in a thread that nothing ends but
    the end of this process; so this must come soon, and nothing may be waited for on its way.
    """
    if hosts.count() > 1:
      with self._writing(self._saving):
        self._manager.expect_written()

  def wait(self):
    """Waits until a running save is on disk; ValueError says what went wrong with it, once.

    On one of several hosts it says so every time.
    """
    with self._writing(self._saving):
      self._manager.wait_until_finished()

  def close(self):
    """Waits for a running save and frees the directory; not after a failure on several hosts."""
    if self._broken:
      return
    with self._writing(self._saving):
      self._manager.close()

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()

"""Checkpoints: exact, on any sharding, and what happens when a file is not what was written."""

import os
import pathlib
import resource
import subprocess
import sys
import textwrap
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fmzoo import checkpoint, checksums

IDENTITY = {'method': 'bfm', 'edges': (1.0, 0.5, 0.0)}


class State(NamedTuple):
  step: Any
  rng: Any
  params: Any
  ema: Any
  opt_state: Any
  bad_steps: Any


def make_state(step, width=32):
  """A state with all that is awkward: None, bf16, bool, a key, empty optimiser states."""
  keys = jax.random.split(jax.random.key(step), 3)
  params = {
    'blocks': {'kernel': jax.random.normal(keys[0], (3, 32, width)), 'bias': jnp.full(5, 0.1)},
    'frozen': {'table': jax.random.normal(keys[1], (8, 4), jnp.bfloat16)},
  }
  ema = {'blocks': jax.tree.map(lambda leaf: leaf + 1, params['blocks']), 'frozen': {'table': None}}
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adam(0.1), {'a': True}))
  opt_state = (tx.init({'a': jnp.ones(4)}), {'hit': jnp.array([True, False, True])})
  return State(jnp.int32(step), keys[2], params, ema, opt_state, jnp.int32(1))


def sharding(count, *axes):
  return NamedSharding(Mesh(np.array(jax.devices()[:count]), ('data',)), PartitionSpec(*axes))


def abstract(tree, place):
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf)), tree
  )


def on_one(leaf):
  return sharding(1)


def spread(count):
  """The middle axis of [L, D, D] leaves over `count` devices, all else replicated."""
  return lambda leaf: sharding(count, None, 'data') if leaf.ndim == 3 else sharding(count)


def bits(leaf):
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.asarray(leaf).tobytes()


def assert_same_bits(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected)):
    assert (a.dtype, a.shape, bits(a)) == (b.dtype, b.shape, bits(b)), path


def write(directory, *steps, **options):
  """Saves make_state(step) for each step."""
  with checkpoint.Checkpoints(directory, identity=IDENTITY, keep_last=9, **options) as checkpoints:
    for step in steps:
      assert checkpoints.save(step, make_state(step))


def read(directory, place=on_one, state=None, identity=IDENTITY, **options):
  with checkpoint.Checkpoints(directory, identity=identity, keep_last=9, **options) as checkpoints:
    return checkpoints.restore(abstract(make_state(0) if state is None else state, place))


def data_file(directory, step, item='params'):
  """The largest array file of an item, which holds the kernel (or, in `run`, all there is)."""
  folder = directory / str(step) / item
  files = list(folder.glob('d/*' if item == 'run' else '**/d/*'))
  return max(files, key=lambda file: file.stat().st_size)


def names(directory):
  return sorted(path.name for path in directory.iterdir())


# Round trips.


def test_round_trip_keeps_every_bit(tmp_path):
  write(tmp_path, 4)
  state, step = read(tmp_path)
  assert step == 4
  assert_same_bits(state, make_state(4))


def test_optimiser_without_state_and_ema_without_leaves(tmp_path):
  state = make_state(1)._replace(ema={'blocks': None, 'frozen': None}, opt_state=optax.EmptyState())
  with checkpoint.Checkpoints(tmp_path, identity={}, keep_last=1) as checkpoints:
    checkpoints.save(1, state)
    assert_same_bits(checkpoints.restore(abstract(state, on_one))[0], state)
    params, _ = checkpoints.restore_params(abstract(state.params, on_one))
    assert_same_bits(params, state.params)


def test_no_checkpoint_is_none(tmp_path):
  assert read(tmp_path / 'new') is None


def test_relative_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write('runs/checkpoints', 2)
  assert read('runs/checkpoints')[1] == 2
  assert (tmp_path / 'runs' / 'checkpoints' / '2').is_dir()


def test_state_may_be_donated_right_after_save(tmp_path):
  """A CPU donates nothing that the writing thread still looks at; what it leaves is deleted."""
  place = spread(8)
  overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0, tree), donate_argnums=0)
  unsaved, state = (
    jax.device_put(make_state(3), jax.tree.map(place, make_state(3))) for _ in range(2)
  )
  overwrite(unsaved.params)  # compiles, so that nothing lies between saving and donating
  assert unsaved.params['blocks']['kernel'].is_deleted()
  with checkpoint.Checkpoints(tmp_path, identity={}, keep_last=1) as checkpoints:
    checkpoints.save(3, state)
    overwrite(state.params)
    jax.tree.map(lambda leaf: leaf.delete(), state)
    restored, _ = checkpoints.restore(abstract(make_state(3), place))
  assert_same_bits(restored, make_state(3))


@pytest.mark.parametrize('count', [1, 4])
def test_saved_from_8_devices_restores_onto(tmp_path, count):
  state = make_state(5)
  with checkpoint.Checkpoints(tmp_path, identity=IDENTITY, keep_last=1) as checkpoints:
    checkpoints.save(5, jax.device_put(state, jax.tree.map(spread(8), state)))
  restored, _ = read(tmp_path, spread(count))
  assert_same_bits(restored, state)
  for leaf in jax.tree.leaves(restored):
    assert leaf.sharding == spread(count)(leaf)


def test_step_that_exists_is_not_saved_again(tmp_path):
  write(tmp_path, 4)
  with checkpoint.Checkpoints(tmp_path, identity=IDENTITY, keep_last=1) as checkpoints:
    assert not checkpoints.save(4, make_state(7))
    assert_same_bits(checkpoints.restore(abstract(make_state(0), on_one))[0], make_state(4))


def test_keep_last_and_keep_steps(tmp_path):
  options = {'identity': {}, 'keep_last': 2, 'keep_steps': (1, 3)}
  for steps in [range(1, 5), range(5, 7)]:  # The rules hold across a restart.
    with checkpoint.Checkpoints(tmp_path, **options) as checkpoints:
      for step in steps:
        checkpoints.save(step, make_state(step))
      found = checkpoints.steps()
  assert found == [1, 3, 5, 6]
  assert names(tmp_path) == ['1', '3', '5', '6']


def test_one_checkpoint_is_whole_at_every_moment(tmp_path):
  """Though one alone is kept: the old one goes once the new one is there."""
  listings, ended = [], threading.Event()

  def watch():
    while not ended.is_set():
      listings.append({name for name in os.listdir(tmp_path) if name.isdigit()})

  watcher = threading.Thread(target=watch)
  with checkpoint.Checkpoints(tmp_path, identity={}, keep_last=1) as checkpoints:
    checkpoints.save(1, make_state(1))
    checkpoints.wait()
    watcher.start()
    for step in range(2, 6):
      checkpoints.save(step, make_state(step))
  ended.set()
  watcher.join()
  assert all(listings) and len(set(map(frozenset, listings))) > 1  # it did watch
  assert names(tmp_path) == ['5']


def test_save_that_fails_deletes_nothing(tmp_path):
  """It is told when the next one begins, which is then waited for; or at the end."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  with checkpoint.Checkpoints(tmp_path, identity={}, keep_last=1) as checkpoints:
    checkpoints.save(1, make_state(1))
    checkpoints.wait()
    try:
      resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
      checkpoints.save(2, make_state(2))
      with pytest.raises(ValueError, match=r'/3 cannot be written \(File too large\); free space'):
        checkpoints.save(3, make_state(3))
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.newest() == 1
  state, step = read(tmp_path, identity={})
  assert step == 1
  assert_same_bits(state, make_state(1))


# Parameters alone.


def test_params_are_averaged_where_there_is_an_average(tmp_path):
  write(tmp_path, 2, 6)
  state = make_state(6)
  with checkpoint.Checkpoints(tmp_path, identity=IDENTITY, read_only=True) as checkpoints:
    params, step = checkpoints.restore_params(abstract(state.params, spread(4)))
    last, _ = checkpoints.restore_params(abstract(state.params, on_one), ema=False)
    older, _ = checkpoints.restore_params(abstract(state.params, on_one), ema=False, step=2)
  assert step == 6
  assert_same_bits(params, {'blocks': state.ema['blocks'], 'frozen': state.params['frozen']})
  assert params['blocks']['kernel'].sharding == sharding(4, None, 'data')
  assert_same_bits(last, state.params)
  assert_same_bits(older, make_state(2).params)


def test_params_without_sharding_go_to_the_first_device(tmp_path):
  write(tmp_path, 2)
  shapes = jax.eval_shape(lambda: make_state(2).params)
  with checkpoint.Checkpoints(tmp_path, identity={}, read_only=True) as checkpoints:
    params, _ = checkpoints.restore_params(shapes, ema=False)
  assert_same_bits(params, make_state(2).params)
  assert params['blocks']['bias'].devices() == {jax.devices()[0]}


def test_subtree_of_params(tmp_path):
  write(tmp_path, 2)
  blocks = {'blocks': make_state(2).params['blocks']}
  with checkpoint.Checkpoints(tmp_path, identity={}, read_only=True) as checkpoints:
    params, _ = checkpoints.restore_params(abstract(blocks, on_one), ema=False)
    assert_same_bits(params, blocks)
    part = {'blocks': {'bias': blocks['blocks']['bias']}}
    with pytest.raises(ValueError, match="'params.blocks.kernel' as float32.*makes it absent"):
      checkpoints.restore_params(abstract(part, on_one))


def test_params_skip_a_damaged_step_and_rename_nothing(tmp_path):
  write(tmp_path, 2, 6)
  flip(data_file(tmp_path, 6))
  wanted = abstract(make_state(0).params, on_one)
  with checkpoint.Checkpoints(tmp_path, identity=IDENTITY, read_only=True) as checkpoints:
    params, step = checkpoints.restore_params(wanted, ema=False)
    assert step == 2
    assert_same_bits(params, make_state(2).params)
    with pytest.raises(ValueError, match=r'no whole checkpoint .*step 6 \('):
      checkpoints.restore_params(wanted, ema=False, step=6)
  assert names(tmp_path) == ['2', '6']


# Damage.


def flip(file, count=64):
  """Inverts bytes in the middle of a file."""
  data = bytearray(file.read_bytes())
  start = max(len(data) // 2 - count // 2, 0)
  data[start : start + count] = bytes(255 - byte for byte in data[start : start + count])
  file.write_bytes(data)


def truncate(file):
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def replace(file, old, new):
  assert old in file.read_bytes()
  file.write_bytes(file.read_bytes().replace(old, new))


DAMAGE = {
  'flipped bytes': lambda step: flip(data_file(step.parent, step.name)),
  'flipped bytes of ema': lambda step: flip(data_file(step.parent, step.name, 'ema')),
  'flipped bytes of run': lambda step: flip(data_file(step.parent, step.name, 'run'), 4),
  'truncated data': lambda step: truncate(data_file(step.parent, step.name)),
  'empty data': lambda step: data_file(step.parent, step.name).write_bytes(b''),
  'truncated record': lambda step: truncate(step / 'meta' / 'metadata'),
  'flipped record': lambda step: flip(step / 'meta' / 'metadata', 1),
  'changed record': lambda step: replace(step / 'meta' / 'metadata', b'"bfm"', b'"bfn"'),
  'no record': lambda step: (step / 'meta').rename(step / 'gone'),
  'no item': lambda step: (step / 'opt_state').rename(step / 'gone'),
  'empty folder': lambda step: (step.rename(step.parent / 'gone'), step.mkdir()),
  'another step': lambda step: (
    step.rename(step.parent / 'gone'),
    (step.parent / '4').rename(step),
  ),
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_damaged_newest_is_set_aside_and_the_one_before_is_used(tmp_path, caplog, kind):
  write(tmp_path, 1, 2, 4, 6)
  DAMAGE[kind](tmp_path / '6')
  state, step = read(tmp_path)
  assert step == (2 if kind == 'another step' else 4)
  assert_same_bits(state, make_state(step))
  assert 'damaged-6-0' in names(tmp_path)
  assert '6' not in names(tmp_path)
  loud = [
    record.message for record in caplog.records
    if record.levelname == 'ERROR' and record.pathname == checkpoint.__file__  # orbax's vary
  ]
  assert len(loud) == 2 and all(f'checkpoint {tmp_path / "6"} ' in line for line in loud)


def test_run_goes_on_after_a_damaged_step_and_deletes_nothing(tmp_path):
  write(tmp_path, 4, 6)
  flip(data_file(tmp_path, 6))
  damaged = data_file(tmp_path, 6).read_bytes()
  with checkpoint.Checkpoints(tmp_path, identity=IDENTITY, keep_last=2) as checkpoints:
    assert checkpoints.restore(abstract(make_state(0), on_one))[1] == 4
    assert checkpoints.save(6, make_state(6))
    checkpoints.wait()
    flip(data_file(tmp_path, 6))
    assert checkpoints.restore(abstract(make_state(0), on_one))[1] == 4
  assert names(tmp_path) == ['4', 'damaged-6-0', 'damaged-6-1']
  assert data_file(tmp_path, 'damaged-6-0').read_bytes() == damaged


def test_all_damaged_is_refused_and_left_as_it_is(tmp_path):
  write(tmp_path, 4, 6)
  flip(data_file(tmp_path, 4))
  truncate(data_file(tmp_path, 6))
  for _ in range(2):
    with pytest.raises(ValueError, match=r'damaged: step 6 \(.*; step 4 \(.*--workdir') as error:
      read(tmp_path)
    assert '\n' not in str(error.value)
  assert names(tmp_path) == ['4', '6']


def test_read_only_restore_renames_nothing(tmp_path):
  write(tmp_path, 4, 6)
  flip(data_file(tmp_path, 6))
  assert read(tmp_path, read_only=True)[1] == 4
  assert names(tmp_path) == ['4', '6']


def test_lack_of_memory_is_not_taken_for_damage(tmp_path, monkeypatch):
  write(tmp_path, 4, 6)
  with checkpoint.Checkpoints(tmp_path, identity=IDENTITY) as checkpoints:

    def fail(*args, **kwargs):
      raise MemoryError('host')

    monkeypatch.setattr(checkpoints._manager, 'restore', fail)
    with pytest.raises(MemoryError):
      checkpoints.restore(abstract(make_state(0), on_one))
  assert names(tmp_path) == ['4', '6']


KILLED = """
import os, signal, sys
import jax.numpy as jnp
from fmzoo import checkpoint
from typing import Any, NamedTuple

class State(NamedTuple):
  step: Any
  params: Any

checkpoints = checkpoint.Checkpoints(sys.argv[1], identity={}, keep_last=1)
checkpoints.save(1, State(jnp.int32(1), {'w': jnp.arange(1 << 22)}))
checkpoints.wait()
checkpoints.save(2, State(jnp.int32(2), {'w': jnp.ones(1 << 22, jnp.int32)}))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_while_saving_leaves_the_step_before(tmp_path):
  root = pathlib.Path(checkpoint.__file__).parents[1]
  command = [sys.executable, '-c', textwrap.dedent(KILLED), str(tmp_path)]
  assert subprocess.run(command, cwd=root, timeout=60, check=False).returncode == -9
  assert '2' not in names(tmp_path) and '1' in names(tmp_path)

  class Small(NamedTuple):
    step: Any
    params: Any

  like = Small(jnp.int32(0), {'w': jnp.zeros(1 << 22, jnp.int32)})
  state, step = read(tmp_path, state=like, identity={})
  assert step == 1
  np.testing.assert_array_equal(state.params['w'], np.arange(1 << 22))
  assert names(tmp_path) == ['1']


# Refusals.


def test_another_identity_is_refused_before_anything_is_renamed(tmp_path):
  write(tmp_path, 4, 6)
  flip(data_file(tmp_path, 6))
  for step in (4, 6):
    with pytest.raises(ValueError, match="by method 'bfm', this config asks for 'soflow'; ch"):
      read(tmp_path, identity={'method': 'soflow'})
    flip(data_file(tmp_path, step))
  assert names(tmp_path) == ['4', '6']


def test_key_that_the_checkpoint_does_not_know_is_refused(tmp_path):
  write(tmp_path, 4)
  with pytest.raises(ValueError, match='was written by blocks None, this config asks for 6'):
    read(tmp_path, identity={**IDENTITY, 'blocks': 6})


def test_another_shape_is_refused_not_taken_for_damage(tmp_path):
  write(tmp_path, 4)
  message = r"leaf 'params.blocks.kernel' as float32\[3,32,32\], this config makes it .*\[3,32,64\]"
  with pytest.raises(ValueError, match=message):
    read(tmp_path, state=make_state(0, width=64))
  assert names(tmp_path) == ['4']


def test_another_dtype_is_refused_not_cast(tmp_path):
  write(tmp_path, 4)
  state = make_state(4)
  state = state._replace(bad_steps=state.bad_steps.astype(jnp.float32))
  with pytest.raises(ValueError, match=r"'bad_steps' as int32\[\], this config makes it float32"):
    read(tmp_path, state=state)


def test_a_leaf_too_many_is_refused(tmp_path):
  write(tmp_path, 4)
  with pytest.raises(ValueError, match=r"'opt_state.*' as .*, this config makes it absent"):
    read(tmp_path, state=make_state(4)._replace(opt_state=()))


def wrong_params(tmp_path, **options):
  with checkpoint.Checkpoints(tmp_path, identity=IDENTITY, read_only=True) as checkpoints:
    checkpoints.restore_params(abstract(make_state(0).params, on_one), **options)


def save_older(tmp_path):
  write(tmp_path, 6)
  write(tmp_path, 4)


def save_read_only(tmp_path):
  write(tmp_path, 4, read_only=True)


def no_such_step(tmp_path):
  write(tmp_path, 4, 6)
  wrong_params(tmp_path, step=5)


def no_folder(tmp_path):
  (tmp_path / 'file').write_text('')
  write(tmp_path / 'file' / 'checkpoints', 4)


def keep_none(tmp_path):
  checkpoint.Checkpoints(tmp_path, identity={}, keep_last=0)


@pytest.mark.parametrize(
  'call, message',
  [
    (wrong_params, 'no checkpoint in .*; train first or pass another --workdir'),
    (no_such_step, r'no step 5 in .*; available steps: \[4, 6\]'),
    (no_folder, r'cannot write checkpoints to .*checkpoints \(Not a directory\); choose another'),
    (keep_none, 'keep_last=0 would delete the newest checkpoint; use 1 or more'),
    (save_older, 'already holds step 6, cannot save step 4 after it; restore first'),
    (save_read_only, 'was opened to read; save with read_only=False'),
  ],
)
def test_refusal_names_value_and_remedy(tmp_path, call, message):
  with pytest.raises(ValueError, match=message) as error:
    call(tmp_path)
  assert '\n' not in str(error.value)


# Checksums.


@pytest.mark.parametrize('dtype', ['bool', 'uint8', 'bfloat16', 'float32', 'int32'])
def test_checksum_sees_every_single_change(dtype):
  values = jnp.arange(24).reshape(2, 3, 4).astype(dtype)
  reference = checksums.checksum(values)
  changed = jax.vmap(lambda i: values.ravel().at[i].set(values.ravel()[i] == 0).reshape(2, 3, 4))
  sums = jax.vmap(checksums.checksum)(changed(jnp.arange(24)))
  same = jax.vmap(lambda other: (other == values).all())(changed(jnp.arange(24)))
  np.testing.assert_array_equal(sums == reference, same)


def test_checksum_sees_order_and_paired_signs():
  values = jnp.arange(1.0, 7.0)
  sums = [
    int(checksums.checksum(other))
    for other in (values, -values, values[::-1], values.at[:2].multiply(-1.0))
  ]
  assert len(set(sums)) == 4


def test_checksum_is_that_of_the_words():
  """Recomputed in numpy, so that files stay readable whatever jax does."""
  values = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
  words = values.view(np.uint32).ravel() + np.arange(15, dtype=np.uint32) * np.uint32(0x9E3779B9)
  words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
  words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
  assert int(checksums.checksum(values)) == int((words ^ (words >> 16)).sum(dtype=np.uint32))


def test_checksum_of_eight_bytes():
  with jax.enable_x64(True):
    values = jnp.arange(4.0, dtype='float64')
    assert checksums.checksum(values) != checksums.checksum(values.at[1].add(2.0**-50))


def test_checksum_does_not_depend_on_sharding():
  values = jax.random.normal(jax.random.key(0), (8, 16, 3))
  sums = [
    int(jax.jit(checksums.checksum)(jax.device_put(values, sharding(8, *axes))))
    for axes in [(), ('data',), (None, 'data')]
  ]
  assert len(set(sums)) == 1

"""The device mesh, and the one place where a step is compiled over it."""

import dataclasses
import functools
import os

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fmzoo.parallel import hosts

MODES = ('jit', 'pmap')
SHRINK_STEP = (
  'lower data.batch_size, raise optim.accumulate_steps or, where the model has it, set'
  ' model.remat=True, which shrink the work'
)
AXES = ('segment', 'data', 'fsdp')  # from the outermost; devices of a host are neighbours


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How devices are used."""

  data: int  # devices along the data axis; -1 takes all that the other axes leave
  fsdp: int  # devices that share parameters, optimiser state and EMA
  segment: int  # groups of devices, each with the velocity blocks of its own segments
  mode: str  # 'jit' (one global program) or 'pmap' (one program per device, lax.pmean)


def make(config, devices=None):
  """Returns a Mesh with the axes AXES; rows are cut over all of them.

  Args:
    config: Config.
    devices: to use in place of those that jax has.

  Raises:
    ValueError: if the mode is unknown, or the devices are not enough or cannot be shared so.
  """
  check(config)
  devices = _neighbours(devices)
  inner = config.fsdp * config.segment
  data = max(len(devices) // inner, 1) if config.data == -1 else config.data
  if config.data == -1 and len(devices) % inner:
    raise ValueError(
      f'mesh.fsdp={config.fsdp} times mesh.segment={config.segment} does not divide the'
      f' {len(devices)} device(s) found; use divisors, or say in mesh.data how many to use'
    )
  size = data * inner
  if size > len(devices):
    raise ValueError(
      f'mesh.data={config.data}, mesh.fsdp={config.fsdp} and mesh.segment={config.segment} ask for'
      f' {size} devices, {len(devices)} found; use mesh.data=-1 or at most'
      f' {len(devices) // inner or 1}, and other axes to match'
    )
  grid = np.array(devices[:size]).reshape(config.segment, data, config.fsdp)
  return Mesh(grid, AXES)


def check(config):
  """Refuses a mode that is unknown or cannot have the axes asked for, and sizes below 1."""
  if config.mode not in MODES:
    raise ValueError(f"mesh.mode='{config.mode}' is unknown; use one of {', '.join(MODES)}")
  for axis in AXES:
    size = getattr(config, axis)
    if size < 1 and (axis, size) != ('data', -1):
      rest = ' or -1, all there are' if axis == 'data' else ''
      raise ValueError(f'mesh.{axis}={size} must be at least 1{rest}')
    if config.mode == 'pmap' and axis != 'data' and size > 1:
      raise ValueError(f"mesh.{axis}={size} needs mesh.mode='jit', found 'pmap'; use that, or 1")


def flat(config, devices=None):
  """Returns a Mesh of one axis, for work that only cuts rows: as many devices as `make` takes.

  Where that is all of them, axes that do not fit them are no matter.

  Raises:
    ValueError: as `make`.
  """
  if config.data == -1:
    config = dataclasses.replace(config, fsdp=1, segment=1)
  return Mesh(make(config, devices).devices.ravel(), ('data',))


def _neighbours(devices):
  """Returns devices so that those of a host follow each other, whatever their numbers."""
  devices = jax.devices() if devices is None else devices
  return sorted(devices, key=lambda device: (device.process_index, device.id))


def local():
  """Returns a Mesh of this host's own devices, for work that hosts do apart."""
  return Mesh(np.array(jax.local_devices()), ('data',))


def of_this_host(mesh, at_most):
  """Returns a Mesh of those devices of a mesh that are this host's, the first `at_most` of them.

  Raises:
    ValueError: if it has none there.
  """
  devices = mesh.local_devices[:at_most]
  if not devices:
    raise ValueError(
      f'a mesh of {mesh.size} devices leaves none for host {jax.process_index()} of'
      f' {jax.process_count()}; use mesh.data=-1'
    )
  return Mesh(np.array(devices), ('data',))


def on_own_devices(mesh, tree):
  """Returns a tree that is replicated over more devices as one over a part of them, not copied.

  Args:
    mesh: of this host's devices, each of which has a copy.
    tree: of arrays.
  """
  def share(leaf):
    """Returns one array over those of its copies."""
    copies = {shard.device: shard.data for shard in leaf.addressable_shards}
    return jax.make_array_from_single_device_arrays(
      leaf.shape, replicated(mesh), [copies[device] for device in mesh.devices.flat]
    )

  return jax.tree.map(share, tree)


def replicated(mesh):
  """Returns the sharding that keeps a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def whole(tree, mesh):
  """Returns a tree with a whole copy on every device; what is so already is not copied."""
  return _gathering(replicated(mesh))(tree)


@functools.cache
def _gathering(sharding):
  """Returns the program of `whole`, one for all calls."""
  return jax.jit(lambda tree: tree, out_shardings=sharding)


def rows_sharded(mesh):
  """Returns the sharding that cuts the first axis over the devices."""
  return NamedSharding(mesh, rows_spec(mesh))


def rows_spec(mesh):
  """Returns the PartitionSpec that cuts the first axis over the devices."""
  return PartitionSpec(mesh.axis_names)


def places(mesh, batch_size):
  """Returns the places of a global batch that this host's devices have, rising: numpy [n]."""
  cuts = rows_sharded(mesh).devices_indices_map((batch_size,))
  own = [cut for device, (cut,) in cuts.items() if device.process_index == jax.process_index()]
  return np.sort(np.concatenate([np.arange(batch_size)[cut] for cut in own]))


def batch_unit(mesh, period, accumulate_steps=1):
  """Returns the rows of which a global batch must be a multiple, see `check_batch`."""
  if mesh.size * accumulate_steps == 1:
    return 1
  return mesh.size // mesh.shape.get('segment', 1) * accumulate_steps * period


def check_batch(batch_size, mesh, period, accumulate_steps=1):
  """Refuses a global batch that devices or micro-batches cannot share evenly.

  One device and one micro-batch take any size; otherwise every part must hold whole groups of
  `period` rows, which the groups of the axis 'segment' share.

  Raises:
    ValueError: names the nearest sizes that work.
  """
  if batch_size < 1:
    raise ValueError(f'data.batch_size={batch_size} must be at least 1')
  unit = batch_unit(mesh, period, accumulate_steps)
  if batch_size % unit == 0:
    return
  below = batch_size // unit * unit
  sizes = f'{below} or {below + unit}' if below else f'{unit}'
  raise ValueError(
    f'data.batch_size={batch_size} cannot be split over {mesh.size} device(s),'
    f' {accumulate_steps} micro-batch(es) of optim.accumulate_steps and groups of {period} rows;'
    f' use {sizes}'
  )


def check_hosts(mesh):
  """Refuses devices that hosts do not share evenly: each reads as many rows of a batch.

  Raises:
    ValueError: the same in all of them.
  """
  owners = [device.process_index for device in mesh.devices.flat]
  shares = [owners.count(index) for index in range(hosts.count())]
  if len(set(shares)) > 1:
    raise ValueError(
      f'a mesh of {mesh.size} devices takes {", ".join(map(str, shares))} of {len(shares)} hosts,'
      ' expected as many of each; use mesh.data=-1, which takes all there are'
    )


def compile_step(make_step, mesh, mode, state):
  """Compiles a train step over the mesh; the state is donated.

  Args:
    make_step: (axis_name or None) -> train_step(state, batch, frozen) -> (state, metrics).
    mesh: as `make` returns it.
    mode: 'jit' or 'pmap'.
    state: shapes of the state with their shardings, as `rules.abstract` gives them.

  Returns:
    train_step with the same arguments, for a state that is sharded so, a frozen tree as
    `replicated` and a batch as `parallel.batch` gives it in the same mode.
  """
  if mode == 'pmap':
    train_step = jax.pmap(
      make_step('data'), axis_name='data', in_axes=(None, 0, None), out_axes=(None, None),
      devices=list(mesh.devices.flat), donate_argnums=0,
    )
    return train_step if hosts.count() == 1 else _with_global_state(train_step, mesh)
  whole, rows = replicated(mesh), rows_sharded(mesh)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  return jax.jit(
    make_step(None),
    in_shardings=(shardings, rows, whole),
    out_shardings=(shardings, whole),
    donate_argnums=0,
  )


def _with_global_state(train_step, mesh):
  """Returns a pmapped step whose state is one array over all hosts, and not one in each of them."""
  def globally(leaf):
    """Tells what a leaf is, which is the same on every device; nothing is copied."""
    copies = [shard.data for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, replicated(mesh), copies)

  def run(*args):
    """See step.make."""
    state, metrics = train_step(*args)
    return jax.tree.map(globally, state), metrics

  return run


def compile_ahead(function, mesh, *args):
  """Compiles before anything is allocated, and refuses what the devices have no memory for.

  Args:
    function: jitted or pmapped.
    mesh: its devices.
    *args: of the function, arrays or jax.ShapeDtypeStruct.

  Returns:
    The compiled function.

  Raises:
    ValueError: says how much it needs and how much there is.
  """
  compiled = function.lower(*args).compile()
  expect_memory(compiled, mesh)
  return compiled


def needed_bytes(compiled):
  """Returns what a compiled program takes on a device; None where the compiler does not tell."""
  memory = compiled.memory_analysis()
  if memory is None:
    return None
  kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return kept + memory.temp_size_in_bytes


def expect_memory(compiled, mesh, name='a step', held='state and batch', remedy=SHRINK_STEP):
  """Refuses a compiled program that the devices of a mesh have no memory for.

  Args:
    compiled: program.
    mesh: its devices.
    name: of it, in words.
    held: what it is given and returns, in words.
    remedy: how its work can be made to need less, in words.

  Raises:
    ValueError: says how much it needs and how much there is.
  """
  needed, free = needed_bytes(compiled), _free_bytes(mesh)
  if needed is None or free is None:
    return
  work = compiled.memory_analysis().temp_size_in_bytes
  kept = needed - work
  if not hosts.all_agree(needed <= free):
    more = 'use devices with more memory'
    raise ValueError(
      f'{name} needs {needed / 1e9:.1f} GB on each device ({held} {kept / 1e9:.1f}, work'
      f' {work / 1e9:.1f}), {mesh.local_devices[0].device_kind} has {free / 1e9:.1f} GB free;'
      f' {more if kept > free else f"{remedy}, or {more}"}'
    )


def _free_bytes(mesh):
  """Returns the memory a device of this host has left, bytes; None where nobody can tell."""
  device = mesh.local_devices[0]
  stats = device.memory_stats()
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit'] - stats.get('bytes_in_use', 0)
  if device.platform != 'cpu' or not os.path.exists('/proc/meminfo'):
    return None
  with open('/proc/meminfo', encoding='ascii') as lines:
    kib = {line.split(':')[0]: int(line.split()[1]) for line in lines}
  return kib['MemAvailable'] * 1024 // len(mesh.local_devices)

"""The device mesh, and the one place where a step is compiled over it."""

import dataclasses
import os

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fmzoo.parallel import hosts

MODES = ('jit', 'pmap')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How devices are used."""

  data: int  # devices along the data axis; -1 takes all there are
  mode: str  # 'jit' (one global program) or 'pmap' (one program per device, lax.pmean)


def make(config):
  """Returns a Mesh with the axis 'data'.

  Raises:
    ValueError: if the mode is unknown or there are not enough devices.
  """
  if config.mode not in MODES:
    raise ValueError(f"mesh.mode='{config.mode}' is unknown; use one of {', '.join(MODES)}")
  devices = jax.devices()
  size = len(devices) if config.data == -1 else config.data
  if not 1 <= size <= len(devices):
    raise ValueError(
      f'mesh.data={config.data} devices asked for, {len(devices)} found; use -1 or at most'
      f' {len(devices)}'
    )
  return Mesh(np.array(devices[:size]), ('data',))


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
      f'mesh.data={mesh.size} leaves no device for host {jax.process_index()} of'
      f' {jax.process_count()}; use -1'
    )
  return Mesh(np.array(devices), ('data',))


def on_own_devices(mesh, tree):
  """Returns a tree that is replicated over more devices as one over a part of them, not copied.

  Args:
    mesh: of this host's devices, each of which has a copy.
    tree: of arrays.
  """
  def share(leaf):
    copies = {shard.device: shard.data for shard in leaf.addressable_shards}
    return jax.make_array_from_single_device_arrays(
      leaf.shape, replicated(mesh), [copies[device] for device in mesh.devices.flat]
    )

  return jax.tree.map(share, tree)


def replicated(mesh):
  """Returns the sharding that keeps a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def rows_sharded(mesh):
  """Returns the sharding that cuts the first axis over the devices."""
  return NamedSharding(mesh, PartitionSpec('data'))


def check_batch(batch_size, mesh, period, accumulate_steps=1):
  """Refuses a global batch that devices or micro-batches cannot share evenly.

  One device and one micro-batch take any size; otherwise every part must hold whole groups of
  `period` rows.

  Raises:
    ValueError: names the nearest sizes that work.
  """
  parts = mesh.size * accumulate_steps
  if batch_size < 1:
    raise ValueError(f'data.batch_size={batch_size} must be at least 1')
  if parts == 1 or batch_size % (parts * period) == 0:
    return
  unit = parts * period
  below = batch_size // unit * unit
  sizes = f'{below} or {below + unit}' if below else f'{unit}'
  raise ValueError(
    f'data.batch_size={batch_size} cannot be split over {mesh.size} device(s) of mesh.data,'
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
      f'mesh.data={mesh.size} takes {", ".join(map(str, shares))} devices of {len(shares)} hosts,'
      ' expected as many of each; use -1, which takes all there are'
    )


def compile_step(make_step, mesh, mode):
  """Compiles a train step over the mesh; the state is donated.

  Args:
    make_step: (axis_name or None) -> train_step(state, batch, frozen) -> (state, metrics).
    mesh: as `make` returns it.
    mode: 'jit' or 'pmap'.

  Returns:
    train_step with the same arguments, for a state and frozen tree as `replicated` and a batch as
    `parallel.batch` gives it in the same mode.
  """
  if mode == 'pmap':
    train_step = jax.pmap(
      make_step('data'), axis_name='data', in_axes=(None, 0, None), out_axes=(None, None),
      devices=list(mesh.devices), donate_argnums=0,
    )
    return train_step if hosts.count() == 1 else _with_global_state(train_step, mesh)
  whole, rows = replicated(mesh), rows_sharded(mesh)
  return jax.jit(
    make_step(None),
    in_shardings=(whole, rows, whole),
    out_shardings=(whole, whole),
    donate_argnums=0,
  )


def _with_global_state(train_step, mesh):
  """Returns a pmapped step whose state is one array over all hosts, and not one in each of them."""
  def globally(leaf):
    """Tells what a leaf is, which is the same on every device; nothing is copied."""
    copies = [shard.data for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, replicated(mesh), copies)

  def run(*args):
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
  needed, free = compiled.memory_analysis(), _free_bytes(mesh)
  if needed is None or free is None:
    return compiled
  kept = needed.argument_size_in_bytes + needed.output_size_in_bytes - needed.alias_size_in_bytes
  work = needed.temp_size_in_bytes
  if not hosts.all_agree(kept + work <= free):
    remedy = (
      'use devices with more memory' if kept > free else
      'lower data.batch_size, raise optim.accumulate_steps or, where the model has it, set'
      ' model.remat=True, which shrink the work, or use devices with more memory'
    )
    raise ValueError(
      f'a step needs {(kept + work) / 1e9:.1f} GB on each device (state and batch {kept / 1e9:.1f},'
      f' work {work / 1e9:.1f}), {mesh.local_devices[0].device_kind} has {free / 1e9:.1f} GB free;'
      f' {remedy}'
    )
  return compiled


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

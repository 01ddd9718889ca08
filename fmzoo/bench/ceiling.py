"""How many products of a kind the devices at hand do in a second, measured: what MFU is a share of.

Square matrices are multiplied one after the other inside one program, so that neither dispatch nor
memory counts, and by a matrix that is an argument, so that nothing can be computed beforehand.
"""

import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, PartitionSpec

from fmzoo.parallel import mesh as meshes

SIZES = {'cpu': (1024, 2048), 'accelerator': (4096, 8192)}  # sides of the matrices
FLOPS = {'cpu': 4e10, 'accelerator': 2e13}  # of a run on one device, about
RUNS = 5


class Rate(NamedTuple):
  """What was reached for one kind of product."""

  dtype: str  # of the operands
  precision: str  # 'default', 'high', 'highest', or the name of an algorithm
  size: int  # side of the matrices with which it was reached
  devices: int  # that worked at once, each on its own matrices
  flops_per_second: float  # of all of them together


def rates(kinds, mesh):
  """Returns {kind: Rate} on the devices of a mesh.

  Args:
    kinds: (dtype, precision) as `cost.products` names them.
    mesh: whose devices work, all at once.
  """
  return {kind: rate(kind, tuple(mesh.devices.flat)) for kind in sorted(kinds)}


@functools.cache
def rate(kind, devices):
  """Returns the best Rate over sizes and runs, measured once for a kind and these devices."""
  logging.info('measuring what %s products at precision %s reach here', *kind)
  place = 'cpu' if devices[0].platform == 'cpu' else 'accelerator'
  found = [_rate(kind, devices, size, FLOPS[place]) for size in SIZES[place]]
  return max(found, key=lambda rate: rate.flops_per_second)


def _rate(kind, devices, size, flops):
  """Returns the best Rate of one size."""
  (dtype, precision), mesh = kind, Mesh(np.array(devices), ('data',))
  length = max(2, round(flops / (2 * size**3)))
  rows, whole = meshes.rows_spec(mesh), PartitionSpec()

  def chain(x, factor):
    """Multiplies [1, size, size] of one device `length` times."""
    def multiply(x, _):
      """One product."""
      return jnp.matmul(x, factor, precision=precision), None

    return jax.lax.scan(multiply, x, length=length)[0]

  run = jax.jit(jax.shard_map(chain, mesh=mesh, in_specs=(rows, whole), out_specs=rows))
  make = jax.jit(
    lambda: (
      jax.random.normal(jax.random.key(0), (mesh.size, size, size), dtype),
      jax.random.normal(jax.random.key(1), (size, size), dtype) / size**0.5,  # keeps numbers finite
    ),
    out_shardings=(meshes.rows_sharded(mesh), meshes.replicated(mesh)),
  )
  args, seconds = make(), []
  jax.block_until_ready(run(*args))
  for _ in range(RUNS):
    begun = time.perf_counter()
    jax.block_until_ready(run(*args))
    seconds.append(time.perf_counter() - begun)
  return Rate(
    dtype, precision, size, mesh.size, 2 * size**3 * length * mesh.size / min(seconds)
  )


def least_seconds(flops, rates):
  """Returns how long products take at the ceiling.

  Args:
    flops: {kind: FLOPs} over all devices.
    rates: {kind: Rate} of these devices.
  """
  return sum(count / rates[kind].flops_per_second for kind, count in flops.items())

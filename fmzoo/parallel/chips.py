"""TPU chips: their figures, their slices as devices to compile for, and what a refusal tells."""

import math
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

_GIB = 2**30
_LOCKED = 'multi-process lockfile'
_SIZE = r'([\d.]+)([BKMGT]?)'
_USED = re.compile(rf'Used {_SIZE} of {_SIZE} hbm(?:\. Exceeded hbm capacity by {_SIZE})?')
_REQUIRED = re.compile(rf'\({_SIZE}\) exceeds available HBM \({_SIZE}\)')


class Chip(NamedTuple):
  """A generation of TPU; every chip is one device of jax, however many cores it has."""

  hbm_bytes: int  # by the vendor's page, whose GB are GiB
  usable_bytes: int  # for a program: what the compiler of libtpu 0.0.42 compares with
  flops: float  # bfloat16 FLOP/s at most, by the vendor's page
  cores: int  # TensorCores that a device drives
  max_chips: int  # of the largest slice that can be had
  shapes: tuple  # of slices, some that can be had
  source: str  # the vendor's page


_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '8x8x8')
CHIPS = {
  'v4': Chip(
    32 * _GIB, int(30.75 * _GIB), 275e12, 2, 4096, _CUBES, 'https://cloud.google.com/tpu/docs/v4'
  ),
  'v5e': Chip(
    16 * _GIB, int(15.75 * _GIB), 197e12, 1, 256, _FLAT, 'https://cloud.google.com/tpu/docs/v5e'
  ),
  'v5p': Chip(
    95 * _GIB, int(95.74 * _GIB), 459e12, 2, 6144, _CUBES, 'https://cloud.google.com/tpu/docs/v5p'
  ),
  'v6e': Chip(
    32 * _GIB, int(31.25 * _GIB), 918e12, 1, 256, _FLAT, 'https://cloud.google.com/tpu/docs/v6e'
  ),
}


def topology(name):
  """Returns the devices of a TPU slice that nobody has to own, or simulated devices.

  Programs are compiled for the devices of a slice by the real compiler, they cannot run. One
  process of a machine may load libtpu at a time, unless ALLOW_MULTIPLE_LIBTPU_LOAD=1.

  Args:
    name: generation and shape of a slice, as in 'v5e:2x4' or 'v4:2x2x1', or 'cpu:8' for simulated
      devices of this process, which has to ask for them before jax starts:
      `jax.config.update('jax_num_cpu_devices', 8)`, or JAX_NUM_CPU_DEVICES=8 in its environment.

  Returns:
    List of devices in the order of their processes and ids.

  Raises:
    ValueError: if there is no such slice, libtpu is missing or in use, or if jax has started with
      fewer simulated devices.
  """
  kind, _, shape = name.partition(':')
  if kind == 'cpu':
    devices = _simulated(name, shape)
  elif kind in CHIPS:
    devices = _slice(name, CHIPS[kind], shape)
  else:
    raise ValueError(
      f"topology '{name}' is of an unknown generation '{kind}'; use one of {', '.join(CHIPS)} or"
      ' cpu, as in v5e:2x4 or cpu:8'
    )
  return sorted(devices, key=lambda device: (device.process_index, device.id))


def _simulated(name, count):
  """Returns the first devices of the CPU."""
  if not re.fullmatch(r'[1-9]\d*', count):
    raise ValueError(f"topology '{name}' has no number of devices; write it as in cpu:8")
  devices = jax.devices('cpu')
  if len(devices) < int(count):
    raise ValueError(
      f"topology '{name}' needs {count} simulated devices, jax has started with {len(devices)};"
      f" call jax.config.update('jax_num_cpu_devices', {count}) before anything else of jax, or set"
      f' JAX_NUM_CPU_DEVICES={count} in the environment'
    )
  return devices[: int(count)]


def _slice(name, chip, shape):
  """Returns the devices of a slice of chips."""
  axes = chip.shapes[0].count('x') + 1
  some = f"use one such as {', '.join(chip.shapes)}"
  if not re.fullmatch('x'.join([r'[1-9]\d*'] * axes), shape):
    raise ValueError(f"topology '{name}' has no shape of {axes} sizes after the colon; {some}")
  count = math.prod(int(size) for size in shape.split('x'))
  if count > chip.max_chips:
    raise ValueError(
      f"topology '{name}' has {count} chips, at most {chip.max_chips} make a slice; {some}"
    )
  options = {'chips_per_host_bounds': (1, 1, 1)} if count == 1 else {}
  if name.startswith('v4:'):
    # Without it the two cores of a chip are two devices, which they are on no machine with v4.
    options['chip_config_name'] = 'megacore'
  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices
  except RuntimeError as error:
    raise ValueError(_why_not(name, some, str(error))) from error


def _why_not(name, some, problem):
  """Returns the line for what jax or libtpu said instead of a slice."""
  if 'TPU support not installed' in problem:
    return (
      f"topology '{name}' needs libtpu, which is not installed; pip install 'fmzoo[tpu]', or use"
      ' simulated devices, which do not need it, as in cpu:8'
    )
  if _LOCKED in problem:
    return (
      f"topology '{name}' needs libtpu, which another process of this machine has loaded (or a"
      ' dead one has left /tmp/libtpu_lockfile); wait for it, or set ALLOW_MULTIPLE_LIBTPU_LOAD=1'
      ' if none of them uses a TPU'
    )
  return f"topology '{name}' is refused by libtpu ({problem.splitlines()[0]}); {some}"


def needed_bytes(error):
  """Reads how much memory a program needs from the TPU compiler's refusal.

  The compiler rounds to three or four figures.

  Args:
    error: what `lower(...).compile()` raised, or its text.

  Returns:
    (needed, available), ints, bytes of a device's HBM; None if that was not what went wrong.
  """
  text = str(error)
  used, required = _USED.search(text), _REQUIRED.search(text)
  if used:
    available = _num_bytes(*used.group(3, 4))
    beyond = used.group(5, 6)
    needed = available + _num_bytes(*beyond) if beyond[0] else _num_bytes(*used.group(1, 2))
    return needed, available
  if required:
    return _num_bytes(*required.group(1, 2)), _num_bytes(*required.group(3, 4))
  return None


def _num_bytes(number, unit):
  """Returns the bytes of a number with a unit of the compiler's, powers of 1,024."""
  return round(float(number) * 1024 ** 'BKMGT'.index(unit or 'B'))

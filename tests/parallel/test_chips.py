"""Slices are named as the compiler knows them, and its refusals are read and said in one line."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from jax.experimental import topologies

from fmzoo.parallel import chips

GIB = 2**30
# What the compiler says of a program whose arrays alone are too large, and of one that fails to fit
# in the end.
TOO_LARGE = (
  'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries'
  ' (16.50G) exceeds available HBM (15.75G).'
)
DOES_NOT_FIT = """RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. \
Ran out of memory in memory space hbm. Used 15.75G of 15.75G hbm. Exceeded hbm capacity by 405.5K.

Total hbm usage >= 14.69G:
    reserved        258.00M
    program          13.11G
    arguments         1.33G
"""


def test_cpu_devices_are_simulated_ones_of_this_process():
  assert chips.topology('cpu:8') == jax.devices('cpu')[:8]
  assert chips.topology('cpu:1') == jax.devices('cpu')[:1]


def test_more_simulated_devices_than_jax_started_with_are_refused():
  with pytest.raises(ValueError) as refused:
    chips.topology('cpu:9')
  assert str(refused.value) == (
    "topology 'cpu:9' needs 9 simulated devices, jax has started with 8; call"
    " jax.config.update('jax_num_cpu_devices', 9) before anything else of jax, or set"
    ' JAX_NUM_CPU_DEVICES=9 in the environment'
  )


@pytest.mark.parametrize('name,message', [
  ('', "topology '' is of an unknown generation ''; use one of v4, v5e, v5p, v6e or cpu"),
  ('v9:2x2', "of an unknown generation 'v9'; use one of v4, v5e, v5p, v6e or cpu, as in v5e:2x4"),
  ('cpu', "topology 'cpu' has no number of devices; write it as in cpu:8"),
  ('cpu:2x2', "topology 'cpu:2x2' has no number of devices"),
  ('v5e', "topology 'v5e' has no shape of 2 sizes after the colon; use one such as 1x1, 2x2"),
  ('v5e:8', "topology 'v5e:8' has no shape of 2 sizes"),
  ('v5e:0x4', "topology 'v5e:0x4' has no shape of 2 sizes"),
  ('v6e:2x2x1', "topology 'v6e:2x2x1' has no shape of 2 sizes"),
  ('v4:2x2', "topology 'v4:2x2' has no shape of 3 sizes after the colon; use one such as 2x2x1"),
  ('v5e:32x32', "topology 'v5e:32x32' has 1024 chips, at most 256 make a slice; use one such as"),
])
def test_what_is_no_slice_is_refused(name, message):
  with pytest.raises(ValueError) as refused:
    chips.topology(name)
  assert message in str(refused.value) and '\n' not in str(refused.value)


@pytest.mark.parametrize('said,message', [
  ('JAX TPU support not installed; cannot generate TPU topology.',
   "topology 'v5e:2x4' needs libtpu, which is not installed; pip install 'fmzoo[tpu]', or use"
   ' simulated devices, which do not need it, as in cpu:8'),
  ('ABORTED: Internal error when accessing libtpu multi-process lockfile. Run "$ sudo rm ..".',
   "topology 'v5e:2x4' needs libtpu, which another process of this machine has loaded"),
  ('INVALID_ARGUMENT: Topology layout "v5e:2x4" is not divisible\nby more',
   'is refused by libtpu (INVALID_ARGUMENT: Topology layout "v5e:2x4" is not divisible); use one'),
])
def test_what_libtpu_refuses_is_said_in_one_line(said, message, monkeypatch):
  def refuse(**_):
    raise RuntimeError(said)

  monkeypatch.setattr(topologies, 'get_topology_desc', refuse)
  with pytest.raises(ValueError) as refused:
    chips.topology('v5e:2x4')
  assert message in str(refused.value) and '\n' not in str(refused.value)


@pytest.mark.parametrize('text,expected', [
  (TOO_LARGE, (16.5 * GIB, 15.75 * GIB)),
  (DOES_NOT_FIT, (15.75 * GIB + 405.5 * 1024, 15.75 * GIB)),
  ('Ran out of memory in memory space hbm. Used 19.90G of 15.75G hbm.', (19.9 * GIB, 15.75 * GIB)),
])
def test_a_refusal_tells_what_is_needed_and_what_there_is(text, expected):
  assert chips.needed_bytes(RuntimeError(text)) == tuple(round(number) for number in expected)


@pytest.mark.parametrize('text', [
  'INVALID_ARGUMENT: something else (16.50G)',
  'Ran out of memory in memory space vmem. Used 20.00M of 16.00M vmem.',
])
def test_another_refusal_tells_nothing_of_memory(text):
  assert chips.needed_bytes(text) is None


LIBTPU = """
import json
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from fmzoo.parallel import chips

def told(name):
  devices = chips.topology(name)
  assert devices == sorted(devices, key=lambda each: (each.process_index, each.id))
  kept = NamedSharding(Mesh(np.array(devices), ('data',)), P())
  x = jax.ShapeDtypeStruct((2**18, 2**18), 'float32', sharding=kept)
  try:
    jax.jit(lambda x: x * 2).lower(x).compile()
  except jax.errors.JaxRuntimeError as error:
    return len(devices), devices[0].num_cores, chips.needed_bytes(error)

slices = ('v4:2x2x1', 'v5e:2x4', 'v5e:1x1', 'v5p:2x2x1', 'v6e:2x2')
found = {name: told(name) for name in slices}
try:
  chips.topology('v5e:3x5')
except ValueError as error:
  found['v5e:3x5'] = str(error)
print(json.dumps(found))
"""


def test_the_table_agrees_with_the_compiler():
  """Devices of each slice, cores of each, and the memory that a program of 512 GiB exceeds."""
  pytest.importorskip('libtpu')
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '0',
  }
  ran = subprocess.run(
    [sys.executable, '-c', LIBTPU], capture_output=True, text=True, timeout=120, env=environment,
    cwd=pathlib.Path(chips.__file__).parents[2],
  )
  assert ran.returncode == 0, ran.stderr[-2000:]
  found = json.loads(ran.stdout)
  assert "topology 'v5e:3x5' is refused by libtpu" in found.pop('v5e:3x5')
  counts = {'v4:2x2x1': 4, 'v5e:2x4': 8, 'v5e:1x1': 1, 'v5p:2x2x1': 4, 'v6e:2x2': 4}
  assert {name: devices for name, (devices, _, _) in found.items()} == counts
  for name, (_, cores, (needed, available)) in found.items():
    chip = chips.CHIPS[name.partition(':')[0]]
    assert cores == chip.cores
    assert abs(available - chip.usable_bytes) <= 0.005 * GIB
    assert 512 * GIB <= needed < 520 * GIB


@pytest.mark.parametrize('name', chips.CHIPS)
def test_figures_are_of_the_order_that_the_compiler_allows(name):
  """A tenth of the memory at most is kept from programs; the vendor rounds v5p's down."""
  chip = chips.CHIPS[name]
  assert 0.9 < chip.usable_bytes / chip.hbm_bytes < 1.01
  assert 1e14 < chip.flops < 1e15
  assert chip.source.endswith(name)

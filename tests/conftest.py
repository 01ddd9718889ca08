"""What every test runs under: eight simulated devices, strict ranks, one golden folder."""

import functools
import gc
import importlib.metadata
import os
import pathlib

os.environ['JAX_PLATFORMS'] = 'cpu'
# XLA compiles a train step in half the time where it does not fuse by way of MLIR. It stops at a
# flag that it does not know, so others than the release this was tried with go without.
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  flags = (
    os.environ.get('XLA_FLAGS', ''), '--xla_cpu_use_fusion_emitters=false',
    '--xla_cpu_parallel_codegen_split_count=1',  # threads that share a program repeat work
  )
  os.environ['XLA_FLAGS'] = ' '.join(filter(None, flags))

import jax
import pytest

from fmzoo.data import cifar10
from tests import soflow_golden_config, soflow_golden_writer, tiny

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Most of a test's time is compilation, which optimises little here, and many tests compile the same
# programs. Processes that tests start do the same, but where they compile for TPUs.
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
jax.config.update('jax_disable_most_optimizations', True)
gc.set_threshold(100_000, 50, 50)  # tracing makes many objects, few of them in cycles
CACHE = pathlib.Path(__file__).parent.parent / '.jax_cache'
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(CACHE)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'
jax.config.update('jax_compilation_cache_dir', str(CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


LONGEST = (  # files
  'test_step', 'test_notebook', 'test_plan', 'test_failures', 'test_resume', 'test_bfm_golden',
  'test_main', 'test_sample', 'test_killed', 'test_hosts_training', 'test_blockwise',
  'test_prepare', 'test_precision', 'test_sources', 'test_train',
)


def pytest_collection_modifyitems(items):
  """Puts the files that take longest first, lest a worker begins one when the others are done."""
  order = {name: place for place, name in enumerate(LONGEST)}
  items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


def pytest_addoption(parser):
  parser.addoption(
    '--golden-root',
    default=str(pathlib.Path(__file__).parent / 'golden'),
    help='folder that holds bfm/, soflow/, ... with recorded arrays',
  )


@pytest.fixture
def optimised():
  """Compiles as ever, for a test that runs longer than it compiles."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture(scope='session')
def golden_root(request):
  """The folder of recorded arrays, tests/golden unless --golden-root says otherwise."""
  return pathlib.Path(request.config.getoption('--golden-root'))


@pytest.fixture(scope='session')
def written_root(tmp_path_factory):
  """A folder like `golden_root` of other configurations, written by the float64 references."""
  folder = tmp_path_factory.mktemp('written')
  config = soflow_golden_config.SECOND_CONFIG
  soflow_golden_writer.write_folder(folder / 'soflow', config, seed=0)
  return folder


@pytest.fixture
def cifar10_data(tmp_path, monkeypatch):
  """Has data.name='cifar10' find twenty random pictures, where there are fifty thousand."""
  tiny.write_cifar10(tmp_path / 'data' / 'cifar10', rows=20)
  monkeypatch.setenv('FMZOO_DATA_DIR', str(tmp_path / 'data'))
  monkeypatch.setattr(
    cifar10, 'Cifar10Source', functools.partial(cifar10.Cifar10Source, rows=20)
  )

"""Inception against numbers recorded from official code (tests/golden/encoders/README.md)."""

import pathlib
import re

import flax.linen as nn
import jax
import numpy as np
import pytest

from fmzoo.convert import inception as convert
from fmzoo.models import inception
from tests import golden_files as files
from tests import golden_weights
from tests import inception_reference as reference

NETWORK, SPATIAL = 5e-5, 1e-4  # limits of the README there, in units of the rms
RESIZED = {'tf1': 1e-6, 'ptfid': 1e-4}
STAGES = (299, 'tf1')  # the run of the recorded stages
RUN = re.compile(r'(\d+)/(\w+)/\w+')
WRITTEN = 'written'
OFFICIAL = pathlib.Path(__file__).parent.parent / 'golden' / 'encoders' / 'inception_keys.csv'
NUMBERS, FOLDED = 23_885_392, 23_833_744  # with batch norms, and without
TENSORS, UNITS = 472, 94


def pytest_generate_tests(metafunc):
  """Runs the tests on every Inception of the folder's config.json, and on the reference's."""
  if 'golden' in metafunc.fixturenames:
    names = [name for name in files.networks(metafunc, 'inception') if name != reference.RESIZED]
    metafunc.parametrize('golden', [*names, WRITTEN], indirect=True, scope='module')


class Golden:
  """The arrays of a configuration, and the network with its synthetic weights."""

  def __init__(self, folder, name):
    config = files.config(folder)
    settings, self.salt = config[name], config['salt']
    assert settings['bn_eps'] == convert.NORM_EPS
    self.arrays = files.Arrays(folder / name)
    self.table = golden_weights.table(folder / settings['keys'])
    units = [key.removesuffix('.conv.weight') for key in self.table if key.endswith('conv.weight')]
    self.config = inception.Config(
      widths={unit: self.table[f'{unit}.conv.weight'][0] for unit in units},
      classes=settings['classes'], precision='highest',
    )
    tensors = golden_weights.tensors(folder / settings['keys'], self.salt)
    self.params = jax.device_put(convert.from_official(tensors, self.config))
    self.net = inception.make(self.config)
    self._run, self._found = jax.jit(self._traced), {}

  def _traced(self, params, images):
    """Returns features, and {stage: mean over pixels, first channels of the corner}."""
    stages = {}

    def keep(call, args, kwargs, context):
      """Keeps what a module gives."""
      value = call(*args, **kwargs)
      if isinstance(value, jax.Array) and value.ndim == 4:
        stages['.'.join(context.module.path)] = value.mean((1, 2)), value[:, 0, 0, :8]
      return value

    with nn.intercept_methods(keep):
      return self.net.features(params, images), stages

  def run(self, size, method):
    """Returns (features, stages) of recorded images, which are computed once."""
    if (size, method) not in self._found:
      images = made(self.arrays[f'image{size}_u8'], method)
      self._found[size, method] = self._run(self.params, images)
    return self._found[size, method]


made = jax.jit(inception.inputs, static_argnums=1)


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """A folder of another configuration, written by the float64 reference."""
  folder = tmp_path_factory.mktemp('written') / 'encoders'
  reference.write_folder(folder)
  return folder


@pytest.fixture(scope='module')
def golden(golden_root, written, request):
  is_written = request.param == WRITTEN
  folder, name = (written, reference.NAME) if is_written else (
    golden_root / 'encoders', request.param
  )
  return Golden(folder, name)


def close(golden, name, actual, limit=NETWORK):
  """Compares with an array of the folder, in units of its rms."""
  return files.close_by_rms(actual, golden.arrays[name], limit, name)


def test_outputs(golden):
  """Features, logits with bias and without, and what softmax makes of them, of every run."""
  runs = {RUN.fullmatch(name).groups() for name in golden.arrays.names() if RUN.fullmatch(name)}
  assert len(runs) > 1
  net, params = golden.net, golden.params
  for size, method in sorted(runs):
    features, _ = golden.run(int(size), method)
    assert features.pool.dtype == features.spatial.dtype == np.float32
    logits = net.logits(params, features.pool)
    found = {
      'pool3': features.pool, 'spatial': features.spatial, 'logits': logits,
      'logits_nobias': net.logits_without_bias(params, features.pool),
    }
    found |= {
      name.replace('logits', 'probs'): jax.nn.softmax(value)
      for name, value in found.items() if name.startswith('logits')
    }
    for name in golden.arrays.names(f'{size}/{method}/'):
      output = name.rpartition('/')[2]
      close(golden, name, found[output], SPATIAL if output == 'spatial' else NETWORK)


def test_stages(golden):
  """What units of the stem and blocks give: means over pixels, and the corner."""
  _, stages = golden.run(*STAGES)
  named = golden.arrays.names('stage/')
  assert named
  for name in named:
    _, module, part = name.split('/')
    mean, corner = stages[module]
    close(golden, name, {'mean': mean, 'corner': corner}[part])


@pytest.mark.parametrize('source', ['golden_root', WRITTEN])
def test_resized_images(golden_root, written, source):
  """Every method and size that is recorded, before values are moved to [-1, 1]."""
  folder = written if source == WRITTEN else golden_root / 'encoders'
  arrays, images = files.Arrays(folder / reference.RESIZED), {}
  networks = [name for name in files.config(folder) if name.startswith('inception')]
  for name in {*networks, reference.RESIZED}:
    found = files.Arrays(folder / name)
    images |= {image: found[image] for image in found.names('image')}
  methods = set()
  for name in arrays.names():
    if '/' in name:
      method, size = name.split('/')
      found = np.asarray(made(images[f'image{size}_u8'], method), np.float64)[:, arrays['rows']]
      found = 128 * found + 128 if method == 'tf1' else (found + 1) / 2
      files.close_by_rms(found, arrays[name], RESIZED[method], name)
      methods.add(method)
  assert methods == set(inception.INPUTS)
  assert all(re.fullmatch(r'image\d+_u8', name) for name in arrays.unused())


def test_official_names_and_shapes(golden):
  """Counters of training are the only tensors that we do not know."""
  params = jax.eval_shape(golden.net.init, jax.random.key(0))
  assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
    lambda leaf: (leaf.shape, leaf.dtype), golden.params
  )
  known = {entry.official for entry in convert.entries(golden.config)}
  assert len(known) == TENSORS and known <= golden.table.keys()
  others = golden.table.keys() - known
  assert all(key.endswith(f'.{convert.COUNTER}') for key in others)


def test_golden_parameters_of_the_official_network():
  """Counted in shapes of our tree, and tensor by tensor of the official table."""
  params = jax.eval_shape(inception.make(inception.OFFICIAL).init, jax.random.key(0))
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == FOLDED
  table = golden_weights.table(OFFICIAL)
  counters = {key: table.pop(key) for key in list(table) if key.endswith(convert.COUNTER)}
  assert set(counters.values()) == {()} and (len(counters), len(table)) == (UNITS, TENSORS)
  assert sum(np.prod(shape, dtype=int) for shape in table.values()) == NUMBERS
  widths = {unit: table[f'{unit}.bn.weight'][0] for unit in inception.WIDTHS}
  assert widths == inception.WIDTHS and table['fc.bias'] == (inception.CLASSES,)


def test_every_array_is_an_input_or_was_checked(golden):
  """Runs after the tests above in this file, which mark what they look at."""
  assert all(re.fullmatch(r'image\d+_u8', name) for name in golden.arrays.unused())

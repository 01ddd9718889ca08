"""Images depend on seed, index and label alone; labels and file names are what was asked for."""

import jax
import numpy as np
import pytest

from fmzoo import sample
from fmzoo import sampler as samplers
from fmzoo.parallel import mesh as meshes
from tests import tiny


def test_an_image_depends_on_its_index_and_not_on_the_batch(tmp_path):
  recipe = tiny.recipe('fm')
  params = tiny.warm(tiny.init(recipe))
  images = []
  for devices, size in ((1, 7), (8, 16), (1, 30)):
    mesh = meshes.make(meshes.Config(data=devices, mode='jit'))
    part = tiny.recipe('fm', sample__batch_size=size)
    images.append(samplers.Sampler(part, mesh)(params, np.arange(30, dtype=np.int32) % 10, 3))
  np.testing.assert_allclose(images[1], images[0], rtol=0, atol=1e-5)
  np.testing.assert_allclose(images[2], images[0], rtol=0, atol=1e-5)
  assert np.abs(images[0][0] - images[0][10]).max() > 0.1


def test_long_descriptions_stay_distinct_and_short():
  names = []
  for last in '1', '2':
    names.append(sample.describe(tiny.recipe('fm'), labels='0,' * 200 + last))
  assert names[0] != names[1] and max(map(len, names)) == sample.NAME


@pytest.mark.parametrize('labels,expected', [
  ('balanced', [0, 1, 2, 0, 1]), ('2,0', [2, 0, 2, 0, 2]), ('1', [1] * 5),
])
def test_labels(labels, expected):
  assert list(sample.choose_labels(labels, 5, 3, 0)) == expected


def test_random_labels_come_from_the_seed():
  first, again, other = (sample.choose_labels('random', 1000, 10, seed) for seed in (0, 0, 1))
  assert (first == again).all() and (first != other).any()
  assert set(first) == set(range(10))


def test_guided_sampling_is_shared_by_the_devices():
  """Each of four devices does a quarter of the work, the layers of conditions aside."""
  def flops(devices):
    recipe = tiny.recipe(
      'bfm_frn', mesh__data=devices, sample__guidance=3.0, run__init_from='elsewhere'
    )
    mesh = meshes.make(recipe.mesh)
    params = sample.abstract_params(recipe, mesh)
    labels = jax.ShapeDtypeStruct((16,), 'int32')
    compiled = samplers.Sampler(recipe, mesh).run.lower(params, 0, labels, labels).compile()
    return compiled.cost_analysis()['flops']

  assert flops(4) < 0.35 * flops(1)

"""What Inception takes and gives, its pools and resizing; numbers are in test_inception_golden."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmzoo.models import inception
from tests import inception_reference as reference
from tests import programs, tiny

NET = inception.make(tiny.INCEPTION)
IMAGES = jax.ShapeDtypeStruct((2, 299, 299, 3), 'float32')
ONE_ULP = 1e-6  # of values up to 255 that become [-1, 1], and some


@pytest.fixture(scope='module')
def params():
  return tiny.random_inception()


def pixels(*shape, seed=0):
  """Returns random uint8 images."""
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def values(*shape, seed=0):
  """Returns random float32 numbers of both signs."""
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def with_widths(widths):
  """Returns the tiny network with other widths."""
  return inception.make(dataclasses.replace(tiny.INCEPTION, widths=widths))


def without(name):
  """Returns widths that lack a unit."""
  return {unit: width for unit, width in tiny.INCEPTION.widths.items() if unit != name}


def test_average_pool_counts_the_pixels_inside_only():
  """Four at corners, six at borders, nine elsewhere."""
  x = values(1, 4, 5, 2)
  got = np.asarray(inception.average_pool(x))
  for row, column, near in ((0, 0, x[0, :2, :2]), (0, 2, x[0, :2, 1:4]), (3, 4, x[0, 2:, 3:]),
                            (1, 0, x[0, :3, :2]), (2, 3, x[0, 1:, 2:])):
    np.testing.assert_allclose(got[0, row, column], near.mean((0, 1)), rtol=1e-6, atol=1e-6)
  assert got.shape == x.shape


def test_largest_pixels_are_those_inside():
  """Beyond the border is nothing, not zero."""
  x = -1 - np.abs(values(1, 5, 5, 2))
  around, halved = (np.asarray(pool(x)) for pool in (inception.largest_around, inception.halve))
  np.testing.assert_array_equal(around[0, 0, 0], x[0, :2, :2].max((0, 1)))
  np.testing.assert_array_equal(around[0, 4, 2], x[0, 3:, 1:4].max((0, 1)))
  np.testing.assert_array_equal(halved[0, 1, 0], x[0, 2:, :3].max((0, 1)))
  assert halved.shape == (1, 2, 2, 2)


@pytest.mark.parametrize('name,pool', [
  ('Mixed_5b', inception.average_pool), ('Mixed_6e', inception.average_pool),
  ('Mixed_7b', inception.average_pool), ('Mixed_7c', inception.largest_around),
])
def test_the_last_block_alone_takes_the_largest_pixels(name, pool):
  """Seen through a pool branch whose convolution changes nothing; it comes last."""
  x = np.abs(values(1, 8, 8, 6))
  config = dataclasses.replace(
    tiny.INCEPTION, widths={**tiny.INCEPTION.widths, f'{name}.branch_pool': 6}
  )
  block = inception.Block(config, name=name)
  shapes = jax.eval_shape(block.init, jax.random.key(0), x)['params']
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
  params['branch_pool']['kernel'] = np.eye(6, dtype=np.float32)[None, None]
  got = jax.jit(block.apply)({'params': params}, x)
  np.testing.assert_allclose(got[..., -6:], pool(x), rtol=1e-6)
  assert not np.any(got[..., :-6])


def test_features_are_those_of_their_blocks(params):
  """Mean of the last block; seven channels of a branch of the sixth, by row, column, channel."""
  seen = {}

  def keep(call, args, kwargs, context):
    """Keeps what a module gives."""
    seen['.'.join(context.module.path)] = value = call(*args, **kwargs)
    return value

  def run(params, images):
    with nn.intercept_methods(keep):
      features = NET.features(params, images)
    return features, seen['Mixed_6d.branch1x1'], seen['Mixed_7c']

  images = inception.inputs(pixels(1, 299, 299, 3), 'tf1')
  (pool, spatial), branch, last = jax.tree.map(np.asarray, jax.jit(run)(params, images))
  np.testing.assert_allclose(pool, last.mean((1, 2)), rtol=1e-5, atol=1e-6)
  assert spatial.shape == (1, 2023) and branch.shape[:3] == (1, 17, 17)
  for y, x, c in ((0, 0, 3), (0, 4, 6), (5, 0, 0), (16, 13, 2)):
    assert spatial[0, (17 * y + x) * 7 + c] == branch[0, y, x, c]
  assert len(np.unique(spatial)) > 500


def test_a_narrow_branch_gives_fewer_spatial_features():
  net = with_widths({**tiny.INCEPTION.widths, 'Mixed_6d.branch1x1': 3})
  shapes = jax.eval_shape(net.init, jax.random.key(0))
  assert jax.eval_shape(net.features, shapes, IMAGES).spatial.shape == (2, 17 * 17 * 3)


def test_logits_with_and_without_bias(params):
  """Both are linear in the features; they differ by the bias of each class."""
  width = params['fc']['kernel'].shape[0]
  pool, bias = values(3, width), params['fc']['bias']
  plain = NET.logits_without_bias(params, pool)
  np.testing.assert_allclose(plain, pool @ params['fc']['kernel'], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(NET.logits(params, pool) - plain, [bias] * 3, atol=1e-6)
  assert np.abs(bias).min() > 0


@pytest.mark.parametrize('precision', ['highest', 'default'])
def test_products_are_of_the_precision_asked_for(params, precision):
  """A convolution a unit, and the layer of the classes."""
  net = inception.make(dataclasses.replace(tiny.INCEPTION, precision=precision))
  want = [('float32', precision.upper())]
  assert programs.products(net.features, params, IMAGES) == want * len(inception.WIDTHS)
  pool = jax.ShapeDtypeStruct((2, params['fc']['kernel'].shape[0]), 'float32')
  assert programs.products(net.logits, params, pool) == want


@pytest.mark.parametrize('shape', [(1, 1), (2, 7), (32, 32), (298, 300), (320, 64), (640, 601)])
@pytest.mark.parametrize('method', inception.INPUTS)
def test_resizing_is_that_of_the_formula(method, shape):
  """Bit by bit where every operation stands alone; a compiler may fuse two roundings into one."""
  images = pixels(1, *shape, 3)
  _, want = reference.inputs(images, method)
  compiled = jax.jit(inception.inputs, static_argnums=1)(images, method)
  assert compiled.dtype == jnp.float32 and compiled.shape == (1, 299, 299, 3)
  np.testing.assert_allclose(compiled, want, rtol=0, atol=ONE_ULP)
  if method == 'tf1':
    np.testing.assert_array_equal(inception.inputs(images, method), want)


def test_images_of_the_right_size_stay_as_they_are():
  """Scaled, not moved: 0 is -1, and 255 is 127 / 128 or 1."""
  images = pixels(1, 299, 299, 3)
  tf1, ptfid = (inception.inputs(images, method) for method in inception.INPUTS)
  np.testing.assert_array_equal(tf1, (images - np.float32(128)) / 128)
  np.testing.assert_allclose(ptfid, images / 127.5 - 1, rtol=0, atol=ONE_ULP)
  assert (tf1.min(), tf1.max()) == (-1, 127 / 128) and (ptfid.min(), ptfid.max()) == (-1, 1)


def test_positions_are_anchored_at_the_corner_or_symmetric():
  """Mirrored images give mirrored inputs from pixels' centres, and others from the corner."""
  images = pixels(1, 40, 40, 3)
  for method, mirrors in (('tf1', False), ('ptfid', True)):
    x, mirrored = (
      np.asarray(inception.inputs(array, method)) for array in (images, images[:, ::-1, ::-1])
    )
    assert np.allclose(x[:, ::-1, ::-1], mirrored, atol=1e-4) == mirrors
    np.testing.assert_allclose(x[:, 0, 0], inception.inputs(images[:, :1, :1], method)[:, 0, 0])


def test_grey_images_are_those_of_three_equal_channels():
  grey = pixels(2, 20, 30, 1)
  for method in inception.INPUTS:
    got, want = (inception.inputs(x, method) for x in (grey, grey.repeat(3, axis=-1)))
    np.testing.assert_array_equal(got, want)


def test_floats_and_integers_give_the_same():
  images = pixels(1, 20, 30, 3)
  for method in inception.INPUTS:
    got, want = (inception.inputs(x, method) for x in (images.astype(np.float32), images))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('function,message', [
  (lambda: inception.inputs(pixels(1, 8, 8, 3), 'tf2'), "method='tf2' makes .* one of tf1, ptfid"),
  (lambda: inception.inputs(pixels(1, 8, 8, 4), 'tf1'),
   r'images has shape \(1, 8, 8, 4\), expected \(any, any, any, 3\), or 1 for grey'),
  (lambda: inception.inputs(pixels(8, 8, 3), 'tf1'), r'images has shape \(8, 8, 3\), expected'),
  (lambda: NET.features({}, np.zeros((1, 256, 256, 3), np.float32)),
   r'images has shape \(1, 256, 256, 3\), expected \(any, 299, 299, 3\)'),
  (lambda: NET.logits({}, np.zeros((1, 2048), np.float32)),
   r'pool has shape \(1, 2048\), expected'),
  (lambda: with_widths(without('Mixed_7a.branch3x3_1')),
   r"widths lacks \['Mixed_7a.branch3x3_1'\] and has \[\] that are no units; give the channels of"),
  (lambda: with_widths({**tiny.INCEPTION.widths, 'AuxLogits.conv0': 8}),
   r"widths lacks \[\] and has \['AuxLogits.conv0'\] that are no units"),
])
def test_what_does_not_fit_is_refused(function, message):
  with pytest.raises(ValueError, match=message):
    function()

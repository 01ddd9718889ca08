"""The U-Net: size, cost, resampling, dropout, initialisation, precision, refusals."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmzoo import cost
from fmzoo.models import layers, unet
from tests import tiny

SHAPE = (8, 8, 3)
TINY, CIFAR = tiny.UNET, tiny.CIFAR_UNET


@pytest.fixture(scope='module')
def initial():
  """(network with a jitted apply, its first params)."""
  net = unet.make(TINY, SHAPE, 10)
  return net._replace(apply=jax.jit(net.apply)), jax.jit(net.init)(jax.random.key(0))


@pytest.fixture(scope='module')
def warmed(initial):
  """(network with a jitted apply, params with noise on every leaf)."""
  return initial[0], tiny.warm(initial[1])


def inputs(size=3):
  """Returns random (x, t, duration, labels) and augmentation labels."""
  keys = jax.random.split(jax.random.key(7), 4)
  x, augment = (jax.random.normal(key, (size, *rest)) for key, rest in zip(keys, (SHAPE, (6,))))
  t, share = (jax.random.uniform(key, (size,)) for key in keys[2:])
  return (x, t, t * share, jnp.zeros(size, jnp.int32)), augment


def row_keys(size=3):
  return jax.random.split(jax.random.key(3), size)


def test_parameter_count_and_cost_are_the_official_ones():
  """Full size: 55,932,419 parameters, 21.2 G multiply-adds an image."""
  net, spec = unet.make(CIFAR, (32, 32, 3), 10), jax.ShapeDtypeStruct
  params = jax.eval_shape(net.init, jax.random.key(0))
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == 55_932_419
  x, t, labels = spec((1, 32, 32, 3), 'float32'), spec((1,), 'float32'), spec((1,), 'int32')
  flops = cost.matmul_flops(net.apply, params, x, t, t, labels)
  np.testing.assert_allclose(flops / 2, 21.2e9, rtol=0.01)


def depthwise(x, direction):
  """The resampling as the official code has it, a convolution of every channel by itself."""
  weights = np.outer(unet.FILTER, unet.FILTER).astype(np.float32)[..., None, None] / 64
  up = direction == 'up'
  return jax.lax.conv_general_dilated(
    x, jnp.tile(weights * (4 if up else 1), (1, 1, 1, x.shape[-1])), (1, 1) if up else (2, 2),
    [(2, 2)] * 2 if up else [(1, 1)] * 2, lhs_dilation=(2, 2) if up else (1, 1),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=x.shape[-1],
  )


@pytest.mark.parametrize('direction,side', [('down', 3), ('up', 12)])
def test_resampling_is_the_depthwise_convolution(direction, side):
  x = jax.random.normal(jax.random.key(0), (2, 6, 6, 5))
  out = unet.resample(x, direction)
  assert out.shape == (2, side, side, 5)
  np.testing.assert_allclose(out, depthwise(x, direction), rtol=0, atol=1e-6)


def test_flops_of_a_depthwise_convolution():
  """4 x 4 taps for each of the 3 x 3 outputs of 5 channels: one input channel an output."""
  assert cost.matmul_flops(lambda x: depthwise(x, 'down'), jnp.ones((2, 6, 6, 5))) == (
    2 * 16 * (2 * 3 * 3 * 5)
  )


def test_rows_do_not_depend_on_their_neighbours(warmed):
  """Three rows at once and one by one, with augmentation labels and dropout."""
  net, params = warmed
  args, augment = inputs()
  rows = (*args, augment, row_keys())

  def run(x, t, duration, labels, augment, keys):
    return net.apply(params, x, t, duration, labels, augment=augment, dropout=keys)

  alone = [run(*(a[i : i + 1] for a in rows)) for i in range(3)]
  np.testing.assert_allclose(run(*rows), np.concatenate(alone), rtol=0, atol=1e-5)


def test_equal_keys_give_equal_masks_in_two_calls(warmed):
  """As SoFlow's two passes at different times need it: seen on equal rows of different calls."""
  net, params = warmed
  args, _ = inputs()
  once = net.apply(params, *args, dropout=row_keys())
  turned = net.apply(params, *(a[::-1] for a in args), dropout=row_keys()[::-1])
  np.testing.assert_allclose(turned[::-1], once, rtol=0, atol=1e-5)
  other = net.apply(params, *args, dropout=jax.random.split(jax.random.key(4), 3))
  assert np.abs(other - once).max() > 1e-2


def test_rows_and_layers_have_masks_of_their_own():
  x = jnp.ones((3, 8, 8, 4))
  one, two = unet.drop(x, row_keys(), 1, 0.3), unet.drop(x, row_keys(), 2, 0.3)
  masks = np.stack([*one, *two]).reshape(6, -1) > 0
  agreement = (masks[:, None] == masks[None]).mean(axis=-1)  # 0.7^2 + 0.3^2 = 0.58 by chance
  np.testing.assert_allclose(agreement[~np.eye(6, dtype=bool)], 0.58, atol=0.15)


def test_dropout_keeps_the_mean_and_the_share():
  out = unet.drop(jnp.ones((4, 32, 32, 4)), row_keys(4), 0, 0.3)
  np.testing.assert_allclose(np.unique(out), [0, 1 / 0.7], rtol=1e-6)
  np.testing.assert_allclose(np.mean(out == 0), 0.3, atol=0.02)


def test_masks_do_not_depend_on_the_width_of_floats():
  """The float64 reference of fmzoo/precision.py drops what the others drop."""
  narrow = unet.drop(jnp.ones((4, 8, 8, 4)), row_keys(4), 0, 0.3)
  with jax.enable_x64():
    wide = unet.drop(jnp.ones((4, 8, 8, 4)), row_keys(4), 0, 0.3)
  assert wide.dtype == jnp.float64
  np.testing.assert_array_equal(narrow == 0, wide == 0)


def test_blocks_may_be_computed_again(warmed):
  """model.remat changes no gradient."""
  args, params = inputs()[0], warmed[1]

  def gradient(remat):
    net = unet.make(dataclasses.replace(TINY, remat=remat), SHAPE, 10)
    return jax.jit(jax.grad(
      lambda p: jnp.sum(net.apply(p, *args, dropout=row_keys()) ** 2)
    ))(params)

  for a, b in zip(*(jax.tree.leaves(gradient(remat)) for remat in (False, True))):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max())


def test_every_block_drops(monkeypatch, warmed):
  net, params = unet.make(TINY, SHAPE, 10), warmed[1]
  seen, drop = [], unet.drop

  def watched(x, rng, layer, rate):
    seen.append((layer, rate))
    return drop(x, rng, layer, rate)

  monkeypatch.setattr(unet, 'drop', watched)
  args, _ = inputs()
  jax.eval_shape(net.apply, params, *args)
  assert not seen  # no keys, no dropout
  jax.eval_shape(lambda keys: net.apply(params, *args, dropout=keys), row_keys())
  encoder, decoder = unet.plan(TINY, 8)
  assert seen == [(i, 0.3) for i in range(len(encoder) + len(decoder))]


def test_labels_are_ignored_and_no_augmentation_is_zeros(warmed):
  net, params = warmed
  (x, t, duration, labels), augment = inputs()
  out = net.apply(params, x, t, duration, labels)
  np.testing.assert_array_equal(out, net.apply(params, x, t, duration, labels + 5))
  zeros = net.apply(params, x, t, duration, labels, augment=0 * augment)
  np.testing.assert_allclose(zeros, out, rtol=0, atol=1e-6)
  assert np.abs(net.apply(params, x, t, duration, labels, augment=augment) - out).max() > 1e-3


def test_initialisation(initial):
  """Xavier by convolution fans with the official gains; biases 0, scales 1; output about 0."""
  net, params = initial
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if name.endswith('bias'):
      assert not leaf.any(), name
    elif name.endswith('scale'):
      assert (leaf == 1).all(), name
    else:
      gain = 1.0
      if 'qkv' in name:
        gain = math.sqrt(0.2)
      elif 'conv_out' in name or 'proj' in name or name == 'decoder_8_conv/kernel':
        gain = 1e-5
      bound = gain * math.sqrt(6 / (math.prod(leaf.shape[:-2]) * sum(leaf.shape[-2:])))
      assert 0.95 * bound < np.abs(leaf).max() <= bound * (1 + 1e-6), name
      np.testing.assert_allclose(leaf.std(), bound / math.sqrt(3), rtol=0.12, err_msg=name)
  args, augment = inputs()
  assert 0 < np.abs(net.apply(params, *args, augment=augment)).max() < 1e-3
  assert all(jax.tree.leaves(net.trainable(params)))


def products(jaxpr):
  """Yields the operands' dtype of every matrix product and convolution, with their shapes."""
  for equation in jaxpr.eqns:
    if equation.primitive.name in ('dot_general', 'conv_general_dilated'):
      (dtype,) = {str(operand.aval.dtype) for operand in equation.invars}
      yield dtype, equation.primitive.name, equation.outvars[0].aval.ndim
    for value in equation.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from products(inner)


def test_bfloat16_is_for_convolutions_and_attention_alone(warmed):
  """Embedding and conditions, the products of rank 2, stay float32; so does what comes out."""
  exact, params = warmed
  net = unet.make(dataclasses.replace(TINY, dtype='bfloat16', precision='default'), SHAPE, 10)
  args, augment = inputs()
  jaxpr = jax.make_jaxpr(lambda p: net.apply(p, *args, augment=augment))(params).jaxpr
  for dtype, name, rank in products(jaxpr):
    assert dtype == ('float32' if name == 'dot_general' and rank == 2 else 'bfloat16')
  have = jax.jit(net.apply)(params, *args, augment=augment)
  want = exact.apply(params, *args, augment=augment)
  assert have.dtype == jnp.float32
  assert 1e-5 < np.abs(want - have).max() / np.abs(want).max() < 0.1


def test_a_network_without_augmentation_has_no_parameters_for_it():
  net = unet.make(dataclasses.replace(TINY, augment_dim=0), SHAPE, 10)
  assert 'augment' not in jax.eval_shape(net.init, jax.random.key(0))['embedding']


@pytest.mark.parametrize('changes,words', [
  ({'multipliers': ()}, r'model.multipliers=\(\) must be one whole number'),
  ({'multipliers': (1.5, 2)}, r'model.multipliers=\(1.5, 2\) must be one whole number'),
  ({'attention_resolutions': (7,)}, r'attention_resolutions=\(7,\) must be among .*\(8, 4\)'),
  ({'blocks': 0}, 'model.blocks=0 must be at least 1'),
  ({'dropout': 1.0}, 'model.dropout=1.0 must be at least 0 and below 1'),
  ({'augment_dim': -1}, 'model.augment_dim=-1 must be at least 0'),
  ({'multipliers': (1, 1, 1, 1, 1)}, 'halves the sides 4 times, which 8x8 do not allow'),
  ({'width': 6}, 'model.width=6 gives decoder_4_block1 18 channels'),
  ({'width': 144}, 'model.width=144 gives encoder_8_block0 144 channels'),
])
def test_settings_that_do_not_fit_are_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    unet.make(dataclasses.replace(TINY, **changes), SHAPE, 10)


def test_unequal_sides_are_refused():
  with pytest.raises(ValueError, match='which 8x4 do not allow; use equal sides'):
    unet.make(TINY, (8, 4, 3), 10)


@pytest.mark.parametrize('name,value,words', [
  ('x', jnp.zeros((3, 4, 4, 3)), 'x has shape'),
  ('t', jnp.zeros(2), 't has shape'),
  ('duration', jnp.zeros((3, 1)), 'duration has shape'),
  ('augment', jnp.zeros((3, 5)), r'augment has shape \(3, 5\), expected \(3, 6\)'),
  ('dropout', jax.random.key(0), r'dropout has shape \(\), expected \(3\)'),
])
def test_inputs_of_another_shape_are_refused(warmed, name, value, words):
  net, params = warmed
  args, _ = inputs()
  given = dict(zip(('x', 't', 'duration', 'labels'), args)) | {name: value}
  with pytest.raises(ValueError, match=words):
    net.apply(params, **given)


def test_attention_is_where_the_specification_has_it():
  """At the listed sides on the way down, in the last block of these on the way up, and in0."""
  encoder, decoder = unet.plan(CIFAR, 32)
  assert [layer.name for layer in encoder if layer.attention] == [
    f'encoder_16_block{i}' for i in range(4)
  ]
  assert [layer.name for layer in decoder if layer.attention] == [
    'decoder_8_in0', 'decoder_16_block4'
  ]
  assert [layer.inputs for layer in decoder if layer.joins] == [512] * 14 + [384]


def test_time_features_end_at_a_ten_thousandth():
  features = unet.sinusoid(jnp.asarray([1.0]), 8)[0]
  np.testing.assert_allclose(features[:4], np.sin(10.0 ** (-4 * np.arange(4) / 3)), rtol=1e-5)
  assert layers.sinusoid(jnp.asarray([1.0]), 8)[0, 0] == features[4]

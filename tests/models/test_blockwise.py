"""The blockwise network: size, cost, initialisation, precision, routing to a segment's blocks."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import bfm_xl
from fmzoo import cost
from fmzoo.models import blockwise, layers
from tests import tiny

SHAPE, CLASSES = (8, 8, 4), 10
TINY = blockwise.Config(
  patch=2, width=32, heads=2, mlp_ratio=2.0, segments=3, segment_depth=2, feature_depth=2,
  frn_depth=1, lora_width=8, rotary_theta=10000.0, feature_dim=12, projector_width=16,
  dtype='float32', precision='highest', attention='xla', remat=False, unroll=1,
)


def xl(**changes):
  """Returns (Config, network) of the recipe of the paper's size."""
  model = {k: v for k, v in bfm_xl.get_config().model.items() if k != 'name'}
  config = blockwise.Config(**{**model, **changes})
  return config, blockwise.make(config, (32, 32, 4), 1000)


def tiny_net(**changes):
  """Returns (network, params with noise on every leaf)."""
  net = blockwise.make(dataclasses.replace(TINY, **changes), SHAPE, CLASSES)
  return net, tiny.warm(jax.jit(net.init)(jax.random.key(0)))


def inputs(size=3):
  """Returns random (x, t, labels)."""
  keys = jax.random.split(jax.random.key(7), 2)
  labels = jnp.arange(size, dtype=jnp.int32) % (CLASSES + 1)
  return jax.random.normal(keys[0], (size, *SHAPE)), jax.random.uniform(keys[1], (size,)), labels


@pytest.mark.parametrize('frn_depth,count', [(0, 963_401_712), (4, 1_059_022_896)])
def test_parameter_count_is_the_official_one(frn_depth, count):
  _, net = xl(frn_depth=frn_depth)
  params = jax.eval_shape(net.init, jax.random.key(0))
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count


def macs_of_parts(config, tokens, channels):
  """Multiply-adds of one image by formula, the concatenation split: {part: (all, in float32)}."""
  n, d, r = tokens, config.width, config.lora_width
  core, patches = (4 + 2 * config.mlp_ratio) * d * d * n + 2 * n * n * d, config.patch**2 * channels
  low_rank = (n + 1) * d * r + 6 * d * r * n
  return {
    'condition': (256 * d + d * d,) * 2,
    'features': (
      patches * d * n + 6 * d * d + config.feature_depth * (core + 7 * d * r),
      config.feature_depth * 7 * d * r,
    ),
    'residual': (
      patches * d * n + config.frn_depth * (core + 6 * d * d), config.frn_depth * 6 * d * d
    ),
    'velocity': (
      2 * patches * d * n + (n + 1) * 8 * d * d + config.segment_depth * (core + low_rank),
      (n + 1) * 2 * d * d + config.segment_depth * low_rank,
    ),
  }


def traced_parts(config, net, tokens):
  """Returns {part: (function, abstract arguments for one image)}."""
  side, spec = math.isqrt(tokens) * config.patch, jax.ShapeDtypeStruct
  params = jax.eval_shape(net.init, jax.random.key(0))
  x, index = spec((1, side, side, 4), 'float32'), spec((), 'int32')
  c, f = spec((1, config.width), 'float32'), spec((1, tokens, config.width), 'float32')
  return {
    'condition': (net.condition, (params, spec((1,), 'float32'), spec((1,), 'int32'))),
    'features': (net.features, (params, x, c)),
    'residual': (net.residual, (params, x, c)),
    'velocity': (net.velocity, (params, x, c, f, index)),
  }


def test_multiply_adds_are_those_of_one_stack_and_no_concatenation():
  """Full size: 111.47 G for an evaluation and 43.80 G with the residual network, one image."""
  config, net = xl(frn_depth=4)
  formula = {name: both[0] for name, both in macs_of_parts(config, 256, 4).items()}
  counted = {
    name: cost.matmul_flops(function, *args) / 2
    for name, (function, args) in traced_parts(config, net, 256).items()
  }
  assert counted == formula
  shared = counted['condition'] + counted['velocity']
  assert f'{(shared + counted["features"]) / 1e9:.2f}' == '111.47'
  # The spec's 43.80 counts the modulation g1, which the residual network's calls leave out.
  assert f'{(shared + counted["residual"]) / 1e9:.2f}' == '43.80'


def products(jaxpr, times=1):
  """Yields (dtype of the operands, multiply-adds) of every matrix product, dearest branch only."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (contract, _), _ = equation.params['dimension_numbers']
      depth = math.prod(equation.invars[0].aval.shape[i] for i in contract)
      dtypes = {str(operand.aval.dtype) for operand in equation.invars}
      assert len(dtypes) == 1
      yield dtypes.pop(), times * depth * math.prod(equation.outvars[0].aval.shape)
    branches = equation.params.get('branches')
    if branches:
      yield from products(branches[0].jaxpr, times)
      continue
    for value in equation.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from products(inner, times * equation.params.get('length', 1))


def test_bfloat16_leaves_conditioning_and_modulation_in_float32():
  """Time, low-rank modulations and the final one are float32; the rest, g1 and g2 too, is not."""
  config = dataclasses.replace(TINY, dtype='bfloat16', precision='default')
  net = blockwise.make(config, SHAPE, CLASSES)
  formula = macs_of_parts(config, 16, 4)
  for name, (function, args) in traced_parts(config, net, 16).items():
    found = {'float32': 0, 'bfloat16': 0}
    for dtype, macs in products(jax.make_jaxpr(function)(*args).jaxpr):
      found[dtype] += macs
    assert found == {
      'float32': formula[name][1], 'bfloat16': formula[name][0] - formula[name][1]
    }, name


def test_bfloat16_stays_near_float32_and_returns_float32():
  exact, params = tiny_net()
  rounded, _ = tiny_net(dtype='bfloat16', precision='default')
  for want, have in zip(outputs(exact, params), outputs(rounded, params)):
    assert have.dtype == jnp.float32
    error = np.abs(want - have).max() / np.abs(want).max()
    assert 1e-5 < error < 0.05


def outputs(net, params):
  """Returns (features, projection, residual, velocity of segment 1)."""
  x, t, labels = inputs()

  @jax.jit
  def run(params):
    c = net.condition(params, t, labels)
    f = net.features(params, x, c)
    v = net.velocity(params, x, c, f, jnp.int32(1))
    return f, net.project(params, f), net.residual(params, x, c), v

  return run(params)


def test_remat_and_unroll_change_no_gradient():
  """Two blocks a stack, so that a loop that runs one twice, or none, shows."""
  (plain, params), (other, _) = tiny_net(), tiny_net(remat=True, unroll=2)
  x, t, labels = inputs(2)
  c = plain.condition(params, t, labels)

  def gradient(net):
    return jax.jit(jax.grad(lambda p: jnp.sum(net.features(p, x, c) ** 2)))(params)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(np.abs(a).max(), 1)),
    gradient(plain), gradient(other),
  )


def test_split_linear_equals_the_linear_of_the_concatenation():
  """Condition first, feature second, as in the official weights."""
  keys = jax.random.split(jax.random.key(0), 3)
  a, b = jax.random.normal(keys[0], (2, 5)), jax.random.normal(keys[1], (2, 7, 6))
  params = tiny.warm(blockwise.JointLinear(4).init(keys[2], a, b))
  joined = jnp.concatenate([jnp.broadcast_to(a[:, None], (2, 7, 5)), b], axis=-1)
  np.testing.assert_allclose(
    blockwise.JointLinear(4).apply(params, a, b), layers.Linear(4).apply(params, joined),
    rtol=0, atol=1e-5,
  )


def test_at_the_start_velocity_is_zero_and_features_are_the_patches():
  net, _ = tiny_net()
  params = jax.jit(net.init)(jax.random.key(0))
  f, _, residual, v = outputs(net, params)
  assert not np.any(v)
  embedded = layers.Linear(TINY.width).apply(
    {'params': params['feature_patches']}, layers.patchify(inputs()[0], TINY.patch)
  )
  np.testing.assert_allclose(f, embedded, rtol=0, atol=1e-5)
  assert np.abs(residual - embedded).max() > 1e-3  # official: the FRN does not start as a no-op


def leaves_by_name(params):
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def expected_spread(name, shape):
  """Returns the standard deviation that spec section 4 gives a kernel or table."""
  if name in ('time/in/kernel', 'time/out/kernel', 'labels/table'):
    return 0.02
  zeroed = ('feature_shared', 'velocity_shared', 'final', 'up')
  if set(zeroed) & set(name.split('/')):
    return 0.0
  return math.sqrt(2 / (shape[-2] + shape[-1]))  # Xavier uniform: bound sqrt(6 / fans) / sqrt(3)


def test_initialisation_is_the_official_one():
  config = dataclasses.replace(TINY, width=64, lora_width=32, feature_dim=48, projector_width=64)
  params = jax.jit(blockwise.make(config, SHAPE, CLASSES).init)(jax.random.key(0))
  for name, leaf in leaves_by_name(params).items():
    assert leaf.dtype == np.float32
    if name.endswith('bias'):
      assert not leaf.any(), name
    elif name.endswith('weight'):
      assert (leaf == 1).all(), name
    else:
      spread = expected_spread(name, leaf.shape)
      np.testing.assert_allclose(leaf.std(), spread, rtol=0.08, err_msg=name)
      if spread > 0.02:
        assert np.abs(leaf).max() <= spread * math.sqrt(3) * 1.0001, name


def test_every_block_of_every_segment_starts_differently():
  params = jax.jit(blockwise.make(TINY, SHAPE, CLASSES).init)(jax.random.key(0))
  kernels = params['segments']['blocks']['core']['attn']['qkv']['kernel']
  assert kernels.shape == (2, 3, 32, 96)  # blocks, segments
  flat = np.asarray(kernels).reshape(6, -1)
  assert len(np.unique(flat[:, 0])) == 6


def test_velocity_runs_the_blocks_of_its_segment_only():
  net, params = tiny_net()
  x, t, labels = inputs(2)
  c = net.condition(params, t, labels)
  f = net.features(params, x, c)

  def total(segments, index):
    return jnp.sum(net.velocity({**params, 'segments': segments}, x, c, f, index) ** 2)

  gradient = jax.jit(jax.value_and_grad(total))
  values = []
  for index in range(3):
    value, grads = gradient(params['segments'], jnp.int32(index))
    values.append(float(value))
    for leaf in jax.tree.leaves(grads):
      assert [bool(np.any(leaf[:, s])) for s in range(3)] == [s == index for s in range(3)]
  assert len(set(values)) == 3


def test_blocks_of_other_segments_are_not_even_copied():
  """They are cut out of the stack inside the branch: the switch takes the whole stack."""
  net, params = tiny_net()
  x, t, labels = inputs(2)
  c = jnp.zeros((2, 32))
  jaxpr = jax.make_jaxpr(net.velocity)(params, x, c, jnp.zeros((2, 16, 32)), jnp.int32(0)).jaxpr
  (switch,) = [equation for equation in jaxpr.eqns if equation.primitive.name == 'cond']
  stacks = {leaf.shape for leaf in jax.tree.leaves(params['segments'])}
  assert stacks <= {operand.aval.shape for operand in switch.invars}


def test_rows_may_share_a_condition_and_an_image():
  """Two images and their null halves: as if conditions and images were repeated."""
  net, params = tiny_net()
  net = net._replace(**{k: jax.jit(v) for k, v in net._asdict().items() if callable(v)})
  x, t, labels = inputs(2)
  c = net.condition(params, t[:1], jnp.append(labels, CLASSES))
  both, whole = jnp.tile(x, (2, 1, 1, 1)), c[jnp.asarray([0, 1, 2, 2])]
  f = net.features(params, both, whole)
  np.testing.assert_allclose(net.features(params, x, c), f, rtol=0, atol=1e-5)
  np.testing.assert_allclose(
    net.residual(params, x, c), net.residual(params, both, whole), rtol=0, atol=1e-5
  )
  segment = jnp.int32(1)
  np.testing.assert_allclose(
    net.velocity(params, x, c, f, segment),
    net.velocity(params, both, whole, f, segment), rtol=0, atol=1e-5,
  )


@pytest.mark.parametrize('changes,words', [
  ({'patch': 3}, 'model.patch=3'), ({'heads': 3}, 'model.heads=3'),
  ({'heads': 16}, 'model.width=32'), ({'segments': 0}, 'model.segments=0'),
  ({'segment_depth': 0}, 'model.segment_depth=0'), ({'feature_depth': 0}, 'model.feature_depth=0'),
])
def test_sizes_that_do_not_divide_are_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    blockwise.make(dataclasses.replace(TINY, **changes), SHAPE, CLASSES)


def test_an_image_of_another_size_is_refused():
  net, params = tiny_net()
  with pytest.raises(ValueError, match='x has shape'):
    net.features(params, jnp.zeros((1, 4, 4, 4)), jnp.zeros((1, 32)))

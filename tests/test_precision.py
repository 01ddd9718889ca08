"""The bound on the consistency quotient's rounding error, and the table that reports it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmzoo import build, cost, precision
from fmzoo.models import layers
from tests import tiny
from tests.test_configs import config_of

BOUND = 0.01  # of the relative error of q at r = 0.002
POLICIES = {policy.name: policy for policy in precision.POLICIES}
SHIPPED = [POLICIES[f'bfloat16, shared roundings, first in {name}'] for name in ('three', 'TF32')]


@pytest.fixture(scope='module')
def b4():
  """DiT-B/4 at full size, all parameters random and not zero, on two rows."""
  config = config_of('soflow:b4')
  config.data.batch_size = 2
  recipe = build.recipe(config)
  return precision.Subject(recipe, *precision.untrained(recipe))


def test_b4_keeps_the_quotient_within_one_percent(b4):
  """What a TPU and a GPU do at precision 'high'."""
  assert max(precision.quotient_errors(b4, SHIPPED, 0.002)) <= BOUND


@pytest.fixture(scope='module')
def subject():
  """A tiny network with noise on every parameter."""
  recipe = tiny.recipe('soflow', data__batch_size=32)
  _, batch = precision.untrained(recipe)
  return precision.Subject(recipe, tiny.warm(tiny.init(recipe)), batch)


def test_the_error_does_not_grow_as_points_come_near(subject):
  near, nearer = (precision.quotient_errors(subject, SHIPPED[:1], r)[0] for r in (0.1, 0.0003125))
  assert max(near, nearer) <= BOUND and nearer < 2 * near


def test_bfloat16_alone_breaks_the_bound(subject):
  assert precision.quotient_errors(subject, [POLICIES['bfloat16']], 0.002)[0] > 0.2


def test_recipes_round_as_the_bound_says():
  """In bfloat16 the first rows of pairs are 'high', on any device no less than the policies."""
  assert layers.first_rows('bfloat16') == 'high'
  assert layers.first_rows('float32') == 'float32'
  for name in ('soflow:xl2', 'soflow_cifar10'):
    assert config_of(name).model.dtype == 'bfloat16'
    assert config_of(name).model.precision == 'highest'


def test_gradients_of_shared_roundings_are_those_of_bfloat16(subject):
  """What is left is the rounding of ordinary bfloat16 products, below two percent."""
  shipped, = precision.gradient_errors(subject, SHIPPED[:1], 0.002)
  assert 1e-4 < shipped < 0.02


def test_first_rows_of_pairs_are_plain_rows(subject):
  """In float32 pairs are what two calls give."""
  net = build.importlib.import_module('fmzoo.models.dit').make(
    subject.recipe.network, subject.recipe.data.latent_shape, 10
  )
  x = jax.random.normal(jax.random.key(2), (6, 8, 8, 1))
  t, labels = jnp.linspace(0.2, 0.9, 6), jnp.arange(6)
  args = subject.params, x, t, t / 2, labels
  pairs, plain = (jax.jit(apply)(*args) for apply in (net.apply_pairs, net.apply))
  np.testing.assert_allclose(pairs, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize('dtype,relative', [
  ('bfloat16', 2**-8), ('tf32', 2**-11), ('bfloat16_3x', 2**-15), ('high', 2**-22),
])
def test_products_round_their_operands(dtype, relative):
  """The error of one product against float64 is that of its operands' mantissas, and not less."""
  rng = np.random.default_rng(0)
  a, b = (rng.standard_normal((64, 64)).astype(np.float32) for _ in range(2))
  exact = a.astype(np.float64) @ b.astype(np.float64)
  found = layers.rounded_product(
    lambda a, b, out: jnp.matmul(a, b, preferred_element_type=out), a, b, dtype, 'float32',
    jnp.float32,
  )
  error = precision.relative_error(np.float64(found), exact)
  assert error < relative
  assert dtype == 'high' or error > relative / 32


def operand_dtypes(jaxpr):
  """Yields the dtypes of the operands of every matrix product."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      yield {str(operand.aval.dtype) for operand in equation.invars}
    for inner in cost.inner_jaxprs(equation.params):
      yield from operand_dtypes(inner)


def test_products_of_the_backward_pass_have_narrow_operands():
  """Also those of a product with a wide result, such as attention logits."""
  q = jnp.ones((2, 4, 1, 8), jnp.bfloat16)
  for pairs in ('', 'high'):
    numerics = layers.Numerics('bfloat16', pairs=pairs)
    program = jax.make_jaxpr(jax.grad(
      lambda q, n=numerics: jnp.sum(layers.attend(q, q, q, n).astype(jnp.float32) ** 2)
    ))(q)
    kinds = list(operand_dtypes(program.jaxpr))
    assert kinds.count({'float32'}) == (2 if pairs else 0)  # first rows, forward
    assert kinds.count({'bfloat16'}) == len(kinds) - kinds.count({'float32'})
    assert len(kinds) == (10 if pairs else 6)  # 2 x (first, two differences, backward by q and k)


def test_passes_of_a_tpu_are_counted_by_precision():
  def product(a, precision):
    return cost.tpu_passes(lambda a: jnp.matmul(a, a, precision=precision), a)

  wide, narrow = (jax.ShapeDtypeStruct((8, 8), dtype) for dtype in ('float32', 'bfloat16'))
  flops = 2 * 8**3
  assert [product(wide, p) for p in (None, 'high', 'highest')] == [flops, 3 * flops, 6 * flops]
  assert product(narrow, 'highest') == flops
  assert cost.matmul_flops(lambda a: jnp.matmul(a, a, precision='high'), wide) == flops


def test_another_method_is_refused(tmp_path):
  with pytest.raises(ValueError, match="measures method 'soflow', this recipe is of 'fm'"):
    precision.report(tiny.recipe('fm'), tmp_path, runs=1)


def test_table_of_a_run(subject, tmp_path, capsys, monkeypatch):
  """One line a policy, relative to the first; costs of the policy that is shipped as computed."""
  monkeypatch.setattr(precision, 'POLICIES', (POLICIES['bfloat16'], SHIPPED[0]))
  monkeypatch.setattr(precision, 'RATIOS', (0.002,))
  for name in ('quotient_errors', 'gradient_errors'):  # measured above
    monkeypatch.setattr(precision, name, lambda subject, policies, ratio: [0.5, 0.25])
  precision.report(subject.recipe, tmp_path, runs=1)
  *_, first, second = capsys.readouterr().out.strip().splitlines()
  assert first == '| bfloat16 | 50.00% | 50.00% | 1.000 | 1.00 | 1.00 |'
  assert second.startswith(f'| {SHIPPED[0].name} | 25.00% | 25.00% | ')
  flops, passes = (float(cell) for cell in second.split('|')[4:6])
  assert 1.0 < flops < 1.02 and 1.0 < passes < 1.5

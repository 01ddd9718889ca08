"""What a function costs, read from its jaxpr: matrix-product and convolution FLOPs."""

import collections
import math

import jax
import jax.numpy as jnp
from jax.extend import core

# bfloat16 passes of the matrix unit of a TPU for a product of float32 operands, by its precision.
PASSES = {'high': 3, 'highest': 6}


def matmul_flops(function, *args):
  """Counts 2 x multiply-adds of all matrix products and convolutions in one call.

  A scan counts its body `length` times, a switch its dearest branch (so a sampler whose guidance
  acts now and then costs at most this), a product once whatever its
  precision; elementwise work is not counted. Nothing is computed or compiled.

  Args:
    function: any traceable function.
    *args: arrays or `jax.ShapeDtypeStruct`s.

  Returns:
    int.

  Raises:
    ValueError: at a `while` loop, whose trip count the jaxpr does not tell.
  """
  return sum(products(function, *args).values())


def products(function, *args):
  """Counts like `matmul_flops`, each kind of product apart.

  Returns:
    {(dtype of the operands, precision): FLOPs}, such as ('float32', 'highest').
  """
  return dict(_count(jax.make_jaxpr(function)(*args).jaxpr))


def tpu_passes(function, *args):
  """Counts like `matmul_flops`, float32 products as often as a TPU passes over their operands.

  That is 3 times at precision 'high', 6 at 'highest'; bfloat16 operands and 'default' once.
  """
  return sum(
    flops * (PASSES.get(precision, 1) if dtype == 'float32' else 1)
    for (dtype, precision), flops in products(function, *args).items()
  )


def _count(jaxpr):
  """Returns {kind: FLOPs} of a jaxpr."""
  total = collections.Counter()
  for equation in jaxpr.eqns:
    total.update(_equation(equation))
  return total


def _equation(equation):
  """Returns {kind: FLOPs} of one equation and all inside it."""
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contract, _), _ = params['dimension_numbers']
    depth = math.prod(equation.invars[0].aval.shape[i] for i in contract)
    return {_kind(equation): 2 * depth * math.prod(equation.outvars[0].aval.shape)}
  if name == 'conv_general_dilated':
    kernel = equation.invars[1].aval.shape
    out_channels = kernel[params['dimension_numbers'].rhs_spec[0]]
    flops = 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // out_channels
    return {_kind(equation): flops}
  inner = [_count(jaxpr) for jaxpr in inner_jaxprs(params)]
  if name == 'while' and any(inner):
    raise ValueError('a while loop with matrix products has no known cost; use lax.scan')
  if name == 'cond':
    return max(inner, key=lambda branch: sum(branch.values()))
  times = params['length'] if name == 'scan' else 1
  total = collections.Counter()
  for part in inner:
    total.update({kind: flops * times for kind, flops in part.items()})
  return total


def _kind(equation):
  """Returns (dtype, precision) of a product; of operands that differ the wider."""
  precision = equation.params['precision']
  precision = precision[0] if isinstance(precision, tuple) else precision
  dtype = jnp.promote_types(*(operand.aval.dtype for operand in equation.invars[:2]))
  if precision is None or isinstance(precision, jax.lax.Precision):
    return str(dtype), 'default' if precision is None else precision.name.lower()
  return str(dtype), str(precision)


def inner_jaxprs(params):
  """Yields the jaxprs among an equation's parameters."""
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, core.Jaxpr):
        yield item

"""What a function costs, read from its jaxpr: matrix-product and convolution FLOPs."""

import math

import jax
from jax.extend import core

# bfloat16 passes of the matrix unit of a TPU for a product of float32 operands, by its precision.
PASSES = {jax.lax.Precision.HIGH: 3, jax.lax.Precision.HIGHEST: 6}


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
  return _count(jax.make_jaxpr(function)(*args).jaxpr, lambda equation: 1)


def tpu_passes(function, *args):
  """Counts like `matmul_flops`, float32 products as often as a TPU passes over their operands.

  That is 3 times at precision 'high', 6 at 'highest'; bfloat16 operands and 'default' once.
  """
  return _count(jax.make_jaxpr(function)(*args).jaxpr, _passes)


def _passes(equation):
  """Returns how often a TPU passes over the operands of a product."""
  precision = equation.params['precision']
  if equation.invars[0].aval.dtype != 'float32' or precision is None:
    return 1
  return PASSES.get(precision[0], 1)


def _count(jaxpr, weight):
  """Sums the FLOPs of a jaxpr, each product weighted."""
  return sum(_equation(equation, weight) for equation in jaxpr.eqns)


def _equation(equation, weight):
  """Returns the weighted FLOPs of one equation and all inside it."""
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contract, _), _ = params['dimension_numbers']
    depth = math.prod(equation.invars[0].aval.shape[i] for i in contract)
    return 2 * depth * math.prod(equation.outvars[0].aval.shape) * weight(equation)
  if name == 'conv_general_dilated':
    kernel = equation.invars[1].aval.shape
    out_channels = kernel[params['dimension_numbers'].rhs_spec[0]]
    flops = 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // out_channels
    return flops * weight(equation)
  inner = [_count(jaxpr, weight) for jaxpr in inner_jaxprs(params)]
  if name == 'while' and any(inner):
    raise ValueError('a while loop with matrix products has no known cost; use lax.scan')
  if name == 'cond':
    return max(inner)
  return sum(inner) * (params['length'] if name == 'scan' else 1)


def inner_jaxprs(params):
  """Yields the jaxprs among an equation's parameters."""
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, core.Jaxpr):
        yield item

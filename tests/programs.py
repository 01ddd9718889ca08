"""What a traced function computes, read from its jaxpr."""

import jax

PRODUCTS = ('dot_general', 'conv_general_dilated')


def products(function, *args):
  """Returns (operands' dtype, precision's name) of every product of a function, as it is traced."""
  return list(_products(jax.make_jaxpr(function)(*args).jaxpr))


def _products(jaxpr):
  """Yields those of a jaxpr, and of those inside it."""
  for equation in jaxpr.eqns:
    if equation.primitive.name in PRODUCTS:
      (dtype,) = {str(operand.aval.dtype) for operand in equation.invars}
      precision = equation.params['precision']
      yield dtype, str(precision[0] if precision else precision)
    for value in equation.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from _products(inner)

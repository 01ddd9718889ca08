"""Gradients of NumPy functions: arrays that remember how they were made.

A function written with the operations below, called with Traced arrays, can be differentiated by
every one of them in one backward pass. For tests: the references are plain NumPy and are checked
against the package, so the package's own differentiation has no part in them.
"""

import itertools

import numpy as np

NUMBERS = itertools.count()  # of Traced arrays, in the order in which they are made


class Traced(np.lib.mixins.NDArrayOperatorsMixin):
  """An array, the arrays it was made of and how its cotangent passes to each of them."""

  def __init__(self, value, parents=()):
    self.value = np.asarray(value)
    self.parents = parents  # pairs (Traced, function of our cotangent that gives its share)
    self.number = next(NUMBERS)
    self.shape = self.value.shape

  def __len__(self):
    return len(self.value)

  def __array_ufunc__(self, ufunc, method, *inputs):
    """Applies an operation of RULES, which the operators come to as well."""
    assert method == '__call__' and ufunc in RULES, f'{ufunc.__name__} has no rule'
    values = [stop_gradient(x) for x in inputs]
    out = ufunc(*values)
    return Traced(out, [
      (x, lambda g, pull=pull, shape=x.shape: shrink(pull(g), shape))
      for x, pull in zip(inputs, RULES[ufunc](out, *values)) if isinstance(x, Traced)
    ])

  def __array_function__(self, function, types, args, kwargs):
    """Applies a function of FUNCTIONS."""
    return FUNCTIONS[function](*args, **kwargs)

  def __getitem__(self, index):
    def pull(g):
      """Adds the share of an entry as often as it was read; by slices alone that is once."""
      whole = np.zeros(self.shape)
      if isinstance(index, np.ndarray):
        np.add.at(whole, index, g)
      else:
        whole[index] = g
      return whole

    return Traced(self.value[index], [(self, pull)])

  def reshape(self, *shape):
    """As of an array."""
    return Traced(self.value.reshape(*shape), [(self, lambda g: g.reshape(self.shape))])

  def transpose(self, *axes):
    """As of an array; every axis is named."""
    return Traced(
      self.value.transpose(*axes), [(self, lambda g: g.transpose(*np.argsort(axes)))]
    )

  def swapaxes(self, one, two):
    """As of an array."""
    return Traced(self.value.swapaxes(one, two), [(self, lambda g: g.swapaxes(one, two))])

  @property
  def T(self):
    """The transpose of a matrix."""
    return self.swapaxes(0, 1)

  def sum(self, axis=None, keepdims=False):
    """As of an array."""
    def pull(g):
      """Hands the cotangent to all that was summed."""
      wide = g if keepdims or axis is None else np.expand_dims(g, axis)
      return np.broadcast_to(wide, self.shape)

    return Traced(self.value.sum(axis, keepdims=keepdims), [(self, pull)])

  def mean(self, axis=None, keepdims=False):
    """As of an array."""
    out = self.sum(axis, keepdims)
    return out * (out.value.size / self.value.size)


def stop_gradient(x):
  """Returns the plain array of x, which may be one already."""
  return x.value if isinstance(x, Traced) else x


def shrink(g, shape):
  """Sums a cotangent over the axes along which its array was repeated."""
  g = g.sum(tuple(range(g.ndim - len(shape)))) if g.ndim > len(shape) else g
  repeated = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] > 1)
  return g.sum(repeated, keepdims=True) if repeated else g


def concatenate(parts, axis=0):
  """np.concatenate."""
  values = [stop_gradient(part) for part in parts]
  ends = np.cumsum([value.shape[axis] for value in values])[:-1]
  return Traced(np.concatenate(values, axis), [
    (part, lambda g, i=i: np.split(g, ends, axis)[i])
    for i, part in enumerate(parts) if isinstance(part, Traced)
  ])


def pad(x, widths):
  """np.pad with zeros; a pair (before, after) for every axis."""
  inner = tuple(slice(before, before + n) for (before, _), n in zip(widths, x.shape))
  return Traced(np.pad(x.value, widths), [(x, lambda g: g[inner])])


FUNCTIONS = {np.concatenate: concatenate, np.pad: pad}

# (result, operands) -> for each operand, the function from the result's cotangent to its own.
RULES = {
  np.add: lambda out, a, b: (lambda g: g, lambda g: g),
  np.subtract: lambda out, a, b: (lambda g: g, lambda g: -g),
  np.multiply: lambda out, a, b: (lambda g: g * b, lambda g: g * a),
  np.true_divide: lambda out, a, b: (lambda g: g / b, lambda g: -g * out / b),
  np.power: lambda out, a, b: (lambda g: g * b * a ** (b - 1),),
  np.negative: lambda out, a: (lambda g: -g,),
  np.exp: lambda out, a: (lambda g: g * out,),
  np.tanh: lambda out, a: (lambda g: g * (1 - out * out),),
  np.sqrt: lambda out, a: (lambda g: g / (2 * out),),
  np.matmul: lambda out, a, b: (
    lambda g: g @ b.swapaxes(-1, -2), lambda g: a.swapaxes(-1, -2) @ g
  ),
}


def made_of(root):
  """Returns all Traced arrays that `root` was made of, itself first, each after its uses."""
  found, waiting = {}, [root]
  while waiting:
    node = waiting.pop()
    if node.number not in found:
      found[node.number] = node
      waiting.extend(parent for parent, _ in node.parents)
  return [found[number] for number in sorted(found, reverse=True)]


def value_and_gradient(function, weights):
  """Differentiates a function of named arrays.

  Args:
    function: {key: array} -> (scalar, anything else).
    weights: {key: array}.

  Returns:
    (scalar, anything else, {key: derivative of the scalar, like the array}).
  """
  traced = {key: Traced(value) for key, value in weights.items()}
  out, rest = function(traced)
  cotangents = {out.number: np.ones(())}
  for node in made_of(out):
    g = cotangents[node.number] if not node.parents else cotangents.pop(node.number)
    for parent, pull in node.parents:
      share = pull(g)
      if parent.number in cotangents:
        share = cotangents[parent.number] + share
      cotangents[parent.number] = share
  grads = {
    key: cotangents.get(x.number, np.zeros(x.shape)) for key, x in traced.items()
  }
  return out.value, rest, grads

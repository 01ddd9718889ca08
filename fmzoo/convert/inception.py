"""Official weights of the InceptionV3 of FID, `.pth` of pytorch-fid, to our tree.

Batch norms are folded into kernels and biases, so there is no way back.
"""

import pathlib

import jax
import numpy as np

from fmzoo.convert import names, weights
from fmzoo.models import inception

FILE = 'pt_inception-2015-12-05-6726825d.pth'
URL = f'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}'
BYTES = 95_628_359
SHA256 = '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'
NORM_EPS = 1e-3
NORM = ('weight', 'bias', 'running_mean', 'running_var')
COUNTER = 'bn.num_batches_tracked'  # of training; files have it of every unit or of none


def load(path):
  """Reads the official network.

  Args:
    path: of FILE, or of the same tensors as `.safetensors`; never executed.

  Returns:
    Tree of float32 numpy arrays for models.inception.OFFICIAL.

  Raises:
    ValueError: one line, if there is no such file, it cannot be read or is of another network.
  """
  if not pathlib.Path(path).is_file():
    raise ValueError(
      f'{path} is no file; download {FILE} ({BYTES} bytes, SHA-256 {SHA256}) from {URL} to it'
    )
  with weights.opened(path) as tensors:
    try:
      return from_official(tensors, inception.OFFICIAL)
    except names.Misfit as error:
      raise ValueError(f'{path}: {error}; {FILE} was expected, from {URL}') from error


def from_official(tensors, config):
  """Builds our tree, with batch norms folded in.

  Args:
    tensors: {official key: array, or weights.Tensor}; counters of training may be there or not.
    config: models.inception.Config.

  Returns:
    Tree of float32 numpy arrays.

  Raises:
    names.Misfit: names the keys that are missing or not expected and the tensors of another shape
      or dtype.
  """
  counters = {f'{unit}.{COUNTER}' for unit in config.widths}
  tensors = {key: tensor for key, tensor in tensors.items() if key not in counters}
  tree = names.from_official(entries(config), tensors, abstract(config))
  folded = {'fc': tree['fc']}
  for unit in config.widths:
    *blocks, name = unit.split('.')
    node = folded
    for block in blocks:
      node = node.setdefault(block, {})
    node[name] = fold(tree[unit])
  return folded


def entries(config):
  """Returns the name map to a tree of units that are not folded, by official name.

  Args:
    config: models.inception.Config.
  """
  found = names.linear('fc', ('fc',))
  for unit in config.widths:
    found.append(names.Entry(
      f'{unit}.conv.weight', (unit, 'kernel'), (),
      lambda weight: weight.transpose(2, 3, 1, 0), lambda kernel: kernel.transpose(3, 2, 0, 1),
    ))
    found += [
      names.Entry(f'{unit}.bn.{leaf}', (unit, leaf), (), names.same, names.same) for leaf in NORM
    ]
  return found


def fold(unit):
  """Makes one affine map of a convolution without bias and the batch norm after it.

    kernel <- kernel weight / sqrt(running_var + eps)
    bias <- bias - running_mean weight / sqrt(running_var + eps)

  Args:
    unit: {'kernel': [h, w, I, O], each of NORM: [O]}.

  Returns:
    {'kernel': [h, w, I, O], 'bias': [O]} float32, computed in float64.
  """
  kernel, weight, bias, mean, variance = (
    np.asarray(unit[name], np.float64) for name in ('kernel', *NORM)
  )
  factor = weight / np.sqrt(variance + NORM_EPS)
  return {
    'kernel': (kernel * factor).astype(np.float32),
    'bias': (bias - mean * factor).astype(np.float32),
  }


def abstract(config):
  """Returns shapes and dtypes of the tree that `entries` leads to.

  Args:
    config: models.inception.Config.
  """
  params = jax.eval_shape(inception.make(config).init, jax.random.key(0))
  tree = {'fc': params['fc']}
  for unit in config.widths:
    leaves = params
    for name in unit.split('.'):
      leaves = leaves[name]
    tree[unit] = {'kernel': leaves['kernel'], **dict.fromkeys(NORM, leaves['bias'])}
  return tree

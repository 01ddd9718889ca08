"""Official SoFlow U-Net weights (github.com/zlab-princeton/SoFlow) to our tree and back.

The official weights hold the resampling filter once for every convolution that resamples. It is a
constant: import checks and drops it, export writes it.
"""

import numpy as np

from fmzoo.convert import names
from fmzoo.models import unet

PREFIX = 'network.'
FILTERS = 'filters'  # a leaf beside our parameters that stands for the official constants
FILTER = (np.outer(unet.FILTER, unet.FILTER) / sum(unet.FILTER) ** 2).astype(np.float32)
SIDES = {'encoder': 'enc', 'decoder': 'dec'}
LAST = {('decoder', 'norm'): 'aux_norm', ('decoder', 'conv'): 'aux_conv'}  # after all blocks


def entries(tree):
  """Returns the name map of a U-Net.

  Args:
    tree: our parameters, or their shapes; the network's layers and resolutions are in its keys.
  """
  found, resampling = _embedding('augment' in tree['embedding']), []
  for layer in tree:
    if layer == 'embedding':
      continue
    side, size, kind = layer.split('_')
    official = f'{SIDES[side]}.{size}x{size}_{LAST.get((side, kind), kind)}'
    if kind == 'norm':
      found += _norm(official, (layer,))
    elif kind == 'conv':
      found += _conv(official, (layer,))
    else:
      found += _block(official, layer, tree[layer])
    if kind in ('down', 'up'):
      resampling += [f'{official}.conv0', f'{official}.skip']
  return found + [
    names.Entry(f'{name}.resample_filter', (FILTERS,), (i,), _from_filter, _to_filter)
    for i, name in enumerate(resampling)
  ]


def _embedding(has_augment):
  """Returns the entries of the embedding."""
  found = [
    *names.linear('map_layer0', ('embedding', 'in')),
    *names.linear('map_layer1', ('embedding', 'out')),
  ]
  if has_augment:
    found.append(names.Entry(
      'map_augment.weight', ('embedding', 'augment', 'kernel'), (), names.transpose,
      names.transpose,
    ))
  return found


def _block(official, layer, tree):
  """Returns the entries of one residual block."""
  found = [
    *_norm(f'{official}.norm0', (layer, 'norm_in')),
    *_conv(f'{official}.conv0', (layer, 'conv_in')),
    *names.linear(f'{official}.affine', (layer, 'condition')),
    *_norm(f'{official}.norm1', (layer, 'norm_out')),
    *_conv(f'{official}.conv1', (layer, 'conv_out')),
  ]
  if 'skip' in tree:
    found += _conv(f'{official}.skip', (layer, 'skip'))
  if 'attention' in tree:
    path = (layer, 'attention')
    found += [
      *_norm(f'{official}.norm2', (*path, 'norm')),
      *_conv(f'{official}.proj', (*path, 'proj')),
      names.Entry(f'{official}.qkv.weight', (*path, 'qkv', 'kernel'), (), _from_qkv, _to_qkv),
      names.Entry(
        f'{official}.qkv.bias', (*path, 'qkv', 'bias'), (), _from_interleaved, _to_interleaved
      ),
    ]
  return found


def _norm(official, path):
  """Returns the entries of a group norm."""
  return [
    names.Entry(f'{official}.weight', (*path, 'scale'), (), names.same, names.same),
    names.Entry(f'{official}.bias', (*path, 'bias'), (), names.same, names.same),
  ]


def _conv(official, path):
  """Returns the entries of a convolution."""
  return [
    names.Entry(f'{official}.weight', (*path, 'kernel'), (), _from_conv, _to_conv),
    names.Entry(f'{official}.bias', (*path, 'bias'), (), names.same, names.same),
  ]


def _from_conv(weight):
  """[out, in, k, k] -> [k, k, in, out]."""
  return weight.transpose(2, 3, 1, 0)


def _to_conv(kernel):
  """[k, k, in, out] -> [out, in, k, k]."""
  return kernel.transpose(3, 2, 0, 1)


def _from_interleaved(a):
  """Official place 3 c + j of the last axis to ours, C j + c: j = 0, 1, 2 is query, key, value."""
  return a.reshape(*a.shape[:-1], -1, 3).swapaxes(-1, -2).reshape(a.shape)


def _to_interleaved(a):
  """Inverts `_from_interleaved`."""
  return a.reshape(*a.shape[:-1], 3, -1).swapaxes(-1, -2).reshape(a.shape)


def _from_qkv(weight):
  """[3 C, C, 1, 1] -> [1, 1, C, 3 C] in our order of columns."""
  return _from_interleaved(_from_conv(weight))


def _to_qkv(kernel):
  """[1, 1, C, 3 C] in our order of columns -> [3 C, C, 1, 1]."""
  return _to_conv(_to_interleaved(kernel))


def _from_filter(buffer):
  """[1, 1, 4, 4] -> [4, 4]."""
  return buffer[0, 0]


def _to_filter(array):
  """[4, 4] -> [1, 1, 4, 4]."""
  return array[None, None]


def _with_filters(tree):
  """Returns the tree with a filter for each of the official constants."""
  count = 2 * sum(layer.endswith(('_down', '_up')) for layer in tree)
  return {**tree, FILTERS: np.broadcast_to(FILTER, (count, *FILTER.shape))}


def from_official(tensors, config, channels, abstract):
  """Builds our tree; the keys may lack 'network.' and hold '_orig_mod.' or a leading 'module.'.

  Args:
    tensors: {official key: array, or weights.Tensor}.
    config, channels: as every converter takes them; of a U-Net `abstract` tells all.
    abstract: our tree with a shape and dtype at every leaf.

  Returns:
    Tree of numpy arrays, see names.from_official, which also says what is refused.

  Raises:
    names.Misfit: also if a resampling filter is not the one that we compute with.
  """
  found = entries(abstract)
  tree = names.from_official(found, names.clean(tensors, PREFIX), _with_filters(abstract))
  filters = tree.pop(FILTERS, None)
  for entry in found:
    if entry.path == (FILTERS,) and not np.array_equal(filters[entry.index], FILTER):
      raise names.Misfit(
        f'{entry.official} is {filters[entry.index].tolist()}, expected {FILTER.tolist()}, the only'
        ' filter that this network computes with; use weights that were trained with it'
      )
  return tree


def to_official(params, config, channels):
  """Returns {official key with 'network.': array} of our tree.

  Args:
    params: tree, or gradients of it, beside which the filters stay what they are.
    config, channels: as every converter takes them; of a U-Net `params` tells all.
  """
  tensors = names.to_official(entries(params), _with_filters(params))
  return {PREFIX + key: value for key, value in tensors.items()}

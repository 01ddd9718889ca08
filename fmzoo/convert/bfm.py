"""Official BFM weights (github.com/mlvlab/Blockwise-Flow-Matching) to our tree and back.

The residual network (FRN) is in the weights of stage 2 only, and model.frn_depth must say so.
"""

import dataclasses

from fmzoo.convert import names

FRN_PREFIX = 'frn_blocks.'


def entries(config, channels):
  """Returns the name map of a blockwise network.

  Args:
    config: models.blockwise.Config.
    channels: C, of the latent.
  """
  patch = config.patch

  def reorder(array, order):
    """Permutes the entries of a patch on the last axis: official (C, P, P), ours (P, P, C)."""
    shape = (channels, patch, patch) if order == (1, 2, 0) else (patch, patch, channels)
    lead = array.shape[:-1]
    array = array.reshape(*lead, *shape)
    axes = (*range(len(lead)), *(len(lead) + axis for axis in order))
    return array.transpose(axes).reshape(*lead, -1)

  def ours(array):
    """(C, P, P) to (P, P, C)."""
    return reorder(array, (1, 2, 0))

  def theirs(array):
    """(P, P, C) to (C, P, P)."""
    return reorder(array, (2, 0, 1))

  def embedder(official, path):
    """Returns the entries of a patch embedder."""
    return [
      names.Entry(
        f'{official}.proj.weight', (path, 'kernel'), (),
        lambda weight: ours(weight).T, lambda kernel: theirs(kernel.T),
      ),
      names.Entry(f'{official}.proj.bias', (path, 'bias'), (), names.same, names.same),
    ]

  found = [
    *names.linear('t_embedder.mlp.0', ('time', 'in')),
    *names.linear('t_embedder.mlp.2', ('time', 'out')),
    names.Entry(
      'y_embedder.embedding_table.weight', ('labels', 'table'), (), names.same, names.same
    ),
    *embedder('representation_x_embedder', 'feature_patches'),
    *embedder('x_embedder', 'velocity_patches'),
    *names.linear('linear_projection.0', ('projector', 'in')),
    *names.linear('linear_projection.2', ('projector', 'mid')),
    *names.linear('linear_projection.4', ('projector', 'out')),
    *names.linear('global_adaLN_modulation.1', ('feature_shared',)),
    *names.linear('global_adaLN_modulation2.1', ('velocity_shared',)),
    *names.linear('final_layer.adaLN_modulation.1', ('final', 'modulation')),
    names.Entry(
      'final_layer.linear.weight', ('final', 'linear', 'kernel'), (),
      lambda weight: ours(weight.T), lambda kernel: theirs(kernel).T,
    ),
    names.Entry('final_layer.linear.bias', ('final', 'linear', 'bias'), (), ours, theirs),
  ]
  low_rank = {'adaLN_modulation.1': 'down', 'adaLN_modulation.2': 'up'}
  for i in range(config.feature_depth):
    found += _block(f'representation_blocks.{i}', ('feature_blocks', 'blocks'), (i,), low_rank)
  for s in range(config.segments):
    for i in range(config.segment_depth):
      found += _block(f'velocity_blocks.{s}.{i}', ('segments', 'blocks'), (i, s), low_rank)
  for i in range(config.frn_depth):
    full = {'adaLN_modulation.1': 'modulation'}
    found += _block(f'{FRN_PREFIX}{i}', ('frn', 'blocks'), (i,), full)
  return found


def _block(official, path, index, modulation):
  """Returns the entries of one transformer block."""
  found = []
  for theirs, ours in (
    ('attn.qkv', ('core', 'attn', 'qkv')), ('attn.proj', ('core', 'attn', 'proj')),
    ('mlp.fc1', ('core', 'mlp', 'fc1')), ('mlp.fc2', ('core', 'mlp', 'fc2')),
    *((theirs, (ours,)) for theirs, ours in modulation.items()),
  ):
    found += names.linear(f'{official}.{theirs}', (*path, *ours), index)
  for norm in ('q_norm', 'k_norm'):
    found.append(names.Entry(
      f'{official}.attn.{norm}.weight', (*path, 'core', 'attn', norm, 'weight'), index,
      names.same, names.same,
    ))
  return found


def from_official(tensors, config, channels, abstract):
  """Builds our tree; drops '_orig_mod.' anywhere in a key and a leading 'module.'.

  Args:
    tensors: {official key: array, or weights.Tensor}.
    config: models.blockwise.Config; with frn_depth=0 the tensors may have no FRN, else they must.
    channels: C, of the latent.
    abstract: our tree with a shape and dtype at every leaf.

  Returns:
    Tree of numpy arrays, see names.from_official, which also says what is refused.

  Raises:
    names.Misfit: also if weights and network are of different stages.
  """
  tensors = names.clean(tensors)
  _check_frn(tensors, config, channels)
  return names.from_official(entries(config, channels), tensors, abstract)


def to_official(params, config, channels):
  """Returns {official key: array} of our tree, with the FRN if the tree has one.

  Args:
    params: tree, or gradients of it.
    config: models.blockwise.Config.
    channels: C, of the latent.
  """
  return names.to_official(entries(_with_frn(config, 'frn' in params), channels), params)


def _with_frn(config, has_frn):
  """Returns the config of the weights at hand."""
  return config if has_frn else dataclasses.replace(config, frn_depth=0)


def _check_frn(tensors, config, channels):
  """Says what to do where weights and recipe differ in the stage alone."""
  first_stage = {key for key in tensors if not key.startswith(FRN_PREFIX)}
  has_frn = len(first_stage) < len(tensors)
  if has_frn == bool(config.frn_depth) or first_stage != {
    entry.official for entry in entries(_with_frn(config, False), channels)
  }:
    return
  if has_frn:
    depth = len({key.split('.')[1] for key in tensors if key.startswith(FRN_PREFIX)})
    raise names.Misfit(
      f'model.frn_depth=0 has no room for the feature residual network of these weights'
      f' ({FRN_PREFIX}*, {depth} blocks); use a recipe of stage 2, with model.frn_depth={depth}'
    )
  raise names.Misfit(
    f'model.frn_depth={config.frn_depth} needs a feature residual network ({FRN_PREFIX}*), these'
    ' weights have none: convert them with the recipe of stage 1 (model.frn_depth=0) and start'
    ' stage 2 from that workdir with --config.run.init_from=DIR'
  )

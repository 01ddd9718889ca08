"""Official weights of DINOv2, of both layouts, to our tree and back.

'hf' is `model.safetensors` of facebook/dinov2-small, -base and -large; 'hub' are the files
`dinov2_vit[sbl]14_pretrain.pth` of facebookresearch/dinov2. Models with registers are refused.
"""

import dataclasses
import re

import jax

from fmzoo.convert import names, weights
from fmzoo.models import dinov2

EMBED = {  # ours: theirs, by layout
  'hub': {'cls_token': 'cls_token', 'mask_token': 'mask_token', 'pos_embed': 'pos_embed'},
  'hf': {
    'cls_token': 'embeddings.cls_token', 'mask_token': 'embeddings.mask_token',
    'pos_embed': 'embeddings.position_embeddings',
  },
}
PATCHES = {'hub': 'patch_embed.proj', 'hf': 'embeddings.patch_embeddings.projection'}
BLOCK = {'hub': 'blocks.{}', 'hf': 'encoder.layer.{}'}
QKV = {  # one layer, or three
  'hub': ('attn.qkv',),
  'hf': tuple(f'attention.attention.{name}' for name in ('query', 'key', 'value')),
}
PROJ = {'hub': 'attn.proj', 'hf': 'attention.output.dense'}
SCALE = {'hub': 'ls{}.gamma', 'hf': 'layer_scale{}.lambda1'}
NORM = {'hub': 'norm', 'hf': 'layernorm'}

PREFIXES = ('dinov2.', 'backbone.')  # of the network inside a larger one, whose other parts stay
CHUNKED = re.compile(r'^blocks\.\d+\.(\d+)\.')  # the last number counts through all chunks
FILES = (  # where they are from
  'use model.safetensors of facebook/dinov2-small, -base or -large, or a file'
  ' dinov2_vit[sbl]14_pretrain.pth'
)


def entries(config, layout):
  """Returns the name map of a network.

  Args:
    config: models.dinov2.Config.
    layout: 'hub' or 'hf'.
  """
  found = [
    names.Entry(theirs, ('embed', ours), (), names.same, names.same)
    for ours, theirs in EMBED[layout].items()
  ]
  found += _patches(PATCHES[layout], config.patch)
  for i in range(config.depth):
    found += _block(BLOCK[layout].format(i), layout, i, config.width)
  return found + _norm(NORM[layout], ('norm',))


def _patches(official, patch):
  """Returns the entries of the patches' layer: a convolution [D, 3, P, P] there."""
  channels = dinov2.IMAGE_CHANNELS
  return [
    names.Entry(
      f'{official}.weight', ('embed', 'patches', 'kernel'), (),
      lambda weight: weight.transpose(2, 3, 1, 0).reshape(patch**2 * channels, -1),
      lambda kernel: kernel.reshape(patch, patch, channels, -1).transpose(3, 2, 0, 1),
    ),
    names.Entry(f'{official}.bias', ('embed', 'patches', 'bias'), (), names.same, names.same),
  ]


def _norm(official, path, index=()):
  """Returns the entries of a layer norm."""
  return [
    names.Entry(f'{official}.{theirs}', (*path, ours), index, names.same, names.same)
    for theirs, ours in (('weight', 'scale'), ('bias', 'bias'))
  ]


def _block(official, layout, i, width):
  """Returns the entries of block i."""
  found, index = [], (i,)
  for name in ('norm1', 'norm2'):
    found += _norm(f'{official}.{name}', ('blocks', name), index)
  for name in ('mlp.fc1', 'mlp.fc2'):
    found += names.linear(f'{official}.{name}', ('blocks', *name.split('.')), index)
  for j in (1, 2):
    found.append(names.Entry(
      f'{official}.{SCALE[layout].format(j)}', ('blocks', f'ls{j}', 'gamma'), index,
      names.same, names.same,
    ))
  columns = 3 * width // len(QKV[layout])
  for j, name in enumerate(QKV[layout]):
    part = (*index, ..., slice(j * columns, (j + 1) * columns))  # of kernel [I, O] and bias [O]
    found += names.linear(f'{official}.{name}', ('blocks', 'attn', 'qkv'), part)
  return found + names.linear(f'{official}.{PROJ[layout]}', ('blocks', 'attn', 'proj'), index)


def from_official(tensors, config):
  """Builds our tree, of either layout.

  A leading 'module.' is dropped, and what precedes a network inside a larger one (PREFIXES), whose
  other tensors are left out; blocks numbered by chunk and block are taken.

  Args:
    tensors: {official key: array, or weights.Tensor}.
    config: models.dinov2.Config; its grid is that of the position table in the tensors.

  Returns:
    Tree of numpy arrays, see names.from_official, which also says what is refused.

  Raises:
    names.Misfit: also if the tensors are of another kind of network.
  """
  return _build(_uniform(tensors), config)


def to_official(params, config, layout):
  """Returns {official key: array} of our tree.

  Args:
    params: tree, or gradients of it.
    config: models.dinov2.Config.
    layout: 'hub' or 'hf'.
  """
  return names.to_official(entries(config, layout), params)


def load(path, grid, method='timm'):
  """Reads a DINOv2 of size S, B or L and resamples its positions, once.

  Args:
    path: `.safetensors`, or a file of torch.save (`.pth`, `.pt`, `.bin`); never executed.
    grid: (rows, columns) of patches in the images that it will see.
    method: as of models.dinov2.resample_positions; BFM and REPA use 'timm'.

  Returns:
    (models.dinov2.Config of float32 products at full precision, tree of float32 numpy arrays).

  Raises:
    ValueError: one line, if the file cannot be read or is of another network.
  """
  with weights.opened(path) as tensors:
    try:
      tensors = _uniform(tensors)
      config = _recognise(tensors)
      params = _build(tensors, config)
    except names.Misfit as error:
      raise ValueError(f'{path}: {error}') from error
  embed = params['embed']
  embed['pos_embed'] = dinov2.resample_positions(embed['pos_embed'], grid, method)
  return dataclasses.replace(config, grid=tuple(grid)), params


def _uniform(tensors):
  """Returns tensors with the official names, without those of other parts of a larger network."""
  found = names.clean(tensors)
  for prefix in PREFIXES:
    inside = {
      key.removeprefix(prefix): tensor for key, tensor in found.items() if key.startswith(prefix)
    }
    found = inside or found
  renamed = {}
  for key, tensor in found.items():
    name = CHUNKED.sub(r'blocks.\1.', key)
    if name in renamed:
      raise names.Misfit(f"weights do not fit: '{key}' is one of two keys for {name}; keep one")
    renamed[name] = tensor
  if registers := [key for key in renamed if key.rpartition('.')[2] == 'register_tokens']:
    raise names.Misfit(f"holds '{registers[0]}', a DINOv2 with registers, one without was expected;"
                       f' {FILES}')
  return renamed


def _layout(tensors):
  """Returns the layout whose position table is there."""
  for layout, embed in EMBED.items():
    if embed['pos_embed'] in tensors:
      return layout
  tables = ' or '.join(f"'{embed['pos_embed']}'" for embed in EMBED.values())
  raise names.Misfit(
    f'holds no position table {tables} of a DINOv2, but {len(tensors)} other tensors, such as'
    f' {sorted(tensors)[:1]}; {FILES}'
  )


def _recognise(tensors):
  """Returns the Config of the network with these tensors, from the shape of its position table."""
  table = tensors[EMBED[_layout(tensors)]['pos_embed']]
  try:
    side = dinov2.table_side(table)
  except ValueError as error:
    raise names.Misfit(f'{error}; {FILES}') from error
  width = table.shape[-1]
  if width not in dinov2.SIZES:
    known = ', '.join(map(str, dinov2.SIZES))
    raise names.Misfit(f'is {width} channels wide, expected one of {known}; {FILES}')
  depth, heads = dinov2.SIZES[width]
  return dinov2.Config(
    patch=dinov2.PATCH, width=width, depth=depth, heads=heads, mlp_ratio=dinov2.MLP_RATIO,
    grid=(side, side), dtype='float32', precision='highest',
  )


def _build(tensors, config):
  """Returns our tree of tensors with the official names of a layout."""
  known = entries(config, _layout(tensors))
  official = {entry.official for entry in known}
  missing, others = sorted(official - tensors.keys()), sorted(tensors.keys() - official)
  if len(missing) + len(others) > names.MAX_KEYS:  # another network; its keys would fill screens
    raise names.Misfit(
      f'holds {len(official) - len(missing)} of the {len(official)} tensors of a DINOv2 of width'
      f' {config.width}, without {missing[:1]}, and {len(others)} others, such as {others[:1]};'
      f' {FILES}'
    )
  return names.from_official(
    known, tensors, jax.eval_shape(dinov2.make(config).init, jax.random.key(0))
  )

"""Official weights of Stable Diffusion's VAE (diffusers' AutoencoderKL) to our tree and back.

Those are `diffusion_pytorch_model.safetensors` of stabilityai/sd-vae-ft-ema and -ft-mse. Newer
exports name the attention's layers otherwise, and some keep them as 1 x 1 convolutions: both are
read, neither is written.
"""

import dataclasses
import hashlib
import pathlib
from typing import Any

import jax
import numpy as np

from fmzoo.convert import names, weights
from fmzoo.models import vae

ATTENTION = {'query': 'q', 'key': 'k', 'value': 'v', 'proj_attn': 'proj'}  # theirs: ours
RENAMED = {  # name in newer exports: official name
  'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn',
}
PLACE = '.attentions.0.'
PUBLISHED = {  # SHA-256 of diffusion_pytorch_model.safetensors, as recorded in public repositories
  'a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815': 'stabilityai/sd-vae-ft-mse',
}


@dataclasses.dataclass(frozen=True)
class Matrix:
  """A 1 x 1 convolution [out, in, 1, 1] seen as the weight [out, in] of a linear layer."""

  tensor: Any  # array or weights.Tensor

  @property
  def shape(self):
    """Shape without the two sides of length one."""
    return tuple(self.tensor.shape[:2])

  @property
  def dtype(self):
    """Type of the tensor."""
    return self.tensor.dtype

  def __array__(self, dtype=None, copy=None):
    return np.asarray(self.tensor, dtype).reshape(self.shape)


def entries(config):
  """Returns the name map of an autoencoder.

  Args:
    config: models.vae.Config.
  """
  found = [
    *_convolution('quant_conv', ('encoder', 'quant')),
    *_convolution('post_quant_conv', ('decoder', 'post_quant')),
  ]
  for part, theirs, step, widths, blocks in (
    ('encoder', 'down', 'downsamplers', config.widths, config.layers_per_block),
    ('decoder', 'up', 'upsamplers', config.widths[::-1], config.layers_per_block + 1),
  ):
    found += _convolution(f'{part}.conv_in', (part, 'conv_in'))
    found += _norm(f'{part}.conv_norm_out', (part, 'norm_out'))
    found += _convolution(f'{part}.conv_out', (part, 'conv_out'))
    found += _middle(f'{part}.mid_block', (part, 'middle'))
    before = widths[0]
    for i, width in enumerate(widths):
      level, path = f'{part}.{theirs}_blocks.{i}', (part, f'level_{i}')
      for j in range(blocks):
        found += _residual(f'{level}.resnets.{j}', (*path, f'residual_{j}'), before != width)
        before = width
      if i + 1 < len(widths):
        found += _convolution(f'{level}.{step}.0.conv', (*path, 'resize'))
  return found


def _convolution(official, path):
  """Returns the entries of a convolution: [out, in, H, W] there, [H, W, in, out] here."""
  return [
    names.Entry(
      f'{official}.weight', (*path, 'kernel'), (),
      lambda weight: weight.transpose(2, 3, 1, 0), lambda kernel: kernel.transpose(3, 2, 0, 1),
    ),
    names.Entry(f'{official}.bias', (*path, 'bias'), (), names.same, names.same),
  ]


def _norm(official, path):
  """Returns the entries of a group norm."""
  return [
    names.Entry(f'{official}.{theirs}', (*path, ours), (), names.same, names.same)
    for theirs, ours in (('weight', 'scale'), ('bias', 'bias'))
  ]


def _residual(official, path, has_shortcut):
  """Returns the entries of a residual block."""
  found = []
  for i in '12':
    found += _norm(f'{official}.norm{i}', (*path, f'norm{i}'))
    found += _convolution(f'{official}.conv{i}', (*path, f'conv{i}'))
  if has_shortcut:
    found += _convolution(f'{official}.conv_shortcut', (*path, 'shortcut'))
  return found


def _middle(official, path):
  """Returns the entries of the blocks at the coarsest resolution."""
  attention, ours = f'{official}.attentions.0', (*path, 'attention')
  return [
    *_residual(f'{official}.resnets.0', (*path, 'residual_0'), False),
    *_norm(f'{attention}.group_norm', (*ours, 'norm')),
    *(
      entry for theirs, name in ATTENTION.items()
      for entry in names.linear(f'{attention}.{theirs}', (*ours, name))
    ),
    *_residual(f'{official}.resnets.1', (*path, 'residual_1'), False),
  ]


def from_official(tensors, config):
  """Builds our tree, of either naming of the attention's layers.

  Args:
    tensors: {official key: array, or weights.Tensor}.
    config: models.vae.Config.

  Returns:
    Tree of numpy arrays, see names.from_official, which also says what is refused.

  Raises:
    names.Misfit: also if the tensors are of another kind of network.
  """
  found, known = _uniform(tensors), entries(config)
  official = {entry.official for entry in known}
  known_here, others = official & found.keys(), sorted(found.keys() - official)
  if len(known_here) < len(official) / 2:  # another network; to name all keys would fill screens
    raise names.Misfit(
      f"holds {len(known_here)} of the {len(official)} tensors of Stable Diffusion's autoencoder,"
      f" such as '{min(official)}', and {len(others)} others, such as {others[:1]}; use"
      ' diffusion_pytorch_model.safetensors of stabilityai/sd-vae-ft-ema or -ft-mse'
    )
  return names.from_official(
    known, found, jax.eval_shape(vae.make(config).init, jax.random.key(0))
  )


def to_official(params, config):
  """Returns {official key: array} of our tree.

  Args:
    params: tree, or gradients of it.
    config: models.vae.Config.
  """
  return names.to_official(entries(config), params)


def load(path):
  """Reads the weights of models.vae.SD_VAE.

  Args:
    path: `.safetensors`.

  Returns:
    Tree of numpy arrays, float32.

  Raises:
    ValueError: one line, if the file cannot be read or is of another network.
  """
  with weights.opened(path) as tensors:
    try:
      return from_official(tensors, vae.SD_VAE)
    except names.Misfit as error:
      raise ValueError(f'{path}: {error}') from error


def name_of(path):
  """Returns the name of a file of weights for manifests: the official one if its hash is known."""
  with open(path, 'rb') as content:
    found = hashlib.file_digest(content, 'sha256').hexdigest()
  return PUBLISHED.get(found, pathlib.Path(path).name)


def encoder_hash(params):
  """Returns the SHA-256 of an encoder's weights: equal for files that make the same latents.

  Fine-tuned decoders keep it, and so do other names of the tensors.

  Args:
    params: the part 'encoder' of the tree of models.vae.SD_VAE, float32.
  """
  known = [entry for entry in entries(vae.SD_VAE) if entry.path[0] == 'encoder']
  tensors, digest = names.to_official(known, {'encoder': params}), hashlib.sha256()
  for key in sorted(tensors):
    digest.update(f'{key} {tensors[key].shape}'.encode())
    digest.update(np.ascontiguousarray(tensors[key], '<f4'))
  return digest.hexdigest()


def _uniform(tensors):
  """Returns tensors with the official names and shapes of the attention's layers."""
  renamed = {}
  for key, tensor in tensors.items():
    block, place, layer = key.partition(PLACE)
    name, _, leaf = layer.rpartition('.')
    official = f'{block}{place}{RENAMED.get(name, name)}.{leaf}' if place else key
    if official in renamed:
      raise names.Misfit(
        f"weights do not fit: '{key}' is one of two keys for {official}; keep one of them"
      )
    is_matrix = place and len(tensor.shape) == 4 and tuple(tensor.shape[2:]) == (1, 1)
    renamed[official] = Matrix(tensor) if is_matrix else tensor
  return renamed

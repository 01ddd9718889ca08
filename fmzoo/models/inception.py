"""InceptionV3 as the Frechet inception distance (FID) measures images with, frozen.

The network of the TensorFlow graph of 2015: its pools differ from those of later InceptionV3s, and
it knows 1008 classes. Batch norms are part of the kernels, see convert/inception.py. Images are
0..255 and go through `inputs`. No auxiliary head, no training.

Source: Szegedy et al., arXiv:1512.00567; Heusel et al., arXiv:1706.08500.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fmzoo import shapes

IMAGE_CHANNELS = 3
SIDE = 299  # of the network's images, pixels
CLASSES = 1008
INPUTS = ('tf1', 'ptfid')  # how images are resized and scaled, see `inputs`
SPATIAL_BLOCK, SPATIAL_CHANNELS = 'Mixed_6d', 7  # whose first channels the spatial features are


class Unit(NamedTuple):
  """A convolution, batch norm and ReLU; its width is in Config.widths."""

  name: str  # the official one, within its block
  kernel: tuple = (1, 1)  # height, width
  stride: int = 1
  padding: str = 'SAME'  # or 'VALID'


def average_pool(x):
  """Averages 3 x 3 pixels around each; at borders those inside the image count, and no others."""
  return nn.avg_pool(x, (3, 3), padding='SAME', count_include_pad=False)


def largest_around(x):
  """Takes the largest of 3 x 3 pixels around each; beyond borders there are none."""
  return nn.max_pool(x, (3, 3), padding='SAME')


def halve(x):
  """Takes the largest of 3 x 3 pixels at every second one."""
  return nn.max_pool(x, (3, 3), strides=(2, 2))


def fine(pool):
  """Returns the branches of a block of 35 x 35 pixels."""
  return (
    (Unit('branch1x1'),),
    (Unit('branch5x5_1'), Unit('branch5x5_2', (5, 5))),
    (Unit('branch3x3dbl_1'), Unit('branch3x3dbl_2', (3, 3)), Unit('branch3x3dbl_3', (3, 3))),
    (pool, Unit('branch_pool')),
  )


def middle(pool):
  """Returns the branches of a block of 17 x 17 pixels: rows and columns in turn."""
  return (
    (Unit('branch1x1'),),
    (Unit('branch7x7_1'), Unit('branch7x7_2', (1, 7)), Unit('branch7x7_3', (7, 1))),
    (Unit('branch7x7dbl_1'), Unit('branch7x7dbl_2', (7, 1)), Unit('branch7x7dbl_3', (1, 7)),
     Unit('branch7x7dbl_4', (7, 1)), Unit('branch7x7dbl_5', (1, 7))),
    (pool, Unit('branch_pool')),
  )


def coarse(pool):
  """Returns the branches of a block of 8 x 8 pixels; two of them fork at their end."""
  return (
    (Unit('branch1x1'),),
    (Unit('branch3x3_1'), (Unit('branch3x3_2a', (1, 3)), Unit('branch3x3_2b', (3, 1)))),
    (Unit('branch3x3dbl_1'), Unit('branch3x3dbl_2', (3, 3)),
     (Unit('branch3x3dbl_3a', (1, 3)), Unit('branch3x3dbl_3b', (3, 1)))),
    (pool, Unit('branch_pool')),
  )


STEM = (
  Unit('Conv2d_1a_3x3', (3, 3), 2, 'VALID'), Unit('Conv2d_2a_3x3', (3, 3), 1, 'VALID'),
  Unit('Conv2d_2b_3x3', (3, 3)), halve, Unit('Conv2d_3b_1x1'),
  Unit('Conv2d_4a_3x3', (3, 3), 1, 'VALID'), halve,
)
BLOCKS = {  # name: branches, side by side; steps of a branch, one after the other
  **dict.fromkeys(('Mixed_5b', 'Mixed_5c', 'Mixed_5d'), fine(average_pool)),
  'Mixed_6a': (
    (Unit('branch3x3', (3, 3), 2, 'VALID'),),
    (Unit('branch3x3dbl_1'), Unit('branch3x3dbl_2', (3, 3)),
     Unit('branch3x3dbl_3', (3, 3), 2, 'VALID')),
    (halve,),
  ),
  **dict.fromkeys(('Mixed_6b', 'Mixed_6c', 'Mixed_6d', 'Mixed_6e'), middle(average_pool)),
  'Mixed_7a': (
    (Unit('branch3x3_1'), Unit('branch3x3_2', (3, 3), 2, 'VALID')),
    (Unit('branch7x7x3_1'), Unit('branch7x7x3_2', (1, 7)), Unit('branch7x7x3_3', (7, 1)),
     Unit('branch7x7x3_4', (3, 3), 2, 'VALID')),
    (halve,),
  ),
  'Mixed_7b': coarse(average_pool),
  'Mixed_7c': coarse(largest_around),  # the one block with another pool, in the graph of 2015 too
}


def official_widths():
  """Returns {name of a unit: its channels} of the official network."""
  stem = (32, 32, 64, 80, 192)
  names = [step.name for step in STEM if isinstance(step, Unit)]
  end = (320, 384, 384, 384, 448, 384, 384, 384, 192)
  of_blocks = {  # in the order of BLOCKS
    'Mixed_5b': (64, 48, 64, 64, 96, 96, 32),
    **dict.fromkeys(('Mixed_5c', 'Mixed_5d'), (64, 48, 64, 64, 96, 96, 64)),
    'Mixed_6a': (384, 64, 96, 96),
    **{
      block: (192, w, w, 192, w, w, w, w, 192, 192)
      for block, w in (('Mixed_6b', 128), ('Mixed_6c', 160), ('Mixed_6d', 160), ('Mixed_6e', 192))
    },
    'Mixed_7a': (192, 320, 192, 192, 192, 192),
    **dict.fromkeys(('Mixed_7b', 'Mixed_7c'), end),
  }
  widths = dict(zip(names, stem, strict=True))
  for block, channels in of_blocks.items():
    branches = [unit.name for unit in units(BLOCKS[block])]
    widths |= {f'{block}.{name}': c for name, c in zip(branches, channels, strict=True)}
  return widths


def units(steps):
  """Yields the units of branches or steps, nested or not, in order."""
  for step in steps:
    if isinstance(step, Unit):
      yield step
    elif isinstance(step, tuple):
      yield from units(step)


WIDTHS = official_widths()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Sizes and numerics of an Inception."""

  widths: Mapping  # {name of a unit: channels} of every unit in WIDTHS
  classes: int
  precision: str  # of float32 products: 'default', 'high' (TF32 / three bfloat16 passes), 'highest'


OFFICIAL = Config(widths=WIDTHS, classes=CLASSES, precision='highest')


class Features(NamedTuple):
  """What images are compared by, float32."""

  pool: jax.Array  # [B, D] mean of the last block over its pixels; D = 2048
  # [B, 17 * 17 * 7], for sFID: height, width, channel of the first branch of SPATIAL_BLOCK, which
  # TensorFlow's graph has as mixed_6/conv; fewer channels where the branch is narrower
  spatial: jax.Array


class Inception(NamedTuple):
  """The network as pure functions; images are [B, 299, 299, 3], from `inputs`."""

  init: Callable  # (rng) -> params, float32
  features: Callable  # (params, images) -> Features
  logits: Callable  # (params, pool [B, D]) -> [B, classes] float32
  logits_without_bias: Callable  # the same for the Inception score, which ADM's code computes so


class Convolve(nn.Module):
  """ReLU of a convolution with bias: [B, h, w, C] -> [B, h', w', width]."""

  width: int
  unit: Unit

  @nn.compact
  def __call__(self, x):
    unit, dimensions = self.unit, ('NHWC', 'HWIO', 'NHWC')
    shape = (*unit.kernel, x.shape[-1], self.width)
    kernel = self.param('kernel', nn.initializers.he_normal(), shape, jnp.float32)
    bias = self.param('bias', nn.initializers.zeros, (self.width,), jnp.float32)
    if unit.kernel == (1, 1):  # XLA on CPU takes up to five times as long for these convolutions
      x = x @ kernel[0, 0]
    else:
      x = jax.lax.conv_general_dilated(
        x, kernel, (unit.stride, unit.stride), unit.padding, dimension_numbers=dimensions
      )
    return nn.relu(x + bias[None, None, None])


def run(steps, x, widths):
  """Applies steps one after the other; units in a tuple of their own stand side by side.

  Args:
    steps: of STEM or of a branch in BLOCKS.
    x: [B, h, w, C].
    widths: {name of a unit within this module: channels}.

  Returns:
    [B, h', w', C'].
  """
  for step in steps:
    if isinstance(step, Unit):
      x = Convolve(widths[step.name], step, name=step.name)(x)
    elif isinstance(step, tuple):
      x = jnp.concatenate([run((unit,), x, widths) for unit in step], axis=-1)
    else:
      x = step(x)
  return x


class Block(nn.Module):
  """The branches of a block, side by side: [B, h, w, C] -> [B, h', w', C']; named as in BLOCKS."""

  config: Config

  @nn.compact
  def __call__(self, x):
    prefix = f'{self.name}.'
    widths = {name.removeprefix(prefix): width for name, width in self.config.widths.items()}
    branches = BLOCKS[self.name]
    return jnp.concatenate([run(branch, x, widths) for branch in branches], axis=-1)


class Body(nn.Module):
  """The network up to its classes: images [B, 299, 299, 3] to Features."""

  config: Config

  @nn.compact
  def __call__(self, images):
    widths = self.config.widths
    x = run(STEM, images, widths)  # [B, 35, 35, 192]
    for name in BLOCKS:
      x = Block(self.config, name=name)(x)
      if name == SPATIAL_BLOCK:
        channels = min(widths[f'{name}.branch1x1'], SPATIAL_CHANNELS)  # that branch comes first
        spatial = x[..., :channels].reshape(x.shape[0], -1)
    return Features(x.mean(axis=(1, 2)), spatial)


def make(config):
  """Builds the pure functions of an Inception.

  Args:
    config: Config.

  Returns:
    Inception. Parameters are named as the official ones, 'fc' is the layer of the classes.

  Raises:
    ValueError: if a unit has no width, or a width no unit.
  """
  missing, unknown = WIDTHS.keys() - config.widths.keys(), config.widths.keys() - WIDTHS.keys()
  if missing or unknown:
    raise ValueError(
      f'widths lacks {sorted(missing)[:3]} and has {sorted(unknown)[:3]} that are no units; give'
      f' the channels of the {len(WIDTHS)} units of models.inception.WIDTHS'
    )
  body, head = Body(config), nn.Dense(config.classes)
  last = sum(config.widths[f'Mixed_7c.{name}'] for name in ends('Mixed_7c'))

  def init(rng):
    """See Inception."""
    rng_body, rng_head = jax.random.split(rng)
    params = body.init(rng_body, jnp.zeros((1, SIDE, SIDE, IMAGE_CHANNELS)))['params']
    return {**params, 'fc': head.init(rng_head, jnp.zeros((1, last)))['params']}

  def features(params, images):
    """See Inception."""
    shapes.expect_shape('images', images, None, SIDE, SIDE, IMAGE_CHANNELS)
    with jax.default_matmul_precision(config.precision):
      return body.apply({'params': params}, images)

  def logits(params, pool):
    """See Inception."""
    return logits_without_bias(params, pool) + params['fc']['bias'][None]

  def logits_without_bias(params, pool):
    """See Inception."""
    shapes.expect_shape('pool', pool, None, last)
    return jnp.matmul(pool, params['fc']['kernel'], precision=config.precision)

  return Inception(init, features, logits, logits_without_bias)


def ends(block):
  """Returns the names of the units whose results are those of a block."""
  return [unit.name for branch in BLOCKS[block] for unit in units(branch[-1:])]


def inputs(images, method):
  """Makes the network's images of any: resized to 299 x 299, scaled to about [-1, 1].

  'tf1': positions from the corner, x / 128 - 1, as TensorFlow 1 did; what ADM's evaluator and its
  reference statistics are made with. 'ptfid': positions from pixels' centres, x / 127.5 - 1, what
  pytorch-fid does. They are not interchangeable. Both are bilinear, leave images of this size as
  they are, average nothing where images shrink and round nothing to integers.

  Args:
    images: [B, H, W, 3 or 1] uint8 or float, 0..255, RGB or grey.
    method: one of INPUTS.

  Returns:
    [B, 299, 299, 3] float32.

  Raises:
    ValueError: if there is no such method, or images have another number of channels.
  """
  if method not in INPUTS:
    raise ValueError(f"method='{method}' makes no inputs; use one of {', '.join(INPUTS)}")
  if len(images.shape) != 4 or images.shape[-1] not in (1, IMAGE_CHANNELS):
    raise ValueError(
      f'images has shape {tuple(images.shape)}, expected (any, any, any, 3), or 1 for grey ones'
    )
  x = images.astype(jnp.float32)
  if method == 'ptfid':
    x = 2 * resize(x / 255, method) - 1
  else:
    x = (resize(x, method) - 128) / 128
  return jnp.broadcast_to(x, (*x.shape[:-1], IMAGE_CHANNELS))


def resize(x, method):
  """Resizes [B, H, W, C] float32 to [B, 299, 299, C], along rows first and then along columns."""
  for axis in (2, 1):
    low, part = positions(x.shape[axis], method)
    part = part.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    # Beyond the last pixel there is another one like it.
    a, b = (jnp.take(x, index, axis=axis, mode='clip') for index in (low, low + 1))
    x = a + (b - a) * part
  return x


def positions(n, method):
  """Returns where the 299 results along an axis of n pixels are read.

  In float32, since TensorFlow's positions are, and round to another pixel now and then.

  Returns:
    (low, part), each [299]: the pixel before, int32, and how far it is to the next, float32 in
    [0, 1).
  """
  half, step = np.float32(0.5), np.float32(n) / np.float32(SIDE)
  position = np.arange(SIDE, dtype=np.float32)
  if method == 'ptfid':
    position = np.maximum((position + half) * step - half, np.float32(0))
  else:
    position = position * step
  low = np.floor(position).astype(np.int32)
  return low, position - low.astype(np.float32)

"""Tiny recipes and batches that tests share: width 32, two blocks, digits or random latents.

The U-Net has 16 channels and one resolution: five blocks take as long to compile as everything
else here together.
"""

import pathlib

import jax
import numpy as np
import sklearn.datasets
from PIL import Image

from configs import bfm_digits, bfm_digits_frn, sit_digits, soflow_cifar10, soflow_digits
from fmzoo import build
from fmzoo.convert import inception as inception_weights
from fmzoo.convert import names
from fmzoo.models import blockwise, dinov2, inception, unet, vae
from fmzoo.parallel import mesh as meshes
from tests import golden_weights

RECIPES = {
  'fm': sit_digits, 'soflow': soflow_digits, 'bfm': bfm_digits, 'bfm_frn': bfm_digits_frn,
  'soflow_unet': soflow_cifar10,
}
METHODS = ('fm', 'soflow', 'bfm', 'bfm_frn')  # on digits
EVERY = (*METHODS, 'soflow_unet')  # for what pictures, dropout or augmentation could break
UNET = unet.Config(
  width=8, multipliers=(1, 2), blocks=1, attention_resolutions=(4,), dropout=0.3, augment_dim=6,
  dtype='float32', precision='highest', remat=False,
)
CIFAR_UNET = unet.Config(
  width=128, multipliers=(2, 2, 2), blocks=4, attention_resolutions=(16,), dropout=0.3,
  augment_dim=6, dtype='float32', precision='highest', remat=False,
)
VAE = vae.Config(  # doubles the side of latents
  widths=(8, 16), layers_per_block=1, groups=4, latent_channels=4, dtype='float32',
  precision='highest',
)

DINOV2 = dinov2.Config(
  patch=dinov2.PATCH, width=32, depth=2, heads=2, mlp_ratio=dinov2.MLP_RATIO, grid=(3, 3),
  dtype='float32', precision='highest',
)
INCEPTION = inception.Config(  # neighbours differ in width
  widths={unit: 7 + 5 * i % 4 for i, unit in enumerate(inception.WIDTHS)}, classes=11,
  precision='highest',
)


def config(method, **changes):
  """Returns a recipe's config shrunk to test size; changes are dotted keys with __ for the dot."""
  config = RECIPES[method].get_config()
  config.data.batch_size = 96
  config.run.steps = 4
  config.log.update(log_every_steps=2, preview_every_steps=0, checkpoint_every_steps=2)
  config.sample.update(num_images=10, batch_size=10)
  config.eval.update(name='none', num_images=20, every_steps=0)
  if method == 'soflow_unet':
    config.model.update(
      width=16, multipliers=(1,), blocks=1, attention_resolutions=(), dtype='float32'
    )
    config.data.update(batch_size=4, augment=0.5)
    config.ema.update(decay=0.9, every_steps=3)
  else:
    config.model.update(width=32, heads=2, mlp_ratio=2.0)
  if method in ('bfm', 'bfm_frn'):
    config.model.update(lora_width=8, segments=3, feature_depth=1, projector_width=16)
    config.sample.num_steps = 2
  if method in ('fm', 'soflow'):
    config.model.depth = 2
  if method == 'fm':
    config.sample.num_steps = 4  # and the recipe's unrolled loop over blocks
  elif method != 'soflow_unet':
    config.model.unroll = 1  # a block is compiled once
  for key, value in changes.items():
    section, _, name = key.partition('__')
    config[section][name] = value
  return config


def recipe(method, **changes):
  """Returns the Recipe of `config`."""
  return build.recipe(config(method, **changes))


def mesh(data, fsdp=1, segment=1):
  """Returns a mesh of simulated devices."""
  return meshes.make(meshes.Config(data=data, fsdp=fsdp, segment=segment, mode='jit'))


def init(recipe, seed=0):
  """Returns parameters of a recipe, as one program: eagerly each leaf would compile several."""
  return jax.jit(recipe.method.init)(jax.random.key(seed))


def blockwise_net(method='bfm_frn', **changes):
  """Returns the blockwise network of `config`; its functions are jitted, since eagerly every call
  would compile its scan anew.
  """
  model = dict(config(method, **changes).model)
  del model['name']
  return jitted(blockwise.make(blockwise.Config(**model), (8, 8, 1), 10))


def jitted(net):
  """Jits the functions of a blockwise network; where a batch begins stays static if it is."""
  parts = {name: jax.jit(part) for name, part in net._asdict().items() if callable(part)}

  def velocity_by_row(params, x, c, f, first=0):
    if isinstance(first, int):
      return static(params, x, c, f, first)
    return net.velocity_by_row(params, x, c, f, first)

  static = jax.jit(net.velocity_by_row, static_argnums=4)
  return net._replace(**{**parts, 'velocity_by_row': velocity_by_row})


def batch(size, latent_shape=(8, 8, 1), feature=(16, 64), seed=0):
  """Returns random rows with every input that a method may ask for."""
  rng = np.random.default_rng(seed)
  return {
    'latent': rng.standard_normal((size, *latent_shape)).astype(np.float32),
    'label': rng.integers(0, 10, size).astype(np.int32),
    'feature': rng.standard_normal((size, *feature)).astype(np.float32),
  }


def pictures(size, side=32, seed=0):
  """Returns random rows as data/cifar10.py has them."""
  rng = np.random.default_rng(seed)
  return {
    'pixels': rng.integers(0, 256, (size, side, side, 3), np.uint8),
    'label': rng.integers(0, 10, size).astype(np.int32),
  }


def write_cifar10(folder, rows):
  """Writes `pictures` as the binary version of CIFAR-10, a fifth of them to each file."""
  folder = folder / 'cifar-10-batches-bin'
  folder.mkdir(parents=True)
  written = pictures(rows)
  planes = written['pixels'].transpose(0, 3, 1, 2).reshape(rows, -1)
  records = np.concatenate([written['label'][:, None].astype(np.uint8), planes], axis=1)
  for number, part in enumerate(np.split(records, 5), start=1):
    (folder / f'data_batch_{number}.bin').write_bytes(part.tobytes())


def write_pictures(folder, classes, per_class, size, seed=0):
  """Cuts scikit-learn's two photographs into PNG files, a folder for each class.

  Even classes are cut from the first photograph and odd ones from the second, at random places.

  Args:
    folder: is made.
    classes: how many, or their names.
    per_class: pictures of each.
    size: side, pixels; 427 at most.
    seed: of the places.

  Returns:
    pixels [classes * per_class, size, size, 3] uint8, classes as given, then by name.
  """
  names = [f'class{i:03d}' for i in range(classes)] if isinstance(classes, int) else list(classes)
  photographs = sklearn.datasets.load_sample_images().images
  rng, written = np.random.default_rng(seed), []
  for label, name in enumerate(names):
    photograph = photographs[label % len(photographs)]
    (pathlib.Path(folder) / name).mkdir(parents=True)
    for index in range(per_class):
      top, left = (rng.integers(0, side - size + 1) for side in photograph.shape[:2])
      written.append(photograph[top : top + size, left : left + size])
      Image.fromarray(written[-1]).save(pathlib.Path(folder) / name / f'{index:05d}.png')
  return np.stack(written)


def warm(params, seed=1):
  """Returns params as NumPy arrays, each with noise, so that no zeros of an init hide a fault."""
  rng = np.random.default_rng(seed)

  def noisy(leaf):
    return np.asarray(leaf) + np.float32(0.05) * rng.standard_normal(leaf.shape).astype(np.float32)

  return jax.tree.map(noisy, params)  # in NumPy, since jax would compile a program a shape


def random_vae(seed=0):
  """Returns parameters of an autoencoder of config `VAE`, see `random_like`."""
  return random_like(vae.make(VAE).init, seed)


def random_dinov2(seed=0):
  """Returns parameters of a DINOv2 of config `DINOV2`, see `random_like`."""
  return random_like(dinov2.make(DINOV2).init, seed)


def official_inception(salt=''):
  """Returns {official key: tensor} of an Inception of config `INCEPTION`, without counters."""
  shapes = inception_weights.abstract(INCEPTION)
  zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(), leaf.shape), shapes)
  official = names.to_official(inception_weights.entries(INCEPTION), zeros)
  return {key: golden_weights.tensor(key, zero.shape, salt) for key, zero in official.items()}


def random_inception(salt=''):
  """Returns parameters of an Inception of config `INCEPTION`, of `official_inception`."""
  return inception_weights.from_official(official_inception(salt), INCEPTION)


def random_like(init, seed):
  """Returns parameters as `init` makes them, each leaf random, as numpy arrays."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(init, jax.random.key(0))
  return jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype('float32'), shapes)

"""The rows of a recipe, checked against it, and what the device makes of them before the loss."""

import dataclasses
import os

import jax
from absl import logging

from fmzoo import encoders
from fmzoo import inputs as device_inputs
from fmzoo.convert import vae as official_vae
from fmzoo.models import vae


def data_root():
  """Returns the folder of all data that no key says otherwise of, FMZOO_DATA_DIR or data/."""
  return os.environ.get('FMZOO_DATA_DIR', 'data')


def data_path(data):
  """Returns the folder of a data set that is on disk."""
  return data.path or os.path.join(data_root(), data.name)


def is_aligned(recipe):
  """Says whether the method aligns with features of a frozen encoder."""
  return 'feature' in recipe.method.inputs


def feature_grid(recipe):
  """Returns (rows, columns) of the tokens that features are aligned with."""
  side = recipe.data.latent_size // recipe.network.patch
  return side, side


def image_size(data):
  """Returns the side of the images that latents stand for, pixels."""
  return data.latent_size * vae.SD_VAE.factor


def open_rows(recipe):
  """Opens the rows of `data.name`: `len(rows)`, `rows.batch(indices)` -> {name: numpy array}.

  Args:
    recipe: build.Recipe.

  Raises:
    ValueError: if the data are missing or do not fit the recipe.
  """
  from fmzoo.data import cifar10, digits, latents, pipeline  # grain: not on every accelerator

  data, aligned = recipe.data, is_aligned(recipe)
  rows = {
    'digits': digits.DigitsSource,
    'cifar10': lambda: cifar10.Cifar10Source(data_path(data)),
    'latents': lambda: latents.LatentSource(
      data_path(data), with_feature=aligned and not data.encoder,
      with_image=aligned and bool(data.encoder), with_mirror=data.flip,
    ),
  }[data.name]()
  if data.name == 'latents':
    _check_latents(recipe, rows)
  tokens, width = (feature_grid(recipe), recipe.network.feature_dim) if aligned else ((0, 0), 0)
  pipeline.check_fit(
    rows, latent_shape=data.latent_shape, num_classes=data.num_classes,
    latent_scale=data.latent_scale,
    feature_shape=(tokens[0] * tokens[1], width) if aligned else None,
  )
  return rows


def _check_latents(recipe, rows):
  """Refuses latents of another VAE, or without what flips and alignment need."""
  data, manifest = recipe.data, rows.manifest
  if data.vae and manifest.vae_hash:
    _check_vae(data, rows)
  elif data.vae:
    logging.warning(
      "%s: made by '%s', whose weights nobody recorded; data.vae=%s is taken for the same",
      rows.name, manifest.vae, data.vae,
    )
  if data.flip and not manifest.mirrored:
    raise ValueError(
      f'data.flip=True needs moments of mirror images, {rows.name} has none; prepare it with'
      ' data.flip=True or use False'
    )
  if not is_aligned(recipe):
    return
  if not data.encoder and not manifest.feature_shape:
    raise ValueError(
      f"{rows.name}: no features of a frozen encoder are stored there, method"
      f" '{recipe.method_name}' aligns with them; set data.encoder=FILE to DINOv2's weights to have"
      ' them computed from stored images'
    )
  if not data.encoder and data.flip:
    raise ValueError(
      f'data.flip=True: {rows.name} holds no features of mirror images; set data.encoder=FILE or'
      ' data.flip=False'
    )
  size = image_size(data)
  if data.encoder and tuple(manifest.image_shape) != (size, size, 3):
    found = f'images of {tuple(manifest.image_shape)}' if manifest.image_shape else 'none'
    raise ValueError(
      f'data.encoder={data.encoder} needs stored images of {(size, size, 3)}, {rows.name} has'
      f" {found}; prepare it with a recipe that aligns, or use stored features, data.encoder=''"
    )


def _check_vae(data, rows):
  """Refuses latents that another encoder made than that of `data.vae`."""
  found = official_vae.encoder_hash(load_vae(data)['encoder'])
  if found != rows.manifest.vae_hash:
    raise ValueError(
      f'data.vae={data.vae} has an encoder with hash {found[:12]}, {rows.name} was made by'
      f" '{rows.manifest.vae}' with {rows.manifest.vae_hash[:12]}; set data.vae to that one or"
      ' prepare the latents again'
    )


def load_vae(data):
  """Returns the weights of `data.vae`, {'encoder': tree, 'decoder': tree} of numpy arrays.

  Raises:
    ValueError: one line, if they cannot be read or are of another network.
  """
  try:
    return official_vae.load(data.vae)
  except ValueError as error:
    raise ValueError(f'data.vae: {error}') from error


def autoencoder(data):
  """Returns the pure functions of Stable Diffusion's VAE in `data.vae_dtype`."""
  precision = 'highest' if data.vae_dtype == 'float32' else 'default'
  return vae.make(dataclasses.replace(vae.SD_VAE, dtype=data.vae_dtype, precision=precision))


def abstract_row(recipe):
  """Returns the shapes of a row as `open_rows` would read it, {name: jax.ShapeDtypeStruct}.

  Moments and features are taken to be stored in float16, as `prepare` writes them unless told.
  """
  data, (height, width, channels) = recipe.data, recipe.data.latent_shape
  shapes = {
    'digits': {'latent': (data.latent_shape, 'float32')},
    'cifar10': {'pixels': (data.latent_shape, 'uint8')},
    'latents': {
      'moments': ((*((2,) if data.flip else ()), height, width, 2 * channels), 'float16')
    },
  }[data.name] | {'label': ((), 'int32')}
  if data.name == 'latents' and is_aligned(recipe):
    if data.encoder:
      shapes['image'] = (image_size(data), image_size(data), 3), 'uint8'
    else:
      rows, columns = feature_grid(recipe)
      shapes['feature'] = (rows * columns, recipe.network.feature_dim), 'float16'
  return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def abstract_inputs(recipe):
  """Returns what `inputs` does, with shapes in place of the frozen parameters; reads no file."""
  data, encode, frozen = recipe.data, None, ()
  if is_aligned(recipe) and data.name == 'digits':
    encode, frozen = encoders.abstract_digits(data.num_classes)
  elif is_aligned(recipe) and data.encoder:
    encode, frozen = encoders.abstract_dinov2(
      grid=feature_grid(recipe), width=recipe.network.feature_dim, dtype=recipe.network.dtype
    )
  return device_inputs.make(data.latent_scale, encode, data.augment, data.flip), frozen


def inputs(recipe, rows, workdir):
  """Returns (inputs, frozen): what the device does before the loss, and its frozen parameters.

  Args:
    recipe: build.Recipe.
    rows: of `open_rows`.
    workdir: of the run, where an encoder that is trained for it is kept.
  """
  data, encode, frozen = recipe.data, None, ()
  if is_aligned(recipe) and data.name == 'digits':
    encode, frozen = encoders.digits(workdir, rows, data.num_classes, recipe.run.seed)
  elif is_aligned(recipe) and data.encoder:
    encode, frozen = encoders.dinov2(
      workdir, data.encoder, grid=feature_grid(recipe), width=recipe.network.feature_dim,
      dtype=recipe.network.dtype,
    )
  return device_inputs.make(data.latent_scale, encode, data.augment, data.flip), frozen

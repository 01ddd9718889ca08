"""Frozen encoders whose patch features a method aligns with, ready to run on the device.

`dinov2`: the published one, for images stored beside their latents.
`digits`: there is no published encoder for 8x8 digits, so a small classifier is trained on them at
the start of the run (seconds), frozen, and kept in the workdir for the runs that resume there.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import zipfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import traverse_util

from fmzoo.convert import dinov2 as official_dinov2
from fmzoo.models import digits_encoder
from fmzoo.models import dinov2 as dinov2_model
from fmzoo.parallel import hosts

STREAM = zlib.crc32(b'encoder')  # keeps its random numbers apart from the run's
STEPS, BATCH, LEARNING_RATE = 300, 128, 3e-3  # of the digits encoder: 21 epochs


def fit_digits(images, labels, num_classes, seed):
  """Trains the digits encoder.

  Args:
    images: [n, 8, 8, 1] float32 in [-1, 1].
    labels: [n] int32.
    num_classes: labels are 0 .. num_classes - 1.
    seed: decides the parameters and the order of the images.

  Returns:
    (params, accuracy on the training images).
  """
  tx = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, STEPS))

  def loss(params, images, labels):
    """Cross entropy of the classes."""
    logits = digits_encoder.apply(params, images)[1]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

  @jax.jit
  def fit(rng, images, labels):
    """Returns trained parameters and the share of images they classify rightly."""
    rng_init, rng_rows = jax.random.split(jax.random.fold_in(rng, STREAM))
    params = digits_encoder.init(rng_init, num_classes)

    def step(carry, key):
      """One update on a random batch."""
      params, opt_state = carry
      rows = jax.random.randint(key, (BATCH,), 0, images.shape[0])
      grads = jax.grad(loss)(params, images[rows], labels[rows])
      updates, opt_state = tx.update(grads, opt_state)
      return (optax.apply_updates(params, updates), opt_state), None

    (params, _), _ = jax.lax.scan(
      step, (params, tx.init(params)), jax.random.split(rng_rows, STEPS)
    )
    right = jnp.argmax(digits_encoder.apply(params, images)[1], axis=-1) == labels
    return params, jnp.mean(right)

  params, accuracy = fit(jax.random.key(seed), jnp.asarray(images), jnp.asarray(labels))
  return params, float(accuracy)


def digits(workdir, source, num_classes, seed):
  """Returns (encode, params) of the digits encoder of a workdir, trained now if it has none.

  Args:
    workdir: where `encoder.npz` is kept.
    source: data.digits.DigitsSource.
    num_classes: of the labels.
    seed: of the training.

  Returns:
    encode: (params, batch with 'latent' [B, 8, 8, 1]) -> features [B, 16, F] float32; params: its
      tree.
  """
  path = pathlib.Path(workdir) / 'encoder.npz'
  with hosts.together('digits encoder'):  # one trains it, and all read the same
    if hosts.is_main() and not path.exists():
      _write_digits(path, source, num_classes, seed)
  try:
    with np.load(path) as arrays:
      params = traverse_util.unflatten_dict(dict(arrays), sep='/')
  except (zipfile.BadZipFile, EOFError, ValueError) as error:
    raise ValueError(f'{path} is damaged ({error}); remove it to have it trained anew') from error
  return _encode_digits, params


def abstract_digits(num_classes):
  """Returns `digits` with shapes in place of its parameters."""
  return _encode_digits, jax.eval_shape(
    lambda: digits_encoder.init(jax.random.key(0), num_classes)
  )


def _encode_digits(params, batch):
  """Returns features [B, 16, F] of a batch's 'latent' [B, 8, 8, 1]."""
  return digits_encoder.apply(params, batch['latent'])[0]


def _write_digits(path, source, num_classes, seed):
  """Trains the digits encoder and writes it to a file."""
  images, labels = source.arrays()
  params, accuracy = fit_digits(images, labels, num_classes, seed)
  logging.info(
    'digits encoder trained for %d steps (training accuracy %.4f) and frozen: %s',
    STEPS, accuracy, path,
  )
  params = jax.tree.map(np.asarray, params)
  temporary = path.with_suffix('.tmp.npz')
  np.savez(temporary, **traverse_util.flatten_dict(params, sep='/'))
  os.replace(temporary, path)


def dinov2(workdir, path, *, grid, width, dtype):
  """Returns (encode, params) of DINOv2 as REPA and BFM feed it: images of 14 pixels a token.

  Args:
    workdir: of the run, which keeps a checksum of the weights in `encoder.json`.
    path: official weights, .safetensors or .pth, of ViT-S/B/L.
    grid: (rows, columns) of the tokens.
    width: F that is expected.
    dtype: of its products, 'float32' or 'bfloat16'.

  Returns:
    encode: (params, batch with 'image' [B, h, w, 3] uint8) -> features [B, N, F] float32; params:
      its tree.

  Raises:
    ValueError: one line, if the weights cannot be read, are of another network or width, or not
      those that the run began with.
  """
  try:
    config, params = official_dinov2.load(path, grid)
  except ValueError as error:
    raise ValueError(f'data.encoder: {error}') from error
  if config.width != width:
    raise ValueError(
      f'data.encoder={path} gives features of width {config.width}, not model.feature_dim={width};'
      f' set it to {config.width} or use weights of that width'
    )
  _expect_same(pathlib.Path(workdir) / 'encoder.json', path, params)
  return _encode_dinov2(config, dtype)[1], params


def abstract_dinov2(*, grid, width, dtype):
  """Returns `dinov2` with shapes in place of its parameters.

  Raises:
    ValueError: if no network of the family has this width.
  """
  if width not in dinov2_model.SIZES:
    sizes = ', '.join(map(str, dinov2_model.SIZES))
    raise ValueError(f'model.feature_dim={width} is the width of no DINOv2; use one of {sizes}')
  depth, heads = dinov2_model.SIZES[width]
  net, encode = _encode_dinov2(dinov2_model.Config(
    patch=dinov2_model.PATCH, width=width, depth=depth, heads=heads,
    mlp_ratio=dinov2_model.MLP_RATIO, grid=tuple(grid), dtype=dtype, precision='default',
  ), dtype)
  return encode, jax.eval_shape(net.init, jax.random.key(0))


def _encode_dinov2(config, dtype):
  """Returns (network, encode) in a dtype."""
  precision = 'highest' if dtype == 'float32' else 'default'
  net = dinov2_model.make(dataclasses.replace(config, dtype=dtype, precision=precision))

  def encode(params, batch):
    """Returns the patch features of images."""
    side = config.grid[0] * config.patch
    return net.features(params, dinov2_model.preprocess(batch['image'], side))

  return net, encode


def _expect_same(file, path, params):
  """Compares a frozen encoder with the one that a run began with; writes the file if it is new."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    digest.update(np.ascontiguousarray(leaf))
  values = {'sha256': digest.hexdigest()}
  with hosts.together('data.encoder'):
    if hosts.is_main() and not file.exists():
      temporary = file.with_suffix(f'.{os.getpid()}.tmp')
      temporary.write_text(json.dumps(values))
      os.replace(temporary, file)
  if (found := file.read_text()) != json.dumps(values):
    raise ValueError(
      f'data.encoder={path} has weights with checksum {values["sha256"][:12]}, the run began with'
      f' others ({file}: {found[:30]}...); use those or another --workdir'
    )

"""Moments as the official codes store them: SoFlow's HDF5 file, and REPA's folder that BFM reads.

Both hold [8, h, w] per picture, the mean and then the standard deviation of Stable Diffusion's VAE,
unscaled; rows here are channels last and hold to what fmzoo/data/images.py describes.
"""

import array
import hashlib
import json
import os
import pathlib
import re
import threading

import h5py
import numpy as np
from absl import logging

from fmzoo.data import picture_files

CHANNELS = 4  # of a latent of Stable Diffusion's VAE
DOWN = 8  # pixels of a picture's side to one of its latent's
MOST = 2**31  # labels are below it, to be stored as int32


class SoflowHdf5:
  """SoFlow's file of ImageNet latents, such as imagenet_latent.hdf5.

  Datasets `latents` float32 [N, 8, h, h], `labels` integers [N], and the scalars `amount` = N and
  `latent_size` = h. It does not say how many classes there are.

  Args:
    path: file.

  Raises:
    ValueError: one line, if it is missing, damaged, or holds something else.
  """

  classes, num_classes = (), 0
  vae = "sd-vae-ft-mse (assumed, as SoFlow's)"  # the file does not say
  has_moments = True

  def __init__(self, path):
    self._path, self._lock, self._failure = os.fspath(path), threading.Lock(), None
    try:
      # A lock is not needed to read, and not every network folder offers one.
      file = h5py.File(self._path, 'r', locking='best-effort')
      self._labels = _check_hdf5(file)
      self._latents = file['latents']  # keeps the file open
      self._shape = self._latents.shape
    except (OSError, ValueError, KeyError, RuntimeError) as error:
      problem = ' '.join(str(error).split())
      raise ValueError(
        f'--from={path} cannot be used: {problem}; expected latents as SoFlow stores them, copy or'
        ' write it again'
      ) from error
    self.lowest_classes = int(self._labels.max()) + 1
    self.size = DOWN * self._shape[-1]
    self.crop = f'ADM centre crop to {self.size}'

  def __len__(self):
    return len(self._labels)

  def __getitem__(self, index):
    picture_files.check_index(index, len(self))
    name = self.name_of(index)
    with self._lock:  # h5py lets one thread in at a time anyway
      moments = self._read(index, name)
    moments = _channels_last(moments, self._shape[1:], name)
    return {'moments': moments, 'label': int(self._labels[index])}

  def _read(self, index, name):
    """Returns a row as stored; after a failure of the disk none, as HDF5 would then give zeros."""
    if self._failure:
      raise self._failure
    try:
      return self._latents[index]
    except OSError as error:
      if error.errno:  # what h5py cannot decode has none
        self._failure = error
        raise
      raise picture_files.Unreadable(name, 'its part of the file is damaged') from error
    except RuntimeError as error:
      problem = ' '.join(str(error).split())
      raise ValueError(
        f'--from={self._path}: {name} cannot be read: {problem}; see that the file can be read and'
        ' start again'
      ) from error

  def name_of(self, index):
    """Returns 'row 17'."""
    return f'row {index}'

  def fingerprint(self):
    """Returns hex SHA-256 over shape, bytes of the file, and labels."""
    size = picture_files.file_size(self._path)
    digest = hashlib.sha256(f'SoFlow HDF5 {self._shape} {size}\n'.encode())
    digest.update(self._labels.tobytes())
    return digest.hexdigest()


def _check_hdf5(file):
  """Returns the labels [N] int64 of a file whose parts agree with each other."""
  for name in ('latents', 'labels', 'amount', 'latent_size'):
    if not isinstance(file.get(name), h5py.Dataset):
      raise ValueError(f"it holds no dataset '{name}'")
  latents, labels = file['latents'], file['labels']
  if latents.dtype.newbyteorder('=') != np.float32:
    raise ValueError(f'latents are {latents.dtype}, expected float32')
  for name in ('labels', 'amount', 'latent_size'):
    if file[name].dtype.kind not in 'iu':
      raise ValueError(f'{name} is {file[name].dtype}, expected integers')
  for name in ('amount', 'latent_size'):
    if file[name].shape != ():
      raise ValueError(f'{name} has shape {file[name].shape}, expected one number')
  amount, side = int(file['amount'][()]), int(file['latent_size'][()])
  expected = amount, 2 * CHANNELS, side, side
  if latents.shape != expected:
    raise ValueError(
      f'latents have shape {latents.shape}, amount and latent_size say {expected}'
    )
  if labels.shape != (amount,):
    raise ValueError(f'labels have shape {labels.shape}, amount says {(amount,)}')
  if amount < 1 or side < 1:
    raise ValueError(f'amount={amount}, latent_size={side}, expected 1 or more')
  labels = labels[()]
  outside = (labels < 0) | (labels >= MOST)
  if outside.any():
    row = outside.argmax()
    raise ValueError(f'row {row} has label {labels[row]}, expected 0 to {MOST - 1}')
  return labels.astype(np.int64)


class RepaFolder:
  """REPA's folder: `vae-sd/` with moments and labels, and `images/` with the pictures.

  Both hold files at any depth, and after sorting file i of one belongs to file i of the other;
  where both names end in digits, these must be the same number.
  Moments are .npy [8, size / 8, size / 8]; pictures have `size` x `size` pixels, in a file of
  Pillow's or in .npy [3, size, size] uint8. vae-sd/dataset.json is {"labels": [[name, label], ...]}
  with the names of the moments' files. It does not say how many classes there are.

  Args:
    path: folder.
    size: side of the pictures, pixels.
    with_pixels: False leaves `images/` alone, which may then be missing.

  Raises:
    ValueError: one line, if a part is missing or damaged, or counts, names or numbers do not agree.
  """

  classes, num_classes = (), 0
  vae = "sd-vae-ft-ema (assumed, as BFM's)"  # the folder does not say
  has_moments = True

  def __init__(self, path, size, with_pixels):
    self._path, self._size = os.fspath(path), size
    self.crop = f'ADM centre crop to {size}'
    self._roots, self._sizes = {}, {}  # by folder
    self._moments = self._files('vae-sd', ('.npy',))
    labels = _read_labels(pathlib.Path(path) / 'vae-sd' / 'dataset.json')
    without = [name for name in self._moments if name not in labels]
    if without:
      raise ValueError(
        f'--from={path}: vae-sd/dataset.json has no label for {len(without)} of'
        f' {len(self._moments)} files, such as {picture_files.printable(without[0])}; write it'
        ' again'
      )
    self._labels = np.array([labels[name] for name in self._moments], np.int64)
    self.lowest_classes = int(self._labels.max()) + 1
    self._pictures = []
    if with_pixels:
      self._pictures = self._files('images', (*picture_files.ENDINGS, '.npy'))
      if len(self._pictures) != len(self._moments):
        raise ValueError(
          f'--from={path}: images/ holds {len(self._pictures)} pictures and vae-sd/'
          f' {len(self._moments)} .npy files, expected as many; write the missing ones again'
        )
      self._check_numbers()

  def __len__(self):
    return len(self._moments)

  def __getitem__(self, index):
    picture_files.check_index(index, len(self))
    name, side = self.name_of(index), self._size // DOWN
    data = self._roots['vae-sd'].read(self._moments[index], name)
    moments = picture_files.read_npy(data, name)
    row = {
      'moments': _channels_last(moments, (2 * CHANNELS, side, side), name),
      'label': int(self._labels[index]),
    }
    if self._pictures:
      row['pixels'] = self._read_pixels(self._pictures[index])
    return row

  def name_of(self, index):
    """Returns the path of a row's moments within the folder."""
    return picture_files.printable(f'vae-sd/{self._moments[index]}')

  def fingerprint(self):
    """Returns hex SHA-256 over name and bytes of each file, and the labels."""
    digest = hashlib.sha256(b'REPA')
    for folder, names in (('vae-sd', self._moments), ('images', self._pictures)):
      for name, size in zip(names, self._sizes.get(folder, ())):
        digest.update(b'%b/%b\0%d\n' % (folder.encode(), os.fsencode(name), size))
    digest.update(self._labels.tobytes())
    return digest.hexdigest()

  def _check_numbers(self):
    """Refuses a picture and moments that sorting pairs though their names say otherwise."""
    for picture, moments in zip(self._pictures, self._moments):
      numbers = _number(picture), _number(moments)
      if None not in numbers and numbers[0] != numbers[1]:
        raise ValueError(
          f'--from={self._path}: images/{picture_files.printable(picture)} would be paired with'
          f' vae-sd/{picture_files.printable(moments)}, expected the same number; write what is'
          ' missing again'
        )

  def _files(self, folder, endings):
    """Returns the files with such endings below a folder, relative to it, sorted."""
    path = os.path.join(self._path, folder)
    if not os.path.isdir(path):
      raise ValueError(f'--from={self._path} holds no folder {folder}/; copy it there')
    logging.info('listing files in %s', picture_files.printable(path))
    listing, _ = picture_files.files_below(path, endings)
    found = sorted(
      (os.path.join(below, name), size) for below, files in listing for name, size in files
    )
    if not found:
      raise ValueError(f'--from={self._path}: {folder}/ holds no {", ".join(endings)}; fill it')
    self._roots[folder] = picture_files.Root(path)
    self._sizes[folder] = array.array('q', [size for _, size in found])
    return [name for name, _ in found]

  def _read_pixels(self, picture):
    """Returns a picture [size, size, 3] uint8."""
    name = picture_files.printable(f'images/{picture}')
    data = self._roots['images'].read(picture, name)
    if picture.lower().endswith('.npy'):
      pixels = picture_files.read_npy(data, name)
      if pixels.shape != (3, self._size, self._size) or pixels.dtype != np.uint8:
        raise picture_files.Unreadable(
          name,
          f'it has {pixels.dtype} {pixels.shape}, expected uint8 {(3, self._size, self._size)}',
        )
      return np.ascontiguousarray(np.moveaxis(pixels, 0, -1))
    image = picture_files.read_rgb(data, name)
    if image.size != (self._size, self._size):
      raise picture_files.Unreadable(
        name, f'it has {image.width} x {image.height} pixels, expected {self._size} x {self._size}'
      )
    return np.array(image)


def _number(name):
  """Returns the number that a file's name ends in, None if in something else."""
  digits = re.search('[0-9]+$', os.path.splitext(name)[0])
  return int(digits[0]) if digits else None


def _read_labels(file):
  """Returns {name: label} of dataset.json, names relative to its folder and inside it."""
  try:
    values = json.loads(file.read_bytes())
    pairs = values.get('labels') if isinstance(values, dict) else None
    if not isinstance(pairs, list):
      raise ValueError('it is no {"labels": [[name, label], ...]}')
    labels = {}
    for pair in pairs:
      name, label = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
      if type(name) is not str or type(label) is not int or not 0 <= label < MOST:
        raise ValueError(f'it has {json.dumps(pair)[:80]}, expected [name, label of 0 or more]')
      path = pathlib.PurePosixPath(name)
      if path.is_absolute() or '..' in path.parts or '\\' in name:
        raise ValueError(f'it names {name[:80]!r}, which leads out of its folder')
      labels[name] = label
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f'{file} cannot be used: {error}; copy or write it again') from error
  return labels


def _channels_last(moments, shape, name):
  """Returns moments [h, w, 8] float32 of [8, h, w], checked."""
  if moments.shape != tuple(shape) or moments.dtype.kind != 'f':
    raise picture_files.Unreadable(
      name, f'it has moments {moments.dtype} {moments.shape}, expected float32 {tuple(shape)}'
    )
  moments = np.ascontiguousarray(np.moveaxis(moments, 0, -1), np.float32)
  if not np.isfinite(moments).all():
    raise picture_files.Unreadable(name, 'its moments are not all finite numbers')
  lowest = moments[..., CHANNELS:].min()
  if lowest < 0:
    raise picture_files.Unreadable(
      name, f'it has a standard deviation of {lowest}, expected 0 or more'
    )
  return moments

"""Files of official weights, safetensors or PyTorch's, read a tensor at a time, never executed."""

import contextlib
import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from fmzoo.convert import names, torch_file, torch_pickle

TORCH = ('.pt', '.pth', '.bin')  # endings of files of torch.save; others are safetensors
ENTRIES = {'ema': 'ema_model', 'params': 'model'}  # of a training checkpoint, by sample.weights
DTYPES = {  # numpy's names; others stay as the file has them, and are refused by their name
  'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16', 'I64': 'int64',
  'I32': 'int32', 'I16': 'int16', 'I8': 'int8', 'U8': 'uint8', 'BOOL': 'bool',
}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor in an open file; numpy.asarray reads it."""

  file: Any  # safetensors.safe_open
  key: str
  shape: tuple
  dtype: str

  def __array__(self, dtype=None, copy=None):
    return np.asarray(self.file.get_tensor(self.key), dtype)


@contextlib.contextmanager
def opened(path, chosen='ema'):
  """Opens a file of weights, `with opened(path) as tensors`: {key: Tensor}, mapped and not read.

  Args:
    path: a file of torch.save if it ends as TORCH says, else safetensors.
    chosen: key of ENTRIES, for a training checkpoint; {key: tensor} is taken as it is.

  Raises:
    ValueError: if the file cannot be read, is of another format or lacks that entry.
  """
  if is_torch(path):
    with torch_file.opened(path) as value:
      yield _entry(path, value, chosen)
  else:
    with _opened_safetensors(path) as tensors:
      yield tensors


def is_torch(path):
  """Says whether a path is that of a file of torch.save, by its ending."""
  return pathlib.Path(path).suffix.lower() in TORCH


@contextlib.contextmanager
def _opened_safetensors(path):
  """Opens a safetensors file."""
  import safetensors  # here: who reads no file may lack it

  with contextlib.ExitStack() as stack:
    try:
      file = stack.enter_context(safetensors.safe_open(path, 'numpy'))
      slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
      reason = error.strerror if isinstance(error, OSError) and error.strerror else error
      raise ValueError(
        f'{path} cannot be read as safetensors ({reason}); pass a whole .safetensors file, or one'
        f' of torch.save that ends in {", ".join(TORCH)}'
      ) from error
    yield {
      key: Tensor(
        file, key, tuple(part.get_shape()), DTYPES.get(part.get_dtype(), part.get_dtype())
      )
      for key, part in slices.items()
    }


def _entry(path, value, chosen):
  """Returns the tensors of what torch.save wrote: all of it, or the entry chosen."""
  if _is_weights(value):
    return value
  entries = value if isinstance(value, dict) else {}
  if _is_weights(found := entries.get(ENTRIES[chosen])):
    return found
  listed = names.listed(torch_pickle.show(str(key)) for key in entries)
  remedies = [
    f'--config.sample.weights={name} takes {entry!r}'
    for name, entry in ENTRIES.items() if _is_weights(entries.get(entry))
  ]
  raise ValueError(
    f"{path} has no tensors under '{ENTRIES[chosen]}' (sample.weights='{chosen}') and not tensors"
    f' alone, its keys are {listed or "none"};'
    f' {"".join(remedies) or "pass a file of model.state_dict()"}'
  )


def _is_weights(value):
  """Says whether a value is {key: tensor}."""
  return isinstance(value, dict) and bool(value) and all(
    isinstance(key, str) and isinstance(tensor, torch_pickle.Tensor)
    for key, tensor in value.items()
  )


def expect_writable(path):
  """Refuses to write where a file is already, or a format that cannot be written here."""
  expect_absent(path)
  if is_torch(path):
    _torch(path)


def expect_absent(path):
  """Refuses to write where a file is already."""
  if os.path.lexists(path):
    raise ValueError(f'{path} is there already and stays as it is; name another file')


def save(path, tensors):
  """Writes {key: contiguous numpy array} to a new file, under its name once complete.

  A file that ends as TORCH says is a training checkpoint with the averaged weights alone, which
  takes torch; any other is safetensors.

  Raises:
    ValueError: if there is such a file, or torch is needed and missing.
  """
  import safetensors.numpy

  path = pathlib.Path(path)
  expect_writable(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  try:
    if is_torch(path):
      _save_torch(temporary, tensors)
    else:
      metadata = {'format': 'pt'}  # as PyTorch's tools
      safetensors.numpy.save_file(tensors, temporary, metadata=metadata)
    expect_absent(path)
    os.replace(temporary, path)
  except (safetensors.SafetensorError, RuntimeError) as error:  # the latter of torch
    raise ValueError(
      f'{path} cannot be written ({error}); name a file in a folder with room and write access'
    ) from error
  finally:
    temporary.unlink(missing_ok=True)


def _save_torch(path, tensors):
  """Writes {'ema_model': {key: tensor}}, where the official samplers look for weights."""
  torch = _torch(path)
  averaged = {key: torch.tensor(tensor) for key, tensor in tensors.items()}
  with open(path, 'wb') as file:  # else the name of the file is stored in it
    torch.save({ENTRIES['ema']: averaged}, file)


def _torch(path):
  """Returns the package torch."""
  try:
    import torch
  except ImportError as error:
    raise ValueError(
      f'{path} takes torch to write, which cannot be imported ({error}); pip install torch, or name'
      ' a .safetensors file'
    ) from error
  return torch

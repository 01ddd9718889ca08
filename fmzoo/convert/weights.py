"""Files of official weights: safetensors, read one tensor at a time and never executed."""

import contextlib
import dataclasses
import os
import pathlib
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

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
def opened(path):
  """Opens a safetensors file, `with opened(path) as tensors`: {key: Tensor}, mapped and not read.

  Raises:
    ValueError: if the file cannot be read or is of another format.
  """
  with contextlib.ExitStack() as stack:
    try:
      file = stack.enter_context(safetensors.safe_open(path, 'numpy'))
      slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
      reason = error.strerror if isinstance(error, OSError) and error.strerror else error
      raise ValueError(
        f'{path} cannot be read as safetensors ({reason}); pass a whole .safetensors file: pickles'
        ' (.pt, .pth, .bin) are not opened, safetensors.torch.save_file turns one into it'
      ) from error
    yield {
      key: Tensor(
        file, key, tuple(part.get_shape()), DTYPES.get(part.get_dtype(), part.get_dtype())
      )
      for key, part in slices.items()
    }


def expect_absent(path):
  """Refuses to write where a file is already."""
  if os.path.lexists(path):
    raise ValueError(f'{path} is there already and stays as it is; name another file')


def save(path, tensors):
  """Writes {key: contiguous numpy array} to a new safetensors file, under its name once complete.

  Raises:
    ValueError: if there is such a file.
  """
  path = pathlib.Path(path)
  expect_absent(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  try:
    safetensors.numpy.save_file(tensors, temporary, metadata={'format': 'pt'})  # as PyTorch's tools
    expect_absent(path)
    os.replace(temporary, path)
  except safetensors.SafetensorError as error:
    raise ValueError(
      f'{path} cannot be written ({error}); name a file in a folder with room and write access'
    ) from error
  finally:
    temporary.unlink(missing_ok=True)

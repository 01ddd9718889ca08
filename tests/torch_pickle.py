"""Files as torch.save lays them out, written without torch: for tests, hostile files included.

Stand-ins for torch's modules are in sys.modules only while something is pickled.
"""

import collections
import io
import pickle
import sys
import types
import zipfile
from typing import Any, NamedTuple
from unittest import mock

import ml_dtypes
import numpy as np

TAGS = {  # dtype: name of its storage class
  'float32': 'FloatStorage', 'float64': 'DoubleStorage', 'float16': 'HalfStorage',
  'bfloat16': 'BFloat16Storage', 'int64': 'LongStorage', 'int32': 'IntStorage',
  'int16': 'ShortStorage', 'int8': 'CharStorage', 'uint8': 'ByteStorage', 'bool': 'BoolStorage',
}
DTYPES = {**{name: np.dtype(name) for name in TAGS if name != 'bfloat16'},
          'bfloat16': np.dtype(ml_dtypes.bfloat16)}
LEGACY_HEAD = (0x1950A86A20F9469CFC6C, 1001, {'protocol_version': 1001, 'little_endian': True})


class View(NamedTuple):
  """A tensor over elements that others may share."""

  elements: Any  # [N], its identity is the storage
  offset: Any
  shape: Any
  strides: Any
  is_parameter: bool = False
  count: Any = None  # elements to claim; None is N
  tag: str = ''  # storage class to claim; '' is that of the dtype


def view(array):
  """Returns the View of a whole array, in C order."""
  array = np.asarray(array)
  strides = tuple(stride // array.itemsize for stride in np.empty(array.shape, array.dtype).strides)
  return View(np.ravel(array), 0, array.shape, strides)


def views(value):
  """Returns nested dicts and lists with a `view` in place of every array."""
  if isinstance(value, dict):
    return {key: views(item) for key, item in value.items()}
  if isinstance(value, list):
    return [views(item) for item in value]
  return view(np.asarray(value)) if isinstance(value, (np.ndarray, np.generic)) else value


def _stand_ins():
  """Returns {module name: module} with what pickles of torch.save name."""
  torch, utils = types.ModuleType('torch'), types.ModuleType('torch._utils')
  torch._utils = utils
  for name in TAGS.values():
    setattr(torch, name, type(name, (), {'__module__': 'torch'}))
  for name in ('_rebuild_tensor_v2', '_rebuild_parameter'):
    function = types.FunctionType((lambda *_: None).__code__, {}, name)
    function.__module__, function.__qualname__ = 'torch._utils', name
    setattr(utils, name, function)
  return {'torch': torch, 'torch._utils': utils}


class _Storage(NamedTuple):
  view: View


class _Pickler(pickle.Pickler):
  """Pickles arrays and Views as tensors; remembers their elements."""

  def __init__(self, stream, modules, protocol, legacy):
    super().__init__(stream, protocol)
    self.torch, self.legacy = modules['torch'], legacy
    self.storages = {}  # id of the elements, which are kept: (key, elements)

  def persistent_id(self, value):
    """Returns what refers to a storage."""
    if not isinstance(value, _Storage):
      return None
    elements = value.view.elements
    key, _ = self.storages.setdefault(id(elements), (str(len(self.storages)), elements))
    tag = getattr(self.torch, value.view.tag or TAGS[elements.dtype.name])
    count = len(elements) if value.view.count is None else value.view.count
    return ('storage', tag, key, 'cpu', count, *([None] if self.legacy else []))

  def reducer_override(self, value):
    """Returns the call that makes a tensor."""
    if isinstance(value, np.ndarray):
      value = view(value)
    if not isinstance(value, View):
      return NotImplemented
    utils, hooks = self.torch._utils, collections.OrderedDict()
    tensor = (
      utils._rebuild_tensor_v2,
      (_Storage(value), value.offset, value.shape, value.strides, False, hooks),
    )
    if not value.is_parameter:
      return tensor
    return utils._rebuild_parameter, (value._replace(is_parameter=False), True, hooks)


def dumps(value, *, protocol=2, legacy=False):
  """Returns (pickle, [elements of storage 0, ...]) of a value with arrays or Views in it."""
  stream, modules = io.BytesIO(), _stand_ins()
  with mock.patch.dict(sys.modules, modules):
    pickler = _Pickler(stream, modules, protocol, legacy)
    pickler.dump(value)
  return stream.getvalue(), [elements for _, elements in pickler.storages.values()]


def archive(pickled, storages=(), *, byteorder=b'little', compression=zipfile.ZIP_STORED, extra=()):
  """Returns a file of zip form.

  Args:
    pickled: bytes of data.pkl.
    storages: arrays or bytes of data/0, data/1, ...
    byteorder: of the member of that name, or None for none.
    compression: of every member.
    extra: (name, bytes) pairs of further members.
  """
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, 'w', compression) as file:
    file.writestr('archive/data.pkl', pickled)
    if byteorder is not None:
      file.writestr('archive/byteorder', byteorder)
    for i, elements in enumerate(storages):
      file.writestr(f'archive/data/{i}', bytes(elements))
    for name, data in (('archive/version', b'3\n'), *extra):
      file.writestr(name, data)
  return stream.getvalue()


def zip_form(value, *, protocol=2, **options):
  """Returns a file of zip form with a value; the options are those of `archive`."""
  pickled, storages = dumps(value, protocol=protocol)
  return archive(pickled, [elements.tobytes() for elements in storages], **options)


def legacy_form(value, *, head=LEGACY_HEAD, keys=None, counts=None):
  """Returns a file of legacy form with a value; head, keys and counts of storages can be false."""
  pickled, storages = dumps(value, legacy=True)
  keys = [str(i) for i in range(len(storages))] if keys is None else keys
  counts = [len(elements) for elements in storages] if counts is None else counts
  parts = [*(pickle.dumps(part, 2) for part in head), pickled, pickle.dumps(keys, 2)]
  for count, elements in zip(counts, storages):
    parts += [np.int64(count).tobytes(), elements.tobytes()]
  return b''.join(parts)


def stand_in():
  """Returns a module `torch` that can make tensors of arrays and save them."""
  torch = types.ModuleType('torch')
  torch.tensor = np.array
  torch.save = lambda value, file: file.write(zip_form(value))
  return torch

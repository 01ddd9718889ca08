"""Pickles of torch.save, interpreted opcode by opcode: no class is looked up, nothing is called.

A pickle can make dicts, lists, tuples, numbers, strings and tensors. Python's own unpickler is not
used even with an allow-list: its memo and the hashes of nested keys can be made to take any amount
of memory and time. Here both grow with the length of the pickle alone.
"""

import dataclasses
import math
import pickletools
from typing import Any

import ml_dtypes
import numpy as np

STORAGES = {  # storage classes, and dtypes of their elements
  'torch.FloatStorage': np.dtype('<f4'), 'torch.DoubleStorage': np.dtype('<f8'),
  'torch.HalfStorage': np.dtype('<f2'), 'torch.BFloat16Storage': np.dtype(ml_dtypes.bfloat16),
  'torch.LongStorage': np.dtype('<i8'), 'torch.IntStorage': np.dtype('<i4'),
  'torch.ShortStorage': np.dtype('<i2'), 'torch.CharStorage': np.dtype('i1'),
  'torch.ByteStorage': np.dtype('u1'), 'torch.BoolStorage': np.dtype('?'),
}
MAX_DIMS = 32
MAX_KEY = 2**31  # of numbers that are keys of a dict
CONSTANTS = {  # opcodes whose argument is the value
  'BININT', 'BININT1', 'BININT2', 'INT', 'LONG', 'LONG1', 'LONG4', 'FLOAT', 'BINFLOAT',
  'UNICODE', 'BINUNICODE', 'SHORT_BINUNICODE', 'STRING', 'BINSTRING', 'SHORT_BINSTRING',
}
VALUES = {  # opcodes without an argument that make a value
  'NONE': lambda: None, 'NEWTRUE': lambda: True, 'NEWFALSE': lambda: False,
  'EMPTY_DICT': dict, 'EMPTY_LIST': list, 'EMPTY_TUPLE': tuple,
}
TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}
TO_MEMO = {'PUT', 'BINPUT', 'LONG_BINPUT', 'MEMOIZE'}
FROM_MEMO = {'GET', 'BINGET', 'LONG_BINGET'}
IGNORED = {'PROTO', 'FRAME', 'STOP'}


class Refused(ValueError):
  """A file holds something that is not taken."""


@dataclasses.dataclass(eq=False)
class Storage:
  """Elements in a file, of which tensors are views."""

  key: str
  dtype: np.dtype
  count: int  # elements
  start: int | None = None  # byte of the file; None until it is found

  @property
  def size(self):
    """Bytes."""
    return self.count * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
  """A tensor in an open file; numpy.asarray reads it."""

  file: Any  # mmap.mmap
  storage: Storage
  offset: int  # first element in the storage
  shape: tuple
  strides: tuple  # in elements

  @property
  def dtype(self):
    """Its name in numpy."""
    return self.storage.dtype.name

  def __array__(self, dtype=None, copy=None):
    kind = self.storage.dtype
    first = self.storage.start + self.offset * kind.itemsize
    elements = np.frombuffer(self.file, kind, reach(self.shape, self.strides), first)
    strides = [stride * kind.itemsize for stride in self.strides]
    view = np.lib.stride_tricks.as_strided(elements, self.shape, strides, writeable=False)
    return np.array(view, dtype, order='C')


@dataclasses.dataclass(frozen=True, eq=False)
class Global:
  """A class or function that a pickle may name: the name alone."""

  name: str


class Machine:
  """Runs the pickles of one file."""

  def __init__(self, file, locate):
    """Begins with no storage.

    Args:
      file: mmap.mmap, for the tensors.
      locate: (Storage) -> None, called once for each; may leave its start for later.
    """
    self.storages = {}  # key: Storage
    self._file, self._locate = file, locate
    self._stack, self._marks, self._memo = [], [], {}

  def run(self, stream):
    """Returns the value of the pickle at the stream's position and leaves it behind the pickle.

    Raises:
      Refused: if the pickle is damaged, or names anything but tensors and OrderedDict.
      ValueError: of pickletools, if it is no pickle.
    """
    self._stack, self._marks, self._memo = [], [], {}
    for opcode, argument, _ in pickletools.genops(stream):
      name = opcode.name
      if name in CONSTANTS:
        self._stack.append(argument)
      elif name in VALUES:
        self._stack.append(VALUES[name]())
      elif name in TO_MEMO:
        self._memo[len(self._memo) if argument is None else argument] = self._top()
      elif name in FROM_MEMO:
        self._recall(argument)
      elif name in TUPLES:
        self._stack.append(tuple(self._pop(TUPLES[name])))
      elif name in ACTIONS:
        ACTIONS[name](self, argument)
      elif name not in IGNORED:
        raise Refused(f'opcode {name} in its pickle, which torch.save does not write')
    (value,) = self._pop(1)
    return value

  def _top(self):
    """Returns the last value."""
    if not self._stack:
      raise Refused('its pickle is damaged: a value is missing')
    return self._stack[-1]

  def _pop(self, count):
    """Takes the last values."""
    if len(self._stack) < count:
      raise Refused('its pickle is damaged: a value is missing')
    values = self._stack[-count:]
    del self._stack[-count:]
    return values

  def _pop_mark(self):
    """Takes the values since the last mark."""
    if not self._marks:
      raise Refused('its pickle is damaged: a mark is missing')
    start = self._marks.pop()
    values = self._stack[start:]
    del self._stack[start:]
    return values

  def _recall(self, argument):
    """Puts down a value of the memo."""
    if argument not in self._memo:
      raise Refused('its pickle is damaged: a value is missing')
    self._stack.append(self._memo[argument])

  def _mark(self, _):
    """Notes where a list of values begins."""
    self._marks.append(len(self._stack))

  def _tuple(self, _):
    """Puts down the values since the mark as a tuple."""
    self._stack.append(tuple(self._pop_mark()))

  def _list(self, _):
    """Puts them down as a list."""
    self._stack.append(self._pop_mark())

  def _dict(self, _):
    """Puts them down as a dict."""
    self._stack.append(_fill({}, self._pop_mark()))

  def _append(self, _):
    """Adds a value to the list below it."""
    values = self._pop(1)
    _expect(self._top(), 'list', list).extend(values)

  def _appends(self, _):
    """Adds the values since the mark to the list below it."""
    values = self._pop_mark()
    _expect(self._top(), 'list', list).extend(values)

  def _set_item(self, _):
    """Adds a key and a value to the dict below them."""
    pair = self._pop(2)
    _fill(_expect(self._top(), 'dict', dict), pair)

  def _set_items(self, _):
    """Adds keys and values since the mark to the dict below it."""
    pairs = self._pop_mark()
    _fill(_expect(self._top(), 'dict', dict), pairs)

  def _global(self, argument):
    """Puts down an allowed name; 'module name' is the argument."""
    self._stack.append(_allowed(*argument.split(' ', 1)))

  def _stack_global(self, _):
    """Puts down an allowed name, of the module and name below."""
    module, name = (_expect(part, 'name', str) for part in self._pop(2))
    self._stack.append(_allowed(module, name))

  def _instance(self, argument):
    """Refuses an old-style instance, by its class if that is not allowed."""
    _allowed(*argument.split(' ', 1))
    raise Refused('opcode INST in its pickle, which torch.save does not write')

  def _reduce(self, _):
    """Stands for a call of an allowed name."""
    function, arguments = self._pop(2)
    name = _expect(function, 'function', Global).name
    _expect(arguments, 'tuple of arguments', tuple)
    if name == 'collections.OrderedDict':
      _expect_length(arguments, 0)  # its items come one by one
      self._stack.append({})
    elif name == 'torch._utils._rebuild_parameter':
      self._stack.append(_expect(_expect_length(arguments, 3)[0], 'tensor', Tensor))
    elif name == 'torch._utils._rebuild_tensor_v2':
      self._stack.append(self._tensor(*_expect_length(arguments, 6, 7)[:4]))
    else:
      raise Refused(f'a call of {name} in its pickle, which torch.save does not write')

  def _build(self, _):
    """Drops the attributes of an OrderedDict, such as _metadata."""
    self._pop(1)
    _expect(self._top(), 'OrderedDict', dict)

  def _persistent(self, _):
    """Puts down the storage of ('storage', class, key, place, count[, None])."""
    (identity,) = self._pop(1)
    identity = _expect_length(_expect(identity, 'storage', tuple), 5, 6)
    kind, tag, key, _, count, *view = identity
    if kind != 'storage' or any(part is not None for part in view):
      raise Refused('a reference in its pickle that is no storage, or is a view of one')
    tag, key, count = _expect(tag, 'class', Global), _expect(key, 'key', str), _count(count)
    if tag.name not in STORAGES:
      raise Refused(f'a storage of class {tag.name} in its pickle')
    storage = Storage(key, STORAGES[tag.name], count)
    known = self.storages.setdefault(key, storage)
    if (known.dtype, known.count) != (storage.dtype, count):
      raise Refused(
        f'storage {show(key)} is {known.dtype}[{known.count}] and {storage.dtype}[{count}] in it'
      )
    if known is storage:
      self._locate(storage)
    self._stack.append(known)

  def _tensor(self, storage, offset, shape, strides):
    """Returns a tensor that lies within its storage."""
    _expect(storage, 'storage', Storage)
    _expect(shape, 'shape', tuple), _expect(strides, 'strides', tuple)
    if len(shape) != len(strides) or len(shape) > MAX_DIMS:
      raise Refused(
        f'a tensor of {len(shape)} dimensions with {len(strides)} strides, expected as many and at'
        f' most {MAX_DIMS}'
      )
    offset, *numbers = (_count(number) for number in (offset, *shape, *strides))
    shape, strides = tuple(numbers[: len(shape)]), tuple(numbers[len(shape) :])
    if offset + reach(shape, strides) > storage.count:
      raise Refused(
        f'a tensor of shape {shape} that goes beyond the {storage.count} elements of its storage'
        f' {show(storage.key)}'
      )
    # A stride of 0 repeats elements: without a limit, a tensor of any size in a small file.
    if math.prod(max(n, 1) for n in shape) * storage.dtype.itemsize > len(self._file):
      raise Refused(f'a tensor of shape {shape} that is larger than the file')
    return Tensor(self._file, storage, offset, shape, strides)


ACTIONS = {
  'MARK': Machine._mark, 'TUPLE': Machine._tuple, 'LIST': Machine._list, 'DICT': Machine._dict,
  'APPEND': Machine._append, 'APPENDS': Machine._appends, 'SETITEM': Machine._set_item,
  'SETITEMS': Machine._set_items, 'GLOBAL': Machine._global,
  'STACK_GLOBAL': Machine._stack_global, 'INST': Machine._instance, 'REDUCE': Machine._reduce,
  'BUILD': Machine._build, 'BINPERSID': Machine._persistent,
}
ALLOWED = {
  'collections.OrderedDict', 'torch._utils._rebuild_tensor_v2', 'torch._utils._rebuild_parameter',
  *STORAGES,
}


def show(text):
  """Returns a string or bytes of a file as a message can hold them: short, printable."""
  return ascii(text[:80])


def reach(shape, strides):
  """Returns how many elements of its storage a tensor spans, from its first to its last."""
  return 0 if 0 in shape else 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))


def _allowed(module, name=''):
  """Returns what stands for a name, if it is allowed."""
  # No allowed name has a dot: 'torch' and '_utils._rebuild_tensor_v2' are not such a pair.
  dotted = f'{module}.{name}'
  if dotted not in ALLOWED or '.' in name:
    raise Refused(f'it refers to {show(dotted)}, which is not a tensor and is not executed')
  return Global(dotted)


def _fill(target, pairs):
  """Puts key, value, key, value, ... into a dict."""
  if len(pairs) % 2:
    raise Refused('its pickle is damaged: a value is missing')
  for key, value in zip(pairs[::2], pairs[1::2]):
    if not (isinstance(key, str) or (isinstance(key, int) and abs(key) < MAX_KEY)):
      raise Refused(
        f'a dict with a key of type {type(key).__name__}, expected strings and numbers below 2**31'
      )
    target[key] = value
  return target


def _expect(value, what, kind):
  """Returns a value of a type."""
  if not isinstance(value, kind):
    raise Refused(f'its pickle is damaged: no {what} where one is expected')
  return value


def _expect_length(values, *lengths):
  """Returns values if there are as many as expected."""
  if len(values) not in lengths:
    raise Refused(f'its pickle is damaged: {len(values)} values, expected {lengths[0]}')
  return values


def _count(value):
  """Returns a number that can count elements."""
  if type(value) is not int or not 0 <= value < 2**63:
    raise Refused('its pickle is damaged: a size that is no number of elements')
  return value

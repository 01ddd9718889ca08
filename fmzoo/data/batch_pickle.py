"""The pickles of CIFAR-10, read without `pickle`: none of their code runs, and none of it is here.

An interpreter of the few opcodes that a dict of a NumPy array, numbers and text needs.
"""

MAX_OPCODES = 200_000  # a batch has 30,000, or 90,000 where Python 3 spells the bytes of Python 2
MAX_NAME = 100  # bytes of a key or of a line


class Object:
  """Stands for an object of a pickle: keeps how it is made and makes nothing."""

  def __init__(self, name, args=None):
    self.name, self.args, self.state = name, args, None


class Pickle:
  """Reads the opcodes of protocol 2 that Python 2 and 3 write for a batch; refuses all else.

  pickle.Unpickler, with an allow-list too, allots its memo by an index in the file, and hashes
  nested tuples: a small file takes gigabytes, overflows the C stack or never ends. Here steps are
  counted, only short text is hashed, and memory is a few times the size of the file. What is
  returned may still be nested deeply: do not print, compare or convert it before its type is known.

  Raises:
    ValueError: what was found, one line of less than 200 letters.
  """

  GLOBALS = ('numpy.core.multiarray._reconstruct', 'numpy.ndarray', 'numpy.dtype', '_codecs.encode')

  def __init__(self, content):
    self.content, self.position = content, 0
    self.stack, self.marks, self.memo = [], [], {}
    self.encodable = len(content)  # letters that _codecs.encode may still get

  def load(self):
    """Returns the object of the pickle."""
    for _ in range(MAX_OPCODES):
      opcode = self.take(1)
      if opcode == b'.':
        return self.last(1)[0]
      if opcode not in self.OPCODES:
        raise ValueError(f'it has opcode {opcode!r}, which no such batch needs')
      method, *args = self.OPCODES[opcode]
      method(self, *args)
    raise ValueError(f'it has more than {MAX_OPCODES} opcodes')

  def take(self, count):
    """Returns the next bytes of the file."""
    part = self.content[self.position : self.position + count]
    if len(part) < count:
      raise ValueError('it ends too early')
    self.position += count
    return part

  def number(self, size, signed=False):
    """Returns the next number of the file, of so many bytes."""
    return int.from_bytes(self.take(size), 'little', signed=signed)

  def line(self):
    """Returns the next line of the file."""
    end = self.content.find(b'\n', self.position, self.position + MAX_NAME)
    if end < 0:
      raise ValueError(f'it has a name without an end in {MAX_NAME} bytes')
    return self.take(end + 1 - self.position)[:-1].decode('latin1')

  def last(self, count=None):
    """Takes the newest values from the stack: so many, or those since the newest mark."""
    if count is None:
      start = self.marks.pop() if self.marks else -1
    else:
      start = len(self.stack) - count
    if start < 0:
      raise ValueError('it asks for values that it has not given')
    values = self.stack[start:]
    del self.stack[start:]
    return values

  def top(self, kind):
    """Returns the newest value of the stack, which stays there."""
    if not self.stack or type(self.stack[-1]) is not kind:
      raise ValueError(f'it changes a {kind.__name__.lower()} where there is none')
    return self.stack[-1]

  def check_protocol(self):
    """PROTO: 2 and no other."""
    if (protocol := self.number(1)) != 2:
      raise ValueError(f'it is of protocol {protocol}, expected 2')

  def mark(self):
    """MARK: remembers where the values of a container begin."""
    self.marks.append(len(self.stack))

  def put(self, size):
    """BINPUT and LONG_BINPUT: remembers the top of the stack."""
    index, value = self.number(size), self.last(1)[0]
    self.memo[index] = value
    self.stack.append(value)

  def get(self, size):
    """BINGET and LONG_BINGET: pushes what was remembered."""
    index = self.number(size)
    if index not in self.memo:
      raise ValueError(f'it asks for number {index} of its memo, which it has not put there')
    self.stack.append(self.memo[index])

  def push(self, value):
    """Pushes the constant of an opcode."""
    self.stack.append(value)

  def push_new(self, kind):
    """Pushes a new empty container."""
    self.stack.append(kind())

  def push_number(self, size, signed=False):
    """Pushes an integer."""
    self.stack.append(self.number(size, signed))

  def push_long(self):
    """Pushes a long integer."""
    self.stack.append(self.number(self.number(1), signed=True))

  def push_bytes(self, size):
    """Pushes bytes."""
    self.stack.append(self.take(self.number(size)))

  def push_text(self):
    """Pushes text."""
    self.stack.append(self.take(self.number(4)).decode())

  def push_tuple(self, count=None):
    """Pushes a tuple of the topmost values."""
    self.stack.append(tuple(self.last(count)))

  def push_global(self):
    """GLOBAL: pushes a stand-in, if the name is allowed."""
    name = f'{self.line()}.{self.line()}'
    if name not in self.GLOBALS:
      raise ValueError(f'it asks for {name!r}, which no such batch needs')
    self.stack.append(Object(name))

  def extend(self, count=None):
    """APPEND and APPENDS."""
    values = self.last(count)
    self.top(list).extend(values)

  def update(self, count=None):
    """SETITEM and SETITEMS."""
    values = self.last(count)
    target = self.top(dict)
    for key, value in zip(values[::2], values[1::2]):
      if type(key) not in (bytes, str) or len(key) > MAX_NAME:
        raise ValueError(f'it has a key that is no text of at most {MAX_NAME} letters')
      target[key] = value

  def reduce(self):
    """REDUCE: puts a stand-in, or the text it encodes, for the call."""
    args, = self.last(1)
    name = self.top(Object).name
    made = self.encoded(args) if name == '_codecs.encode' else Object(name, args)
    self.stack[-1] = made

  def encoded(self, args):
    """Does what _codecs.encode would, in the one encoding that NumPy asks for."""
    if type(args) is not tuple or [type(value) for value in args] != [str, str]:
      raise ValueError('it encodes what is not text')
    text, encoding = args
    if encoding != 'latin1':
      raise ValueError(f'it asks for encoding {encoding[:MAX_NAME]!r} instead of latin1')
    self.encodable -= len(text)
    if self.encodable < 0:
      raise ValueError('it encodes more text than it holds')
    return text.encode('latin1')

  def build(self):
    """BUILD: gives a stand-in its state."""
    state, = self.last(1)
    self.top(Object).state = state

  OPCODES = {
    b'\x80': (check_protocol,), b'(': (mark,), b'q': (put, 1), b'r': (put, 4), b'h': (get, 1),
    b'j': (get, 4), b'N': (push, None), b'\x88': (push, True), b'\x89': (push, False),
    b'}': (push_new, dict), b']': (push_new, list), b')': (push_new, tuple),
    b'K': (push_number, 1), b'M': (push_number, 2), b'J': (push_number, 4, True),
    b'\x8a': (push_long,), b'U': (push_bytes, 1), b'T': (push_bytes, 4), b'X': (push_text,),
    b'\x85': (push_tuple, 1), b'\x86': (push_tuple, 2), b'\x87': (push_tuple, 3),
    b't': (push_tuple,), b'a': (extend, 1), b'e': (extend,), b's': (update, 2), b'u': (update,),
    b'c': (push_global,), b'R': (reduce,), b'b': (build,),
  }

"""The text of a compiled program as computations of instructions; what it costs is told elsewhere.

Only what `collectives` asks for is read: names, types, operands, calls, and how often loops run.
"""

import re
from typing import NamedTuple

_HEADER = re.compile(r'(ENTRY )?%?([^\s(]+) \(.*-> .*\{\s*$')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?(\S+) = (\(.*?\)|\S+) ([a-z][a-z0-9-]*)\((.*)')
_CALLS = re.compile(
  r'\b(?:calls|to_apply|true_computation|false_computation|called_computations'
  r'|branch_computations)=(\{[^}]*\}|%\S+)'
)
_NAME = re.compile(r'%([^\s,(){}]+)')
_ARRAY = re.compile(r'\b([a-z][a-z0-9]*)\[([^\]]*)\]')
_BITS = re.compile(r'(?:bf|f|s|u|c)(\d+)')
_DEVICES = re.compile(r'\b(?:num_partitions|replica_count)=(\d+)')
# What hands its first operand on unchanged.
_SAME = ('copy', 'copy-start', 'copy-done', 'bitcast')


class Instruction(NamedTuple):
  """One line of a computation."""

  name: str  # unique within its computation
  type: str  # of the result, as printed: 'f32[8,4]{1,0}' or a tuple of such
  opcode: str
  rest: str  # of the line, after the bracket that opens the operands

  @property
  def operands(self):
    """Names of the operands, in their order."""
    return _NAME.findall(self.rest[: _closing(self.rest)])

  @property
  def attributes(self):
    """The line after the bracket that closes the operands."""
    return self.rest[_closing(self.rest) :]

  def called(self):
    """Returns the names of the computations it calls once; those of a loop are not among them."""
    return [name for group in _CALLS.findall(self.attributes) for name in _NAME.findall(group)]

  def attribute(self, key):
    """Returns the computation's name that stands after `key=`."""
    return re.search(rf'\b{key}=%([^\s,]+)', self.attributes)[1]


class Computation(NamedTuple):
  """A function of the program."""

  name: str
  instructions: dict  # name -> Instruction, in the order they are printed
  root: Instruction | None


class Program(NamedTuple):
  """A compiled program."""

  computations: dict  # name -> Computation
  entry: Computation
  devices: int  # that run it


class Frame(NamedTuple):
  """Where one stands in a program: a computation, and the loop whose body or condition it is."""

  computation: Computation
  loop: Instruction | None = None
  body: Computation | None = None  # of that loop
  caller: 'Frame | None' = None  # the frame that the loop stands in


def parse(text):
  """Reads the text of a compiled program.

  Args:
    text: what `compiled.as_text()` returns.

  Returns:
    Program.

  Raises:
    ValueError: if there is no entry computation in it.
  """
  computations, entry, name, instructions, root = {}, None, None, {}, None
  for line in text.splitlines():
    if name is None:
      header = _HEADER.match(line)
      if header:
        name, instructions, root = header[2], {}, None
        entry = name if header[1] else entry
    elif line.startswith('}'):
      computations[name] = Computation(name, instructions, root)
      name = None
    elif match := _INSTRUCTION.match(line):
      instruction = Instruction(*match.groups()[1:])
      instructions[instruction.name] = instruction
      root = instruction if match[1] else root
  if entry not in computations:
    raise ValueError(
      f"the text starts with '{text[:40]}' and has no ENTRY computation; pass compiled.as_text()"
    )
  devices = 1
  for number in _DEVICES.findall(text.partition('\n')[0]):
    devices *= int(number)
  return Program(computations, computations[entry], devices)


def num_bytes(type_text):
  """Returns the bytes of an array type, or of all arrays in a tuple type, without padding.

  Raises:
    ValueError: at an element type that is not known.
  """
  total = 0
  for element, dimensions in _ARRAY.findall(type_text):
    bits = 8 if element == 'pred' else 0 if element in ('token', 'opaque') else None
    if bits is None:
      known = _BITS.match(element)
      if not known:
        raise ValueError(
          f"'{element}[{dimensions}]' has an element type of unknown size; expected pred or a"
          ' letter and bits, as in f32'
        )
      bits = int(known[1])
    for size in filter(None, dimensions.split(',')):
      bits *= int(size.removeprefix('<='))
    total += -(-bits // 8)
  return total


def trip_count(loop, frame, program):
  """Tells how often a loop's body runs.

  A CPU or GPU program says so in the loop's line. A TPU program does not: there the count follows
  from the condition, which must be `counter < bound`, from where the counter starts and from what
  the body adds to it, all of them constants.

  Args:
    loop: Instruction, a `while`.
    frame: Frame that it stands in.
    program: Program.

  Returns:
    int.

  Raises:
    ValueError: if the text does not tell.
  """
  known = re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.attributes)
  if known:
    return int(known[1])
  body = program.computations[loop.attribute('body')]
  condition = Frame(program.computations[loop.attribute('condition')], loop, body, frame)
  count = _counted(condition, condition._replace(computation=body))
  if count is None:
    raise ValueError(
      f"how often the loop '{loop.name}' runs cannot be read from its condition"
      f" '{condition.computation.name}'; use lax.scan, whose length is known"
    )
  return count


def _counted(condition, body):
  """Returns the trips of a loop that counts up to a bound in constant steps; None of others."""
  test = condition.computation.root
  if test is None or test.opcode != 'compare' or 'direction=LT' not in test.attributes:
    return None
  counter, bound = test.operands
  index = _element(condition.computation, counter)
  update = _updated(body.computation, index)
  start = _operand_of_tuple(condition.caller.computation, condition.loop.operands[0], index)
  if update is None or start is None:
    return None
  first, last = constant(condition.caller, start), constant(condition, bound)
  step = _step(body, update.name, index)
  if first is None or last is None or not step or step < 0:
    return None
  return max(-(-(last - first) // step), 0)


def _step(body, name, index):
  """Returns what is added to an element of the parameter in all; None of others."""
  if _element(body.computation, name) == index:
    return 0
  update = _source(body.computation, name)
  if update is None or update.opcode != 'add':
    return None
  for before, added in (update.operands, update.operands[::-1]):
    value = constant(body, added)
    if value is not None:
      step = _step(body, before, index)
      return None if step is None else step + value
  return None


def constant(frame, name):
  """Returns the integer that a scalar of a frame always is, also through loops; None of others."""
  instruction = _source(frame.computation, name)
  if instruction is None:
    return None
  if instruction.opcode == 'constant':
    number = re.match(r'-?\d+\)', instruction.rest)
    return int(number[0][:-1]) if number else None
  index = _element(frame.computation, name)
  if index is None or frame.loop is None:
    return None
  after = _updated(frame.body, index)
  if after is None or _element(frame.body, after.name) != index:
    return None  # the loop changes it
  before = _operand_of_tuple(frame.caller.computation, frame.loop.operands[0], index)
  return None if before is None else constant(frame.caller, before)


def _source(computation, name):
  """Returns the instruction that makes a value, before copies of it."""
  instruction = computation.instructions.get(name)
  while instruction is not None and instruction.opcode in _SAME:
    instruction = computation.instructions.get(instruction.operands[0])
  return instruction


def _element(computation, name):
  """Returns which element of the computation's tuple parameter a value is; None of others."""
  taken = _source(computation, name)
  if taken is None or taken.opcode != 'get-tuple-element':
    return None
  whole = computation.instructions.get(taken.operands[0])
  if whole is None or whole.opcode != 'parameter':
    return None
  return int(re.search(r'index=(\d+)', taken.attributes)[1])


def _updated(body, index):
  """Returns the instruction that makes an element of what a loop's body hands on."""
  if index is None or body.root is None:
    return None
  name = _operand_of_tuple(body, body.root.name, index)
  return None if name is None else _source(body, name)


def _operand_of_tuple(computation, name, index):
  """Returns the name of an element of a tuple that a computation makes."""
  if index is None:
    return None
  made = _source(computation, name)
  if made is None or made.opcode != 'tuple':
    return None
  return made.operands[index]


def _closing(text):
  """Returns where the bracket closes that was opened before the text."""
  depth = 1
  for match in re.finditer(r'[()]', text):
    depth += 1 if match[0] == '(' else -1
    if depth == 0:
      return match.start()
  return len(text)

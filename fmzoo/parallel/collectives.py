"""What a compiled program moves between devices, read from its text: no program is run."""

import re
from typing import NamedTuple

from fmzoo.parallel import hlo

KINDS = (
  'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute',
  'collective-broadcast',
)
_GROUPS = re.compile(
  r"\breplica_groups=(?:(\{\})|\{(\{[^=]*?\})\}|\[\d+,(\d+)\]<=|mesh\[([^\]]*)\][^{]*\{([^}]*)\})"
)
_PAIRS = re.compile(r'\bsource_target_pairs=\{(.*?)\}\}')


class Collective(NamedTuple):
  """All collectives of one kind over groups of one size."""

  kind: str  # one of KINDS
  group_size: int  # devices that take part in one of them together
  count: int  # how many of them a device runs in one call of the program
  bytes: int  # of all of those, see `collectives`


def collectives(hlo_text):
  """Sums up the collectives that a device runs in one call of a compiled program.

  The bytes of a collective are those of the whole array that its group shares, the larger one of a
  device's operand and result: of an all-reduce the array that is summed, of an all-gather the
  result, of a reduce-scatter, an all-to-all and a permutation the operand, of several arrays
  together all of them. In a ring of g devices a device then sends (g - 1) / g of these bytes, of
  an all-reduce twice as much, of a permutation all of them.

  A loop counts its body as often as it runs, a conditional its dearest branch. What begins and
  ends in different places is counted where it begins, and once if a TPU spreads it over several
  fusions. An all-reduce in a fusion that keeps a slice of the sum is a reduce-scatter. Kinds and
  types are those of the compiled program: beside a matrix product a TPU may send float32 operands
  as bfloat16, and the parts of an all-gather or a reduce-scatter as permutations in a loop; a CPU
  sends bfloat16 as float32.

  Args:
    hlo_text: what `compiled.as_text()` returns, for a CPU, GPU or TPU.

  Returns:
    List of Collective, the most bytes first.

  Raises:
    ValueError: at a loop with collectives that runs no known number of times, and at text that is
      not understood.
  """
  program = hlo.parse(hlo_text)
  _check_chains(program)
  sums = _walk(hlo.Frame(program.entry), program, _computations_that_send(program))
  table = [Collective(*key, count, size) for key, (count, size) in sums.items()]
  return sorted(table, key=lambda row: (-row.bytes, row.kind, row.group_size))


def _computations_that_send(program):
  """Returns the names of the computations that have a collective in them or in what they call."""
  callers, found = {}, []
  for computation in program.computations.values():
    for instruction in computation.instructions.values():
      if _kind(instruction):
        found.append(computation.name)
      for name in _callees(instruction):
        callers.setdefault(name, []).append(computation.name)
  sending = set()
  while found:
    name = found.pop()
    if name not in sending:
      sending.add(name)
      found.extend(callers.get(name, ()))
  return sending


def _callees(instruction):
  """Returns the names of all computations that an instruction may run."""
  if instruction.opcode == 'while':
    return [instruction.attribute('condition'), instruction.attribute('body')]
  return [] if instruction.opcode.endswith(('-update', '-done')) else instruction.called()


def _kind(instruction):
  """Returns the kind of the collective that begins here; None if none does."""
  kind = instruction.opcode.removesuffix('-start')
  if kind == 'ragged-all-to-all':
    raise ValueError(
      f"'{instruction.name}' is a {kind}, whose bytes are not in the text; use lax.all_to_all"
    )
  return kind if kind in KINDS else None


def _walk(frame, program, sending):
  """Sums the collectives of a computation and of all that it runs.

  Args:
    frame: hlo.Frame.
    program: hlo.Program.
    sending: names of the computations that are worth a look.

  Returns:
    {(kind, group size): (count, bytes)}.
  """
  sums = {}
  for instruction in frame.computation.instructions.values():
    kind = _kind(instruction)
    callees = [name for name in _callees(instruction) if name in sending]
    if kind and not _goes_on(instruction, frame.computation):
      _add(sums, _one(kind, instruction, frame.computation, program.devices))
    elif instruction.opcode == 'while' and callees:
      _add(sums, _loop(instruction, frame, program, sending))
    elif callees:
      inner = [_walk(hlo.Frame(program.computations[name]), program, sending) for name in callees]
      dearest = instruction.opcode == 'conditional'
      for each in [max(inner, key=_cost)] if dearest else inner:
        _add(sums, each)
  return sums


def _loop(loop, frame, program, sending):
  """Sums the collectives of a loop: its body's, and its condition's, which runs once more."""
  trips = hlo.trip_count(loop, frame, program)
  body = program.computations[loop.attribute('body')]
  sums = {}
  for key, times in (('body', trips), ('condition', trips + 1)):
    computation = program.computations[loop.attribute(key)]
    _add(sums, _walk(hlo.Frame(computation, loop, body, frame), program, sending), times)
  return sums


def _goes_on(instruction, computation):
  """True of a part of a collective that another fusion begins, as a TPU spreads them over some."""
  return 'chain_id=' in instruction.attributes and not any(
    'AsyncCollectiveStart' in each.attributes and instruction.name in each.operands
    for each in computation.instructions.values()
    if each.opcode == 'custom-call'
  )


def _check_chains(program):
  """Raises ValueError at a part of a collective that begins nowhere and would not be counted."""
  parts = [
    (re.search(r'chain_id="?(\d+)', part.attributes)[1], _goes_on(part, computation), part.name)
    for computation in program.computations.values()
    for part in computation.instructions.values()
    if 'chain_id=' in part.rest and _kind(part)
  ]
  begun = {chain for chain, goes_on, _ in parts if not goes_on}
  for chain, _, name in parts:
    if chain not in begun:
      raise ValueError(
        f"'{name}' has chain_id {chain}, which no AsyncCollectiveStart begins; this text is of a"
        ' newer compiler than it can be read from'
      )


def _one(kind, instruction, computation, devices):
  """Returns the sums of a single collective."""
  size = _group_size(instruction, devices)
  payload = sum(
    hlo.num_bytes(computation.instructions[name].type) for name in instruction.operands
  )
  if kind == 'all-gather':
    payload *= size
  if kind == 'all-reduce' and _is_sliced(instruction, computation):
    kind = 'reduce-scatter'
  return {(kind, size): (1, payload)}


def _is_sliced(reduced, computation):
  """True if a computation takes slices of a sum, as the fusion does that is a reduce-scatter."""
  results = {reduced.name}
  for instruction in computation.instructions.values():
    if instruction.opcode == 'get-tuple-element' and instruction.operands[0] in results:
      results.add(instruction.name)
  return any(
    each.opcode == 'dynamic-slice' and each.operands[0] in results
    for each in computation.instructions.values()
  )


def _group_size(instruction, devices):
  """Returns how many devices take part in a collective together.

  Raises:
    ValueError: if its groups are written in a way that is not known.
  """
  attributes = instruction.attributes
  pairs = _PAIRS.search(attributes)
  if pairs:
    return _linked([tuple(map(int, pair)) for pair in re.findall(r'(\d+),(\d+)', pairs[1])])
  groups = _GROUPS.search(attributes)
  if not groups:
    raise ValueError(
      f"the replica_groups of '{instruction.name}' are not understood in"
      f" '{attributes[:120]}'; expected {{{{0,1}},{{2,3}}}}, [4,2]<=[8] or mesh['a'=8] {{'a'}}"
    )
  everyone, lists, per_group, mesh, axes = groups.groups()
  if everyone:
    return devices
  if lists:
    return max(len(group.split(',')) for group in re.findall(r'\{([\d, ]+)\}', lists))
  return int(per_group) if per_group else _of_axes(mesh, axes)


def _of_axes(mesh, axes):
  """Returns the devices of a group over axes of a mesh, or over parts of them: 'a':(2)4 has 4."""
  sizes = dict(re.findall(r"'?([^',=\s]+)'?=(\d+)", mesh))
  size = 1
  for name, part in re.findall(r"'?([^',:\s]+)'?(?::\(\d+\)(\d+))?(?:,|$)", axes):
    size *= int(part or sizes[name])
  return size


def _linked(pairs):
  """Returns how many devices the largest chain or ring of senders and receivers has."""
  group_of = {}
  for source, target in pairs:
    merged = group_of.get(source, {source}) | group_of.get(target, {target})
    for device in merged:
      group_of[device] = merged
  return max(map(len, group_of.values()), default=1)


def _add(sums, more, times=1):
  """Adds sums to others, in place."""
  for key, (count, size) in more.items():
    before = sums.get(key, (0, 0))
    sums[key] = (before[0] + count * times, before[1] + size * times)


def _cost(sums):
  """Returns what orders the branches of a conditional: bytes, then how many collectives."""
  return sum(size for _, size in sums.values()), sum(count for count, _ in sums.values())

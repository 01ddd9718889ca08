"""Files of torch.save (`.pt`, `.pth`, `.bin`) without torch: zip form and legacy form.

Nothing in a file is executed (see torch_pickle), unpacked to disk or decompressed. Sizes are
checked before a tensor is handed out; its elements are read when numpy asks for them.
"""

import contextlib
import io
import mmap
import re
import struct
import zipfile

from fmzoo.convert import torch_pickle
from fmzoo.convert.torch_pickle import Refused, show

MAX_PICKLE = 2**21  # bytes; a tensor takes about 120, so this is room for 17,000 of them
MAX_REASON = 300  # characters of a message, some of which quote the file
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
LOCAL_HEADER = struct.Struct('<4s22xHH')  # of a zip member: magic, lengths of name and extra field
ENCRYPTED = 1  # bit of a zip member's flags
DAMAGE = (ValueError, struct.error, zipfile.BadZipFile, NotImplementedError)


@contextlib.contextmanager
def opened(path):
  """Opens a file of torch.save, `with opened(path) as value`, mapped and not read.

  Args:
    path: of a file in zip form (torch 1.6 and later) or in legacy form.

  Yields:
    What was saved: dict, list, tuple, number, string or None, with torch_pickle.Tensor for tensors
    and parameters and dict for OrderedDict. Tensors can be read while the file is open.

  Raises:
    ValueError: if the file cannot be read, is damaged or holds anything else.
  """
  with contextlib.ExitStack() as stack:
    try:
      file = stack.enter_context(open(path, 'rb'))
      mapped = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
      value = _read_zip(file, mapped) if mapped[:2] == b'PK' else _read_legacy(mapped)
    except (OSError, *DAMAGE) as error:
      known = isinstance(error, OSError) and error.strerror
      reason = known or str(error)[:MAX_REASON]
      raise ValueError(
        f'{path} cannot be read as a PyTorch file ({reason}); pass a whole file into which'
        ' torch.save put tensors and dicts alone, such as model.state_dict(), or .safetensors'
      ) from error
    yield value


def _read_zip(file, mapped):
  """Returns the value in a file of zip form."""
  with zipfile.ZipFile(file) as archive:
    members = {member.filename: member for member in archive.infolist()}
  pickles = [name for name in members if re.fullmatch(r'[^/]+/data\.pkl', name)]
  if len(pickles) != 1:
    raise Refused(f'a zip file with {len(pickles)} members FOLDER/data.pkl, expected 1')
  folder = pickles[0].removesuffix('data.pkl')
  if order := members.get(f'{folder}byteorder'):
    start, end = _extent(mapped, order)
    if mapped[start:end] != b'little':
      raise Refused(f'byteorder is {show(mapped[start : min(end, start + 9)])}, expected little')

  def locate(storage):
    """Finds a storage among the members."""
    name = f'{folder}data/{storage.key}'
    if name not in members:
      raise Refused(f'storage {show(storage.key)} is not in it')
    storage.start, end = _extent(mapped, members[name])
    if end - storage.start != storage.size:
      raise Refused(
        f'storage {show(storage.key)} has {end - storage.start} bytes, expected {storage.size}'
      )

  start, end = _extent(mapped, members[pickles[0]])
  if end - start > MAX_PICKLE:
    raise Refused(f'data.pkl has {end - start} bytes, expected at most {MAX_PICKLE}')
  return torch_pickle.Machine(mapped, locate).run(io.BytesIO(mapped[start:end]))


def _extent(mapped, member):
  """Returns where the bytes of a zip member are: the first, and the one after the last."""
  name = show(member.filename)
  if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & ENCRYPTED:
    raise Refused(f'member {name} is compressed or encrypted, torch.save does neither')
  if not 0 <= member.header_offset <= len(mapped) - LOCAL_HEADER.size:
    raise Refused(f'member {name} is not within the file')
  magic, *lengths = LOCAL_HEADER.unpack_from(mapped, member.header_offset)
  start = member.header_offset + LOCAL_HEADER.size + sum(lengths)
  end = start + member.file_size
  if magic != b'PK\3\4' or member.file_size != member.compress_size or end > len(mapped):
    raise Refused(f'member {name} is damaged')
  return start, end


def _read_legacy(mapped):
  """Returns the value in a file of legacy form: five pickles, then the storages."""
  stream = io.BytesIO(mapped[:MAX_PICKLE])
  machine = torch_pickle.Machine(mapped, locate=lambda storage: None)
  if machine.run(stream) != LEGACY_MAGIC or machine.run(stream) != LEGACY_PROTOCOL:
    raise Refused('neither a zip file nor one of the older form, which begins with two numbers')
  system = machine.run(stream)
  if not (isinstance(system, dict) and system.get('little_endian') is True):
    raise Refused('little_endian is not true in it, expected that byte order')
  value, keys = machine.run(stream), machine.run(stream)
  _locate_in_turn(mapped, stream.tell(), keys, machine.storages)
  return value


def _locate_in_turn(mapped, start, keys, storages):
  """Finds the storages of a legacy file: for each key a count and its elements, from `start`."""
  waiting = dict(storages)
  for key in keys if isinstance(keys, list) else ():
    storage = waiting.pop(key, None) if isinstance(key, str) else None
    if storage is None or start + 8 > len(mapped):
      raise Refused('its list of storages does not fit its tensors')
    (count,) = struct.unpack_from('<q', mapped, start)
    storage.start = start + 8
    start = storage.start + storage.size
    if count != storage.count:
      raise Refused(f'storage {show(key)} has {count} elements, expected {storage.count}')
    if start > len(mapped):
      raise Refused(f'storage {show(key)} ends {start - len(mapped)} bytes after the file')
  if waiting:
    raise Refused(f'storage {show(next(iter(waiting)))} is not in it')

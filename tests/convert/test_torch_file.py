"""Files of torch.save without torch: what is read, what is refused, and that nothing is run."""

import os
import pickle
import random
import zipfile

import numpy as np
import pytest
import safetensors

from fmzoo.convert import torch_file, torch_pickle
from tests import torch_pickle as files

FORMS = {'zip': files.zip_form, 'legacy': files.legacy_form}


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'x.pt'


def load(path, data):
  """Writes a file and returns what is in it, with arrays for tensors."""
  path.write_bytes(data)
  with torch_file.opened(path) as value:
    return arrays(value)


def arrays(value):
  """Reads every tensor in dicts, lists and tuples."""
  if isinstance(value, dict):
    return {key: arrays(part) for key, part in value.items()}
  if isinstance(value, (list, tuple)):
    return type(value)(map(arrays, value))
  return np.asarray(value) if isinstance(value, torch_pickle.Tensor) else value


def refusal(path, data):
  """Writes a file that must be refused and returns the line."""
  with pytest.raises(ValueError) as error:
    load(path, data)
  line = str(error.value)
  assert line.startswith(f'{path} cannot be read as a PyTorch file (') and '\n' not in line
  assert line.endswith('such as model.state_dict(), or .safetensors')
  return line


@pytest.mark.parametrize('name', ['tiny_zip.pth', 'tiny_legacy.pth'])
def test_golden_tensors_of_encoders_are_equal(golden_root, name):
  """Views, transposes, parameters, halves, counters; dtypes as in the safetensors beside."""
  folder = golden_root / 'encoders'
  with (
    np.load(folder / 'tiny_expected.npz') as expected,
    safetensors.safe_open(folder / 'tiny.safetensors', 'numpy') as twin,
    torch_file.opened(folder / name) as found,
  ):
    assert found.keys() == set(expected.files) == set(twin.keys())
    for key, tensor in found.items():
      array = np.asarray(tensor)
      assert tensor.shape == array.shape == expected[key].shape
      assert tensor.dtype == array.dtype.name == twin.get_tensor(key).dtype.name
      widened = array.astype(expected[key].dtype)
      np.testing.assert_array_equal(widened, expected[key], err_msg=key)


def test_golden_unsafe_file_of_encoders_is_refused(golden_root, capsys):
  path = golden_root / 'encoders' / 'tiny_unsafe.pth'
  with pytest.raises(ValueError, match=r"refers to '\w+\.\w+', which is not a tensor"):
    torch_file.opened(path).__enter__()
  assert capsys.readouterr().out == ''


@pytest.mark.parametrize('form', FORMS)
def test_values_and_dtypes(path, form):
  tensors = {name: np.arange(-3, 3).astype(dtype) for name, dtype in files.DTYPES.items()}
  nested = {'steps': 3, 'list': [1.5, None, True, ('a', -7)], 3: {'empty': np.zeros((0, 4), 'f4')}}
  found = load(path, FORMS[form]({**tensors, **nested}))
  assert found['steps'] == 3 and found['list'] == nested['list']
  assert found[3]['empty'].shape == (0, 4)
  for name, tensor in tensors.items():
    assert found[name].dtype == tensor.dtype
    np.testing.assert_array_equal(found[name], tensor, err_msg=name)


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_pickle_protocols(path, protocol):
  tensor = np.float32([[1, 2]])
  found = load(path, files.zip_form({'x': tensor}, protocol=protocol))
  np.testing.assert_array_equal(found['x'], tensor)


@pytest.mark.parametrize('form', FORMS)
def test_strides_and_shared_storages(path, form):
  elements = np.arange(24, dtype=np.float32)
  whole = elements.reshape(2, 3, 4)
  found = load(path, FORMS[form]({
    'transposed': files.View(elements, 0, (4, 2, 3), (1, 12, 4)),
    'part': files.View(elements, 13, (3, 2), (4, 2), is_parameter=True),
    'repeated': files.View(elements, 5, (3, 2), (0, 1)),
    'last': files.View(elements, 23, (), ()),
    'none': files.View(elements, 24, (2, 0), (1, 1)),
  }))
  np.testing.assert_array_equal(found['transposed'], whole.transpose(2, 0, 1))
  np.testing.assert_array_equal(found['part'], whole[1, :, 1::2])
  np.testing.assert_array_equal(found['repeated'], [[5, 6]] * 3)
  assert found['last'] == 23 and found['none'].shape == (2, 0)
  assert found['transposed'].flags.c_contiguous and found['transposed'].flags.owndata


def test_attributes_of_dicts_are_dropped(path):
  """A state dict of PyTorch carries its versions as an attribute."""
  state = b'\x80\x02ccollections\nOrderedDict\n)R}X\x09\x00\x00\x00_metadataK\x01sb.'
  found = load(path, files.archive(state))
  assert found == {} and type(found) is dict


def test_tensors_are_read_when_asked_for(path):
  """The elements of 'b' change after the file was opened; 'a' has a copy by then."""
  data = files.zip_form({'a': np.ones(3, 'f4'), 'b': np.full(3, 2, 'f4')})
  path.write_bytes(data)
  with torch_file.opened(path) as found:
    a = np.asarray(found['a'])
    with open(path, 'r+b') as file:
      for array in (np.ones(3, 'f4'), np.full(3, 2, 'f4')):
        file.seek(data.index(array.tobytes()))
        file.write(np.full(3, 5, 'f4').tobytes())
    np.testing.assert_array_equal(a, 1)
    np.testing.assert_array_equal(found['b'], 5)
  with pytest.raises(ValueError, match='closed'):
    np.asarray(found['b'])


class Trap:
  """Unpickled, it leaves a file behind."""

  def __init__(self, function, *arguments):
    self.reduced = function, arguments

  def __reduce__(self):
    return self.reduced


def opcodes(*parts):
  """Joins raw opcodes to a pickle of protocol 4."""
  return b'\x80\x04' + b''.join(parts) + b'.'


def text(value):
  """The opcodes of a string."""
  return b'\x8c' + bytes([len(value)]) + value.encode()


# name: (pickle that would make the file {sprung}, words of the line)
HOSTILE = {
  'os.system': (lambda sprung: pickle.dumps(Trap(os.system, f'touch {sprung}'), 2), 'posix.system'),
  'protocol 4': (
    lambda sprung: pickle.dumps({'x': Trap(os.system, f'touch {sprung}')}, 4), 'posix.system'),
  'eval': (
    lambda sprung: pickle.dumps(Trap(eval, f"open('{sprung}', 'w')"), 2), '__builtin__.eval'),
  'builtins': (
    lambda sprung: pickle.dumps([Trap(exec, f"open('{sprung}', 'w')")], 4), 'builtins.exec'),
  'getattr': (
    lambda sprung: opcodes(b'cbuiltins\ngetattr\n', b'ccollections\nOrderedDict\n',
                           text('fromkeys'), b'\x86R'), 'builtins.getattr'),
  'open': (lambda sprung: pickle.dumps(Trap(open, str(sprung), 'w'), 2), "open'"),
  'text': (lambda sprung: f"cos\nsystem\n(S'touch {sprung}'\ntR.".encode(), 'os.system'),
  'instance': (lambda sprung: f"(S'touch {sprung}'\nios\nsystem\n.".encode(), 'os.system'),
  'allowed instance': (lambda sprung: b'(icollections\nOrderedDict\n.', 'INST'),
  'module': (lambda sprung: opcodes(b'ctorch.nn.modules.linear\nLinear\n)\x81}b'), 'linear.Linear'),
  'new object': (lambda sprung: opcodes(b'ccollections\nOrderedDict\n)\x81'), 'NEWOBJ'),
  'dotted': (
    lambda sprung: opcodes(text('collections'), text('OrderedDict.__init__.__globals__'), b'\x93'),
    'OrderedDict.__init__'),
  'dotted in an allowed name': (
    lambda sprung: opcodes(text('torch'), text('_utils._rebuild_tensor_v2'), b'\x93'),
    "'torch._utils._rebuild_tensor_v2'"),
  'other function of an allowed module': (
    lambda sprung: opcodes(b'ctorch._utils\n_import_dotted_name\n'), '_import_dotted_name'),
  'numpy': (lambda sprung: pickle.dumps(np.zeros(2), 2), 'numpy'),
  'call of a string': (lambda sprung: opcodes(text('os.system'), text('ls'), b'\x85R'), 'function'),
  'call of a storage class': (lambda sprung: opcodes(b'ctorch\nFloatStorage\n)R'), 'a call of'),
  'call without arguments': (lambda sprung: opcodes(b'ccollections\nOrderedDict\nNR'), 'arguments'),
  'attributes of a function': (
    lambda sprung: opcodes(b'ctorch._utils\n_rebuild_tensor_v2\n}b'), 'OrderedDict'),
  'extension': (lambda sprung: opcodes(b'\x82\x01'), 'EXT1'),
  'reference by text': (lambda sprung: opcodes(b'Pstorage\n'), 'PERSID'),
  'reference to a module': (
    lambda sprung: opcodes(b'(', text('module'), b'NNNNtQ'), 'no storage'),
  'set': (lambda sprung: opcodes(b'\x8f'), 'EMPTY_SET'),
}


@pytest.mark.parametrize('case', HOSTILE)
@pytest.mark.parametrize('form', [*FORMS, 'plain'])
def test_hostile_pickles_are_named_and_not_run(path, case, form):
  sprung = path.with_name('sprung')
  make, word = HOSTILE[case]
  data = {
    'zip': files.archive, 'plain': lambda pickled: pickled,
    'legacy': lambda pickled: b''.join(pickle.dumps(p, 2) for p in files.LEGACY_HEAD) + pickled,
  }[form](make(sprung))
  assert word in refusal(path, data)
  assert not sprung.exists()


def test_the_traps_would_spring(tmp_path):
  """Else the test above proves nothing."""
  for name in ('os.system', 'eval', 'open', 'text', 'instance'):
    sprung = tmp_path / name
    pickle.loads(HOSTILE[name][0](sprung))
    assert sprung.exists(), name


ONES = np.ones(6, np.float32)


def claim(*arguments, **options):
  """Returns a state dict of one tensor that claims what it likes."""
  return {'x': files.View(ONES, *arguments, **options)}


# name: (tensor, words of the line)
TENSORS = {
  'offset': (claim(1, (6,), (1,)), 'beyond the 6 elements'),
  'shape': (claim(0, (7,), (1,)), 'beyond the 6 elements'),
  'stride': (claim(0, (2, 3), (4, 1)), 'beyond the 6 elements'),
  'empty beyond': (claim(7, (0,), (1,)), 'beyond the 6 elements'),
  'repeated without end': (claim(0, (2**40, 2**30), (0, 0)), 'larger than the file'),
  'empty without end': (claim(0, (2**40, 0), (0, 0)), 'larger than the file'),
  'negative offset': (claim(-1, (6,), (1,)), 'no number of elements'),
  'negative shape': (claim(0, (-6,), (1,)), 'no number of elements'),
  'negative stride': (claim(5, (6,), (-1,)), 'no number of elements'),
  'large stride': (claim(0, (2,), (2**70,)), 'no number of elements'),
  'offset of another type': (claim(0.0, (6,), (1,)), 'no number of elements'),
  'truth for a size': (claim(0, (True,), (1,)), 'no number of elements'),
  'list for a shape': (claim(0, [6], (1,)), 'no shape'),
  'number for strides': (claim(0, (6,), 1), 'no strides'),
  'strides': (claim(0, (2, 3), (1,)), '2 dimensions with 1 strides'),
  'dimensions': (claim(0, (1,) * 33, (1,) * 33), '33 dimensions'),
  'negative count': (claim(0, (6,), (1,), count=-6), 'no number of elements'),
  'dtype': ([files.View(ONES, 0, (6,), (1,)), files.View(ONES, 0, (6,), (1,), tag='IntStorage')],
            "storage '0' is float32[6] and int32[6]"),
}


@pytest.mark.parametrize('case', TENSORS)
@pytest.mark.parametrize('form', FORMS)
def test_tensors_beyond_their_storage(path, case, form):
  value, words = TENSORS[case]
  assert words in refusal(path, FORMS[form](value))


PICKLE, STORED = files.dumps({'x': ONES})
STORED = [elements.tobytes() for elements in STORED]
FLAG = b'PK\1\2' + b'\x14\x03\x14\0'  # of a member in the list of them, up to its flags


def encrypted():
  """Returns a file whose first member says that it is encrypted."""
  data = files.archive(PICKLE, STORED)
  assert FLAG in data
  return data.replace(FLAG + b'\0', FLAG + b'\1', 1)


def misplaced():
  """Returns a file whose list of members says that the first is somewhere behind the end."""
  data = bytearray(files.archive(PICKLE, STORED))
  entry = data.index(FLAG)
  data[entry + 42 : entry + 46] = b'\xff\xff\xff\x7f'
  return bytes(data)


def doubled_tuple(depth):
  """Returns the pickle of a dict whose key holds a tuple twice, which holds one twice, ..."""
  doubled = b''.join(b'h%ch%c\x86\x94' % (i, i) for i in range(depth))
  return opcodes(b')\x94', doubled, b'}h%cK\1s' % depth)


# name: (file, words of the line)
DAMAGED = {
  'empty': (b'', 'empty'),
  'text': (b'no weights at all', 'opcode'),
  'another pickle': (pickle.dumps({'x': 1}, 2), 'neither a zip file nor'),
  'zip without end': (files.archive(PICKLE, STORED)[:-9], 'not a zip file'),
  'zip of something else': (files.archive(PICKLE).replace(b'data.pkl', b'data.txt'), '0 members'),
  'two pickles': (files.archive(PICKLE, STORED, extra=[('b/data.pkl', PICKLE)]), '2 members'),
  'byte order': (files.archive(PICKLE, STORED, byteorder=b'big'), "byteorder is b'big'"),
  'compressed': (
    files.archive(PICKLE, STORED, compression=zipfile.ZIP_DEFLATED), 'compressed or encrypted'),
  'encrypted': (encrypted(), 'compressed or encrypted'),
  'misplaced': (misplaced(), "'archive/data.pkl' is not within the file"),
  'storage missing': (files.archive(PICKLE), "storage '0' is not in it"),
  'storage short': (files.archive(PICKLE, [STORED[0][:-1]]), '23 bytes, expected 24'),
  'storage long': (files.archive(PICKLE, [STORED[0] + b'0']), '25 bytes, expected 24'),
  'member name': (
    files.archive(PICKLE, STORED).replace(b'PK\3\4', b'PK\5\4', 1), 'data.pkl\' is damaged'),
  'long pickle': (files.archive(b'}' * torch_file.MAX_PICKLE + b'.'), 'expected at most 2097152'),
  'pickle without end': (files.archive(PICKLE[:-1], STORED), 'STOP'),
  'nothing in it': (files.archive(opcodes()), 'a value is missing'),
  'no mark': (files.archive(opcodes(b't')), 'a mark is missing'),
  'memo of nothing': (files.archive(opcodes(b'\x94')), 'a value is missing'),
  'from an empty memo': (files.archive(opcodes(b'h\x07')), 'a value is missing'),
  'value without key': (files.archive(opcodes(b'}(Nu')), 'a value is missing'),
  'items of a list': (files.archive(opcodes(b'](K\1Nu')), 'no dict'),
  'elements of a dict': (files.archive(opcodes(b'}Na')), 'no list'),
  'attributes of a number': (files.archive(opcodes(b'K\1}b')), 'no OrderedDict'),
  'tuple for a key': (files.archive(doubled_tuple(80)), 'a key of type tuple'),
  'large key': (files.archive(opcodes(b'}\x8a\x08', b'\1' * 8, b'Ns')), 'a key of type int'),
  'pairs': (
    files.archive(opcodes(b'ccollections\nOrderedDict\n]\x85R')), '1 values, expected 0'),
  'parameter of nothing': (
    files.archive(opcodes(b'ctorch._utils\n_rebuild_parameter\n(NNNtR')), 'no tensor'),
  'tensor of nothing': (
    files.archive(opcodes(b'ctorch._utils\n_rebuild_tensor_v2\n(NK\0))NNtR')), 'no storage'),
  'tensor of too little': (
    files.archive(opcodes(b'ctorch._utils\n_rebuild_tensor_v2\n)R')), '0 values, expected 6'),
  'storage of no class': (
    files.archive(opcodes(b'(', text('storage'), b'ccollections\nOrderedDict\n', text('0'),
                          b'NK\0tQ')), 'a storage of class collections.OrderedDict'),
  'legacy: magic': (files.legacy_form(ONES, head=(1, 1001, {})), 'neither a zip file nor'),
  'legacy: version': (
    files.legacy_form(ONES, head=(files.LEGACY_HEAD[0], 1002, {})), 'neither a zip file nor'),
  'legacy: byte order': (
    files.legacy_form(ONES, head=(*files.LEGACY_HEAD[:2], {'little_endian': False})),
    'little_endian'),
  'legacy: count': (files.legacy_form(ONES, counts=[5]), "'0' has 5 elements, expected 6"),
  'legacy: key missing': (files.legacy_form(ONES, keys=[]), "storage '0' is not in it"),
  'legacy: another key': (files.legacy_form(ONES, keys=['1']), 'list of storages'),
  'legacy: key twice': (files.legacy_form(ONES, keys=['0', '0']), 'list of storages'),
  'legacy: key of a number': (files.legacy_form(ONES, keys=[0]), 'list of storages'),
  'legacy: no list': (files.legacy_form(ONES, keys={'0': 0}), "storage '0' is not in it"),
  'legacy: short': (files.legacy_form(ONES)[:-1], 'ends 1 bytes after the file'),
  'legacy: no elements': (files.legacy_form(ONES)[:-25], 'list of storages'),
  'legacy: view': (
    files.legacy_form(ONES).replace(b'K\x06Nt', b'K\x06K\0t'), 'is a view of one'),
}


@pytest.mark.parametrize('case', DAMAGED)
def test_damaged_files(path, case):
  data, words = DAMAGED[case]
  assert words in refusal(path, data)


def test_missing_files_and_folders(tmp_path):
  for name in ('missing.pt', '.'):
    with pytest.raises(ValueError, match=f'{name} cannot be read as a PyTorch file .(No|Is a)'):
      torch_file.opened(tmp_path / name).__enter__()


def test_deep_pickles_are_read_or_refused_and_nothing_breaks(path):
  """Tuples in tuples: what compares, hashes or frees them recursively would not come back."""
  depth = 10**5
  path.write_bytes(files.archive(opcodes(b')', b'\x85' * depth)))
  with torch_file.opened(path) as value:
    assert isinstance(value, tuple)
  assert 'key of type tuple' in refusal(path, files.archive(opcodes(b'})', b'\x85' * depth, b'Ns')))


def test_a_memo_of_a_high_number_takes_no_memory(path):
  data = files.archive(opcodes(b'}r\xff\xff\xff\x7fj\xff\xff\xff\x7f\x86'))
  assert load(path, data) == ({}, {})


@pytest.mark.parametrize('form', FORMS)
def test_every_cut_is_noticed(path, form):
  data = FORMS[form]({'x': ONES, 'y': np.zeros((2, 3), files.DTYPES['bfloat16'])})
  for size in range(1, len(data), 7):
    refusal(path, data[:size])


@pytest.mark.parametrize('form', FORMS)
def test_any_change_of_bytes_is_read_or_refused(path, form):
  """No other error than the one line, whatever is in the file."""
  rng = random.Random(0)
  data = FORMS[form]({'x': ONES, 'y': {'z': np.float32([[1, 2]]), 'n': [3, 0.5, None]}})
  for _ in range(200):
    changed = bytearray(data)
    for _ in range(rng.choice([1, 3])):
      changed[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(changed)
    try:
      with torch_file.opened(path) as value:
        arrays(value)
    except ValueError as error:
      assert 'cannot be read as a PyTorch file' in str(error)

"""CIFAR-10 in each of its forms gives the same rows; what is damaged or hostile is refused."""

import gzip
import io
import json
import pathlib
import pickle
import tarfile

import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image

from fmzoo import sources
from fmzoo.data import cifar10, pipeline
from tests import tiny

ROWS = 10  # two in each of five files
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (ROWS, 32, 32, 3), np.uint8)
LABELS = np.array([3, 9, 0, 1, 5, 5, 8, 2, 7, 6])
PLANES = PIXELS.transpose(0, 3, 1, 2).reshape(ROWS, -1)  # as the files have them


def binary_files():
  """Returns {name: content} of the binary version."""
  return {
    f'data_batch_{i + 1}.bin': b''.join(
      bytes([LABELS[row]]) + PLANES[row].tobytes() for row in (2 * i, 2 * i + 1)
    ) for i in range(5)
  }


def text(value):
  """Returns the opcodes of Python 2's pickle for bytes."""
  return b'T' + len(value).to_bytes(4, 'little') + value


def batch_pickle(pixels, labels, kind=b'u1'):
  """Returns what Python 2 wrote: a dict of a NumPy array and a list, protocol 2."""
  array = (
    b'cnumpy.core.multiarray\n_reconstruct\n' b'cnumpy\nndarray\n' b'K\x00\x85' + text(b'b')
    + b'\x87R(K\x01K' + bytes([len(pixels)]) + b'M\x00\x0c\x86'  # version 1, shape (n, 3072)
    + b'cnumpy\ndtype\n' + text(kind) + b'K\x00K\x01\x87R'
    + b'(K\x03' + text(b'|') + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb'
    + b'\x89' + text(pixels.tobytes()) + b'tb'  # not in Fortran's order
  )
  numbers = b''.join(b'K' + bytes([label]) for label in labels)
  return (
    b'\x80\x02}(' + text(b'data') + array + text(b'labels') + b'](' + numbers + b'e'
    + text(b'batch_label') + text(b'training batch 1 of 5') + b'u.'
  )


def python_files():
  """Returns {name: content} of the Python version."""
  return {
    f'data_batch_{i + 1}': batch_pickle(PLANES[2 * i : 2 * i + 2], LABELS[2 * i : 2 * i + 2])
    for i in range(5)
  }


FORMS = {
  'bin': ('cifar-10-batches-bin', 'cifar-10-binary.tar.gz', binary_files),
  'py': ('cifar-10-batches-py', 'cifar-10-python.tar.gz', python_files),
}


def extract(path, form, **changes):
  """Writes the files of a form to their folder; changes are contents by name, None leaves out."""
  folder, _, files = FORMS[form]
  (path / folder).mkdir()
  for name, content in (files() | changes).items():
    if content is not None:
      (path / folder / name).write_bytes(content)
  return path / folder


def pack(path, form, names=None):
  """Writes the archive of a form, last file first and with one that is not asked for."""
  folder, archive, files = FORMS[form]
  with tarfile.open(path / archive, 'w:gz') as members:
    entries = {'.': None, folder: None, **{
      f'{folder}/{name}': content for name, content in reversed(files().items())
      if names is None or name in names
    }, f'{folder}/readme.html': b'hello'}
    for name, content in entries.items():
      member = tarfile.TarInfo(name)
      member.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
      member.size = len(content or b'')
      members.addfile(member, io.BytesIO(content or b''))
  return path / archive


def example(image, label):
  """Returns the bytes of a tf.train.Example, which TFDS keeps its rows in."""

  def field(number, content):
    """Encodes a field of length-delimited bytes."""
    size, digits = len(content), []
    while size >= 128:
      digits.append(size % 128 + 128)
      size //= 128
    return bytes([8 * number + 2, *digits, size]) + content

  png = io.BytesIO()
  Image.fromarray(image).save(png, format='PNG')
  features = {
    'id': field(1, field(1, b'train_1')), 'image': field(1, field(1, png.getvalue())),
    'label': field(3, field(1, bytes([label]))),
  }
  return field(1, b''.join(
    field(1, field(1, name.encode()) + field(2, value)) for name, value in features.items()
  ))


def write_tfds(folder, name='cifar10', file_format='array_record', rows=ROWS):
  """Writes what TFDS's download_and_prepare would."""
  folder.mkdir(parents=True)
  kinds = 'tensorflow_datasets.core.features.'
  features = {
    'id': {'pythonClassName': kinds + 'text_feature.Text', 'text': {}},
    'image': {
      'pythonClassName': kinds + 'image_feature.Image',
      'image': {'dtype': 'uint8', 'shape': {'dimensions': ['32', '32', '3']}},
    },
    'label': {
      'pythonClassName': kinds + 'class_label_feature.ClassLabel',
      'classLabel': {'numClasses': '10'},
    },
  }
  (folder / 'features.json').write_text(json.dumps({
    'pythonClassName': kinds + 'features_dict.FeaturesDict',
    'featuresDict': {'features': features},
  }))
  (folder / 'dataset_info.json').write_text(json.dumps({
    'name': name, 'version': '3.0.2', 'fileFormat': file_format,
    'splits': [{
      'name': 'train', 'numBytes': '1', 'shardLengths': [str(rows)],
      'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
    }],
  }))
  shard = folder / f'{name}-train.{file_format}-00000-of-00001'
  writer = array_record_module.ArrayRecordWriter(str(shard), 'group_size:1')
  for image, label in zip(PIXELS, LABELS):
    writer.write(example(image, label))
  writer.close()
  return shard


def has_the_rows(source):
  """Compares every row of a source with what was written."""
  assert len(source) == ROWS
  order = np.random.default_rng(0).permutation(ROWS)
  rows = source.batch(order)
  assert sorted(rows) == ['label', 'pixels']
  assert rows['pixels'].dtype == np.uint8 and rows['label'].dtype == np.int32
  np.testing.assert_array_equal(rows['pixels'], PIXELS[order])
  np.testing.assert_array_equal(rows['label'], LABELS[order])


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('write', [extract, pack])
def test_published_files_give_their_rows(tmp_path, form, write):
  write(tmp_path, form)
  has_the_rows(cifar10.Cifar10Source(tmp_path, ROWS))


@pytest.mark.parametrize('where', ['.', '3.0.2', 'cifar10/3.0.2'])
def test_tfds_folders_give_their_rows(tmp_path, where):
  write_tfds(tmp_path / 'data' / where)
  has_the_rows(cifar10.Cifar10Source(tmp_path / 'data', ROWS))


@pytest.mark.parametrize('order', ['C', 'F'])
def test_pickles_of_python_3_give_their_rows(tmp_path, order):
  """Protocol 2 spells bytes as _codecs.encode; later NumPy calls its module numpy._core."""
  written = {
    f'data_batch_{i + 1}': pickle.dumps({
      b'data': np.asarray(PLANES[2 * i : 2 * i + 2], order=order),
      b'labels': LABELS[2 * i : 2 * i + 2].tolist(),
    }, protocol=2).replace(b'numpy._core.', b'numpy.core.') for i in range(5)
  }
  assert b'_codecs' in written['data_batch_1']
  extract(tmp_path, 'py', **written)
  has_the_rows(cifar10.Cifar10Source(tmp_path, ROWS))


def test_the_binary_version_is_preferred(tmp_path):
  extract(tmp_path, 'bin')
  extract(tmp_path, 'py', data_batch_1=b'not looked at')
  pack(tmp_path, 'bin').write_bytes(b'nor this')
  write_tfds(tmp_path / '3.0.2', name='cifar100')
  has_the_rows(cifar10.Cifar10Source(tmp_path, ROWS))


def test_rows_go_through_the_pipeline(tmp_path):
  extract(tmp_path, 'bin')
  source = cifar10.Cifar10Source(tmp_path, ROWS)
  pipeline.check_fit(source, latent_shape=(32, 32, 3), num_classes=10, latent_scale=1.0)
  batch = next(pipeline.batches(source, batch_size=4, seed=0, shuffle=False, num_threads=0))
  np.testing.assert_array_equal(batch['pixels'], PIXELS[:4])
  assert batch['label'].dtype == np.int32


def test_the_recipe_opens_all_fifty_thousand(tmp_path, monkeypatch):
  """Its folder is cifar10 below $FMZOO_DATA_DIR, and rows are not counted in tens there."""
  monkeypatch.setenv('FMZOO_DATA_DIR', str(tmp_path))
  recipe = tiny.recipe('fm', data__name='cifar10', data__latent_size=32, data__channels=3)
  (tmp_path / 'cifar10').mkdir()
  extract(tmp_path / 'cifar10', 'bin')
  with pytest.raises(ValueError, match='expected 30730000 .10000 records of 3073.'):
    sources.open_rows(recipe)


class Calls:
  """Pickles to a call of print."""

  def __reduce__(self):
    return print, ('this pickle ran',)


def encoded(encoding):
  """Pickles bytes in an encoding."""
  return pickle.dumps(b'\xff', protocol=2).replace(b'latin1', encoding)


REFUSED = {  # what is in data_batch_3 of the Python version, and what the message says
  'a call': (pickle.dumps(Calls(), 2), "it asks for '__builtin__.print', which no such"),
  'a class of NumPy': (pickle.dumps(np.float64(1), 2), "_core.multiarray.scalar', which"),
  'an encoding': (encoded(b'rot_13'), "encoding 'rot_13' instead of latin1"),
  'no array': (pickle.dumps({b'data': [1], b'labels': [1]}, 2), "its b'data' are no array"),
  'no labels': (
    batch_pickle(PLANES[:2], LABELS[:2]).replace(b'labels', b'labelz'), "its b'labels' are no list",
  ),
  'no dict': (pickle.dumps([1, 2], 2), 'it holds no dict but list'),
  'another dtype': (batch_pickle(PLANES[:2], LABELS[:2], b'i1'), "data are b'i1' and not uint8"),
  'a cut': (batch_pickle(PLANES[:2], LABELS[:2])[:999], 'it ends too early'),
  'nothing': (b'', '0 bytes, is no batch of CIFAR-10: it ends too early'),
  'garbage': (b'\xff\xfe' * 50, r"it has opcode b'.xff', which no such batch needs"),
  'a later protocol': (pickle.dumps({}, 4), 'it is of protocol 4, expected 2'),
  'too few rows': (
    batch_pickle(PLANES[:1], LABELS[:1]),
    r'its data have shape \(1, 3072\), expected \(2, 3072\)',
  ),
  'too few labels': (batch_pickle(PLANES[:2], LABELS[:1]), 'it has 1 labels, expected 2'),
  'a label of ten': (batch_pickle(PLANES[:2], [1, 10]), 'has label 10, expected 0 to 9'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_damaged_and_hostile_pickles_are_refused(tmp_path, capsys, case):
  content, message = REFUSED[case]
  extract(tmp_path, 'py', data_batch_3=content)
  with pytest.raises(ValueError, match=message) as error:
    cifar10.Cifar10Source(tmp_path, ROWS)
  assert 'data_batch_3' in str(error.value) and '\n' not in str(error.value)
  assert f'copy it from {cifar10.URL} again' in str(error.value)
  assert capsys.readouterr().out == ''


def test_pickles_with_a_changed_byte_never_crash(tmp_path):
  """Either they read as a batch, or the message is one line."""
  content = batch_pickle(PLANES[:2], LABELS[:2])
  head = content.index(PLANES[:2].tobytes())
  for index in range(head):
    for value in (0, ord('R'), 255):
      changed = content[:index] + bytes([value]) + content[index + 1 :]
      try:
        cifar10._from_pickle('data_batch_1', changed, 2)
      except ValueError as error:
        assert 'data_batch_1' in str(error), (index, value)


def test_damaged_binary_files_are_refused(tmp_path):
  content = binary_files()['data_batch_4.bin']
  file = extract(tmp_path, 'bin') / 'data_batch_4.bin'
  for damaged, message in (
    (content[:-1], r'bin has 6145 bytes, expected 6146 \(2 records of 3073\); copy it from'),
    (b'\x0b' + content[1:], 'bin has label 11, expected 0 to 9; copy it from'),
  ):
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=message):
      cifar10.Cifar10Source(tmp_path, ROWS)
  file.unlink()
  with pytest.raises(ValueError, match='data_batch_4.bin is missing; extract the archive of http'):
    cifar10.Cifar10Source(tmp_path, ROWS)


def test_damaged_archives_are_refused(tmp_path):
  archive = pack(tmp_path, 'bin')
  content = archive.read_bytes()
  middle = len(content) // 2
  for damaged in (
    content[:middle], content[:5], b'', b'<html>',
    content[:middle] + bytes(200) + content[middle + 200 :],
  ):
    archive.write_bytes(damaged)
    with pytest.raises(ValueError, match=f'tar.gz, {len(damaged)} bytes, cannot be read: .*again'):
      cifar10.Cifar10Source(tmp_path, ROWS)
  pack(tmp_path, 'bin', names=['data_batch_1.bin'])
  with pytest.raises(ValueError, match='tar.gz holds no cifar-10-batches-bin/data_batch_2.bin; co'):
    cifar10.Cifar10Source(tmp_path, ROWS)


def test_files_of_another_size_are_not_read(tmp_path, monkeypatch):
  """A file of 3 GiB with nothing on the disk is refused by its size."""
  monkeypatch.setattr(pathlib.Path, 'read_bytes', None)
  for form, name, most in (('py', 'data_batch_1', 16_788), ('bin', 'data_batch_1.bin', 6146)):
    file = extract(tmp_path, form) / name
    with file.open('wb') as sparse:
      sparse.truncate(3 * 2**30)
    message = f'{name} has 3221225472 bytes, expected at most {most}; extract the archive of http'
    with pytest.raises(ValueError, match=message):
      cifar10.Cifar10Source(tmp_path, ROWS)


@pytest.mark.parametrize('form', FORMS)
def test_archives_that_claim_too_much_are_not_read(tmp_path, monkeypatch, form):
  folder, archive, files = FORMS[form]
  name = next(iter(files()))
  member = tarfile.TarInfo(f'{folder}/{name}')
  member.size = 3 * 2**30
  (tmp_path / archive).write_bytes(gzip.compress(member.tobuf() + bytes(10_240)))
  monkeypatch.setattr(tarfile.TarFile, 'extractfile', None)
  message = f'cannot be read: {folder}/{name} in it has 3221225472 bytes, expected at most .* again'
  with pytest.raises(ValueError, match=message):
    cifar10.Cifar10Source(tmp_path, ROWS)


def test_archives_are_not_unpacked_without_end(tmp_path):
  """Neither what follows the files nor a header of tar is read whole; a little more is skipped."""
  archive = pack(tmp_path, 'bin')
  content = archive.read_bytes()
  archive.write_bytes(content + gzip.compress(bytes(100_000)))
  has_the_rows(cifar10.Cifar10Source(tmp_path, ROWS))
  header = tarfile.TarInfo('PaxHeader')
  header.type, header.size = tarfile.XHDTYPE, 3 * 2**30
  zeros = bytes(5_000_000)
  for damaged in (content + gzip.compress(zeros), gzip.compress(header.tobuf() + zeros)):
    archive.write_bytes(damaged)
    with pytest.raises(ValueError, match='read: it unpacks to more than 1097744 bytes; copy it'):
      cifar10.Cifar10Source(tmp_path, ROWS)


def test_the_newest_version_of_tfds_is_read(tmp_path):
  """3.0.10 comes after 3.0.2, and a version after what is none."""
  write_tfds(tmp_path / 'cifar10' / '3.0.10')
  for other in ('3.0.2', '2.10.0', 'older'):
    write_tfds(tmp_path / 'cifar10' / other, rows=9)
  has_the_rows(cifar10.Cifar10Source(tmp_path, ROWS))


@pytest.mark.parametrize('changes,message', [
  ({'name': 'cifar100'}, "holds 10 training rows of 'cifar100', expected 10 of 'cifar10'"),
  ({'rows': 9}, "holds 9 training rows of 'cifar10', expected 10"),
  ({'file_format': 'tfrecord'}, "cannot be read: .*prepare it .* file_format='array_record'"),
])
def test_other_tfds_folders_are_refused(tmp_path, changes, message):
  write_tfds(tmp_path / 'cifar10' / '3.0.2', **changes)
  with pytest.raises(ValueError, match=message) as error:
    cifar10.Cifar10Source(tmp_path, ROWS)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('file', ['dataset_info.json', 'features.json', 'shard'])
def test_damaged_tfds_folders_are_refused(tmp_path, file):
  shard = write_tfds(tmp_path / '3.0.2')
  damaged = shard if file == 'shard' else shard.with_name(file)
  damaged.write_bytes(damaged.read_bytes()[:100])
  with pytest.raises(ValueError, match='3.0.2 cannot be read: .*prepare it again') as error:
    cifar10.Cifar10Source(tmp_path, ROWS)
  assert '\n' not in str(error.value)


def test_an_empty_folder_says_what_to_put_there(tmp_path):
  expected = f'put cifar-10-binary.tar.gz or cifar-10-python.tar.gz of {cifar10.URL} there'
  for path, problem in ((tmp_path, 'holds no CIFAR-10'), (tmp_path / 'no', 'is not a folder')):
    with pytest.raises(ValueError, match=f'data.path={path} {problem}; {expected}'):
      cifar10.Cifar10Source(path)

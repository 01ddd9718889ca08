"""Pictures in folders and in TFDS: which rows there are, what they hold, what is refused."""

import concurrent.futures
import errno
import io
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import warnings

import numpy as np
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image

from fmzoo.data import images, picture_files
from tests import tiny
from tests.data import test_cifar10

PHOTOGRAPH = Image.fromarray(sklearn.datasets.load_sample_images().images[0])
SMALL = Image.fromarray(np.asarray(PHOTOGRAPH)[100:140, 200:250])  # 50 x 40


def content(image, form, **options):
  """Returns the bytes of a picture's file."""
  stream = io.BytesIO()
  image.save(stream, form, **options)
  return stream.getvalue()


def write(file, image=SMALL, form='PNG', **options):
  """Writes a picture, and the folders it is in."""
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_bytes(content(image, form, **options))
  return file


def fails(number):
  """Returns an `open` of a disk that gives only this error."""

  def fail(*args, **options):
    raise OSError(number, os.strerror(number), *args[:1])

  return fail


def names(source):
  return [source.name_of(i) for i in range(len(source))]


def refused(spec, *words, size=32, with_pixels=True):
  """Opens what must be refused in one line with these words."""
  with pytest.raises(ValueError) as error:
    images.open_source(str(spec), size, with_pixels)
  line = str(error.value)
  assert '\n' not in line
  for word in words:
    assert word in line, line


def test_crop_of_a_picture_of_that_size_changes_nothing():
  pixels = np.asarray(PHOTOGRAPH)[:32, :32]
  np.testing.assert_array_equal(images.adm_crop(Image.fromarray(pixels), 32), pixels)


def test_crop_halves_with_a_box_filter_before_anything_else():
  """A side of exactly twice the size is only halved: the mean of four pixels, rounded twice."""
  pixels = np.asarray(PHOTOGRAPH)[:64, :64]
  means = pixels.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
  np.testing.assert_allclose(images.adm_crop(Image.fromarray(pixels), 32), means, rtol=0, atol=1)


def test_crop_takes_the_middle_and_rounds_down():
  pixels = np.asarray(PHOTOGRAPH)[:32, :37]
  np.testing.assert_array_equal(images.adm_crop(Image.fromarray(pixels), 32), pixels[:, 2:34])


def test_crop_rounds_half_to_even():
  """16 x 25 pixels to 24: the longer side would be 37.5 and becomes 38, of 16 x 27 40.5 and 40."""
  for side, scaled in ((25, 38), (27, 40)):
    image = PHOTOGRAPH.crop((300, 200, 316, 200 + side))
    pixels = np.asarray(image.resize((24, scaled), Image.Resampling.BICUBIC))
    top = (scaled - 24) // 2
    np.testing.assert_array_equal(images.adm_crop(image, 24), pixels[top : top + 24])


@pytest.mark.parametrize('sides', [(1, 1), (31, 90), (500, 40), (33, 32), (427, 640)])
@pytest.mark.parametrize('size', [1, 8, 32])
def test_crop_always_has_its_size(sides, size):
  cropped = images.adm_crop(PHOTOGRAPH.resize(sides), size)
  assert cropped.shape == (size, size, 3) and cropped.dtype == np.uint8
  assert cropped.flags.c_contiguous and cropped.flags.owndata


def test_crop_makes_rgb_first():
  grey = PHOTOGRAPH.convert('L')
  np.testing.assert_array_equal(
    images.adm_crop(grey, 32), images.adm_crop(grey.convert('RGB'), 32)
  )


def test_class_folders_give_labels_in_the_order_of_names(tmp_path):
  pixels = tiny.write_pictures(tmp_path, ('b', 'a', 'C'), per_class=2, size=32)
  source = images.open_source(str(tmp_path), 32, True)
  assert source.classes == ('C', 'a', 'b') and source.num_classes == 3
  assert names(source) == [f'{name}/0000{i}.png' for name in 'Cab' for i in range(2)]
  assert [source[i]['label'] for i in range(6)] == [0, 0, 1, 1, 2, 2]
  for i, row in enumerate((4, 5, 2, 3, 0, 1)):
    np.testing.assert_array_equal(source[i]['pixels'], pixels[row])
  assert (source.has_moments, source.vae, source.lowest_classes) == (False, '', 3)
  assert source.crop == 'ADM centre crop to 32'


def test_pictures_of_tests_are_the_same_each_time(tmp_path):
  first, again, other = (
    tiny.write_pictures(tmp_path / str(i), 2, 3, 16, seed) for i, seed in enumerate((0, 0, 1))
  )
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()
  assert images.ImageFolder(tmp_path / '0', 16).classes == ('class000', 'class001')


def test_rows_are_cropped_to_the_size(tmp_path):
  write(tmp_path / 'x.png', PHOTOGRAPH)
  row = images.ImageFolder(tmp_path, 24)[0]
  np.testing.assert_array_equal(row['pixels'], images.adm_crop(PHOTOGRAPH, 24))


def test_pictures_are_found_at_any_depth_in_the_order_of_torchvision(tmp_path):
  """Folders as text, then files: 'n/b-1' comes before 'n/b/a', and files of 'n' before both."""
  for name in ('n/z.png', 'n/b/a.png', 'n/b/a/c.png', 'n/b-1/d.png', 'm/deep/er/e.png'):
    write(tmp_path / name)
  source = images.ImageFolder(tmp_path, 32)
  assert names(source) == [
    'm/deep/er/e.png', 'n/z.png', 'n/b/a.png', 'n/b-1/d.png', 'n/b/a/c.png'
  ]
  assert source.classes == ('m', 'n')


def test_pictures_without_class_folders_are_of_one_class(tmp_path):
  for name in ('b.png', 'a.png'):
    write(tmp_path / name)
  source = images.ImageFolder(tmp_path, 32)
  assert names(source) == ['a.png', 'b.png'] and source[1]['label'] == 0
  assert source.classes == () and source.num_classes == source.lowest_classes == 1


def test_endings_of_any_case_are_pictures_and_hidden_files_are_not(tmp_path):
  endings = ('.jpg', '.JPEG', '.Png', '.webp', '.bmp', '.gif', '.tif', '.TIFF', '.ppm')
  for i, ending in enumerate(endings):
    form = Image.registered_extensions()[ending.lower()]
    write(tmp_path / 'a' / f'{i}{ending}', form=form)
  write(tmp_path / 'a' / '.hidden.png')
  write(tmp_path / '.thumbnails' / 'x.png')
  source = images.ImageFolder(tmp_path, 32)
  assert names(source) == [f'a/{i}{ending}' for i, ending in enumerate(endings)]
  for row in source:
    error = np.abs(row['pixels'].astype(int) - images.adm_crop(SMALL, 32))
    assert error.mean() < 16  # JPEG and GIF lose a little
  assert source.classes == ('a',)


def test_files_that_are_no_pictures_are_counted_and_logged(tmp_path, caplog):
  write(tmp_path / 'a' / 'x.png')
  for name in ('README.md', 'a/notes.txt', 'a/below/more.txt'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('')
  with caplog.at_level('INFO'):
    assert len(images.ImageFolder(tmp_path, 32)) == 1
  assert 'left out 3 files' in caplog.text and 'README.md' in caplog.text


def test_links_are_followed(tmp_path):
  write(tmp_path / 'elsewhere' / 'deep' / 'x.png')
  (tmp_path / 'data').mkdir()
  (tmp_path / 'data' / 'cat').symlink_to(tmp_path / 'elsewhere')
  assert names(images.ImageFolder(tmp_path / 'data', 32)) == ['cat/deep/x.png']


def test_a_link_to_a_folder_above_is_refused(tmp_path):
  write(tmp_path / 'cat' / 'x.png')
  (tmp_path / 'cat' / 'round').symlink_to(tmp_path / 'cat')
  refused(tmp_path, 'cat/round links to a folder it is in')


def test_folders_that_are_not_classes_are_refused(tmp_path):
  refused(tmp_path / 'none', 'is not there', 'tfds:NAME', '.hdf5', 'vae-sd/dataset.json')
  refused(tmp_path, 'holds no pictures', '.jpeg')
  for name in ('train', 'val'):
    write(tmp_path / name / 'cat' / 'x.png')
  refused(tmp_path, 'holds train, val, which are splits', str(tmp_path / 'train'))
  (tmp_path / 'dog').mkdir()
  refused(tmp_path, 'class folder dog holds no pictures')
  write(tmp_path / 'x.png')
  refused(tmp_path, 'both pictures (x.png) and folders (dog)')
  refused(tmp_path / 'x.png', 'is a file of another kind', 'tfds:NAME')
  refused(tmp_path, 'size=0', size=0)


def test_an_index_beyond_the_end_ends_iteration(tmp_path):
  tiny.write_pictures(tmp_path, 1, 2, 8)
  source = images.ImageFolder(tmp_path, 8)
  assert len(list(source)) == 2
  with pytest.raises(IndexError):
    source[-1]


@pytest.mark.parametrize('mode', ['L', 'LA', 'P', 'RGBA', '1', 'RGB'])
def test_pngs_of_any_mode_are_rgb_without_a_warning(tmp_path, mode):
  """And one whose palette has transparent colours, of which Pillow would warn."""
  image = SMALL.convert(mode)
  options = {'transparency': bytes(range(64))} if mode == 'P' else {}
  write(tmp_path / 'x.png', image, **options)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    pixels = images.ImageFolder(tmp_path, 32)[0]['pixels']
  np.testing.assert_array_equal(pixels, images.adm_crop(image.convert('RGB'), 32))


def test_cmyk_and_pngs_that_are_called_jpeg_can_be_read(tmp_path):
  """ImageNet has some of both."""
  cmyk = write(tmp_path / 'a.JPEG', SMALL.convert('CMYK'), 'JPEG', quality=95)
  write(tmp_path / 'b.JPEG')
  source = images.ImageFolder(tmp_path, 32)
  with Image.open(cmyk) as image:
    expected = images.adm_crop(image.convert('RGB'), 32)
  np.testing.assert_array_equal(source[0]['pixels'], expected)
  np.testing.assert_array_equal(source[1]['pixels'], images.adm_crop(SMALL, 32))


def test_the_orientation_of_exif_is_not_applied(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # a quarter turn
  write(tmp_path / 'x.png', exif=exif)
  pixels = images.ImageFolder(tmp_path, 32)[0]['pixels']
  np.testing.assert_array_equal(pixels, images.adm_crop(SMALL, 32))


def sixteen_bits():
  return content(Image.fromarray(np.full((40, 40), 1000, np.uint16)), 'PNG')


@pytest.mark.parametrize('data,reason', [
  (b'', 'it is no JPEG'),
  (b'hello' * 100, 'it is no JPEG'),
  (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'it is no JPEG'),
  (content(SMALL, 'JPEG')[:-300], 'damaged .*truncated'),
  (content(SMALL, 'PNG')[:-300], 'damaged .*truncated'),
  (sixteen_bits(), 'mode I;16, expected 8 bits'),
  (content(Image.new('L', (20000, 2)), 'PNG'), '20000 x 2 pixels are too narrow'),
])
def test_an_unreadable_file_is_named_and_the_others_are_read(tmp_path, data, reason):
  write(tmp_path / 'a' / 'good.png')
  (tmp_path / 'a' / 'bad.png').write_bytes(data)
  source = images.ImageFolder(tmp_path, 320)
  with pytest.raises(images.Unreadable, match=reason) as error:
    source[0]
  assert error.value.name == 'a/bad.png' and str(tmp_path) not in str(error.value)
  assert '\n' not in error.value.reason and len(error.value.reason) < 120
  assert source[1]['pixels'].shape == (320, 320, 3)


def test_a_decompression_bomb_is_unreadable(tmp_path, monkeypatch):
  write(tmp_path / 'x.png')
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 900)  # refused at twice as many, 2,000 are there
  with pytest.raises(images.Unreadable, match='more than 1800 pixels'):
    images.ImageFolder(tmp_path, 8)[0]


def test_a_picture_that_is_gone_is_unreadable(tmp_path):
  (tmp_path / 'x.png').symlink_to(tmp_path / 'nowhere')
  source = images.ImageFolder(tmp_path, 8)
  with pytest.raises(images.Unreadable, match='x.png cannot be read: no such file') as error:
    source[0]
  assert error.value.name == 'x.png' and str(tmp_path) not in str(error.value)


def test_a_folder_in_place_of_a_picture_is_unreadable(tmp_path):
  file = write(tmp_path / 'x.png')
  source = images.ImageFolder(tmp_path, 8)
  file.unlink()
  file.mkdir()
  with pytest.raises(images.Unreadable, match='x.png cannot be read: is a directory'):
    source[0]


@pytest.mark.parametrize('number', [errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ELOOP])
def test_faults_of_one_file_make_it_unreadable(tmp_path, monkeypatch, number):
  write(tmp_path / 'x.png')
  source = images.ImageFolder(tmp_path, 8)
  monkeypatch.setattr(picture_files, 'open', fails(number), raising=False)
  with pytest.raises(images.Unreadable, match=os.strerror(number).lower()):
    source[0]


@pytest.mark.parametrize('number', [
  errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE,
  errno.ENOMEM, errno.EINVAL,
])
def test_faults_of_disk_and_machine_are_not_blamed_on_the_picture(tmp_path, monkeypatch, number):
  write(tmp_path / 'x.png')
  source = images.ImageFolder(tmp_path, 8)
  monkeypatch.setattr(picture_files, 'open', fails(number), raising=False)
  with pytest.raises(OSError, match=os.strerror(number)) as error:
    source[0]
  assert error.value.errno == number


def test_want_of_file_handles_while_decoding_is_not_blamed_on_the_picture(tmp_path, monkeypatch):
  write(tmp_path / 'x.png')
  source = images.ImageFolder(tmp_path, 8)
  monkeypatch.setattr(Image, 'open', fails(errno.EMFILE))
  with pytest.raises(OSError, match='Too many'):
    source[0]


def test_pictures_of_a_folder_that_is_gone_are_not_called_unreadable(tmp_path):
  write(tmp_path / 'data' / 'x.png')
  source = images.ImageFolder(tmp_path / 'data', 8)
  (tmp_path / 'data').rename(tmp_path / 'elsewhere')
  with pytest.raises(FileNotFoundError):
    source[0]
  (tmp_path / 'elsewhere').rename(tmp_path / 'data')
  assert source[0]['label'] == 0


def test_the_empty_place_of_a_mount_is_not_the_folder(tmp_path):
  """What is there afterwards is on another device; here it is the one of the processes."""
  write(tmp_path / 'data' / 'x.png')
  (tmp_path / 'mount').symlink_to(tmp_path / 'data')
  source = images.ImageFolder(tmp_path / 'mount', 8)
  (tmp_path / 'mount').unlink()
  (tmp_path / 'mount').symlink_to('/proc/self')
  with pytest.raises(FileNotFoundError):
    source[0]


def test_a_huge_file_is_unreadable_before_it_is_read(tmp_path):
  with open(write(tmp_path / 'x.png'), 'ab') as file:
    file.truncate(2**40)
  with pytest.raises(images.Unreadable, match='1099511627776 bytes, expected 1073741824 or fewer'):
    images.ImageFolder(tmp_path, 8)[0]


@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'GIF', 'TIFF', 'WEBP', 'BMP', 'PPM'])
@pytest.mark.filterwarnings('ignore::UserWarning')  # Pillow's, of damaged metadata
def test_damaged_bytes_raise_nothing_but_unreadable(form):
  draw, whole = random.Random(0), content(SMALL, form)
  for _ in range(100):
    data = bytearray(whole)
    for _ in range(draw.randint(1, 8)):
      data[draw.randrange(min(len(data), draw.choice((64, len(data)))))] = draw.randrange(256)
    try:
      assert picture_files.read_crop(bytes(data), 'x', 8).shape == (8, 8, 3)
    except images.Unreadable as error:
      assert '\n' not in str(error)


def test_formats_are_loaded_before_the_first_picture_is_read():
  """In a fresh process: Pillow would load WEBP when it meets one, where a thread may be too late.
  """
  script = '''
import concurrent.futures, sys, threading
from PIL import Image
from fmzoo.data import picture_files
picture_files.read_crop(b'P6 1 1 255 xyz', 'x', 8)
assert 'WEBP' in Image.OPEN
data, together = sys.stdin.buffer.read(), threading.Barrier(8)
def read(_):
  together.wait()
  return picture_files.read_crop(data, 'x', 8).sum()
with concurrent.futures.ThreadPoolExecutor(8) as pool:
  assert len(set(pool.map(read, range(8)))) == 1
'''
  subprocess.run(
    [sys.executable, '-c', script], input=content(SMALL, 'WEBP'), check=True, timeout=60,
    cwd=pathlib.Path(__file__).parents[2],
  )


def test_threads_share_a_source(tmp_path):
  pixels = tiny.write_pictures(tmp_path, 2, 10, 16)
  source = images.ImageFolder(tmp_path, 16)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    rows = list(pool.map(source.__getitem__, range(20)))
  np.testing.assert_array_equal([row['pixels'] for row in rows], pixels)


def test_names_that_are_no_text_can_be_printed(tmp_path):
  name = os.fsdecode(b'caf\xe9\n.png')
  write(tmp_path / name)
  source = images.ImageFolder(tmp_path, 32)
  source.name_of(0).encode()
  assert source.name_of(0) == 'caf\ufffd\ufffd.png' and source[0]['label'] == 0
  assert len(source.fingerprint()) == 64


def test_listing_is_announced_and_takes_the_sizes_along(tmp_path, monkeypatch, caplog):
  """A million files are not asked one by one once more, and nobody waits without a word."""
  tiny.write_pictures(tmp_path, 2, 2, 16)
  (tmp_path / 'class001' / 'gone.png').symlink_to(tmp_path / 'nowhere')
  with caplog.at_level('INFO'):
    source = images.ImageFolder(tmp_path, 16)
  assert f'listing pictures in {tmp_path}' in caplog.text
  expected, stat, asked = source.fingerprint(), os.stat, []
  monkeypatch.setattr(os, 'stat', lambda path, **options: asked.append(path) or stat(path))
  assert source.fingerprint() == expected and not asked
  monkeypatch.undo()
  file = tmp_path / 'class000' / '00000.png'
  file.write_bytes(file.read_bytes() + b'x')
  assert images.ImageFolder(tmp_path, 16).fingerprint() != expected


def test_the_listing_is_announced_before_it_begins(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(os, 'scandir', fails(errno.EIO))
  with caplog.at_level('INFO'):
    refused(tmp_path, 'cannot be listed: Input/output error')
  assert 'listing pictures in' in caplog.text


def test_the_fingerprint_changes_with_the_listing_and_not_with_the_place(tmp_path):
  def fingerprint(folder):
    return images.ImageFolder(folder, 16).fingerprint()

  for name in ('one', 'two'):
    tiny.write_pictures(tmp_path / name, 2, 2, 16)
  before = fingerprint(tmp_path / 'one')
  assert before == fingerprint(tmp_path / 'two') and len(bytes.fromhex(before)) == 32
  file = tmp_path / 'two' / 'class001' / '00001.png'
  seen = {before}
  for change in (
    lambda: file.write_bytes(file.read_bytes() + b'x'),
    lambda: file.rename(file.with_name('00002.png')),
    lambda: (tmp_path / 'two' / 'class001').rename(tmp_path / 'two' / 'class002'),
    lambda: write(tmp_path / 'two' / 'class000' / '00009.png'),
  ):
    change()
    seen.add(fingerprint(tmp_path / 'two'))
  assert len(seen) == 5


@pytest.fixture(scope='module')
def tfds_folder(tmp_path_factory):
  """Ten random 32 x 32 pictures as the training split of cifar10, in TFDS's own layout."""
  folder = tmp_path_factory.mktemp('tfds') / 'cifar10' / '3.0.2'
  test_cifar10.write_tfds(folder)
  return folder


def test_tfds_folders_give_their_rows(tfds_folder):
  source = images.open_source(f'tfds:{tfds_folder}', 32, True)
  assert len(source) == 10 and source.num_classes == 10 == len(source.classes)
  for i, row in enumerate(source):
    np.testing.assert_array_equal(row['pixels'], test_cifar10.PIXELS[i])
    assert row['label'] == test_cifar10.LABELS[i] and type(row['label']) is int
  assert source.name_of(3) == 'row 3' and source.crop == 'ADM centre crop to 32'
  assert (source.has_moments, source.vae, source.lowest_classes) == (False, '', 10)


def test_tfds_splits_may_be_parts(tfds_folder):
  source = images.open_source(f'tfds:{tfds_folder}:train[50%:]', 32, True)
  assert len(source) == 5
  np.testing.assert_array_equal(source[0]['pixels'], test_cifar10.PIXELS[5])


def test_tfds_names_are_found_in_its_data_folder_without_tensorflow(tfds_folder):
  script = '''
import sys
from fmzoo.data import images
for name in ('cifar10', 'cifar10:3.0.2', 'cifar10:3.0.2:train'):
  source = images.open_source(f'tfds:{name}', 8, False)
  assert source[9]['pixels'].shape == (8, 8, 3) and source.fingerprint()
assert not {'tensorflow', 'jax'} & set(sys.modules)
'''
  environment = {**os.environ, 'TFDS_DATA_DIR': str(tfds_folder.parents[1])}
  subprocess.run(
    [sys.executable, '-c', script], env=environment, check=True, timeout=60,
    cwd=pathlib.Path(__file__).parents[2],
  )


def test_imagenet_of_tfds_has_its_classes():
  with tfds.testing.mock_data(num_examples=7):
    source = images.open_source('tfds:imagenet2012', 16, True)
    assert len(source) == 7 and source.num_classes == 1000
    assert source.classes[:2] == ('n01440764', 'n01443537')
    assert source[6]['pixels'].shape == (16, 16, 3) and 0 <= source[6]['label'] < 1000


def test_names_that_tfds_writes_are_labels(tmp_path):
  """A data set that TFDS itself stored, which takes TensorFlow and so a process of its own."""
  script = f'''
import numpy as np, tensorflow_datasets as tfds
pixels = np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3)
tfds.dataset_builders.store_as_tfds_dataset(
  name='toys', version='1.0.0', data_dir={str(tmp_path)!r}, disable_shuffling=True,
  features=tfds.features.FeaturesDict({{
    'image': tfds.features.Image(shape=(8, 8, 3), encoding_format='png'),
    'label': tfds.features.ClassLabel(names=['car', 'bear'])}}),
  split_datasets={{'train': [
    (i, {{'image': pixels[i], 'label': name}}) for i, name in enumerate(('bear', 'car', 'bear'))]}},
  file_format='array_record', download_config=tfds.download.DownloadConfig(try_download_gcs=False))
'''
  subprocess.run([sys.executable, '-c', script], check=True, timeout=300)
  source = images.open_source(f'tfds:{tmp_path}/toys/1.0.0', 8, True)
  assert source.classes == ('car', 'bear')
  assert [row['label'] for row in source] == [1, 0, 1]
  pixels = np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3)
  np.testing.assert_array_equal([row['pixels'] for row in source], pixels)


def test_tfds_that_is_not_prepared_says_how(tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  refused(
    'tfds:imagenet2012', "tfds.builder('imagenet2012'", "file_format='array_record'",
    'download_and_prepare()', 'not prepared in',
  )


def test_tfds_in_another_file_format_says_how(tmp_path):
  folder = tmp_path / 'cifar10' / '3.0.2'
  test_cifar10.write_tfds(folder, file_format='tfrecord')
  refused(
    f'tfds:{folder}', f'{folder} is in file format tfrecord', "file_format='array_record'"
  )


@pytest.mark.parametrize('split,word', [
  ('test', "Unknown split 'test'. Should be one of ['train']"), ('train[', 'Error parsing split'),
])
def test_tfds_without_such_a_split_is_refused(tfds_folder, split, word):
  refused(f'tfds:{tfds_folder}:{split}', word)


@pytest.mark.parametrize('spec', ['tfds:', 'tfds::train', 'tfds:a:'])
def test_tfds_without_a_name_is_refused(spec):
  refused(spec, 'expected tfds:NAME[:SPLIT]')


def test_tfds_that_is_unknown_or_no_version_folder_is_refused(tmp_path, tfds_folder):
  refused('tfds:no_such_data', 'no_such_data not found', 'expected a name of TFDS')
  refused(f'tfds:{tfds_folder.parent}', 'expected a version folder')
  refused('tfds:imagenet2012:9.9.9', '9.9.9')


@pytest.mark.parametrize('old,new,words', [
  ('"image": {"pythonClass', '"picture": {"pythonClass', "no feature 'image'"),
  ('"label": {"pythonClass', '"kind": {"pythonClass', "no feature 'label'"),
  ('"dtype": "uint8"', '"dtype": "uint16"', "'image' is uint16, expected uint8"),
])
def test_tfds_with_other_features_is_refused(tmp_path, old, new, words):
  test_cifar10.write_tfds(tmp_path / 'x')
  file = tmp_path / 'x' / 'features.json'
  assert old in file.read_text()
  file.write_text(file.read_text().replace(old, new))
  refused(f'tfds:{tmp_path}/x', words)


def shards_of(rows, record=b'x'):
  """Returns the bytes of an ArrayRecord file."""
  with tempfile.NamedTemporaryFile() as file:
    writer = array_record_module.ArrayRecordWriter(file.name, 'group_size:1')
    for _ in range(rows):
      writer.write(record)
    writer.close()
    return pathlib.Path(file.name).read_bytes()


def test_tfds_labels_out_of_range_are_unreadable(tmp_path):
  """Test splits have -1 where the label is secret."""
  test_cifar10.write_tfds(tmp_path / 'x')
  file = tmp_path / 'x' / 'features.json'
  file.write_text(file.read_text().replace('"numClasses": "10"', '"numClasses": "2"'))
  source = images.open_source(f'tfds:{tmp_path}/x', 32, True)
  row, label = next((i, k) for i, k in enumerate(test_cifar10.LABELS) if k >= 2)
  with pytest.raises(images.Unreadable, match=f'row {row} .*label {label}, expected 0 to 1'):
    source[row]


@pytest.mark.parametrize('change,words', [
  (lambda shard: shard.write_bytes(shard.read_bytes()[:-100]), 'no readable end'),
  (lambda shard: shard.unlink(), 'no readable end'),
  (lambda shard: shard.write_bytes(shards_of(9)), '9 rows'),
])
def test_tfds_with_an_incomplete_shard_is_refused(tmp_path, change, words):
  shard = test_cifar10.write_tfds(tmp_path / 'x')
  change(shard)
  refused(f'tfds:{tmp_path}/x', f'{shard.name} has {words}, dataset_info.json says 10 rows')


def test_a_damaged_tfds_record_is_unreadable(tmp_path):
  shard = test_cifar10.write_tfds(tmp_path / 'x')
  data = bytearray(shard.read_bytes())
  at = [found.start() for found in re.finditer(b'IDAT', data)][3]
  data[at : at + 40] = bytes(40)
  shard.write_bytes(data)
  source, bad = images.open_source(f'tfds:{tmp_path}/x', 32, True), 0
  for i in range(len(source)):
    try:
      np.testing.assert_array_equal(source[i]['pixels'], test_cifar10.PIXELS[i])
    except images.Unreadable:
      bad += 1
  assert bad == 1


def test_a_missing_tfds_file_is_not_blamed_on_the_record(tmp_path):
  shard = test_cifar10.write_tfds(tmp_path / 'decompressed')
  source = images.open_source(f'tfds:{tmp_path}/decompressed', 32, True)
  shard.rename(tmp_path / 'elsewhere')
  with pytest.raises(ValueError, match='row 3 cannot be read: .*No such file') as error:
    source[3]
  assert not isinstance(error.value, images.Unreadable) and '\n' not in str(error.value)


@pytest.mark.parametrize('problem,is_damage', [
  ('open() failed: Too many open files; opening /corrupted/x', False),
  ('read() failed: Input/output error; reading /data/x; at byte 9', False),
  ('Corrupted Riegeli/records file: chunk data hash mismatch; at byte 13244', True),
  ('Brotli-compressed stream got truncated; at byte 3', True),
])
def test_only_problems_of_bytes_damage_a_tfds_record(tfds_folder, monkeypatch, problem, is_damage):
  class Rows(list):
    def __getitem__(self, index):
      raise RuntimeError(problem)

  source = images.open_source(f'tfds:{tfds_folder}', 32, True)
  monkeypatch.setattr(source, '_rows', Rows(range(10)))
  with pytest.raises(ValueError) as error:
    source[3]
  assert isinstance(error.value, images.Unreadable) == is_damage


def test_the_fingerprint_of_tfds_changes_with_split_and_files(tmp_path):
  def fingerprint(folder, split='train'):
    return images.open_source(f'tfds:{folder}:{split}', 32, True).fingerprint()

  for name in ('a', 'b'):
    test_cifar10.write_tfds(tmp_path / name)
  assert fingerprint(tmp_path / 'a') == fingerprint(tmp_path / 'b')
  assert fingerprint(tmp_path / 'a') != fingerprint(tmp_path / 'a', 'train[:5]')
  info = tmp_path / 'b' / 'dataset_info.json'
  info.write_text(info.read_text().replace('3.0.2', '3.0.3'))
  shard = test_cifar10.write_tfds(tmp_path / 'c')
  shard.write_bytes(shards_of(10, random.Random(0).randbytes(20000)))
  others = [fingerprint(tmp_path / name) for name in 'bc']
  assert len({*others, fingerprint(tmp_path / 'a')}) == 3

"""Pictures become the moments that the VAE gives, and a stop at any place leaves no trace."""

import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import h5py
import jax
import numpy as np
import pytest
from PIL import Image

from fmzoo import inputs, main
from fmzoo.convert import vae as official
from fmzoo.convert import weights
from fmzoo.data import images, latents, manifests, prepare, shards
from fmzoo.models import vae
from tests import tiny

CLASSES, PER_CLASS = 3, 7
SIDE = 8  # of the pictures; the tiny autoencoder halves it
COUNT = CLASSES * PER_CLASS
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module', autouse=True)
def small():
  """The tiny autoencoder in place of the official one, two images at a time on each device."""
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(vae, 'SD_VAE', tiny.VAE)
    monkeypatch.setattr(prepare, 'ENCODED_ROWS', 1)
    yield


@pytest.fixture(scope='module')
def params():
  """The autoencoder's weights."""
  return tiny.random_vae()


@pytest.fixture(scope='module')
def folder(tmp_path_factory, params):
  """A folder with pictures and the autoencoder's file."""
  folder = tmp_path_factory.mktemp('prepare')
  np.save(folder / 'pixels.npy', tiny.write_pictures(folder / 'pictures', CLASSES, PER_CLASS, SIDE))
  weights.save(folder / 'vae.safetensors', official.to_official(params, tiny.VAE))
  return folder


def recipe(folder, target, method='fm', **changes):
  """Returns a recipe that reads latents of the pictures from a folder."""
  return tiny.recipe(method, **{
    'data__name': 'latents', 'data__path': str(target), 'data__latent_size': SIDE // 2,
    'data__channels': 4, 'data__latent_scale': 0.18215, 'data__num_classes': CLASSES,
    'data__vae': str(folder / 'vae.safetensors'), **changes,
  })


def run(folder, target, source=None, **changes):
  """Prepares the pictures in shards of four."""
  options = {'dtype': 'float32', 'shard_rows': 4}
  options |= {key: changes.pop(key) for key in list(changes) if key in options}
  source = str(folder / 'pictures') if source is None else source
  return prepare.prepare(recipe(folder, target, **changes), source, **options)


def contents(path):
  """Returns {name: bytes} of a folder of files."""
  return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope='module')
def whole(folder):
  """Latents that were prepared without a stop."""
  run(folder, folder / 'whole')
  return folder / 'whole'


def encoded(params, pixels):
  """Returns the moments of pictures by the network itself, one at a time."""
  encode = jax.jit(vae.make(tiny.VAE).encode)
  return np.concatenate([encode(params, inputs.from_pixels(one[None])) for one in pixels])


def test_moments_are_those_of_the_pictures(folder, whole, params):
  source = latents.LatentSource(whole)
  rows = source.batch(np.arange(COUNT))
  np.testing.assert_allclose(
    rows['moments'], encoded(params, np.load(folder / 'pixels.npy')), rtol=1e-5, atol=1e-5
  )
  np.testing.assert_array_equal(rows['label'], np.repeat(np.arange(CLASSES), PER_CLASS))
  latents.verify(whole)


def test_the_manifest_says_how_they_came_about(whole, params):
  manifest = manifests.read(whole)
  assert manifest.classes == ['class000', 'class001', 'class002'] and manifest.unreadable == []
  assert (manifest.num_classes, manifest.scale, manifest.mirrored) == (CLASSES, 0.18215, False)
  assert manifest.vae == 'vae.safetensors' and manifest.image_shape == []
  assert manifest.vae_hash == official.encoder_hash(params['encoder'])
  assert manifest.crop == 'ADM centre crop to 8'
  assert [shard['count'] for shard in manifest.shards] == [4, 4, 4, 4, 4, 1]


def test_mirror_images_and_pictures_are_kept_where_the_recipe_needs_them(folder, params, tmp_path):
  """A method that aligns needs the pictures, flips need moments of their mirror images."""
  run(folder, tmp_path, method='bfm', data__flip=True, data__encoder='later.safetensors')
  rows = latents.LatentSource(tmp_path, with_image=True, with_mirror=True).batch(np.arange(COUNT))
  pixels = np.load(folder / 'pixels.npy')
  np.testing.assert_array_equal(rows['image'], pixels)
  for side, seen in enumerate((pixels, pixels[:, :, ::-1])):
    np.testing.assert_allclose(
      rows['moments'][:, side], encoded(params, seen), rtol=1e-5, atol=1e-5
    )


def test_half_precision_moments_are_the_same_rounded(folder, whole, tmp_path):
  run(folder, tmp_path, dtype='float16')
  exact, rounded = (
    latents.LatentSource(path).batch(np.arange(COUNT))['moments'] for path in (whole, tmp_path)
  )
  np.testing.assert_array_equal(rounded, exact.astype(np.float16))


READING = (images.ImageFolder, '__getitem__')  # of a picture
PLACES = (  # where a stop may fall, and after how many calls
  (READING, 2), (READING, 9), ((prepare.Encoder, '__call__'), 2), ((shards.os, 'replace'), 1),
  ((shards.os, 'replace'), 2), ((shards.os, 'replace'), 7), ((shards.latents, 'sha256'), 3),
  ((shards.shutil, 'rmtree'), 0),
)


@pytest.mark.parametrize('stops', [PLACES[:1], PLACES[1:4], PLACES[4:], PLACES[::-1], PLACES[::3]])
def test_a_job_that_was_stopped_goes_on_to_the_same_bytes(folder, whole, tmp_path, stops):
  """It breaks off while it reads, encodes, renames and tidies up, again and again."""
  for stop in stops:
    with pytest.MonkeyPatch.context() as monkeypatch:
      break_off(monkeypatch, *stop)
      with contextlib.suppress(KeyboardInterrupt):  # a later place may not come any more
        run(folder, tmp_path, data__num_threads=0)
  run(folder, tmp_path)
  assert contents(tmp_path) == contents(whole)


def break_off(monkeypatch, place, after):
  """Has a function raise in place of its call number `after`."""
  function, left = getattr(*place), [after]

  def breaking(*args, **options):
    left[0] -= 1
    if left[0] < 0:
      raise KeyboardInterrupt
    return function(*args, **options)

  monkeypatch.setattr(*place, breaking)


SCRIPT = '''
import sys, time
import jax
from fmzoo import main
from fmzoo.data import images
from fmzoo.models import vae
from tests import tiny
vae.SD_VAE, read = tiny.VAE, images.ImageFolder.__getitem__
images.ImageFolder.__getitem__ = lambda *args: (time.sleep(0.05), read(*args))[1]
flags, host, *paths = sys.argv[1:]
if host:
  address, process = host.split('/')
  jax.distributed.initialize(address, 2, int(process), initialization_timeout=60)
for path in paths:
  main.run(['fmzoo', 'prepare', *flags.split(), f'--config.data.path={path}'])
'''


def test_a_killed_process_goes_on_to_the_same_bytes(folder, tmp_path):
  """The command itself, killed once a shard is there; two hosts with the same command finish."""
  flags = (
    f'--config=configs/sit.py:s --config.data.latent_size={SIDE // 2} --from={folder}/pictures'
    f' --config.data.num_classes={CLASSES} --config.data.vae={folder}/vae.safetensors'
    ' --config.data.num_threads=0 --shard_rows=4'
  )
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  settings = {
    'cwd': ROOT, 'env': os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    'stderr': subprocess.PIPE, 'text': True,
  }
  command = [sys.executable, '-c', SCRIPT, flags]
  with subprocess.Popen([*command, '', whole, killed], **settings) as process:
    until = time.time() + 120
    while not list(killed.glob('partial/0*.json')) and time.time() < until:
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
  assert process.returncode == -signal.SIGKILL
  assert not (killed / 'manifest.json').exists()
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  finishing = [
    subprocess.Popen([*command, f'localhost:{port}/{host}', killed], **settings) for host in '01'
  ]
  told = [process.communicate(timeout=120)[1] for process in finishing]
  assert [process.returncode for process in finishing] == [0, 0], told
  done = re.search(r'(\d+) of 21 images are in finished shards, it goes on', told[0])
  assert done and 4 <= int(done[1]) < COUNT
  assert contents(killed) == contents(whole)


def test_unreadable_pictures_are_named_and_left_out(folder, whole, tmp_path, caplog):
  """One cut short and one of another kind; the others are the same as ever."""
  for source in sorted((folder / 'pictures').rglob('*.png')):
    target = tmp_path / 'pictures' / source.relative_to(folder / 'pictures')
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
  torn = tmp_path / 'pictures' / 'class001' / '00002.png'
  torn.write_bytes(torn.read_bytes()[:100])
  (tmp_path / 'pictures' / 'class002' / '00006.png').write_text('no picture')
  with caplog.at_level('INFO', logger='absl'):
    manifest = run(folder, tmp_path / 'latents', source=str(tmp_path / 'pictures'))
  names = ['class001/00002.png', 'class002/00006.png']
  assert manifest.unreadable == names and manifest.count == COUNT - 2
  assert '2 images could not be read and were left out: ' + ', '.join(names) in caplog.text
  source = latents.LatentSource(tmp_path / 'latents')
  rest = np.setdiff1d(np.arange(COUNT), [PER_CLASS + 2, COUNT - 1])
  found, expected = source.batch(np.arange(len(source))), latents.LatentSource(whole).batch(rest)
  np.testing.assert_array_equal(found['label'], expected['label'])
  np.testing.assert_allclose(found['moments'], expected['moments'], rtol=1e-5, atol=1e-5)


def test_stored_moments_need_no_vae(folder, tmp_path, monkeypatch):
  """SoFlow's file: mean and deviation, channels first, as they are; an eighth of their pictures."""
  monkeypatch.setattr(vae, 'SD_VAE', dataclasses.replace(tiny.VAE, widths=(8, 8, 8, 8)))
  rng = np.random.default_rng(0)
  moments = np.abs(rng.standard_normal((5, 8, 4, 4))).astype(np.float32)
  with h5py.File(tmp_path / 'latents.hdf5', 'w') as file:
    file['latents'], file['labels'] = moments, np.arange(5) % CLASSES
    file['amount'], file['latent_size'] = 5, 4
  manifest = run(
    folder, tmp_path / 'latents', source=str(tmp_path / 'latents.hdf5'), data__vae='',
  )
  assert manifest.vae.startswith('sd-vae-ft-mse (assumed') and manifest.vae_hash == ''
  rows = latents.LatentSource(tmp_path / 'latents').batch(np.arange(5))
  np.testing.assert_array_equal(rows['moments'], moments.transpose(0, 2, 3, 1))
  np.testing.assert_array_equal(rows['label'], np.arange(5) % CLASSES)


def test_labels_of_stored_moments_fit_before_anything_is_written(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(vae, 'SD_VAE', dataclasses.replace(tiny.VAE, widths=(8, 8, 8, 8)))
  with h5py.File(tmp_path / 'latents.hdf5', 'w') as file:
    file['latents'], file['labels'] = np.ones((5, 8, 4, 4), np.float32), np.arange(5)
    file['amount'], file['latent_size'] = 5, 4
  with pytest.raises(ValueError, match='data.num_classes=3 is too low for .* up to 4; set it to 5'):
    run(folder, tmp_path / 'latents', source=str(tmp_path / 'latents.hdf5'), data__vae='')
  assert not (tmp_path / 'latents').exists()


@pytest.mark.parametrize('changes,words', [
  ({'data__num_classes': 1000}, 'data.num_classes=1000 does not fit --from=.*, which has 3'),
  ({'data__vae': ''}, "data.vae='' must name the weights that encode --from="),
  ({'data__vae': 'none.safetensors'}, 'data.vae: none.safetensors cannot be read'),
  ({'source': 'nowhere'}, '--from=nowhere is not there; expected tfds:NAME'),
])
def test_what_cannot_work_is_refused_before_anything_is_written(folder, tmp_path, changes, words):
  with pytest.raises(ValueError, match=words):
    run(folder, tmp_path / 'latents', **changes)
  assert not (tmp_path / 'latents').exists()


def test_a_finished_job_is_left_as_it_is(folder, whole):
  before = contents(whole)
  assert run(folder, whole) == manifests.read(whole)
  assert contents(whole) == before


def test_small_sources_are_cut_finely_by_themselves(folder, tmp_path, monkeypatch):
  """Sixteen shards of equal size, of no fewer rows than is worth a file, and no more than set."""
  jobs = []
  monkeypatch.setattr(prepare, '_open_job', lambda *args, **sizes: jobs.append(sizes))
  for count in (21, 1600, 10**6):
    monkeypatch.setattr(images.ImageFolder, '__len__', lambda self, count=count: count)
    with pytest.raises(AttributeError):  # of a job that is none
      run(folder, tmp_path, shard_rows=None)
  assert [sizes['rows_per_shard'] for sizes in jobs] == [64, 100, 2048]


def test_another_vae_does_not_go_on_with_the_job(folder, tmp_path):
  with pytest.MonkeyPatch.context() as monkeypatch:
    break_off(monkeypatch, READING, after=6)
    with pytest.raises(KeyboardInterrupt):
      run(folder, tmp_path, data__num_threads=0)
  other = official.to_official(tiny.random_vae(seed=1), tiny.VAE)
  weights.save(tmp_path / 'other.safetensors', other)
  with pytest.raises(ValueError, match="beginnings of other latents: vae was 'vae.safetensors'"):
    run(folder, tmp_path, data__vae=str(tmp_path / 'other.safetensors'))


def test_prepare_needs_a_recipe_of_latents(capsys, monkeypatch):
  for words, message in (
    (['--config=configs/sit_digits.py', '--from=x'], "found data.name='digits'"),
    (['--config=configs/sit.py:s'], "'prepare' needs --from=SOURCE"),
    (['--config=configs/sit.py:s', '--from=x', '--dtype=int8'], 'int8'),
    (['--config=configs/sit.py:s', '--from=x', '--shard_rows=0'], 'shard_rows'),
  ):
    monkeypatch.setattr(sys, 'argv', ['fmzoo', 'prepare', *words])
    assert main.cli() == 2
    told = capsys.readouterr().err
    assert message in told and told.count('\n') == 1


def test_a_picture_of_another_size_is_cropped(folder, params, tmp_path):
  """What is encoded is the crop, not the file."""
  photograph = Image.fromarray(np.load(folder / 'pixels.npy')[0]).resize((20, 30))
  (tmp_path / 'pictures').mkdir()
  photograph.save(tmp_path / 'pictures' / 'only.png')
  run(folder, tmp_path / 'latents', source=str(tmp_path / 'pictures'), data__num_classes=1)
  moments = latents.LatentSource(tmp_path / 'latents').batch(np.array([0]))['moments']
  crop = images.adm_crop(photograph, SIDE)
  np.testing.assert_allclose(moments, encoded(params, crop[None]), rtol=1e-5, atol=1e-5)

"""Where data and runs may lie: latents in a bucket, all else on any file system, behind links."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fmzoo import checkpoint, files, main, paths, pictures, sample, step, writer
from fmzoo.data import cifar10, latents, shards
from fmzoo.data import images as image_sources
from fmzoo.metrics import protocol
from tests import bucket_server, tiny

ROOT = pathlib.Path(__file__).parent.parent
SETTINGS = {
  'latent_shape': (4, 4, 2), 'num_classes': 5, 'vae': 'toy-vae', 'vae_hash': 'abc', 'scale': 0.5,
  'crop': 'centre 256', 'rows_per_shard': 4,
}
SHARD = 'latents-00001-of-00003.array_record'


def write(path, seed=0):
  """Writes ten random rows in three shards."""
  rng = np.random.default_rng(seed)
  rows = [
    {'moments': abs(rng.standard_normal((4, 4, 4))).astype(np.float16), 'label': index % 5}
    for index in range(10)
  ]
  shards.write_latents(path, rows, **SETTINGS)


def run(root, code):
  """Runs Python that prints a JSON value, in a process whose buckets are the folders of `root`.

  Returns:
    (the value, names of the objects that were asked for).
  """
  with bucket_server.serving(root) as (environment, asked):
    result = subprocess.run(
      [sys.executable, '-c', code], cwd=ROOT, env=os.environ | environment, capture_output=True,
      text=True, timeout=60, check=False,
    )
  assert result.returncode == 0, result.stderr
  return json.loads(result.stdout), asked


OPEN = """
import json, pickle
import numpy as np
from fmzoo.data import latents
"""
REFUSED = OPEN + """
lines = {}
for path in %s:
  try:
    latents.LatentSource(path)
    lines[path] = 'opened'
  except ValueError as error:
    lines[path] = str(error)
print(json.dumps(lines))
"""


def test_latents_in_a_bucket_are_those_of_the_folder(tmp_path):
  """Also in a copy of the source, as worker processes get it; a row is one request."""
  folder = tmp_path / 'bucket' / 'some data' / 'latents'
  write(folder)
  found, asked = run(tmp_path, OPEN + """
source = latents.LatentSource('gs://bucket/some data/latents/')
rows = [source.batch(np.array([9, 0, 4])), pickle.loads(pickle.dumps(source)).batch(np.array([7]))]
print(json.dumps([{name: part.tolist() for name, part in row.items()} for row in rows]))
""")
  source = latents.LatentSource(folder)
  for indices, row in zip(([9, 0, 4], [7]), found):
    expected = source.batch(np.array(indices))
    assert row.keys() == expected.keys()
    for name, values in expected.items():
      np.testing.assert_array_equal(np.array(row[name], values.dtype), values)
  assert asked[0] == 'bucket/some data/latents/manifest.json'
  assert asked[1:7] == [  # an opened shard is asked for its end and its first record
    f'bucket/some data/latents/latents-{index:05d}-of-00003.array_record'
    for index in (0, 0, 1, 1, 2, 2)
  ]
  opened = 4  # shards that rows were read of, each opened once more
  assert len(asked) == 7 + 4 + opened


def test_what_is_wrong_with_latents_in_a_bucket_is_one_line(tmp_path):
  whole = tmp_path / 'bucket' / 'whole'
  write(whole)
  write(tmp_path / 'other', seed=1)
  for name in ('no_manifest', 'no_shard', 'cut_short', 'another_run'):
    shutil.copytree(whole, tmp_path / 'bucket' / name)
  (tmp_path / 'bucket' / 'no_manifest' / 'manifest.json').unlink()
  (tmp_path / 'bucket' / 'no_shard' / SHARD).unlink()
  cut = tmp_path / 'bucket' / 'cut_short' / SHARD
  cut.write_bytes(cut.read_bytes()[:-100])
  shutil.copy(tmp_path / 'other' / SHARD, tmp_path / 'bucket' / 'another_run' / SHARD)
  expected = {
    'gs://bucket/whole': 'opened',
    'gs://bucket/no_manifest': 'holds no manifest.json; expected latents',
    'gs://nobody/whole': 'holds no manifest.json',
    'gs://bucket/no_shard': f'shard {SHARD} cannot be read (Permanent error',
    'gs://bucket/cut_short': f'shard {SHARD} has no readable end',
    'gs://bucket/another_run': f'shard {SHARD} begins with another record',
    'gs://closed/whole': 'cannot be read (PERMISSION_DENIED',
    'gs://': 'cannot be read (',
    's3://bucket/whole': 'is an address, expected a path of this machine; mount',
  }
  lines, _ = run(tmp_path, REFUSED % list(expected))
  for path, words in expected.items():
    assert words in lines[path] and '\n' not in lines[path], lines[path]
    assert path in lines[path] or words == 'opened'
  assert lines['gs://bucket/no_shard'].endswith('; check the network and the credentials')
  assert lines['gs://bucket/cut_short'].endswith('; copy or write it again')


def test_a_bucket_that_does_not_answer_is_given_up(tmp_path):
  """The client alone would go on trying for many minutes."""
  lines, _ = run(tmp_path, """
import os
os.environ['TENSORSTORE_GCS_HTTP_URL'] = 'http://127.0.0.1:9'  # nobody listens there
from fmzoo.data import buckets
buckets.SECONDS = 0.5
""" + REFUSED % ['gs://bucket/x'])
  assert 'no answer in 0.5 s' in lines['gs://bucket/x']


@pytest.mark.parametrize('arguments,name', [
  (('--workdir=gs://bucket/run',), '--workdir'),
  (('sample', '--workdir', 'gs://bucket/run'), '--workdir'),
  (('evaluate', '--samples=s3://bucket/x.npz'), '--samples'),
  (('convert', '--weights=gs://bucket/x.safetensors'), '--weights'),
  (('convert', '--export=https://host/x.safetensors'), '--export'),
  (('prepare', '--from=gs://bucket/pictures'), '--from'),
  (('--config.run.init_from=gs://bucket/run',), 'run.init_from'),
  (('--config.data.vae=gs://bucket/x.safetensors',), 'data.vae'),
  (('--config.data.encoder=gs://bucket/x.pth',), 'data.encoder'),
])
def test_an_address_is_refused_in_one_line(arguments, name, tmp_path, monkeypatch, capsys):
  """And nothing is made, such as a folder `gs:`."""
  recipe = () if arguments[0] == 'sample' else (f'--config={ROOT}/configs/bfm_xl.py',)
  address = arguments[-1].rpartition('=')[2]
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(ROOT)
  monkeypatch.setattr(sys, 'argv', ['fmzoo', *arguments, *recipe])
  assert main.cli() == 2
  (line,) = capsys.readouterr().err.strip().splitlines()
  assert f'{name}={address} is an address' in line and 'mount the bucket' in line
  assert not list(tmp_path.iterdir())


def test_latents_are_not_written_to_an_address(tmp_path, monkeypatch, capsys):
  """Neither by the command nor by the functions, also where the environment names the place."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(ROOT)
  monkeypatch.setenv('FMZOO_DATA_DIR', 'gs://bucket/data')
  monkeypatch.setattr(
    sys, 'argv', ['fmzoo', 'prepare', f'--config={ROOT}/configs/bfm_xl.py', f'--from={tmp_path}']
  )
  assert main.cli() == 2
  line = capsys.readouterr().err.strip()
  assert 'data.path=gs://bucket/data/latents is an address' in line and 'copy it there' in line
  with pytest.raises(ValueError, match='data.path=gs://bucket/x is an address'):
    write('gs://bucket/x')
  with pytest.raises(ValueError, match='data.path=gs://bucket/x is an address'):
    shards.Job('gs://bucket/x', None, count=1, rows_per_shard=1)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('opened', [
  lambda path: cifar10.Cifar10Source(path),
  lambda path: image_sources.open_source(path, 64, False),
  lambda path: latents.verify(path),
  lambda path: sample.open_checkpoints(tiny.recipe('fm'), path, read_only=False),
])
def test_functions_refuse_an_address_too(opened, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match='=gs://bucket/x is an address'):
    opened('gs://bucket/x')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('path', ['runs/a', 'a/gs:/b', './a:b', '~/x', '', pathlib.Path('gs')])
def test_paths_of_this_machine_pass(path):
  paths.expect_local('data.path', path)
  assert not paths.is_bucket(path)


@pytest.fixture
def linked(tmp_path):
  """A link to a folder in memory, a file system of its own; where there is none, to any folder."""
  memory = pathlib.Path('/dev/shm')
  place = memory if memory.is_dir() and os.access(memory, os.W_OK) else tmp_path
  with tempfile.TemporaryDirectory(dir=place) as folder:
    (tmp_path / 'linked').symlink_to(folder, target_is_directory=True)
    yield tmp_path / 'linked'


def test_checkpoints_behind_a_link_come_back(linked):
  """Also past a newer one that is damaged, which is renamed there."""
  state = step.TrainState(
    params={'w': jnp.arange(6.0)}, ema={'w': jnp.zeros(6)}, opt_state=(), step=jnp.int32(1),
    rng=jax.random.key(0), bad_steps=jnp.int32(0),
  )
  folder = linked / 'run' / 'checkpoints'
  with checkpoint.Checkpoints(folder, identity={}, keep_last=2) as checkpoints:
    for done in (1, 2, 3):
      checkpoints.save(done, state._replace(params={'w': done * jnp.arange(6.0)}))
  shutil.rmtree(folder / '3' / 'params')
  with checkpoint.Checkpoints(folder, identity={}, keep_last=2) as checkpoints:
    restored, done = checkpoints.restore(jax.eval_shape(lambda: state))
  assert done == 2 and sorted(os.listdir(linked.resolve() / 'run' / 'checkpoints')) == [
    '2', 'damaged-3-0']
  np.testing.assert_array_equal(restored.params['w'], 2 * np.arange(6.0))


@pytest.fixture(scope='module')
def tensorflow_is_imported():
  """Pays for the import once, outside of the test."""
  import clu.metric_writers  # noqa: F401


def test_results_behind_a_link_replace_and_keep_what_was_there(linked, tensorflow_is_imported):
  """Pictures and configs are replaced, other numbers are set aside, later lines are cut."""
  workdir = linked / 'run'
  for images in (np.zeros((2, 4, 4, 1), np.uint8), np.ones((2, 4, 4, 1), np.uint8)):
    pictures.save_grid(workdir / 'samples' / 'x.png', images, 2)
  with Image.open(workdir / 'samples' / 'x.png') as picture:
    np.testing.assert_array_equal(np.asarray(picture), pictures.grid(images, 2)[..., 0])
  for text in ('a', 'b'):
    files.write_config(workdir, {'run': text})
    protocol.write_result(workdir / 'evaluations' / 'x', {'accuracy': 1.0}, {'of': text})
  assert json.loads((workdir / 'config.json').read_text()) == {'run': 'b'}
  results = workdir / 'evaluations' / 'x'
  assert json.loads((results / 'protocol.json').read_text()) == {'of': 'b'}
  assert json.loads((results / 'earlier_1' / 'protocol.json').read_text()) == {'of': 'a'}
  for resume_step in (0, 1):
    with writer.Writer(workdir, resume_step=resume_step) as out:
      out.scalars(1 + resume_step, {'loss': 1.0})
      out.scalars(3 + resume_step, {'loss': 1.0})
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines] == [1, 2, 4]
  assert list(linked.resolve().glob('run/events.out.tfevents*'))
  assert not list(linked.resolve().rglob('*.tmp'))


def test_latents_behind_a_link_are_written_and_read(linked, tmp_path):
  write(linked / 'latents')
  write(tmp_path / 'plain')
  latents.verify(linked / 'latents')
  for folder in (linked / 'latents', linked.resolve() / 'latents'):
    rows = [
      latents.LatentSource(path).batch(np.arange(10)) for path in (folder, tmp_path / 'plain')
    ]
    jax.tree.map(np.testing.assert_array_equal, *rows)

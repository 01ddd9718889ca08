"""Images depend on seed, index and label alone; labels and file names are what was asked for."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from fmzoo import convert_weights, evaluate, files, make_reference, partial, sample
from fmzoo import sampler as samplers
from fmzoo.parallel import hosts
from fmzoo.parallel import mesh as meshes
from tests import test_evaluate, tiny

ROOT = pathlib.Path(__file__).parent.parent


def test_an_image_depends_on_its_index_and_not_on_the_batch(tmp_path):
  recipe = tiny.recipe('fm')
  params = tiny.warm(tiny.init(recipe))
  images = []
  for devices, size in ((1, 7), (8, 16), (1, 30)):
    mesh = tiny.mesh(devices)
    part = tiny.recipe('fm', sample__batch_size=size)
    images.append(samplers.Sampler(part, mesh)(params, np.arange(30, dtype=np.int32) % 10, 3))
  np.testing.assert_allclose(images[1], images[0], rtol=0, atol=1e-5)
  np.testing.assert_allclose(images[2], images[0], rtol=0, atol=1e-5)
  assert np.abs(images[0][0] - images[0][10]).max() > 0.1


def test_long_descriptions_stay_distinct_and_short():
  names = []
  for last in '1', '2':
    names.append(sample.describe(tiny.recipe('fm'), labels='0,' * 200 + last))
  assert names[0] != names[1] and max(map(len, names)) == sample.NAME


@pytest.mark.parametrize('labels,expected', [
  ('balanced', [0, 1, 2, 0, 1]), ('2,0', [2, 0, 2, 0, 2]), ('1', [1] * 5),
])
def test_labels(labels, expected):
  assert list(sample.choose_labels(labels, 5, 3, 0)) == expected


def test_random_labels_come_from_the_seed():
  first, again, other = (sample.choose_labels('random', 1000, 10, seed) for seed in (0, 0, 1))
  assert (first == again).all() and (first != other).any()
  assert set(first) == set(range(10))


@pytest.mark.parametrize('labels', ['random', 'balanced', '3,1'])
def test_a_label_does_not_depend_on_how_many_there_are(labels):
  few, many = (sample.choose_labels(labels, count, 1000, 5) for count in (333, 50_000))
  np.testing.assert_array_equal(few, many[:333])


def test_guided_sampling_is_shared_by_the_devices():
  """Each of four devices does a quarter of the work, the layers of conditions aside."""
  def flops(devices):
    recipe = tiny.recipe(
      'bfm_frn', mesh__data=devices, sample__guidance=3.0, run__init_from='elsewhere'
    )
    mesh = meshes.make(recipe.mesh)
    params = sample.abstract_params(recipe, mesh)
    labels = jax.ShapeDtypeStruct((16,), 'int32')
    compiled = samplers.Sampler(recipe, mesh).run.lower(params, 0, labels, labels).compile()
    return compiled.cost_analysis()['flops']

  assert flops(4) < 0.35 * flops(1)


def made(workdir, seed=1, **changes):
  """Returns a tiny recipe whose checkpoint lies in a workdir, and is made there if need be."""
  recipe = tiny.recipe('fm', **{
    'sample__num_steps': 2, 'sample__num_images': 53, 'sample__labels': 'random', **changes,
  })
  if not (workdir / 'checkpoints').exists():
    params = tiny.warm(tiny.init(recipe), seed)
    with sample.open_checkpoints(recipe, workdir, read_only=False) as checkpoints:
      files.write_config(workdir, recipe.config)
      checkpoints.save(0, convert_weights.Weights(jax.device_put(params)))
  return recipe


def stored_files(workdir):
  """Returns {name: bytes} of everything in samples/."""
  paths = (path for path in (workdir / 'samples').rglob('*') if path.is_file())
  return {path.name: path.read_bytes() for path in paths}


def stop_after(monkeypatch, chunks):
  """Has the next `sample` fail once it has written so many chunks."""
  write, left = partial.Job.write, [chunks]

  def counted(self, chunk, images):
    if not left[0]:
      raise InterruptedError
    left[0] -= 1
    write(self, chunk, images)

  monkeypatch.setattr(partial.Job, 'write', counted)


def test_the_file_is_the_same_to_the_last_bit(tmp_path, monkeypatch):
  """Whatever the batch, the devices, the number of images and the interruptions."""
  monkeypatch.setattr(samplers, 'ROWS', 5)
  whole = tmp_path / 'whole'
  path = sample.sample(made(whole, mesh__data=1, sample__batch_size=5), whole)
  with np.load(path) as arrays:
    images, labels = arrays['arr_0'], arrays['labels']
  assert images.shape == (53, 8, 8, 1) and images.std() > 20
  np.testing.assert_array_equal(labels, sample.choose_labels('random', 53, 10, 0))
  parts = tmp_path / 'parts'
  for devices, batch_size in ((4, 100), (1, 30)):
    with monkeypatch.context() as context, pytest.raises(InterruptedError):
      stop_after(context, 3)
      sample.sample(made(parts, mesh__data=devices, sample__batch_size=batch_size), parts)
  partial_folder, = (parts / 'samples').glob('*.partial')
  chunk = sorted(partial_folder.glob('0*'))[2]
  chunk.write_bytes(b'damaged')
  sample.sample(made(parts, mesh__data=4, sample__batch_size=7), parts)
  assert stored_files(parts) == stored_files(whole)
  fewer = sample.sample(made(parts, mesh__data=3, sample__num_images=12), parts)
  np.testing.assert_array_equal(np.load(fewer)['arr_0'], images[:12])


def test_finished_images_are_left_alone_and_get_their_pngs(tmp_path, monkeypatch):
  path = sample.sample(made(tmp_path, mesh__data=1), tmp_path)
  before = stored_files(tmp_path)
  stop_after(monkeypatch, 0)
  assert sample.sample(made(tmp_path, mesh__data=2), tmp_path) == path
  assert stored_files(tmp_path) == before and len(before) == 3
  sample.sample(made(tmp_path, mesh__data=1, sample__png_folder=True), tmp_path)
  after = stored_files(tmp_path)
  assert {name: after[name] for name in before} == before
  assert set(after) - set(before) == {f'{index:05d}.png' for index in range(53)}


def test_a_host_that_does_not_see_the_finished_file_is_not_left_alone(tmp_path, monkeypatch):
  """The others, which see it, make the images once more with it: the same."""
  sample.sample(made(tmp_path, mesh__data=1), tmp_path)
  before, again = stored_files(tmp_path), []
  is_finished, write = partial.Job.is_finished.fget, partial.Job.write
  monkeypatch.setattr(
    partial.Job, 'is_finished', property(lambda job: 'here' if is_finished(job) else '')
  )
  monkeypatch.setattr(hosts, 'all_agree', lambda holds: bool(holds) and holds != 'here')
  monkeypatch.setattr(partial.Job, 'write', lambda *args: again.append(write(*args)))
  sample.sample(made(tmp_path, mesh__data=1), tmp_path)
  assert again and stored_files(tmp_path) == before


def test_images_of_other_weights_are_refused(tmp_path):
  """The workdir was trained anew, to the same step."""
  old, new = tmp_path / 'old', tmp_path / 'new'
  sample.sample(made(old), old)
  recipe = made(new, seed=2)
  (old / 'samples').rename(new / 'samples')
  before = stored_files(new)
  with pytest.raises(ValueError, match='weights_sha256 was [0-9a-f]{64} and is now') as error:
    sample.sample(recipe, new)
  assert '\n' not in str(error.value) and stored_files(new) == before


def test_the_record_is_the_protocol(tmp_path):
  path = sample.sample(recipe := made(tmp_path), tmp_path)
  record = json.loads(path.with_name(f'{path.name.removesuffix(".npz")}.json').read_text())
  params, done = sample.load_params(recipe, meshes.make(recipe.mesh), tmp_path)
  asked = sample.protocol(recipe, params, done, labels='random', num_images=53, weights='ema')
  assert {key: record[key] for key in asked} == json.loads(json.dumps(asked))
  assert record['sampler'] == {'num_steps': 2, 'guidance': 1.0, 'solver': 'euler'}
  assert record['recipe'] == recipe.identity


def command(workdir, *words):
  """Starts `fmzoo sample` in a process of its own."""
  return subprocess.Popen(
    [sys.executable, '-m', 'fmzoo.main', 'sample', f'--workdir={workdir}', *words],
    cwd=ROOT, stderr=subprocess.PIPE, text=True,
  )


def interrupt(process, workdir, signum, at_chunks):
  """Sends a signal once so many chunks are there; returns what the process told, by lines."""
  while len(chunks(workdir)) < at_chunks:
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.001)
  process.send_signal(signum)
  return process.communicate(timeout=60)[1].splitlines()


def chunks(workdir):
  """Returns the finished chunks of a job."""
  return [path for path in workdir.glob('samples/*.partial/0*') if path.suffix != '.tmp']


def test_a_stopped_process_is_gone_on_with(tmp_path):
  """kill -9 and SIGTERM; the files equal those of a process that was never stopped."""
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  for workdir in (whole, parts):
    made(workdir, mesh__data=1, sample__num_images=4000, sample__batch_size=8)
  uninterrupted, process = command(whole), command(parts)
  assert interrupt(process, parts, signal.SIGKILL, 20) == [] and process.returncode == -9
  done = len(chunks(parts))
  process = command(parts, '--config.sample.batch_size=100')
  lines = interrupt(process, parts, signal.SIGTERM, done + 20)
  assert process.returncode == 143 and len(lines) == 2, lines
  assert f'{8 * done} of 4000 images are there already' in lines[0]
  assert f'stopped by SIGTERM after {8 * len(chunks(parts))} of 4000 images' in lines[1]
  process = command(parts)
  lines = process.communicate(timeout=60)[1]
  assert process.returncode == 0 and uninterrupted.wait(60) == 0, lines
  assert stored_files(parts) == stored_files(whole) and len(stored_files(whole)) == 3


def test_two_hosts_stop_together(tmp_path):
  """SIGTERM of one: both have made as many chunks, and both say so by their status."""
  made(tmp_path, mesh__data=1, sample__num_images=40_000, sample__batch_size=8)
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  two = [
    command(
      tmp_path, '--config.mesh.data=-1', f'--coordinator=localhost:{port}', '--processes=2',
      f'--process={index}',
    ) for index in range(2)
  ]
  try:
    told = [interrupt(two[1], tmp_path, signal.SIGTERM, 20), two[0].communicate(timeout=60)[1]]
  finally:
    for process in two:
      process.kill()
  assert [process.returncode for process in two] == [143, 143], told
  numbers = sorted(int(path.name.partition('-')[0]) for path in chunks(tmp_path))
  shares = [[n for n in numbers if n < 20_000], [n for n in numbers if n >= 20_000]]
  assert len(shares[0]) == len(shares[1]) >= 10 and len(numbers) < 5000, numbers


HOST = """
import sys
import jax
jax.distributed.initialize('localhost:' + sys.argv[1], 2, int(sys.argv[2]))
from fmzoo import main
from tests import test_evaluate
test_evaluate.use_standin()
workdir = '--workdir=' + sys.argv[3]
for sys.argv in ['fmzoo', 'sample', workdir], ['fmzoo', 'evaluate', workdir]:
  assert main.cli() == 0
"""


def test_two_hosts_write_and_measure_what_one_does(tmp_path, monkeypatch):
  flags = os.environ.get('XLA_FLAGS', '')
  monkeypatch.setenv('XLA_FLAGS', f'{flags} --xla_force_host_platform_device_count=2'.strip())
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  test_evaluate.use_standin(monkeypatch.setattr)
  (tmp_path / 'weights').write_bytes(b'weights')
  for name in 'one', 'two':
    recipe = made(
      tmp_path / name, sample__batch_size=8, eval__name='inception', eval__num_images=53,
      eval__inception=str(tmp_path / 'weights'), eval__reference=str(tmp_path / 'digits.npz'),
    )
  make_reference.make_reference(recipe, recipe.eval.reference)
  one = command(tmp_path / 'one')
  two = [
    subprocess.Popen(
      [sys.executable, '-c', HOST, str(port), str(index), str(tmp_path / 'two')], cwd=ROOT,
      stderr=subprocess.PIPE, text=True,
    ) for index in range(2)
  ]
  try:
    told = [process.communicate(timeout=120)[1] for process in (one, *two)]
  finally:
    for process in (one, *two):
      process.kill()
  assert [process.returncode for process in (one, *two)] == [0, 0, 0], told
  assert stored_files(tmp_path / 'two') == stored_files(tmp_path / 'one') != {}
  values = evaluate.evaluate(recipe, tmp_path / 'one')
  (result,) = (tmp_path / 'two' / 'evaluations').glob('*/metrics.json')
  found = json.loads(result.read_text())
  assert found.keys() == values.keys()
  for metric, value in values.items():
    np.testing.assert_allclose(found[metric], value, rtol=1e-9, atol=1e-6, err_msg=metric)

"""Images to numbers and back to how they came about, with a stand-in for Inception."""

import json
import shutil
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmzoo import (
  build,
  evaluate,
  evaluators,
  hashes,
  hooks,
  main,
  make_reference,
  pictures,
  sample,
  sampler,
  train,
)
from fmzoo.convert import inception as official
from fmzoo.metrics import activations, protocol
from fmzoo.models import inception
from fmzoo.parallel import hosts
from fmzoo.parallel import mesh as meshes
from tests import tiny

LOAD = official.load


def standin(config):
  """An Inception of a few numbers: fixed random projections of 12 x 12 pixels."""
  rng = np.random.default_rng(0)
  matrices = [rng.standard_normal((144, n)).astype(np.float32) / 12 for n in (6, 4)]
  head = rng.standard_normal((6, 5)).astype(np.float32)

  def features(params, images):
    small = jnp.mean(images[:, ::25, ::25], axis=-1).reshape(len(images), -1)
    return inception.Features(*(params['scale'] * (small @ matrix) for matrix in matrices))

  return inception.Inception(
    lambda rng: {'scale': jnp.ones(())}, features,
    lambda params, pool: pool @ head + 1, lambda params, pool: pool @ head,
  )


def use_standin(setattr=setattr):
  """Has everybody take the stand-in for Inception, and its weights for any that are there."""
  setattr(inception, 'make', standin)
  setattr(official, 'load', lambda path: {'scale': np.float32(1)})


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  """The path of weights that load as those of the stand-in, and beside it statistics of digits."""
  path = tmp_path_factory.mktemp('weights') / 'inception.pth'
  path.write_bytes(b'weights')
  with pytest.MonkeyPatch.context() as patch:
    use_standin(patch.setattr)
    made = recipe_of(path)
    make_reference.make_reference(made, made.eval.reference)
    yield path


def recipe_of(weights, **changes):
  settings = {
    'eval__name': 'inception', 'eval__inception': str(weights), 'mesh__data': 1,
    'eval__reference': str(weights.parent / 'digits.npz'), **changes,
  }
  return tiny.recipe('fm', **settings)


@pytest.fixture
def recipe(weights):
  """A recipe on digits that is measured against all of them."""
  return recipe_of(weights)


@pytest.fixture(scope='module')
def finished(weights, tmp_path_factory):
  """The workdir of a run that was measured at its end."""
  workdir = tmp_path_factory.mktemp('finished')
  train.train(recipe_of(weights), workdir)
  return workdir


@pytest.fixture
def run(finished, tmp_path):
  """A copy of it."""
  return shutil.copytree(finished, tmp_path / 'run')


def digits_npz(folder, count=200):
  """Writes real digits as if they were generated."""
  path = folder / 'real.npz'
  images = pictures.pixels(sklearn_digits()[:count])
  np.savez(path, arr_0=images, labels=np.zeros(len(images), np.int32))
  return path


def sklearn_digits():
  from fmzoo.data import digits

  return digits.DigitsSource().arrays()[0]


def result(workdir):
  """Returns (metrics, protocol) of the one result of a workdir."""
  (folder,) = (workdir / 'evaluations').iterdir()
  return tuple(json.loads((folder / f'{n}.json').read_text()) for n in ('metrics', 'protocol'))


def test_a_set_is_at_no_distance_from_itself(recipe, tmp_path):
  values = evaluate.evaluate(recipe, tmp_path / 'w', samples=digits_npz(tmp_path, 1797))
  assert abs(values['fid-1797']) <= 1e-9 + values['fid_error']
  assert abs(values['sfid-1797']) <= 1e-9 + values['sfid_error']
  assert values['precision'] == values['recall'] == 1
  assert 1 <= values['inception_score'] <= 5


def test_other_images_are_further_away(recipe, tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 1), np.uint8)
  np.savez(tmp_path / 'noise.npz', arr_0=noise)
  near = evaluate.evaluate(recipe, tmp_path / 'w', samples=digits_npz(tmp_path, 300))
  far = evaluate.evaluate(recipe, tmp_path / 'w', samples=tmp_path / 'noise.npz')
  assert far['fid-300'] > 10 * near['fid-300'] and far['precision'] < near['precision']


def test_checkpoint_and_the_file_of_its_samples_give_the_same_numbers(weights, run, tmp_path):
  generated, about = result(run)
  recipe = recipe_of(weights, sample__num_images=20)
  path = sample.sample(recipe, run)
  values = evaluate.evaluate(recipe, tmp_path / 'again', samples=path)
  metrics, told = result(tmp_path / 'again')
  for name, value in values.items():
    np.testing.assert_allclose(value, generated[name], rtol=1e-9, atol=1e-9, err_msg=name)
  assert protocol.differences(told, about) == []
  assert told['images']['pixels_sha256'] == about['images']['pixels_sha256']


def test_protocol_tells_all_that_one_needs_to_measure_it_again(weights, recipe, finished):
  metrics, about = result(finished)
  assert set(metrics) == {
    'fid-20', 'fid_error', 'sfid-20', 'sfid_error', 'inception_score', 'inception_score_std',
    'precision', 'recall', 'gmac_per_image',
  }
  images, settings = about['images'], about['metrics']
  assert images['num_images'] == 20 and images['step'] == 4 and images['weights'] == 'ema'
  assert len(images['weights_sha256']) == 64 and images['sampler']['num_steps'] == 4
  assert settings['inception_sha256'] == hashes.file_sha256(weights)
  assert settings['reference']['sha256'] == hashes.file_sha256(recipe.eval.reference)
  assert settings['reference']['num_images'] == 1797 and settings['resize'] == 'tf1'
  assert about['code']


def test_training_goes_on_while_the_host_computes_its_numbers(weights, tmp_path, monkeypatch):
  """The report of step 2 waits for step 4: were it not in a thread, it would wait for ever."""
  reached, ordinary, saved = threading.Event(), evaluate.report, hooks.Hooks.__call__

  def report(*args):
    assert reached.wait(timeout=60)
    return ordinary(*args)

  def noted(self, done, *args, **kwargs):
    if done == 4:
      reached.set()
    saved(self, done, *args, **kwargs)

  monkeypatch.setattr(evaluate, 'report', report)
  monkeypatch.setattr(hooks.Hooks, '__call__', noted)
  train.train(recipe_of(weights, eval__every_steps=2), tmp_path)
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines if 'eval/fid-20' in line] == [2, 4]


def test_sigterm_gives_an_evaluation_up_which_the_next_start_makes(weights, tmp_path, monkeypatch):
  """The step is saved before it is measured, so nothing is lost."""
  collect, preemptions, make = evaluators.Inception.collect, [], hosts.Preemption

  def watched():
    preemptions.append(make())
    return preemptions[-1]

  def interrupted(self, batches, **options):
    preemptions[-1]._notice(None, None)
    return collect(self, batches, **options)

  monkeypatch.setattr(hosts, 'Preemption', watched)
  settings = {'eval__every_steps': 2, 'log__checkpoint_every_steps': 0}
  with monkeypatch.context() as patch:
    patch.setattr(evaluators.Inception, 'collect', interrupted)
    state = train.train(recipe_of(weights, **settings), tmp_path)
  assert int(state.step) == 3 and not (tmp_path / 'evaluations').exists()
  assert {path.name for path in (tmp_path / 'checkpoints').iterdir()} >= {'2', '3'}
  train.train(recipe_of(weights, **settings), tmp_path)
  assert [path.name[:6] for path in (tmp_path / 'evaluations').iterdir()] == ['step=4']


def test_a_result_cut_short_by_a_kill_is_made_again(recipe, run):
  (folder,) = (run / 'evaluations').iterdir()
  metrics = (folder / 'metrics.json').read_text()
  (folder / 'metrics.json').unlink()
  train.train(recipe, run)
  assert (folder / 'metrics.json').read_text() == metrics


def test_numbers_under_way_are_kept_when_a_run_fails(weights, tmp_path, monkeypatch):
  def fail(self, done):
    assert done != 4, 'the log fails'
    log(self, done)

  log = hooks.Hooks.log
  monkeypatch.setattr(hooks.Hooks, 'log', fail)
  with pytest.raises(AssertionError, match='the log fails'):
    train.train(recipe_of(weights, eval__every_steps=2), tmp_path)
  assert result(tmp_path)[1]['images']['step'] == 2


def test_a_failing_report_ends_the_run_with_its_reason(recipe, tmp_path, monkeypatch):
  def report(*_):
    raise ValueError('no numbers')

  monkeypatch.setattr(evaluate, 'report', report)
  with pytest.raises(ValueError, match='no numbers'):
    train.train(recipe, tmp_path)


def test_numbers_of_a_diverged_network_are_refused(recipe, tmp_path):
  mesh = meshes.make(recipe.mesh)
  measurement = evaluate.Measurement(recipe, mesh, sampler.Sampler(recipe, mesh))
  params = jax.tree.map(lambda leaf: leaf * jnp.nan, tiny.init(recipe))
  with pytest.raises(ValueError, match='image 0 and 9 others of 10 hold numbers that are not'):
    measurement.collect(params, 4, weights='ema')


def test_images_of_a_reference_are_seen_once(weights, tmp_path, monkeypatch):
  adm = tmp_path / 'adm.npz'
  np.savez(adm, arr_0=pictures.pixels(sklearn_digits()[:100]))
  made = recipe_of(weights, eval__reference=str(adm))
  samples, seen, measure = digits_npz(tmp_path, 50), [], activations.measure

  def watched(*args, **kwargs):
    found = measure(*args, **kwargs)
    seen.append(found.pool.count)
    return found

  monkeypatch.setattr(activations, 'measure', watched)
  first = evaluate.evaluate(made, tmp_path / 'a', samples=samples)
  assert seen == [100, 50]
  assert evaluate.evaluate(made, tmp_path / 'b', samples=samples) == first
  assert seen == [100, 50, 50]


def test_statistics_of_adm_go_before_those_of_its_images(weights, tmp_path):
  """They are of all real images, arr_0 is a part of them, for precision and recall."""
  rng, adm = np.random.default_rng(0), tmp_path / 'adm.npz'
  spread = rng.standard_normal((6, 6))
  np.savez(
    adm, arr_0=pictures.pixels(sklearn_digits()[:100]), mu=np.full(6, 3.0), sigma=spread @ spread.T
  )
  known = evaluators.make(recipe_of(weights, eval__reference=str(adm)), [8, 8]).reference
  np.testing.assert_array_equal(known.pool.mean, np.full(6, 3.0))
  assert known.features.shape == (100, 6) and known.spatial.mean.shape == (4,)


def test_few_images_are_told_aloud(recipe, tmp_path, caplog):
  evaluate.evaluate(recipe, tmp_path / 'w', samples=digits_npz(tmp_path, 6))
  text = 'fid of 6 images: their covariance of 6 features has rank 5 at most'
  assert text in caplog.text and text in ' '.join(result(tmp_path / 'w')[1]['notes'])


def test_a_folder_of_pngs_has_the_record_of_its_images(weights, run, tmp_path):
  """Names with full stops, as those of options are, are neither cut nor mixed up."""
  recipe = recipe_of(weights, sample__png_folder=True)
  path = sample.sample(recipe, run)
  folder = path.with_name(path.name.removesuffix('.npz'))
  for samples in (folder, path):
    values = evaluate.evaluate(recipe, tmp_path / samples.suffix, samples=samples)
    metrics, about = result(tmp_path / samples.suffix)
    assert metrics == values and about['images']['sampler']['num_steps'] == 4
    assert (tmp_path / samples.suffix / 'evaluations' / folder.name).is_dir()


def test_the_record_of_other_images_is_refused(recipe, run, tmp_path):
  path = sample.sample(recipe, run)
  with np.load(path) as arrays:
    np.savez(path, arr_0=arrays['arr_0'][:6], labels=arrays['labels'][:6])
  with pytest.raises(ValueError, match='record of other images: num_images is 10 there and 6 in'):
    evaluate.evaluate(recipe, tmp_path / 'again', samples=path)


def test_other_pixels_than_the_record_says_are_refused(recipe, run, tmp_path):
  path = sample.sample(recipe, run)
  with np.load(path) as arrays:
    np.savez(path, arr_0=255 - arrays['arr_0'], labels=arrays['labels'])
  with pytest.raises(ValueError, match='holds other pixels than .*json says'):
    evaluate.evaluate(recipe, tmp_path / 'again', samples=path)
  assert not (tmp_path / 'again').exists()


@pytest.mark.parametrize('text', ['["ab"]', 'notes of mine'])
def test_a_foreign_file_of_that_name_is_no_record(recipe, tmp_path, text):
  path = digits_npz(tmp_path, 50)
  path.with_suffix('.json').write_text(text)
  evaluate.evaluate(recipe, tmp_path / 'w', samples=path)
  assert set(result(tmp_path / 'w')[1]['images']) == {
    'file', 'num_images', 'shape', 'pixels_sha256'}


@pytest.mark.parametrize('kind', ['folder', 'npz'])
def test_a_reference_of_pictures(weights, tmp_path, caplog, kind):
  """Cropped to the recipe's size; a picture that cannot be read is named and left out."""
  pixels = tiny.write_pictures(tmp_path / 'pictures', 2, 10, 32)
  (tmp_path / 'pictures' / 'class000' / 'x.png').write_bytes(b'no picture')
  np.savez(tmp_path / 'x.npz', arr_0=pixels)
  config = tiny.config('soflow_unet', mesh__data=1)
  config.eval.update(name='inception', inception=str(weights))
  made, source = build.recipe(config), {'folder': 'pictures', 'npz': 'x.npz'}[kind]
  make_reference.make_reference(made, tmp_path / 'ref.npz', str(tmp_path / source))
  with np.load(tmp_path / 'ref.npz') as arrays:
    about = json.loads(str(arrays['protocol']))
    matrix = np.random.default_rng(0).standard_normal((144, 6)).astype(np.float32) / 12
    seen = np.asarray(inception.inputs(jnp.asarray(pixels), 'tf1'))[:, ::25, ::25].mean(axis=-1)
    np.testing.assert_allclose(
      arrays['mu'], (seen.reshape(20, -1) @ matrix).mean(axis=0), rtol=1e-4, atol=1e-5)
    assert arrays['pool'].shape == (20, 6)
  assert about['num_images'] == 20 and about['image_size'] == [32, 32]
  assert about.get('unreadable', ['class000/x.png']) == ['class000/x.png']


def call(monkeypatch, capsys, *arguments):
  """Runs the command line; returns (exit status, stdout, stderr)."""
  monkeypatch.setattr(sys, 'argv', ['fmzoo', *map(str, arguments)])
  capsys.readouterr()
  status = main.cli()
  return status, *capsys.readouterr()


def test_two_results_are_compared(recipe, tmp_path, monkeypatch, capsys):
  for name, count in (('a=(1,2)', 100), ('b', 50)):
    samples = digits_npz(tmp_path, count).rename(tmp_path / f'{name}.npz')
    evaluate.evaluate(recipe, tmp_path, samples=samples)
  folders = ','.join(str(tmp_path / 'evaluations' / name) for name in ('a=(1,2)', 'b'))
  status, out, _ = call(monkeypatch, capsys, 'evaluate', f'--compare={folders}')
  assert status == 0 and 'fid-100' in out and 'images.num_images: 100 | 50' in out
  assert 'metrics.resize' not in out  # the same in both
  same = ','.join([str(tmp_path / 'evaluations' / 'b')] * 2)
  assert 'protocols are the same' in call(monkeypatch, capsys, 'evaluate', f'--compare={same}')[1]


REAL = '--samples={folder}/real.npz'
BAD = {
  'no checkpoint': ((), ('no checkpoint', 'train first')),
  'no weights': (
    (REAL, '--config.eval.inception={folder}/none.pth'),
    ('none.pth', 'pt_inception-2015-12-05-6726825d.pth', 'https://github.com', official.SHA256)),
  'no reference': ((REAL, '--config.eval.reference='), ("eval.reference=''", '--make_reference')),
  'a reference that is not there': (
    (REAL, '--config.eval.reference={folder}/none.npz'), ('none.npz', 'VIRTUAL_imagenet256')),
  'a reference made otherwise': (
    (REAL, '--config.eval.resize=ptfid'), ('digits.npz', "resize 'tf1'", "'ptfid'")),
  'unknown resize': (('--config.eval.resize=pil',), ('eval.resize', 'pil', 'tf1, ptfid')),
  'samples cut short': (('--samples={folder}/cut.npz',), ('cut.npz',)),
  'samples that are no pixels': (('--samples={folder}/floats.npz',), ('floats.npz', 'float32')),
  'samples of a wrong size': (('--samples={folder}/flat.npz',), ('flat.npz',)),
  'samples with two channels': (('--samples={folder}/two.npz',), ('two.npz', '2')),
  'samples of another size': (
    ('--samples={folder}/large.npz',), ('9 x 9 pixels', 'digits.npz', '8 x 8')),
  'no samples there': (('--samples={folder}/none.npz',), ('none.npz',)),
  'a folder without pictures': (('--samples={folder}/empty',), ('empty',)),
  'results of nothing': (('--compare={folder},{folder}',), ('two results', 'metrics.json')),
  'one result': (('--compare={folder}',), ('--compare', 'A,B')),
  'three samples': (('--samples={folder}/three.npz',), ('three.npz holds 3 images', '4 or more')),
  'one sample asked for': (('--config.eval.num_images=1',), ('eval.num_images=1', 'at least 4')),
  'weights that are a folder': (
    (REAL, '--config.eval.inception={folder}/empty'), ('empty is no file',)),
  'a reference whose protocol is damaged': (
    (REAL, '--config.eval.reference={folder}/odd.npz'), ('odd.npz', 'cannot be read')),
  'a reference that is there': (('--make_reference={folder}/digits.npz',), ('digits.npz', 'there')),
  'a reference of another kind': (('--make_reference={folder}/x.npy',), ('x.npy', '.npz')),
  'a source without reference': (('--from={folder}',), ('--from', '--make_reference')),
  'a reference of nothing': (
    ('--make_reference={folder}/x.npz', '--from={folder}/none'), ('--from', 'none')),
}


@pytest.mark.parametrize('arguments,words', BAD.values(), ids=BAD)
def test_bad_input_is_one_line(recipe, tmp_path, monkeypatch, capsys, arguments, words):
  (tmp_path / 'config.json').write_text(json.dumps(recipe.config))
  (tmp_path / 'empty').mkdir()
  whole = digits_npz(tmp_path).read_bytes()
  (tmp_path / 'cut.npz').write_bytes(whole[:-200])
  np.savez(tmp_path / 'odd.npz', mu=np.zeros(6), sigma=np.eye(6), protocol='{bad')
  for name, array in {
    'three': np.zeros((3, 8, 8, 1), np.uint8),
    'floats': np.zeros((5, 8, 8, 3), np.float32), 'flat': np.zeros((5, 64), np.uint8),
    'two': np.zeros((5, 8, 8, 2), np.uint8), 'large': np.zeros((5, 9, 9, 1), np.uint8),
  }.items():
    np.savez(tmp_path / f'{name}.npz', arr_0=array)
  shutil.copy(recipe.eval.reference, tmp_path / 'digits.npz')
  if words[0] in ('none.pth', 'empty is no file'):
    monkeypatch.setattr(official, 'load', LOAD)
  before = sorted(tmp_path.rglob('*'))
  arguments = [argument.format(folder=tmp_path) for argument in arguments]
  status, _, lines = call(
    monkeypatch, capsys, 'evaluate', f'--workdir={tmp_path}', *arguments)
  assert status == 2 and lines.count('\n') == 1 and lines.startswith('error: '), lines
  assert all(word in lines for word in words), lines
  assert sorted(tmp_path.rglob('*')) == before


def test_training_looks_for_what_it_needs_before_it_begins(weights, tmp_path):
  with pytest.raises(ValueError, match="eval.reference=''"):
    train.train(recipe_of(weights, eval__reference=''), tmp_path / 'w')
  assert not (tmp_path / 'w').exists()


def test_a_reference_of_another_size_is_refused_before_training(weights, tmp_path):
  np.savez(tmp_path / 'large.npz', arr_0=np.zeros((5, 9, 9, 3), np.uint8))
  other = recipe_of(weights, eval__reference=str(tmp_path / 'large.npz'))
  with pytest.raises(ValueError, match='8 x 8 pixels do not compare .* 9 x 9'):
    train.train(other, tmp_path / 'w')
  assert not (tmp_path / 'w').exists() and not list(tmp_path.glob('large.*-*.npz'))


def test_training_that_never_measures_needs_nothing(weights, tmp_path):
  train.train(recipe_of(weights, eval__reference='', eval__every_steps=-1), tmp_path / 'w')
  assert not (tmp_path / 'w' / 'evaluations').exists()

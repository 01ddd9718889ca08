"""Images to numbers and back to how they came about, with a stand-in for Inception."""

import json
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmzoo import evaluate, evaluators, main, make_reference, pictures, sample, sampler, train
from fmzoo.convert import inception as official
from fmzoo.metrics import activations, reference
from fmzoo.models import inception
from fmzoo.parallel import mesh as meshes
from tests import tiny


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


@pytest.fixture
def weights(tmp_path, monkeypatch):
  """The path of weights that load as those of the stand-in."""
  monkeypatch.setattr(inception, 'make', standin)
  monkeypatch.setattr(official, 'load', lambda path: {'scale': np.float32(1)})
  path = tmp_path / 'inception.pth'
  path.write_bytes(b'weights')
  return path


def recipe_of(weights, **changes):
  settings = {
    'eval__name': 'inception', 'eval__inception': str(weights), 'mesh__data': 1,
    'eval__reference': str(weights.parent / 'digits.npz'), **changes,
  }
  return tiny.recipe('fm', **settings)


@pytest.fixture
def recipe(weights):
  """A recipe on digits that is measured against all of them."""
  made = recipe_of(weights)
  make_reference.make_reference(made, made.eval.reference)
  return made


def digits_npz(folder, count=200):
  """Writes real digits as if they were generated."""
  path = folder / 'real.npz'
  images = pictures.pixels(np.tile(sklearn_digits()[:count], 1))
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


def test_checkpoint_and_the_file_of_its_samples_give_the_same_numbers(recipe, tmp_path):
  train.train(recipe, tmp_path)
  generated, about = result(tmp_path)
  path = sample.sample(recipe_of(tmp_path / 'inception.pth', sample__num_images=20), tmp_path)
  values = evaluate.evaluate(recipe, tmp_path / 'again', samples=path)
  metrics, told = result(tmp_path / 'again')
  for name, value in values.items():
    np.testing.assert_allclose(value, generated[name], rtol=1e-9, atol=1e-9, err_msg=name)
  assert {key: told['images'][key] for key in about['images']} == about['images']
  assert told['metrics'] == about['metrics'] and 'pixels_sha256' in told['images']


def test_protocol_tells_all_that_one_needs_to_measure_it_again(recipe, tmp_path):
  train.train(recipe, tmp_path)
  metrics, about = result(tmp_path)
  assert set(metrics) == {
    'fid-20', 'fid_error', 'sfid-20', 'sfid_error', 'inception_score', 'inception_score_std',
    'precision', 'recall', 'gmac_per_image',
  }
  images, settings = about['images'], about['metrics']
  assert images['num_images'] == 20 and images['step'] == 4 and images['weights'] == 'ema'
  assert len(images['weights_sha256']) == 64 and images['sampler']['num_steps'] == 4
  assert settings['inception_sha256'] == reference.file_sha256(tmp_path / 'inception.pth')
  assert settings['reference']['sha256'] == reference.file_sha256(recipe.eval.reference)
  assert settings['reference']['num_images'] == 1797 and settings['resize'] == 'tf1'
  assert about['code']


def test_training_goes_on_while_the_host_computes_its_numbers(recipe, tmp_path, monkeypatch):
  """The report of step 2 waits for step 4: were it not in a thread, it would wait for ever."""
  reached, ordinary, saved = threading.Event(), evaluate.report, train.Hooks.__call__

  def report(*args):
    assert reached.wait(timeout=60)
    return ordinary(*args)

  def hooks(self, done, *args, **kwargs):
    if done == 4:
      reached.set()
    saved(self, done, *args, **kwargs)

  monkeypatch.setattr(evaluate, 'report', report)
  monkeypatch.setattr(train.Hooks, '__call__', hooks)
  train.train(recipe_of(tmp_path / 'inception.pth', eval__every_steps=2), tmp_path)
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines if 'eval/fid-20' in line] == [2, 4]


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
  known = evaluators.make(recipe_of(weights, eval__reference=str(adm))).reference
  np.testing.assert_array_equal(known.pool.mean, np.full(6, 3.0))
  assert known.features.shape == (100, 6) and known.spatial.mean.shape == (4,)


def test_few_images_are_told_aloud(recipe, tmp_path, caplog):
  evaluate.evaluate(recipe, tmp_path / 'w', samples=digits_npz(tmp_path, 6))
  text = 'fid of 6 images: their covariance of 6 features has rank 5 at most'
  assert text in caplog.text and text in ' '.join(result(tmp_path / 'w')[1]['notes'])


def call(monkeypatch, capsys, *arguments):
  """Runs the command line; returns (exit status, stdout, stderr)."""
  monkeypatch.setattr(sys, 'argv', ['fmzoo', *map(str, arguments)])
  capsys.readouterr()
  status = main.cli()
  return status, *capsys.readouterr()


def test_two_results_are_compared(recipe, tmp_path, monkeypatch, capsys):
  for name, count in (('a', 100), ('b', 50)):
    samples = digits_npz(tmp_path, count).rename(tmp_path / f'{name}.npz')
    evaluate.evaluate(recipe, tmp_path, samples=samples)
  folders = ','.join(str(tmp_path / 'evaluations' / name) for name in 'ab')
  status, out, _ = call(monkeypatch, capsys, 'evaluate', f'--compare={folders}')
  assert status == 0 and 'fid-100' in out and 'images.num_images: 100 | 50' in out
  assert 'metrics.resize' not in out  # the same in both
  same = ','.join([str(tmp_path / 'evaluations' / 'a')] * 2)
  assert 'protocols are the same' in call(monkeypatch, capsys, 'evaluate', f'--compare={same}')[1]


BAD = {
  'no weights': (
    ('--config.eval.inception={folder}/none.pth',),
    ('none.pth', 'pt_inception-2015-12-05-6726825d.pth', 'https://github.com', official.SHA256)),
  'no reference': (('--config.eval.reference=',), ("eval.reference=''", '--make_reference')),
  'a reference that is not there': (
    ('--config.eval.reference={folder}/none.npz',), ('none.npz', 'VIRTUAL_imagenet256')),
  'a reference made otherwise': (
    ('--config.eval.resize=ptfid',), ('digits.npz', "resize 'tf1'", "'ptfid'")),
  'unknown resize': (('--config.eval.resize=pil',), ('eval.resize', 'pil', 'tf1, ptfid')),
  'samples cut short': (('--samples={folder}/cut.npz',), ('cut.npz',)),
  'samples that are no pixels': (('--samples={folder}/floats.npz',), ('floats.npz', 'float32')),
  'samples of a wrong size': (('--samples={folder}/flat.npz',), ('flat.npz',)),
  'samples with two channels': (('--samples={folder}/two.npz',), ('two.npz', '2')),
  'samples of another size': (
    ('--samples={folder}/large.npz',), ('9 x 9 pixels', 'digits.npz', '8 x 8')),
  'no samples there': (('--samples={folder}/none.npz',), ('none.npz',)),
  'a folder without pictures': (('--samples={folder}/empty',), ('empty',)),
  'results of nothing': (('--compare={folder},{folder}',), ('no result', 'metrics.json')),
  'one result': (('--compare={folder}',), ('--compare', 'A,B')),
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
  for name, array in {
    'floats': np.zeros((5, 8, 8, 3), np.float32), 'flat': np.zeros((5, 64), np.uint8),
    'two': np.zeros((5, 8, 8, 2), np.uint8), 'large': np.zeros((5, 9, 9, 1), np.uint8),
  }.items():
    np.savez(tmp_path / f'{name}.npz', arr_0=array, labels=np.zeros(5, np.int32))
  if words[0] == 'none.pth':
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
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


def test_training_that_never_measures_needs_nothing(weights, tmp_path):
  train.train(recipe_of(weights, eval__reference='', eval__every_steps=-1), tmp_path / 'w')
  assert not (tmp_path / 'w' / 'evaluations').exists()

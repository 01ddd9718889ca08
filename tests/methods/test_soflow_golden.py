"""SoFlow against numbers recorded from the official code (tests/golden/soflow/README.md).

And against those of another configuration, written by the float64 reference (soflow_reference).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from safetensors.numpy import load_file

from fmzoo import inputs, optimizer, pictures, step
from fmzoo.convert import soflow as convert
from fmzoo.data import images
from fmzoo.methods import flow, soflow, soflow_rows, soflow_sampler, soflow_times
from fmzoo.models import dit, layers
from tests import golden_files as files
from tests import tiny
from tests.test_optimizer import averages

NETWORK, LOSS, CONSISTENCY, MIN_GAP = 2e-5, 5e-5, 3e-4, 3e-3  # limits of the README there
ELSEWHERE = ('unet.', 'uvel.', 'ucon.', 'temb.unet', 'ckpt.', 'aug.')  # test_soflow_*_golden.py
PATHS = {'Linear': 'linear', 'Trig': 'trig'}
SOLUTIONS = {'Euler': 'euler', 'Trig': 'trig'}


class Golden:
  """The folder, and the model that its config.json describes."""

  def __init__(self, folder):
    self.config = files.config(folder)
    self.arrays = files.Arrays(folder / 'io.npz')
    d = self.config['dit']
    self.classes, self.patch, self.depth = d['num_classes'], d['patch'], d['depth']
    self.model = dit.Config(
      patch=d['patch'], width=d['hidden'], depth=d['depth'], heads=d['heads'], mlp_ratio=4.0,
      duration=True, dtype='float32', precision='highest', attention='xla', remat=False, unroll=1,
    )
    shape = (d['data_size'], d['data_size'], d['channels'])
    self.net = dit.make(self.model, shape, self.classes)
    self.net = self.net._replace(
      apply=jax.jit(self.net.apply), apply_pairs=jax.jit(self.net.apply_pairs)
    )
    self.params = convert.from_official(
      load_file(folder / 'dit.safetensors'), self.model, d['channels'],
      jax.eval_shape(self.net.init, jax.random.key(0)),
    )

  @functools.cached_property
  def value_and_grad(self):
    """(config, params, rows) -> ((loss, metrics), gradient), one program for a config."""
    def loss(params, config, rows):
      return soflow.loss_of_rows(config, self.net, self.classes, params, rows)

    return jax.jit(
      lambda config, params, rows: jax.value_and_grad(loss, has_aux=True)(params, config, rows),
      static_argnums=0,
    )

  def image(self, name):
    return files.channels_last(self.arrays[name])

  def official(self, params):
    return convert.to_official(params, self.model, self.config['dit']['channels'])

  def labels(self, name):
    return self.arrays[name].astype(np.int32)

  def settings(self, case=None, **changes):
    """Returns soflow.Config of a loss case; ratio and schedule are irrelevant unless given."""
    case = case or {}
    top = {**self.config, **case}
    loss = {**self.config['loss'], **case.get('over', {})}
    values = {
      'path': PATHS[top['noising_type']], 'solution': SOLUTIONS[top['coefficient_type']],
      'velocity_ratio': 1.0, 'total_steps': 1, 'time_mean': tuple(self.config['time_mean']),
      'time_std': tuple(self.config['time_std']), 'guidance': loss['cfg_scale'],
      'mix_ratio': loss['mix_ratio'], 'guidance_decay_time': loss['cfg_decay_time'],
      'label_dropout': 0.1, 'weight_power': loss['p'], 'weight_eps': loss['eps'],
      'middle_schedule': 'exponent', 'middle_initial': 0.1, 'middle_final': 0.002,
    }
    return soflow.Config(**{**values, **changes})


@pytest.fixture(scope='module', params=['golden_root', 'written_root'])
def golden(request):
  """The folder of --golden-root, and one of the reference's."""
  return Golden(request.getfixturevalue(request.param) / 'soflow')


def test_network_outputs(golden):
  a = golden.arrays
  x, t, s, y = golden.image('dit.x'), a['dit.t'], a['dit.s'], golden.labels('dit.y')
  null = np.full_like(y, golden.classes)
  config = golden.settings()

  def check(name, value):
    files.close(files.channels_first(value), a[name], NETWORK, name)

  check('dit.net', golden.net.apply(golden.params, x, t, t - s, y))
  check('dit.net_null', golden.net.apply(golden.params, x, t, t - s, null))
  check('dit.solution', soflow_sampler.solve(
    golden.net, golden.params, x, solution=config.solution, t=t, s=s, labels=y
  ))
  scale = soflow_times.velocity_scale(config.solution)
  check('dit.velocity', scale * golden.net.apply(golden.params, x, t, 0 * t, y))
  check('dit.velocity_null', scale * golden.net.apply(golden.params, x, t, 0 * t, null))


def test_debug_arrays(golden):
  """Patch tokens, condition, first attention branch, block outputs and final tokens."""
  if not golden.config['debug']:
    assert not golden.arrays.names('dit.dbg')
    return
  a, p = golden.arrays, golden.params
  x, t, s, y = golden.image('dit.x'), a['dit.t'], a['dit.s'], golden.labels('dit.y')
  d = golden.config['dit']
  width, heads = d['hidden'], d['heads']
  with jax.default_matmul_precision('highest'):
    tokens = layers.Linear(width).apply({'params': p['patches']}, layers.patchify(x, d['patch']))
    files.close(tokens, a['dit.dbg.patch_tokens'], NETWORK, 'patch_tokens')
    cond = layers.TimeEmbedding(width).apply({'params': p['time']}, t)
    cond += layers.TimeEmbedding(width).apply({'params': p['duration']}, t - s)
    cond += p['labels']['table'][y]
    files.close(cond, a['dit.dbg.cond_c'], NETWORK, 'cond_c')
    h = tokens + p['pos_embed']
    for i in range(d['depth']):
      block = jax.tree.map(lambda leaf, i=i: leaf[i], p['blocks'])
      modulation = layers.Linear(6 * width).apply(
        {'params': block['modulation']}, jax.nn.silu(cond)
      )
      shift, scale = np.split(modulation[:, None], 6, axis=-1)[:2]
      if i == 0:
        branch = layers.Attention(heads).apply(
          {'params': block['core']['attn']}, layers.modulate(layers.layer_norm(h), shift, scale)
        )
        files.close(branch, a['dit.dbg.block0_attn_out'], NETWORK, 'attention')
      h = layers.TransformerBlock(heads, 4.0).apply(
        {'params': block['core']}, h, modulation[:, None]
      )
      files.close(h, a[f'dit.dbg.block{i}_out'], NETWORK, f'block {i}')
    modulation = layers.Linear(2 * width).apply(
      {'params': p['final_modulation']}, jax.nn.silu(cond)
    )
    shift, scale = np.split(modulation[:, None], 2, axis=-1)
    out = layers.Linear(p['final']['bias'].size).apply(
      {'params': p['final']}, layers.modulate(layers.layer_norm(h), shift, scale)
    )
    files.close(out, a['dit.dbg.final_tokens'], NETWORK, 'final tokens')


def test_schedules_and_tables(golden):
  a, config = golden.arrays, golden.config
  t, s = a['sched.t'], a['sched.s']
  exact = {'rtol': 0, 'atol': 2e-6}
  for name in config['sched_noise']:
    values = flow.path_coefficients(PATHS[name], t)
    for key, value in zip(('alpha', 'beta', 'alpha_grad', 'beta_grad'), values):
      np.testing.assert_allclose(value, a[f'sched.{name}.{key}'], err_msg=key, **exact)
  keys = ('a', 'b', 'a_grad_t', 'a_grad_s', 'b_grad_t', 'b_grad_s')
  for name in config['sched_coef']:
    values = soflow_times.solution_coefficients(SOLUTIONS[name], t, s)
    for key, value in zip(keys, values):
      np.testing.assert_allclose(value, a[f'sched.{name}.{key}'], err_msg=key, **exact)
  for i, case in enumerate(config['rk']):
    steps = a[f'rk.{i}.k']
    ratio = np.array([
      soflow_times.middle_ratio(
        case['method'].lower(), case['init'], case['end'], int(k), case['K']
      )
      for k in steps
    ])
    np.testing.assert_allclose(ratio, a[f'rk.{i}.ratio'], rtol=1e-12)
    exact_ratio = a[f'rk.{i}.ratio'].astype(np.float32)
    time, target = a['rk.t'][None], a['rk.s'][None]
    raw = time + (target - time) * exact_ratio[:, None]
    np.testing.assert_allclose(raw, a[f'rk.{i}.l_raw'], **exact)
    middle = soflow_times.middle_time(time, target, exact_ratio[:, None])
    np.testing.assert_allclose(middle, a[f'rk.{i}.l'], **exact)
  for name in a.names('cfgdecay.'):
    if name != 'cfgdecay.t':
      value = soflow_times.guidance_decay(a['cfgdecay.t'], float(name.removeprefix('cfgdecay.')))
      np.testing.assert_allclose(value, a[name], err_msg=name, **exact)
  np.testing.assert_allclose(layers.sinusoid(a['temb.t']), a['temb.dit256'], **exact)
  for name in a.names('posembed.'):
    width, grid = (int(part.lstrip('Dgrid')) for part in name.removeprefix('posembed.').split('_'))
    table = layers.position_table(grid, width)
    np.testing.assert_allclose(table.reshape(a[name].shape), a[name], **exact)


def test_times(golden):
  a, config = golden.arrays, golden.config
  draws = [
    jax.nn.sigmoid(std * a[f'time.normal{i}'] + mean)
    for i, (mean, std) in enumerate(zip(config['time_mean'], config['time_std']))
  ]
  t, s = soflow_times.consistency_times(draws[1], draws[2])
  for value, name in ((draws[0], 't_vel'), (t, 't_con'), (s, 's_con')):
    np.testing.assert_allclose(value, a[f'time.{name}'], rtol=0, atol=2e-6, err_msg=name)


def rows_of(golden, case, kind):
  """Returns the Rows of a loss case."""
  a = golden.arrays
  t = a[f'{case}.t']
  labels = golden.labels(f'{case}.labels') if f'{case}.labels' in a else None
  s, t_mid = (a[f'{case}.s'], a[f'{case}.l']) if kind == 'con' else (t, t)
  return soflow_rows.Rows(
    golden.image(f'{case}.x0'), golden.image(f'{case}.x1'), labels, a[f'{case}.mask'], t, s, t_mid
  )


def test_losses_and_gradients(golden):
  for case in golden.config['loss_cases']:
    pre, kind = case['pre'], case['kind']
    limit = MIN_GAP if 'mingap' in pre else CONSISTENCY if kind == 'con' else LOSS
    config = golden.settings(case, velocity_ratio=1.0 if kind == 'vel' else 0.0)
    rows = rows_of(golden, pre, kind)
    if rows.labels is None:
      rows = rows._replace(dropped=np.zeros_like(golden.arrays[f'{pre}.mask']))
    (loss, metrics), grads = golden.value_and_grad(config, golden.params, rows)
    part = 'flow' if kind == 'vel' else 'consistency'
    a = golden.arrays
    for value, name in (
      (loss, 'loss'), (metrics[f'{part}/mse'], 'mse'), (metrics[f'{part}/weight'], 'weight'),
    ):
      files.close(value, a[f'{pre}.{name}'].squeeze(), limit, f'{pre}.{name}')
    grads = golden.official({**grads, 'pos_embed': golden.params['pos_embed']})
    squares = [np.sum(np.square(g, dtype=np.float64))
               for key, g in grads.items() if 'pos_embed' not in key]
    files.close(np.sqrt(sum(squares)), a[f'{pre}.grad_norm'].squeeze(), limit, f'{pre}.grad_norm')
    named = a.names(f'{pre}.grad.')
    assert named
    for name in named:
      key = name.removeprefix(f'{pre}.grad.')
      files.close(grads[f'network.{key.removeprefix("network.")}'], a[name], limit, name)
    if f'{pre}.x_t' in a:
      x_t = flow.interpolate(config.path, rows.x, rows.noise, rows.t)
      v_t = flow.velocity_target(config.path, rows.x, rows.noise, rows.t)
      files.close(files.channels_first(x_t), a[f'{pre}.x_t'], 2e-6, 'x_t')
      files.close(files.channels_first(v_t), a[f'{pre}.v_t'], 2e-6, 'v_t')


def test_three_training_steps(golden):
  """AdamW and EMA over three steps of the joint loss."""
  a, train = golden.arrays, golden.config['train']
  config = golden.settings(velocity_ratio=train['velocity_loss_ratio'])
  size = len(a['train.x0'])
  is_consistency = soflow_rows.consistency_rows(size, config.velocity_ratio)
  order = np.empty(size, int)  # theirs: flow rows, then consistency rows; ours: see row_blocks
  order[~is_consistency] = np.arange(size - is_consistency.sum())
  order[is_consistency] = np.arange(size - is_consistency.sum(), size)
  x, noise, mask = (golden.image(f'train.{k}') if k != 'mask' else a['train.mask']
                    for k in ('x0', 'x1', 'mask'))
  t = np.empty(size, np.float32)
  t[~is_consistency], t[is_consistency] = a['train.t_vel'], a['train.t']
  s, t_mid = t.copy(), t.copy()
  s[is_consistency], t_mid[is_consistency] = a['train.s'], a['train.l']
  assert len(a['train.t']) == is_consistency.sum()
  rows = soflow_rows.Rows(
    x[order], noise[order], golden.labels('train.labels')[order], mask[order], t, s, t_mid
  )
  tx = optax.adamw(train['lr'], *train['betas'], eps=1e-8, weight_decay=train['weight_decay'])
  mask_of = golden.net.trainable(golden.params)
  params, fixed = step.partition(jax.tree.map(jnp.asarray, golden.params), mask_of)
  ema, opt_state = params, tx.init(params)

  @jax.jit
  def update(params, opt_state, ema):
    (loss, metrics), grads = jax.value_and_grad(lambda p: soflow.loss_of_rows(
      config, golden.net, golden.classes, step.merge(p, fixed), rows), has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    ema = jax.tree.map(lambda e, p: e + (1 - train['ema_decay']) * (p - e), ema, params)
    return params, opt_state, ema, loss, metrics, optax.tree.norm(grads)

  @jax.jit
  def losses(params):  # each alone on its own rows: flow, consistency
    return [soflow.loss_of_rows(
      dataclasses.replace(config, velocity_ratio=ratio), golden.net, golden.classes,
      step.merge(params, fixed), jax.tree.map(lambda leaf, keep=keep: leaf[keep], rows),
    )[0] for ratio, keep in ((1.0, ~is_consistency), (0.0, is_consistency))]

  for n in range(1, 4):
    of_flow, of_consistency = losses(params)
    params, opt_state, ema, loss, metrics, norm = update(params, opt_state, ema)
    ours = [of_flow, metrics['flow/mse'], metrics['flow/weight'], of_consistency,
            metrics['consistency/mse'], metrics['consistency/weight'], loss, norm]
    np.testing.assert_allclose(ours, a[f'train.step{n}.scalars'], rtol=1e-4)
    for kind, tree in (('param', params), ('ema', ema)):
      official = golden.official(step.merge(tree, fixed))
      for name in a.names(f'train.step{n}.{kind}.'):
        key = name.removeprefix(f'train.step{n}.{kind}.')
        limit = 1e-2 * train['lr']
        np.testing.assert_allclose(official[key], a[name], rtol=0, atol=limit, err_msg=name)


def test_pixels(golden):
  """Float to uint8, exactly; x is a row of an image of one channel."""
  pixels = pictures.to_uint8(golden.arrays['pixel.x'][None, None, :, None])
  np.testing.assert_array_equal(pixels[0, 0, :, 0], golden.arrays['pixel.u8'])


def test_crops(golden):
  """Pictures to the middle that is encoded, exactly; the reference writes none."""
  a, sizes = golden.arrays, golden.config.get('crop_sizes', ())
  assert len(a.names('crop.')) == 2 * len(sizes)
  for i, size in enumerate(sizes):
    cropped = images.adm_crop(Image.fromarray(a[f'crop.{i}.img']), size)
    np.testing.assert_array_equal(cropped, a[f'crop.{i}.out'], err_msg=f'crop.{i}')


def test_latents_of_stored_moments(golden):
  moments, noise = golden.image('latent.moments'), golden.image('latent.eps')
  latent = inputs.sample_moments(moments, noise, 0.18215)
  np.testing.assert_allclose(latent, golden.image('latent.sample'), rtol=0, atol=1e-6)


def displacement_is(actual, expected, start):
  """Compares moves from the start, with the largest one as the unit."""
  files.close(np.asarray(actual) - start, expected - start, 1e-4)


@pytest.mark.parametrize('name', optimizer.NAMES)
def test_optimizer(golden, name):
  """Twelve updates with given gradients, of scales at which eps matters."""
  a, settings = golden.arrays, golden.config['opt'][name]
  optim = dataclasses.replace(
    tiny.recipe('soflow').optim, name=name, learning_rate=settings['lr'], warmup_steps=0,
    schedule='constant', b1=settings['betas'][0], b2=settings['betas'][1],
  )
  tx, params = optimizer.make(optim, 12), a['opt.p0']
  state, trajectory = tx.init(params), []
  for grads in a['opt.grads']:
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    trajectory.append(params)
  displacement_is(trajectory, a[f'opt.{name}.traj'], a['opt.p0'])


@pytest.mark.parametrize('name,every', [('per_step', 1), ('every16', 16)])
def test_ema_of_given_parameters(golden, name, every):
  """The step's average, under an optimiser that puts the recorded parameters in place."""
  a, decay = golden.arrays, golden.config['ema_decay_test']
  found = averages(jnp.asarray(a['ema.params']), a['ema.p0'], ema_decay=decay, ema_every=every)
  displacement_is(found, a[f'ema.{name}'], a['ema.p0'])


def test_samplers(golden):
  a = golden.arrays
  x, renoise = golden.image('sampler.x1'), golden.image('sampler.renoise')
  labels, config = golden.labels('sampler.labels'), golden.settings()
  for calls in golden.config['nfe']:
    out = soflow_sampler.few_step_sample(
      golden.net, golden.params, x, labels, config=config, steps=calls,
      renoise=renoise[: calls - 1],
    )
    files.close(files.channels_first(out), a[f'sampler.nfe{calls}'], NETWORK, f'{calls} calls')


def test_every_array_is_an_input_or_was_checked(golden):
  """Runs after the tests above in this file, which mark what they look at."""
  inputs = set(golden.config['input_keys'])
  left = [
    n for n in golden.arrays.unused()
    if n not in inputs and not n.startswith(ELSEWHERE)
  ]
  assert not left

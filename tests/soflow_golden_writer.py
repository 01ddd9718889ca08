"""Golden folders of SoFlow from the NumPy reference: weights, inputs, outputs and gradients.

The layout is that of tests/golden/soflow/README.md without `crop.*` and latents_tiny.hdf5. A loss
case whose name ends in 'nolabel' gets no labels, and one whose name ends in 'mingap' the smallest
gap between its times.
"""

import json
import math

import numpy as np
from safetensors.numpy import save_file

from tests import metrics_reference as metrics
from tests import soflow_augment_reference as augment
from tests import soflow_dit_reference as dit
from tests import soflow_golden_config as shapes
from tests import soflow_reference as ref
from tests import soflow_unet_reference as unet
from tests import torch_pickle

ROWS, SAMPLES, UNET_ROWS, TIMES, NORMALS, EMA_STEPS, OPT_STEPS = 5, 3, 4, 8, 28, 40, 12
DECAY_TIMES, LEAST_GAP = 13, 0.01
FLOAT32 = np.float32


def wave_key(config):
  """The start of the names of the U-Net's time features."""
  return f'temb.unet{unet.NOISE_MULT * config["unet"]["model_channels"]}'


def synthetic_weights(tensors, seed):
  """Returns {key: float32 array}, random and of a size that keeps activations near 1."""
  rng, weights = np.random.default_rng(seed), {}
  for key, shape in tensors.items():
    draw, norm = rng.standard_normal(shape), '_norm.' in key or '.norm' in key
    if key.endswith('resample_filter'):
      draw = np.multiply.outer(unet.FILTER, unet.FILTER).reshape(shape)
    elif key.endswith('pos_embed'):
      draw = dit.position_table(shape[2], math.isqrt(shape[1])) + 0.05 * draw
    elif key.endswith('.bias'):
      draw = 0.1 * draw
    elif norm:
      draw = 1 + 0.2 * draw
    elif 'embedding_table' in key:
      draw = 0.5 * draw
    else:
      draw = draw / np.sqrt(np.prod(shape[1:]))
    weights[key] = draw.astype(FLOAT32)
  return weights


def normal(rng, *shape):
  """Standard normals, float32."""
  return rng.standard_normal(shape).astype(FLOAT32)


def uniform(rng, *shape):
  """Uniforms in [0, 1), float32."""
  return rng.random(shape).astype(FLOAT32)


def images(rng, section, count):
  """[count, C, H, W] normals of the size of a network's images."""
  return normal(rng, count, section.get('channels', unet.COLORS), *2 * (section['data_size'],))


def time_pair(rng, config, count):
  """Times {'t', 's', 'l'} of consistency rows, float32 [count] each, at step loss_k of rk[0].

  Pairs whose t - l is below LEAST_GAP are drawn again: q divides by it, and what float32 rounding
  is left of a network would be above the limits of all cases but 'mingap'.
  """
  rk, low = config['rk'][0], FLOAT32(ref.MIN_GAP)
  ratio = FLOAT32(ref.gap_ratio(rk['method'], rk['init'], rk['end'], config['loss_k'], rk['K']))
  kept = np.zeros((3, 0), FLOAT32)
  while kept.shape[1] < count:
    _, t, s = ref.drawn_times(config['time_mean'], config['time_std'], normal(rng, 3, count))
    t = t.astype(FLOAT32)
    s = np.minimum(s.astype(FLOAT32), t - low)
    middle = ref.middle_times(t, s, ratio)[1].astype(FLOAT32)
    kept = np.concatenate([kept, np.stack([t, s, middle])[:, t - middle > LEAST_GAP]], axis=1)
  return dict(zip('tsl', kept[:, :count]))


def velocity_times(rng, config, count):
  """Times of flow-matching rows, float32 [count]."""
  t, _, _ = ref.drawn_times(config['time_mean'], config['time_std'], normal(rng, 3, count))
  return t.astype(FLOAT32)


def table_inputs(rng, config):
  """Times and normals of the schedules, extremes among them."""
  ends = np.array([[0.0, 1.0, 1.0, ref.MIN_GAP], [0.0, 0.0, 1 - ref.MIN_GAP, 0.0]], FLOAT32)
  pairs = np.sort(uniform(rng, 2, TIMES - 4), axis=0)[::-1]
  extremes = np.array([-12, -9, 9, 12], FLOAT32)
  near = [tau + d for tau in config['decay_list'] for d in (-0.01, 0, 0.002, 0.02) if tau + d <= 1]
  t, s = np.concatenate([ends, pairs], axis=1)
  more = uniform(rng, max(0, DECAY_TIMES - 4 - len(near)))
  out = {
    'sched.t': t, 'sched.s': s, 'rk.t': t[3:], 'rk.s': s[3:],
    'cfgdecay.t': np.array([0, 0.3, 0.999, 1, *near, *more], FLOAT32),
    'temb.t': np.array([0, 1e-4, 1, *uniform(rng, 4)], FLOAT32),
  }
  for i in range(3):
    out[f'time.normal{i}'] = np.append(normal(rng, NORMALS), np.roll(extremes, i))
  return out | {f'rk.{i}.k': np.array(k, np.int64) for i, k in enumerate(config['rk_ks'])}


def labels_and_mask(rng, config, count):
  """Labels [count] int64, and which third of them is dropped."""
  labels = rng.integers(0, config['dit']['num_classes'], count)
  return {'labels': labels, 'mask': np.arange(count) % 3 == 1}


def case_inputs(rng, config):
  """Rows of every loss case."""
  out, sections = {}, (('loss_cases', 'dit', config['B']), ('unet_loss_cases', 'unet', UNET_ROWS))
  for cases, section, count in sections:
    for case in config[cases]:
      rows = {key: images(rng, config[section], count) for key in ('x0', 'x1')}
      rows |= labels_and_mask(rng, config, count)
      if section == 'unet':
        rows |= {'aug_labels': normal(rng, count, unet.AUGMENT), 'mask': np.zeros(count, bool)}
      if section == 'unet' or case['pre'].endswith('nolabel'):
        del rows['labels']
      if case['kind'] == 'vel':
        rows['t'] = velocity_times(rng, config, count)
      else:
        rows |= time_pair(rng, config, count)
      if case['pre'].endswith('mingap'):
        rows['s'] = rows['l'] = rows['t'] - FLOAT32(ref.MIN_GAP)
      out |= {f'{case["pre"]}.{key}': value for key, value in rows.items()}
  return out


def network_inputs(rng, config):
  """Single calls and samplers of both networks, and the rows of the training steps."""
  d, u, size = config['dit'], config['unet'], config['B']
  calls = {'dit': time_pair(rng, config, ROWS), 'unet': time_pair(rng, config, SAMPLES)}
  flow_rows = int(config['train']['velocity_loss_ratio'] * size)
  training = {key: images(rng, d, size) for key in ('x0', 'x1')}
  training |= labels_and_mask(rng, config, size) | time_pair(rng, config, size - flow_rows)
  training['t_vel'] = velocity_times(rng, config, flow_rows)
  renoise = normal(rng, max(config['nfe']) - 1, SAMPLES, d['channels'], *2 * (d['data_size'],))
  return {
    **{f'{name}.{key}': calls[name][key] for name in calls for key in ('t', 's')},
    'dit.x': images(rng, d, ROWS), 'dit.y': np.append(
      rng.integers(0, d['num_classes'], ROWS - 1), d['num_classes']),
    'unet.x': images(rng, u, SAMPLES), 'unet.aug_labels': normal(rng, SAMPLES, unet.AUGMENT),
    'unet.renoise': images(rng, u, SAMPLES)[None],
    'sampler.x1': images(rng, d, SAMPLES), 'sampler.renoise': renoise,
    'sampler.labels': rng.integers(0, d['num_classes'], SAMPLES),
    **{f'train.{key}': value for key, value in training.items()},
  }


def checkpoint_inputs(rng, config):
  """Single calls of the two networks of a training checkpoint."""
  times, section = time_pair(rng, config, SAMPLES), config['ckpt_dit']
  return {
    'ckpt.x': images(rng, section, SAMPLES), 'ckpt.t': times['t'], 'ckpt.s': times['s'],
    'ckpt.y': rng.integers(0, section['num_classes'] + 1, SAMPLES),
  }


def draw_inputs(rng, case):
  """The images and every random draw of an augmentation case."""
  n, size = case['n'], case['size']
  draws = {
    'xflip_bit': rng.integers(0, 2, (n, 1, 1, 1)), 'xflip_u': uniform(rng, n, 1, 1, 1),
    'trans_n': normal(rng, 2, n), 'trans_u': uniform(rng, 1, n),
    **{f'{name}_{kind}': draw(rng, n) for name in ('scale', 'aniso')
       for kind, draw in (('n', normal), ('u', uniform))},
    'aniso_angle_u': uniform(rng, n), 'aniso_rot_u': uniform(rng, n),
  }
  pictures = np.clip(0.5 * normal(rng, n, unet.COLORS, size, size), -1, 1)
  named = {f'{case["pre"]}.draw_{key}': value for key, value in draws.items()}
  return {f'{case["pre"]}.images': pictures, **named}


def other_inputs(rng, config):
  """Augmentation, optimisers, averages, pixels and latents."""
  channels = config['dit']['channels']
  out = {
    'opt.p0': normal(rng, 4, 3),
    'opt.grads': normal(rng, OPT_STEPS, 4, 3) * np.array([1, 1e-3, 1e-6], FLOAT32),
    'ema.p0': normal(rng, 5), 'ema.params': normal(rng, EMA_STEPS, 5),
    'pixel.x': np.append(1.2 * normal(rng, 54), np.array([-2, -1, 0, 1, 2], FLOAT32)),
    'latent.moments': np.abs(normal(rng, 2, 2 * channels, 4, 4)),
    'latent.eps': normal(rng, 2, channels, 4, 4),
  }
  for case in config['aug']:
    out |= draw_inputs(rng, case)
  return out


def synthetic_inputs(config, seed):
  """Returns the input arrays of the schema by name."""
  rng, out = np.random.default_rng(seed), {}
  for part in (table_inputs, case_inputs, network_inputs, other_inputs, checkpoint_inputs):
    out |= part(rng, config)
  return out


def table_outputs(config, a):
  """Schedules, times, guidance decay and embeddings."""
  t, s = ref.wide(a['sched.t']), ref.wide(a['sched.s'])
  out = {}
  for names, kinds, values in (
    ('alpha beta alpha_grad beta_grad', 'sched_noise', lambda kind: ref.noising(kind, t)),
    ('a b a_grad_t a_grad_s b_grad_t b_grad_s', 'sched_coef',
     lambda kind: ref.coefficients(kind, t, s)),
  ):
    for kind in config[kinds]:
      out |= {f'sched.{kind}.{n}': v for n, v in zip(names.split(), values(kind))}
  for i, rk in enumerate(config['rk']):
    ratio = ref.gap_ratio(rk['method'], rk['init'], rk['end'], a[f'rk.{i}.k'], rk['K'])
    middle = ref.middle_times(ref.wide(a['rk.t']), ref.wide(a['rk.s']), ratio[:, None])
    out |= {f'rk.{i}.ratio': ratio, f'rk.{i}.l_raw': middle[0], f'rk.{i}.l': middle[1]}
  normals = [a[f'time.normal{i}'] for i in range(3)]
  times = ref.drawn_times(config['time_mean'], config['time_std'], normals)
  out |= dict(zip(('time.t_vel', 'time.t_con', 'time.s_con'), times))
  for tau in config['decay_list']:
    out[f'cfgdecay.{tau}'] = ref.guidance_decay(ref.wide(a['cfgdecay.t']), tau)
  out['temb.dit256'], width = dit.time_waves(a['temb.t']), 2 * config['unet']['model_channels']
  out[f'{wave_key(config)}_raw'] = unet.time_waves(a['temb.t'], width, swapped=False)
  out[f'{wave_key(config)}_swapped'] = unet.time_waves(a['temb.t'], width)
  for width, grid in config['posembed']:
    out[f'posembed.D{width}_grid{grid}'] = dit.position_table(width, grid)
  return out


def dit_outputs(config, model, a):
  """Single calls of the DiT, its stages and the few-step sampler."""
  x, t, s, y = (a[f'dit.{key}'] for key in 'xtsy')
  network, settings = dit.dit(model), ref.settings_of(config)
  stages = dit.stages(model, x, t, s, y)
  kind = settings.coefficient
  out = {
    'dit.net': stages.pop('net'), 'dit.net_null': network.run(x, t, s, None),
    'dit.solution': ref.solution(network, kind, x, (t, s), y),
    'dit.velocity': ref.velocity(network, kind, x, t, y),
    'dit.velocity_null': ref.velocity(network, kind, x, t),
  }
  if config['debug']:
    out |= {f'dit.dbg.{key}': value for key, value in stages.items()}
  for calls in config['nfe']:
    run = a['sampler.x1'], a['sampler.renoise'][: calls - 1], a['sampler.labels']
    out[f'sampler.nfe{calls}'] = ref.few_step_sample(network, settings, *run)
  return out


def unet_outputs(config, model, a):
  """Single calls of the U-Net, its stages and the two-step sampler."""
  x, t, s, labels = (a[f'unet.{key}'] for key in ('x', 't', 's', 'aug_labels'))
  network, settings = unet.unet(model), ref.settings_of(config, 'unet_loss')
  stages = unet.stages(model, x, t, s, labels)
  out = {
    'unet.net': stages.pop('net'), 'unet.net_noaug': network.run(x, t, s),
    'unet.solution_noaug': ref.solution(network, settings.coefficient, x, (t, s)),
    'unet.nfe2': ref.few_step_sample(network, settings, x, a['unet.renoise']),
  }
  if config['debug']:
    first = next(layer.key for layer in unet.layers(model.config)[0] if layer.kind == 'block')
    out |= {'unet.dbg.emb': stages.pop('emb'), 'unet.dbg.enc_block0_sample0': stages[first][:1]}
    out |= {
      f'unet.dbg.{key.removeprefix("network.")}.chmean': value.mean((2, 3))
      for key, value in stages.items()
    }
  return out


def case_rows(a, pre):
  """Returns the Rows of a loss case."""
  named = {'augment': 'aug_labels'}
  return ref.Rows(**{
    key: a[f'{pre}.{named.get(key, key)}'] for key in ref.Rows._fields
    if f'{pre}.{named.get(key, key)}' in a
  })


def loss_outputs(config, case, model, rows):
  """A loss case with its metrics and gradients."""
  is_unet, pre = 'model_channels' in model.config, case['pre']
  make, section = (unet.unet, 'unet_loss') if is_unet else (dit.dit, 'loss')
  settings, compute = ref.settings_of(config, section, case), ref.LOSSES[case['kind']]
  loss, (mse, weight), grads = ref.differentiated(
    lambda model: compute(make(model), settings, rows), model
  )
  few = 'grad_names' if case.get('full') else 'grad_names_few'
  named = config['unet_grad_names' if is_unet else few]
  out = {'loss': loss, 'mse': mse, 'weight': weight, 'grad_norm': ref.norm(grads)[None]}
  out |= {f'grad.{key}': grads[key] for key in named}
  if case.get('full'):
    out |= dict(zip(('x_t', 'v_t'), ref.noisy(settings.noising, rows)))
  return {f'{pre}.{key}': value for key, value in out.items()}


def training_outputs(config, model, a):
  """Three AdamW updates of the joint loss, with their averages."""
  cut = len(a['train.t_vel'])
  first, second = (
    {key: a[f'train.{key}'][part] for key in ('x0', 'x1', 'mask', 'labels')}
    for part in (slice(cut), slice(cut, None))
  )
  parts = (
    ref.Rows(**first, t=a['train.t_vel']),
    ref.Rows(**second, **{key: a[f'train.{key}'] for key in 'tsl'}),
  )
  out = {}
  for n, (numbers, weights, ema) in enumerate(ref.train(model, dit.dit, parts, config), 1):
    out[f'train.step{n}.scalars'] = numbers
    kept = {1: {'param': weights}, 3: {'param': weights, 'ema': ema}}.get(n, {})
    for kind, tree in kept.items():
      out |= {f'train.step{n}.{kind}.{key}': tree[key] for key in config['train']['names']}
  return out


def other_outputs(config, a):
  """Augmentation, optimisers, averages, pixels and latents."""
  out = {
    'pixel.u8': ref.pixels(a['pixel.x']),
    'latent.sample': ref.latent(a['latent.moments'], a['latent.eps']),
  }
  for name, update in (('adamw', ref.adamw), ('radam', ref.radam)):
    run = a['opt.p0'], a['opt.grads']
    out[f'opt.{name}.traj'] = ref.trajectory(update, *run, **config['opt'][name])
  for name, every in (('per_step', 1), ('every16', 16)):
    run = a['ema.p0'], a['ema.params'], config['ema_decay_test']
    out[f'ema.{name}'] = ref.averages(*run, every)
  for case in config['aug']:
    start = f'{case["pre"]}.draw_'
    draws = {key.removeprefix(start): a[key] for key in a if key.startswith(start)}
    results = augment.augment(a[f'{case["pre"]}.images'], draws, case['p'])
    out |= {f'{case["pre"]}.{key}': value for key, value in results.items()}
  return out


def outputs(config, models, a):
  """Every output array of the schema from the inputs; models are a DiT and a U-Net."""
  net, picture_net = models
  out = table_outputs(config, a) | other_outputs(config, a)
  out |= dit_outputs(config, net, a) | unet_outputs(config, picture_net, a)
  out |= training_outputs(config, net, a)
  for model, cases in ((net, 'loss_cases'), (picture_net, 'unet_loss_cases')):
    for case in config[cases]:
      out |= loss_outputs(config, case, model, case_rows(a, case['pre']))
  return out


def checkpoint(config, seed):
  """Returns a training checkpoint after one step: two networks, Adam's moments of the first."""
  tensors = shapes.dit_shapes(config['ckpt_dit'])
  online, averaged = (synthetic_weights(tensors, [*seed, i]) for i in range(2))
  moments = {
    i: {'step': np.float32(1), 'exp_avg': 0.1 * weight, 'exp_avg_sq': 0.01 * weight**2}
    for i, (key, weight) in enumerate(online.items()) if not key.endswith('pos_embed')
  }
  return {
    'model': online, 'ema_model': averaged,
    'optimizer': {'state': moments, 'param_groups': [{'lr': 1e-4, 'params': [*moments]}]},
    'finished_steps': 1, 'finished_epochs': 0,
  }


def checkpoint_outputs(config, networks, a):
  """Single calls of both networks of a checkpoint."""
  out = {}
  for name in ('model', 'ema_model'):
    weights = {key: ref.wide(weight) for key, weight in networks[name].items()}
    network = dit.dit(ref.Model(weights, config['ckpt_dit']))
    out[f'ckpt.{name}.net'] = network.run(a['ckpt.x'], a['ckpt.t'], a['ckpt.s'], a['ckpt.y'])
  return out


def load(folder, config):
  """Returns the DiT and the U-Net of a folder."""
  return tuple(
    ref.Model(ref.load_weights(folder / f'{name}.safetensors'), config[name])
    for name in ('dit', 'unet')
  )


def write_folder(folder, config, seed):
  """Writes config.json, both .safetensors, dit_ckpt.pt and both .npz; outputs are float64."""
  folder.mkdir(parents=True, exist_ok=True)
  for i, (name, tensors) in enumerate((
    ('dit', shapes.dit_shapes(config['dit'])), ('unet', shapes.unet_shapes(config['unet'])),
  )):
    save_file(synthetic_weights(tensors, [seed, i]), folder / f'{name}.safetensors')
  arrays = synthetic_inputs(config, [seed, 2])
  networks = checkpoint(config, [seed, 3])
  (folder / 'dit_ckpt.pt').write_bytes(torch_pickle.zip_form(torch_pickle.views(networks)))
  results = outputs(config, load(folder, config), arrays)
  results |= checkpoint_outputs(config, networks, arrays)
  text = json.dumps({**config, 'input_keys': sorted(arrays)}, indent=1)
  (folder / 'config.json').write_text(text + '\n')
  np.savez_compressed(folder / 'io.npz', **arrays, **results)
  metrics.write(folder / 'metrics.npz', [seed, 4])

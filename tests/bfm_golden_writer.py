"""Golden folders of BFM from the NumPy reference: weights, inputs, outputs and slopes.

The layout is that of tests/golden/bfm/README.md without `train_grad_global_norm`. Large parameters
have slopes instead of whole gradients: `train_direction/<key>` is a unit vector of the parameter's
shape and `train_slope/<key>` the derivative of the total loss along it (`ft_*` for the FRN stage).
"""

import json

import numpy as np
from safetensors.numpy import save_file

from tests import bfm_reference as ref

SECOND_CONFIG = {
  'name': 'bfm_tiny_b',
  'hidden_size': 24,
  'num_heads': 3,
  'context_size': 6,
  'patch_size': 3,
  'in_channels': 3,
  'mlp_ratio': 3.0,
  'num_classes': 7,
  'segments': 4,
  'segment_depth': 1,
  'feature_alignment_depth': 3,
  'frn_depth': 2,
  'adaln_lora_dim': 5,
  'dim_projection': 10,
  'projector_hidden': 12,
  'proj_loss_weight': 0.3,
  'train_batch': 12,
  'small_batch': 3,
  'frn_batch': 6,
  'smp_steps': 2,
  'debug_samples': 3,
  'interval': [0.45, 0.9],
  'frn_interval': [0.2, 0.7],
  'grad_params': [
    'representation_blocks.0.attn.q_norm.weight',
    'representation_blocks.1.attn.qkv.bias',
    'representation_blocks.2.adaLN_modulation.1.weight',
    'velocity_blocks.0.0.attn.k_norm.weight',
    'velocity_blocks.1.0.adaLN_modulation.2.bias',
    'velocity_blocks.3.0.mlp.fc2.bias',
    't_embedder.mlp.2.bias',
    'global_adaLN_modulation.1.bias',
    'final_layer.adaLN_modulation.1.bias',
    'linear_projection.4.weight',
  ],
  'slope_params': [
    't_embedder.mlp.0.weight',
    'y_embedder.embedding_table.weight',
    'representation_x_embedder.proj.weight',
    'x_embedder.proj.weight',
    'global_adaLN_modulation.1.weight',
    'global_adaLN_modulation2.1.weight',
    'representation_blocks.0.attn.qkv.weight',
    'representation_blocks.1.mlp.fc1.weight',
    'representation_blocks.2.adaLN_modulation.2.weight',
    'velocity_blocks.0.0.attn.qkv.weight',
    'velocity_blocks.1.0.adaLN_modulation.1.weight',
    'velocity_blocks.2.0.attn.proj.weight',
    'velocity_blocks.3.0.mlp.fc2.weight',
    'linear_projection.0.weight',
    'linear_projection.2.weight',
    'final_layer.adaLN_modulation.1.weight',
    'final_layer.linear.weight',
  ],
  'ft_grad_params': [
    'frn_blocks.0.attn.q_norm.weight',
    'frn_blocks.1.attn.k_norm.weight',
    'frn_blocks.0.adaLN_modulation.1.bias',
    'frn_blocks.1.mlp.fc1.bias',
  ],
  'ft_slope_params': [
    'frn_blocks.0.attn.qkv.weight',
    'frn_blocks.0.mlp.fc2.weight',
    'frn_blocks.1.adaLN_modulation.1.weight',
    'frn_blocks.1.attn.proj.weight',
  ],
  'null_label': 7,
  'adaln_type': 'lora',
  'q_norm': 'rmsnorm',
  'k_norm': 'rmsnorm',
  'rope_theta': 100.0,
  'time_freq_dim': 256,
  'norm_eps': 1e-06,
  'label_dropout': 'disabled; dropped labels are already the null label in *_y',
}

SAMPLE_ROWS, SAMPLER_ROWS = 3, 2  # rows of the single calls, rows of the whole runs
CANDIDATES = 4  # random directions of which a slope takes the steepest
WITHOUT_CALLS = ('frn_cfg1', 'sde_cosine_cfg1', 'sde_fixed_cfg4')
DEBUG_ROWS_KEPT = ('t_sinusoid', 't_emb', 'y_emb', 'c', 'global_adaln', 'rep_block0_adaln_total')


def linear_shapes(key, rows, columns):
  """A linear layer of the official layout: weight (out, in) and bias (out)."""
  return {f'{key}.weight': (rows, columns), f'{key}.bias': (rows,)}


def block_shapes(config, key, modulation):
  """A transformer block; `modulation` are the (out, in) pairs of its adaLN layers."""
  width, head = config['hidden_size'], config['hidden_size'] // config['num_heads']
  inner = int(width * config['mlp_ratio'])
  shapes = {
    **linear_shapes(f'{key}.attn.qkv', 3 * width, width),
    f'{key}.attn.q_norm.weight': (head,),
    f'{key}.attn.k_norm.weight': (head,),
    **linear_shapes(f'{key}.attn.proj', width, width),
    **linear_shapes(f'{key}.mlp.fc1', inner, width),
    **linear_shapes(f'{key}.mlp.fc2', width, inner),
  }
  for i, pair in enumerate(modulation, 1):
    shapes |= linear_shapes(f'{key}.adaLN_modulation.{i}', *pair)
  return shapes


def weight_shapes(config):
  """Official key -> shape, FRN included."""
  width, rank, hidden = (config[k] for k in ('hidden_size', 'adaln_lora_dim', 'projector_hidden'))
  entries = config['patch_size'] ** 2 * config['in_channels']
  shapes = {'y_embedder.embedding_table.weight': (config['num_classes'] + 1, width)}
  for key, *pair in (
    ('t_embedder.mlp.0', width, config['time_freq_dim']),
    ('t_embedder.mlp.2', width, width),
    ('representation_x_embedder.proj', width, entries),
    ('x_embedder.proj', width, entries),
    ('linear_projection.0', hidden, width),
    ('linear_projection.2', hidden, hidden),
    ('linear_projection.4', config['dim_projection'], hidden),
    ('global_adaLN_modulation.1', 6 * width, width),
    ('global_adaLN_modulation2.1', 6 * width, 2 * width),
    ('final_layer.adaLN_modulation.1', 2 * width, 2 * width),
    ('final_layer.linear', entries, width),
  ):
    shapes |= linear_shapes(key, *pair)
  for i in range(config['feature_alignment_depth']):
    low_rank = ((rank, width), (6 * width, rank))
    shapes |= block_shapes(config, f'representation_blocks.{i}', low_rank)
  for s, j in np.ndindex(config['segments'], config['segment_depth']):
    low_rank = ((rank, 2 * width), (6 * width, rank))
    shapes |= block_shapes(config, f'velocity_blocks.{s}.{j}', low_rank)
  for k in range(config['frn_depth']):
    shapes |= block_shapes(config, f'frn_blocks.{k}', ((6 * width, width),))
  return shapes


def synthetic_weights(config, seed):
  """Returns {official key: float32 array}, random and of a size that keeps activations near 1."""
  rng, weights = np.random.default_rng(seed), {}
  for key, shape in weight_shapes(config).items():
    draw = rng.standard_normal(shape)
    if key.endswith('_norm.weight'):
      draw = 1 + 0.2 * draw
    elif key.endswith('.bias'):
      draw = 0.1 * draw
    elif not key.startswith('y_embedder'):
      draw = draw * (0.5 if 'adaLN' in key else 1.0) / np.sqrt(shape[1])
    weights[key] = draw.astype(np.float32)
  return weights


def split_sizes(config, count):
  """[S] rows per segment: count // S, and one more in the first count mod S."""
  base, rest = divmod(count, config['segments'])
  return np.array([base + (s < rest) for s in range(config['segments'])], np.int64)


def times_within(rng, config, sizes):
  """[B] float32, uniform inside each row's segment and off its edges."""
  edges = ref.segment_edges(config).astype(np.float64)
  segment = np.repeat(np.arange(len(sizes)), sizes)
  share = rng.uniform(0.02, 0.98, len(segment))
  return (edges[segment] + share * (edges[segment + 1] - edges[segment])).astype(np.float32)


def normal(rng, *shape):
  return rng.standard_normal(shape).astype(np.float32)


def image_shape(config):
  return config['in_channels'], config['context_size'], config['context_size']


def token_count(config):
  return (config['context_size'] // config['patch_size']) ** 2


def training_inputs(rng, config):
  """Rows of stage 1, of the small batch and of the FRN stage; one label of each is null."""
  image, arrays = image_shape(config), {}
  for prefix, count, images in (
    ('train', config['train_batch'], ('images', 'noise')),
    ('small', config['small_batch'], ('x',)),
    ('ft', config['frn_batch'], ('images', 'noise')),
  ):
    sizes = split_sizes(config, count)
    labels = rng.integers(0, config['num_classes'], count)
    labels[count // 2] = config['null_label']
    arrays |= {f'{prefix}_{name}': normal(rng, count, *image) for name in images}
    arrays[f'{prefix}_t'] = times_within(rng, config, sizes)
    arrays |= {f'{prefix}_y': labels, f'{prefix}_split_sizes': sizes}
  zs = normal(rng, config['train_batch'], token_count(config), config['dim_projection'])
  return arrays | {'train_zs': zs}


def sampling_inputs(rng, config):
  """Rows of the single calls (one of them null), starts and noise of the whole runs."""
  image, segments, rows, runs = image_shape(config), config['segments'], SAMPLE_ROWS, SAMPLER_ROWS
  labels = rng.integers(0, config['num_classes'], rows - 1)
  return {
    'samp_x': normal(rng, rows, *image),
    'samp_t': times_within(rng, config, np.full(segments, rows)).reshape(segments, rows),
    'samp_y': np.append(labels, config['null_label']),
    'samp_cached_feature': normal(rng, rows, token_count(config), config['hidden_size']),
    'samp_coeff': rng.uniform(0.1, 0.9, (rows, 1, 1)).astype(np.float32),
    'smp_latents': normal(rng, runs, *image),
    'smp_y': rng.integers(0, config['num_classes'], runs),
    'smp_sde_noise': normal(rng, segments * config['smp_steps'], runs, *image),
  }


def synthetic_inputs(config, seed):
  """Returns the input arrays of the schema by name: float32, labels and sizes int64."""
  rng = np.random.default_rng(seed)
  return training_inputs(rng, config) | sampling_inputs(rng, config)


def training_batch(arrays, prefix):
  """The rows of stage 1 ('train') or of the FRN stage ('ft')."""
  names = ('images', 'noise', 't', 'y', 'split_sizes')
  return ref.Batch(
    *(arrays[f'{prefix}_{name}'] for name in names),
    zs=arrays['train_zs'] if prefix == 'train' else None,
  )


def training_outputs(model, arrays):
  """Stage 1 on both paths, the small batch and the FRN stage."""
  batch = training_batch(arrays, 'train')
  cosine = ref.stage1(model, batch, 'cosine')
  v, z = ref.train_forward(model, *(arrays[f'small_{k}'] for k in ('x', 't', 'y', 'split_sizes')))
  frn = ref.frn_stage(model, training_batch(arrays, 'ft'))
  return {
    **{f'train_{name}': value for name, value in ref.stage1(model, batch).items()},
    **{f'cos_{k}': cosine[k] for k in ('x_t', 'v_target', 'loss_denoise', 'loss_proj')},
    'small_v': v, 'small_z': z,
    **{f'ft_{name}': value for name, value in frn.items()},
  }


def call_outputs(model, arrays):
  """Single network calls of every segment, with and without the FRN, and the scores of one."""
  x, labels, cached = (arrays[f'samp_{k}'] for k in ('x', 'y', 'cached_feature'))
  out = {}
  for s in range(model.config['segments']):
    call = (model, x, arrays['samp_t'][s], labels, s)
    out[f'samp_v_seg{s}'], out[f'samp_feature_seg{s}'] = ref.sample_forward(*call)
    out[f'samp_frn_v_seg{s}'], combined = ref.sample_forward_frn(
      *call, cached=cached, coefficient=arrays['samp_coeff']
    )
    if s == 0:
      out['dbg_samp_frn_combined_feature_seg0'] = combined
  scored = min(1, model.config['segments'] - 1)
  for path in ('linear', 'cosine'):
    v, t = out[f'samp_v_seg{scored}'], arrays['samp_t'][scored]
    out[f'score_{path}'] = ref.score(path, v, x, t)
  return out


def sampler_outputs(model, arrays):
  """Whole runs of all samplers and, for most, their network calls."""
  start, noise = (model, arrays['smp_latents'], arrays['smp_y']), arrays['smp_sde_noise']
  plain, strong = ref.Guidance(), ref.Guidance(4.0)
  limited = ref.Guidance(4.0, *model.config['interval'])
  runs = {
    'ode_cfg1': ref.ode(*start, plain),
    'ode_cfg4': ref.ode(*start, strong),
    'ode_interval': ref.ode(*start, limited),
    'frn_cfg1': ref.ode_frn(*start, plain),
    'frn_cfg4': ref.ode_frn(*start, strong),
    'frn_interval': ref.ode_frn(*start, ref.Guidance(4.0, *model.config['frn_interval'])),
    'sde_cfg1': ref.sde(*start, plain, noise=noise),
    'sde_cfg4': ref.sde(*start, strong, noise=noise),
    'sde_interval': ref.sde(*start, limited, noise=noise),
    'sde_cosine_cfg1': ref.sde(*start, plain, noise=noise, path='cosine'),
    'sde_fixed_cfg1': ref.sde(*start, plain, noise=noise, end='corrected'),
    'sde_fixed_cfg4': ref.sde(*start, strong, noise=noise, end='corrected'),
  }
  calls = {f'{name}_calls': run[1] for name, run in runs.items() if name not in WITHOUT_CALLS}
  return {name: run[0] for name, run in runs.items()} | calls


def debug_outputs(model, arrays):
  """What happens inside the training forward; per-token arrays of its first rows (segment 0)."""
  config, few = model.config, model.config['debug_samples']
  batch = training_batch(arrays, 'train')
  x_t, _ = ref.noisy('linear', batch.x, batch.noise, batch.t)
  cos, sin = ref.rotary_tables(config)
  stages = ref.condition_stages(model, batch.t, batch.labels)
  stages |= ref.feature_stages(model, x_t, stages['c'])
  first = ref.velocity_stages(model, x_t[:few], stages['c'][:few], stages['feature'][:few], 0)
  stages |= {f'vel0_{k}' if k.startswith('block') else k: value for k, value in first.items()}
  names = [*DEBUG_ROWS_KEPT, 'patches', 'rep_x_embed', 'x_embed', 'c_repre', 'global_adaln2']
  names += ['vel0_block0_adaln_total', 'final_tokens']
  names += [f'rep_block0_q_{k}' for k in ('before_norm', 'after_norm', 'after_rope')]
  names += ['rep_block0_attn_out', 'rep_block0_mlp_out']
  names += [f'rep_block{i}_out' for i in range(config['feature_alignment_depth'])]
  names += [f'vel0_block{j}_out' for j in range(config['segment_depth'])]
  kept = {k: stages[k] if k in DEBUG_ROWS_KEPT else stages[k][:few] for k in names}
  return {f'dbg_{k}': v for k, v in {'rope_cos': cos, 'rope_sin': sin, **kept}.items()}


def outputs(model, arrays):
  """Every output array of the schema but gradients and slopes, from the input arrays."""
  out = {}
  for part in (training_outputs, call_outputs, sampler_outputs, debug_outputs):
    out |= part(model, arrays)
  return out


def total_loss(arrays):
  """The stage-1 loss as a function of the model."""
  batch = training_batch(arrays, 'train')
  return lambda model: ref.stage1(model, batch)['loss_total']


def frn_loss(arrays):
  """The loss of the FRN stage as a function of the model."""
  batch = training_batch(arrays, 'ft')
  return lambda model: ref.frn_stage(model, batch)['loss']


def unit_direction(rng, shape):
  """A random unit vector of a parameter's shape, float32."""
  direction = rng.standard_normal(shape)
  return (direction / np.linalg.norm(direction)).astype(np.float32)


def steepest(rng, loss, model, key):
  """(direction, slope) of the steepest of a few random directions.

  One alone may be nearly orthogonal to the gradient, and its slope then be mostly rounding.
  """
  directions = [unit_direction(rng, model.weights[key].shape) for _ in range(CANDIDATES)]
  slopes = [ref.slope(loss, model, key, d.astype(np.float64)) for d in directions]
  best = int(np.argmax(np.abs(slopes)))
  return directions[best], np.asarray(slopes[best])


def derivatives(model, arrays, seed):
  """Whole gradients of the small parameters that the config names, slopes of the large ones."""
  rng, config, out = np.random.default_rng(seed), model.config, {}
  for prefix, loss, whole, sloped in (
    ('train', total_loss(arrays), 'grad_params', 'slope_params'),
    ('ft', frn_loss(arrays), 'ft_grad_params', 'ft_slope_params'),
  ):
    for key in config[whole]:
      out[f'{prefix}_grad/{key}'] = ref.gradient(loss, model, key)
    for key in config[sloped]:
      direction, slope = steepest(rng, loss, model, key)
      out |= {f'{prefix}_direction/{key}': direction, f'{prefix}_slope/{key}': slope}
  return out


def write_folder(folder, config, seed):
  """Writes config.json, weights.safetensors and io.npz; outputs are float64."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config, indent=1) + '\n')
  save_file(synthetic_weights(config, [seed, 0]), folder / 'weights.safetensors')
  model, arrays = ref.load(folder), synthetic_inputs(config, [seed, 1])
  results = outputs(model, arrays) | derivatives(model, arrays, [seed, 2])
  np.savez_compressed(folder / 'io.npz', **arrays, **results)

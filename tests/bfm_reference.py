"""Blockwise Flow Matching in float64 NumPy: network, losses, FRN stage, samplers, slopes.

A second implementation that shares nothing with the package: it is written from the formulas, and
the golden folders are checked against it or written by it (tests/bfm_golden_writer.py). Weights
keep the official names and (out, in) layouts, images are [B, C, H, W], t = 1 is noise, and what
enters the network (images, times, FRN coefficients) is rounded to float32 first, as in a sampler
that keeps its own state in float64. A is the number of heads, E the width of one.
"""

import json
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file

TIME_PERIOD = 10000.0  # slowest wave of the time features; rope_theta is a number of its own
SDE_LAST = 0.04  # where the SDE's grid ends, before its step to 0


class Model(NamedTuple):
  """A network: what every function below works on."""

  weights: dict  # official key -> float64 array in the official layout
  config: dict  # as config.json of a golden folder


class Batch(NamedTuple):
  """Training rows in the order of their segments; `zs` is None in the FRN stage."""

  x: np.ndarray  # [B, C, H, W] clean latents
  noise: np.ndarray  # [B, C, H, W]
  t: np.ndarray  # [B]
  labels: np.ndarray  # [B] after label dropout
  sizes: np.ndarray  # [S] rows per segment
  zs: np.ndarray | None  # [B, N, F] encoder features


def load(folder):
  """Returns the Model of a golden folder."""
  tensors = load_file(folder / 'weights.safetensors')
  config = json.loads((folder / 'config.json').read_text())
  return Model({key: value.astype(np.float64) for key, value in tensors.items()}, config)


def rounded(x):
  """x rounded to float32, as float64."""
  return np.asarray(x, np.float32).astype(np.float64)


def linspace(start, stop, count):
  """float32 grid: start + step i in the first half, stop - step (count - 1 - i) in the second."""
  start, stop = np.float32(start), np.float32(stop)
  if count == 1:
    return np.array([start])
  step = (stop - start) / np.float32(count - 1)
  i = np.arange(count, dtype=np.float32)
  grid = np.where(i < count // 2, start + step * i, stop - step * (np.float32(count - 1) - i))
  grid[0], grid[-1] = start, stop
  return grid


def segment_edges(config):
  """[S + 1] float32, falling from 1 to 0; segment s lies between edges s and s + 1."""
  return linspace(1, 0, config['segments'] + 1)


def linear(model, key, x):
  """y = x W^T + b, [..., in] -> [..., out]."""
  return x @ model.weights[f'{key}.weight'].T + model.weights[f'{key}.bias']


def silu(x):
  """x sigmoid(x)."""
  return x / (1 + np.exp(-x))


def gelu(x):
  """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def modulate(model, x, shift, scale):
  """LN(x) (1 + scale) + shift over the last axis; LN has a biased variance and no weights."""
  x = x - x.mean(-1, keepdims=True)
  norm = np.sqrt((x * x).mean(-1, keepdims=True) + model.config['norm_eps'])
  return x / norm * (1 + scale) + shift


def rms_norm(model, key, x):
  """x / sqrt(mean(x^2) + eps) w over the last axis."""
  norm = np.sqrt((x * x).mean(-1, keepdims=True) + model.config['norm_eps'])
  return x / norm * model.weights[f'{key}.weight']


def patchify(config, x):
  """[B, C, H, W] -> [B, N, C P P]: tokens by row, entries by channel, row offset, column offset."""
  p, x = config['patch_size'], rounded(x)
  batch, channels, side, _ = x.shape
  x = x.reshape(batch, channels, side // p, p, side // p, p)
  return x.transpose(0, 2, 4, 1, 3, 5).reshape(batch, (side // p) ** 2, channels * p * p)


def unpatchify(config, tokens):
  """[B, N, C P P] -> [B, C, H, W]."""
  p, side = config['patch_size'], config['context_size']
  tokens = tokens.reshape(len(tokens), side // p, side // p, -1, p, p)
  return tokens.transpose(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, side, side)


def time_features(config, t):
  """[cos(t f_k), sin(t f_k)] with f_k = 10000^(-k / half), [B] -> [B, 2 half]."""
  half = config['time_freq_dim'] // 2
  angles = rounded(t)[:, None] * TIME_PERIOD ** (-np.arange(half) / half)
  return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


def rotary_tables(config):
  """cos and sin, [N, E]: the row turns the first half of a head, the column the second."""
  side = config['context_size'] // config['patch_size']
  half = config['hidden_size'] // config['num_heads'] // 2
  waves = np.repeat(config['rope_theta'] ** (-np.arange(0, half, 2) / half), 2)
  row, column = np.divmod(np.arange(side * side), side)
  angles = np.concatenate([row[:, None] * waves, column[:, None] * waves], axis=-1)
  return np.cos(angles), np.sin(angles)


def rotate(config, x):
  """Turns each pair (x[2i], x[2i + 1]) by its angle, [B, A, N, E]."""
  cos, sin = rotary_tables(config)
  turned = np.stack([-x[..., 1::2], x[..., 0::2]], axis=-1).reshape(x.shape)
  return x * cos + turned * sin


def attention(model, key, x):
  """softmax(q k^T / sqrt(E)) v with normalised, rotated q and k; returns its stages by name.

  [B, N, D] -> 'attn_out' [B, N, D] and the queries 'q_before_norm', 'q_after_norm' and
  'q_after_rope', all [B, A, N, E].
  """
  batch, count, width = x.shape
  parts = linear(model, f'{key}.qkv', x).reshape(batch, count, 3, model.config['num_heads'], -1)
  q, k, v = np.moveaxis(parts, 2, 0).swapaxes(2, 3)
  q_normed, k_normed = rms_norm(model, f'{key}.q_norm', q), rms_norm(model, f'{key}.k_norm', k)
  q_turned, k_turned = rotate(model.config, q_normed), rotate(model.config, k_normed)
  logits = q_turned @ k_turned.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
  scores = np.exp(logits - logits.max(-1, keepdims=True))
  mixed = scores / scores.sum(-1, keepdims=True) @ v
  out = linear(model, f'{key}.proj', mixed.swapaxes(1, 2).reshape(batch, count, width))
  return {
    'q_before_norm': q, 'q_after_norm': q_normed, 'q_after_rope': q_turned, 'attn_out': out,
  }


def block(model, key, h, a):
  """A transformer block on h [B, N, D] under the modulation a [B, N or 1, 6 D]; stages by name."""
  shift1, scale1, gate1, shift2, scale2, gate2 = np.split(a, 6, axis=-1)
  stages = attention(model, f'{key}.attn', modulate(model, h, shift1, scale1))
  h = h + gate1 * stages['attn_out']
  hidden = gelu(linear(model, f'{key}.mlp.fc1', modulate(model, h, shift2, scale2)))
  out = linear(model, f'{key}.mlp.fc2', hidden)
  return {**stages, 'mlp_out': out, 'out': h + gate2 * out}


def low_rank(model, key, z):
  """A block's own modulation Lin(Lin(SiLU(z))), [..., D or 2 D] -> [..., 6 D]."""
  down = linear(model, f'{key}.adaLN_modulation.1', silu(z))
  return linear(model, f'{key}.adaLN_modulation.2', down)


def condition_stages(model, t, labels):
  """c = t_emb + y_emb, [B, D], and its parts by name."""
  waves = time_features(model.config, t)
  t_emb = linear(model, 't_embedder.mlp.2', silu(linear(model, 't_embedder.mlp.0', waves)))
  y_emb = model.weights['y_embedder.embedding_table.weight'][labels]
  return {'t_sinusoid': waves, 't_emb': t_emb, 'y_emb': y_emb, 'c': t_emb + y_emb}


def feature_stages(model, x, c):
  """The feature network: 'feature' [B, N, D] and everything on the way, by name."""
  patches = patchify(model.config, x)
  h = linear(model, 'representation_x_embedder.proj', patches)
  shared = linear(model, 'global_adaLN_modulation.1', silu(c))
  stages = {'patches': patches, 'rep_x_embed': h, 'global_adaln': shared}
  for i in range(model.config['feature_alignment_depth']):
    key = f'representation_blocks.{i}'
    a = low_rank(model, key, c) + shared
    inner = {'adaln_total': a, **block(model, key, h, a[:, None])}
    h = inner['out']
    stages |= {f'rep_block{i}_{name}': value for name, value in inner.items()}
  return {**stages, 'feature': h}


def velocity_stages(model, x, c, f, segment):
  """The velocity network of one segment: 'velocity' [B, C, H, W] and everything on the way."""
  z = np.concatenate([np.broadcast_to(c[:, None], f.shape), f], axis=-1)
  shared = linear(model, 'global_adaLN_modulation2.1', silu(z))
  h = linear(model, 'x_embedder.proj', patchify(model.config, x))
  stages = {'c_repre': z, 'global_adaln2': shared, 'x_embed': h}
  for j in range(model.config['segment_depth']):
    key = f'velocity_blocks.{segment}.{j}'
    a = low_rank(model, key, z) + shared
    h = block(model, key, h, a)['out']
    stages |= {f'block{j}_adaln_total': a, f'block{j}_out': h}
  shift, scale = np.split(linear(model, 'final_layer.adaLN_modulation.1', silu(z)), 2, axis=-1)
  tokens = linear(model, 'final_layer.linear', modulate(model, h, shift, scale))
  return {**stages, 'final_tokens': tokens, 'velocity': unpatchify(model.config, tokens)}


def features(model, x, t, labels):
  """f(x, t, y), [B, N, D]."""
  return feature_stages(model, x, condition_stages(model, t, labels)['c'])['feature']


def project(model, f):
  """The projector, [B, N, D] -> [B, N, F]."""
  for i in (0, 2):
    f = silu(linear(model, f'linear_projection.{i}', f))
  return linear(model, 'linear_projection.4', f)


def residual(model, x, c):
  """u of the FRN: the residual stream after its blocks, embedded input included, [B, N, D]."""
  h = linear(model, 'representation_x_embedder.proj', patchify(model.config, x))
  for k in range(model.config['frn_depth']):
    key = f'frn_blocks.{k}'
    a = linear(model, f'{key}.adaLN_modulation.1', silu(c))
    h = block(model, key, h, a[:, None])['out']
  return h


def train_forward(model, x, t, labels, sizes):
  """(velocity [B, C, H, W], projected features [B, N, F]) of rows in the order of segments."""
  c = condition_stages(model, t, labels)['c']
  f = feature_stages(model, x, c)['feature']
  starts = np.cumsum([0, *sizes])
  rows = [slice(a, b) for a, b in zip(starts[:-1], starts[1:])]
  parts = [
    velocity_stages(model, x[r], c[r], f[r], s)['velocity']
    for s, r in enumerate(rows) if r.start < r.stop
  ]
  return np.concatenate(parts), project(model, f)


def sample_forward(model, x, t, labels, segment):
  """(velocity [B, C, H, W], feature [B, N, D]) of one segment."""
  c = condition_stages(model, t, labels)['c']
  f = feature_stages(model, x, c)['feature']
  return velocity_stages(model, x, c, f, segment)['velocity'], f


def sample_forward_frn(model, x, t, labels, segment, *, cached, coefficient):
  """(velocity, cached + coefficient u) of one segment; the coefficient is [] or [B, 1, 1]."""
  c = condition_stages(model, t, labels)['c']
  f = cached + rounded(coefficient) * residual(model, x, c)
  return velocity_stages(model, x, c, f, segment)['velocity'], f


def path_terms(path, t):
  """a, b of x_t = a x + b noise, and their derivatives a', b'."""
  if path == 'linear':
    return 1 - t, t, -np.ones_like(t), np.ones_like(t)
  angle = np.pi / 2 * t
  cos, sin = np.cos(angle), np.sin(angle)
  return cos, sin, -np.pi / 2 * sin, np.pi / 2 * cos


def noisy(path, x, noise, t):
  """(x_t, velocity a' x + b' noise), both [B, C, H, W], for times [B]."""
  a, b, da, db = path_terms(path, np.asarray(t, np.float64)[:, None, None, None])
  x, noise = x.astype(np.float64), noise.astype(np.float64)
  return a * x + b * noise, da * x + db * noise


def unit(x):
  """x / max(|x|, 1e-12) over the last axis."""
  return x / np.maximum(np.sqrt((x * x).sum(-1, keepdims=True)), 1e-12)


def stage1(model, batch, path='linear'):
  """Forward pass and losses of a training batch, by the names of the golden arrays."""
  x_t, target = noisy(path, batch.x, batch.noise, batch.t)
  v, z = train_forward(model, x_t, batch.t, batch.labels, batch.sizes)
  per_sample = ((v - target) ** 2).mean((1, 2, 3))
  denoise, align = per_sample.mean(), -(unit(z) * unit(batch.zs)).sum(-1).mean()
  return {
    'x_t': x_t, 'v': v, 'z': z, 'v_target': target, 'loss_per_sample': per_sample,
    'loss_denoise': denoise, 'loss_proj': align,
    'loss_total': denoise + model.config['proj_loss_weight'] * align,
  }


def frn_stage(model, batch):
  """FRN stage: f(x_start, t_start) + coeff u(x_t, t) against f(x_t, t), and its loss."""
  edges = segment_edges(model.config).astype(np.float64)
  segment = np.repeat(np.arange(len(batch.sizes)), batch.sizes)
  t, t_start = batch.t.astype(np.float64), edges[segment]
  coeff = ((t_start - t) / (t_start - edges[segment + 1]))[:, None, None]
  x_t, _ = noisy('linear', batch.x, batch.noise, t)
  x_start, _ = noisy('linear', batch.x, batch.noise, t_start)
  c = condition_stages(model, t, batch.labels)['c']
  start = features(model, x_start, t_start, batch.labels)
  approx = start + coeff * residual(model, x_t, c)
  target = feature_stages(model, x_t, c)['feature']
  return {
    'x_t': x_t, 't_start': t_start, 'x_start': x_start, 'coeff': coeff, 'approx': approx,
    'target': target, 'loss': ((approx - target) ** 2).mean((1, 2)).mean(),
  }


def slope(loss, model, key, direction, step=3e-5):
  """d loss(model) / d weights[key] along a direction: (loss(+step) - loss(-step)) / (2 step)."""
  ends = []
  for move in (step, -step):
    weights = {**model.weights, key: model.weights[key] + move * direction}
    ends.append(loss(model._replace(weights=weights)))
  return (ends[0] - ends[1]) / (2 * step)


def gradient(loss, model, key):
  """d loss(model) / d weights[key], one slope per entry: for small parameters only."""
  shape = model.weights[key].shape
  directions = np.eye(model.weights[key].size).reshape(-1, *shape)
  return np.array([slope(loss, model, key, d) for d in directions]).reshape(shape)


def score(path, v, x, t):
  """(rho v - x) / (b^2 - rho b' b) with rho = a / a', for times [B] and images [B, C, H, W]."""
  a, b, da, db = path_terms(path, np.asarray(t, np.float64)[:, None, None, None])
  rho = a / da
  return (rho * v - x) / (b * b - rho * db * b)


class Guidance(NamedTuple):
  """Classifier-free guidance: on where weight > 1 and low <= t <= high."""

  weight: float = 1.0
  low: float = 0.0
  high: float = 1.0

  def is_on(self, t):
    return self.weight > 1 and self.low <= t <= self.high

  def combine(self, halves):
    cond, null = np.split(halves, 2)
    return null + self.weight * (cond - null)


def doubled(config, x, labels):
  """[x; x] and [labels; null]."""
  null = np.full_like(labels, config['null_label'])
  return np.concatenate([x, x]), np.concatenate([labels, null])


def segment_grid(config, segment):
  """[n + 1] float32 times of an ODE segment, from its start to its end."""
  edges = segment_edges(config)
  return linspace(edges[segment], edges[segment + 1], config['smp_steps'] + 1)


def sde_grid(config, segment):
  """[n + 1] float32 times of an SDE segment; the last one takes n of them to 0.04, then 0."""
  if segment < config['segments'] - 1:
    return segment_grid(config, segment)
  grid = linspace(segment_edges(config)[segment], SDE_LAST, config['smp_steps'])
  return np.append(grid, np.float32(0))


def ode(model, x, labels, guidance):
  """Euler steps x + dt v. Returns (x [B, C, H, W], calls [S n, 3]: time, rows, segment)."""
  x, calls = x.astype(np.float64), []
  for segment in range(model.config['segments']):
    grid = segment_grid(model.config, segment)
    for t, dt in zip(grid, np.diff(grid).astype(np.float64)):
      on = guidance.is_on(t)
      inputs = doubled(model.config, x, labels) if on else (x, labels)
      calls.append((t, len(inputs[0]), segment))
      v, _ = sample_forward(model, inputs[0], np.full(len(inputs[0]), t), inputs[1], segment)
      x = x + dt * (guidance.combine(v) if on else v)
  return x, np.array(calls, np.float64)


def ode_frn(model, x, labels, guidance):
  """As `ode`, with the feature network at the start of each segment and the FRN after it.

  The start computes the features of both halves and each step takes what it needs of them, so that
  guidance may switch inside a segment; `calls` counts the rows whose velocity a step uses.
  """
  x, calls, size = x.astype(np.float64), [], len(x)
  for segment in range(model.config['segments']):
    grid = segment_grid(model.config, segment)
    both = doubled(model.config, x, labels)
    cached = features(model, both[0], np.full(2 * size, grid[0]), both[1])
    span = float(grid[0]) - float(grid[-1])
    for t, dt in zip(grid, np.diff(grid).astype(np.float64)):
      on, coefficient = guidance.is_on(t), (float(grid[0]) - float(t)) / span
      rows = 2 * size if on else size
      inputs = doubled(model.config, x, labels) if on else (x, labels)
      calls.append((t, rows, segment))
      v, _ = sample_forward_frn(
        model, inputs[0], np.full(rows, t), inputs[1], segment,
        cached=cached[:rows], coefficient=coefficient,
      )
      x = x + dt * (guidance.combine(v) if on else v)
  return x, np.array(calls, np.float64)


def sde(model, x, labels, guidance, *, noise, path='linear', end='official'):
  """Euler-Maruyama steps x + drift dt + sqrt(2 t |dt|) noise with drift = v - t score.

  The end is 'corrected' (the step from 0.04 to 0 once, without noise) or 'official' (that step with
  noise, then again without). Returns as `ode`; noise is [S n, B, C, H, W].
  """
  x, calls = x.astype(np.float64), []
  grids = [sde_grid(model.config, s) for s in range(model.config['segments'])]
  steps = [(s, t, float(dt)) for s, grid in enumerate(grids) for t, dt in zip(grid, np.diff(grid))]
  noises = list(noise.astype(np.float64))
  if end == 'official':
    steps.append(steps[-1])
    noises.append(0.0)
  else:
    noises[-1] = 0.0
  for (segment, t, dt), draw in zip(steps, noises):
    on = guidance.is_on(t)
    inputs = doubled(model.config, x, labels) if on else (x, labels)
    times = np.full(len(inputs[0]), t)
    calls.append((t, len(times), segment))
    v, _ = sample_forward(model, inputs[0], times, inputs[1], segment)
    drift = v - float(t) * score(path, v, inputs[0], times)
    drift = guidance.combine(drift) if on else drift
    x = x + drift * dt + np.sqrt(2 * float(t)) * np.sqrt(abs(dt)) * draw
  return x, np.array(calls, np.float64)

"""DINOv2 in float64 and plain numpy, from official tensors; and a folder of arrays it gives.

Written after the description of the network, independently of fmzoo/models/dinov2.py; it is checked
against the recorded arrays itself.
"""

import csv
import json
import math

import numpy as np

from tests import golden_weights

NAME = 'dinov2_reference.npz'
CONFIG = {
  'keys_hf': 'second_hf_keys.csv', 'keys_hub': 'second_hub_keys.csv', 'hidden_size': 48,
  'num_layers': 3, 'num_heads': 3, 'mlp_ratio': 4, 'patch_size': 14, 'train_image_size': 70,
  'layer_norm_eps': 1e-06,
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SALT = 'second'
IMAGE, REPA_IMAGE, SIDE = (28, 56), 61, 42  # pixels of the images; side of the preprocessed ones
GRIDS = ((2, 4), (7, 7), (5, 5), (1, 25))  # of resampled tables


def keys(t, a):
  """Keys' kernel at one distance."""
  t = abs(t)
  if t <= 1:
    return (a + 2) * t**3 - (a + 3) * t**2 + 1
  return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def resize_row(row, m, method):
  """Resizes the first axis of an array to m, one result at a time."""
  n = len(row)
  out = []
  for i in range(m):
    if method == 'timm':
      f = max(n / m, 1)
      centre = (i + 0.5) * n / m
      taps = range(max(int(centre - 2 * f + 0.5), 0), min(int(centre + 2 * f + 0.5), n))
      weights = [keys((j - centre + 0.5) / f, -0.5) for j in taps]
      weights = [weight / sum(weights) for weight in weights]
    else:
      p = (i + 0.5) * n / (m + 0.1 * (method == 'hub')) - 0.5
      taps = [math.floor(p) + k for k in (-1, 0, 1, 2)]
      weights = [keys(p - j, -0.75) for j in taps]
    out.append(sum(w * row[min(max(j, 0), n - 1)] for w, j in zip(weights, taps)))
  return np.array(out)


def resize(image, shape, method):
  """Resizes [H, W, C]."""
  rows = resize_row(image, shape[0], method)
  return resize_row(rows.swapaxes(0, 1), shape[1], method).swapaxes(0, 1)


def positions(table, grid, method):
  """Resamples a table [1, 1 + n n, D] -> [1, 1 + rows columns, D]."""
  table = table.astype(np.float64)
  n = round((table.shape[1] - 1) ** 0.5)
  if grid == (n, n):
    return table
  patches = resize(table[0, 1:].reshape(n, n, -1), grid, method)
  return np.concatenate([table[:, :1], patches.reshape(1, grid[0] * grid[1], -1)], axis=1)


def layer_norm(x, tensors, name):
  """Layer norm over the last axis."""
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  return x * tensors[f'{name}.weight'] + tensors[f'{name}.bias']


def linear(x, tensors, name):
  """A linear layer."""
  return x @ tensors[f'{name}.weight'].T + tensors[f'{name}.bias']


def attend(q, k, v):
  """Softmax attention of one head and one image: [N, E] each."""
  scores = np.exp(q @ k.T / q.shape[1] ** 0.5)
  return scores / scores.sum(1, keepdims=True) @ v


def gelu(x):
  """x Phi(x)."""
  return x * 0.5 * (1 + np.vectorize(math.erf)(x / 2**0.5))


def as_hub(tensors, depth):
  """Returns tensors of the 'hf' layout under the names of 'hub'."""
  tensors = dict(tensors)
  for i in range(depth):
    for leaf in ('weight', 'bias'):
      parts = [
        tensors.pop(f'encoder.layer.{i}.attention.attention.{name}.{leaf}')
        for name in ('query', 'key', 'value')
      ]
      tensors[f'encoder.layer.{i}.attn.qkv.{leaf}'] = np.concatenate(parts)
  renamed = {}
  for key, tensor in tensors.items():
    for old, new in (
      ('embeddings.patch_embeddings.projection', 'patch_embed.proj'),
      ('embeddings.position_embeddings', 'pos_embed'), ('embeddings.', ''),
      ('encoder.layer', 'blocks'), ('attention.output.dense', 'attn.proj'),
      ('layer_scale1.lambda1', 'ls1.gamma'), ('layer_scale2.lambda1', 'ls2.gamma'),
      ('layernorm', 'norm'),
    ):
      key = key.replace(old, new)
    renamed[key] = tensor
  return renamed


def run(tensors, images, settings, method):
  """Returns (tokens after the final norm, {stage: tokens}) of images [B, H, W, 3], normalised.

  Tensors are of the 'hub' layout; stages have the names of 'hf'.
  """
  tensors = {key: tensor.astype(np.float64) for key, tensor in tensors.items()}
  patch, heads = settings['patch_size'], settings['num_heads']
  b, h, w = images.shape[0], images.shape[1] // patch, images.shape[2] // patch
  kernel, tokens = tensors['patch_embed.proj.weight'], []
  for row in range(h):
    for column in range(w):
      top, left = row * patch, column * patch
      cut = images[:, top : top + patch, left : left + patch].astype(np.float64)
      tokens.append(np.einsum('bhwc,dchw->bd', cut, kernel) + tensors['patch_embed.proj.bias'])
  first = np.repeat(tensors['cls_token'], b, axis=0)
  x = np.concatenate([first, np.stack(tokens, axis=1)], axis=1)
  x = x + positions(tensors['pos_embed'], (h, w), method)
  stages = {'embeddings': x}
  for i in range(settings['num_layers']):
    block, theirs = f'blocks.{i}', f'encoder.layer.{i}'
    stages[f'{theirs}.norm1'] = y = layer_norm(x, tensors, f'{block}.norm1')
    q, k, v = np.split(linear(y, tensors, f'{block}.attn.qkv'), 3, axis=-1)
    of_heads = [np.split(part, heads, axis=-1) for part in (q, k, v)]
    y = np.concatenate([
      np.stack([attend(q[j], k[j], v[j]) for j in range(b)]) for q, k, v in zip(*of_heads)
    ], axis=-1)
    stages[f'{theirs}.attention'] = y = linear(y, tensors, f'{block}.attn.proj')
    stages[f'{theirs}.layer_scale1'] = y = y * tensors[f'{block}.ls1.gamma']
    x = x + y
    stages[f'{theirs}.norm2'] = y = layer_norm(x, tensors, f'{block}.norm2')
    y = gelu(linear(y, tensors, f'{block}.mlp.fc1'))
    stages[f'{theirs}.mlp'] = y = linear(y, tensors, f'{block}.mlp.fc2')
    stages[theirs] = x = x + y * tensors[f'{block}.ls2.gamma']
  return layer_norm(x, tensors, 'norm'), stages


def normalise(pixels):
  """Returns images of pixels 0..255."""
  return (pixels / 255 - np.array(MEAN)) / np.array(STD)


def shapes(settings):
  """Returns ({key: shape} of 'hf', the same of 'hub')."""
  d, hidden = settings['hidden_size'], settings['hidden_size'] * settings['mlp_ratio']
  side = settings['train_image_size'] // settings['patch_size']
  norm = {'weight': (d,), 'bias': (d,)}

  def layer(out, into=d):
    """Returns the shapes of a linear layer."""
    return {'weight': (out, into), 'bias': (out,)}

  patches = {'weight': (d, 3, settings['patch_size'], settings['patch_size']), 'bias': (d,)}
  table = (1, 1 + side**2, d)
  hf = {'embeddings.patch_embeddings.projection': patches, 'layernorm': norm, 'embeddings': {
    'cls_token': (1, 1, d), 'mask_token': (1, d), 'position_embeddings': table}}
  hub = {'patch_embed.proj': patches, 'norm': norm}
  both = {'norm1': norm, 'norm2': norm, 'mlp.fc1': layer(hidden), 'mlp.fc2': layer(d, hidden)}
  for i in range(settings['num_layers']):
    parts = {f'attention.attention.{name}': layer(d) for name in ('query', 'key', 'value')}
    parts |= {f'layer_scale{j}': {'lambda1': (d,)} for j in (1, 2)}
    parts |= {**both, 'attention.output.dense': layer(d)}
    hf |= {f'encoder.layer.{i}.{name}': leaves for name, leaves in parts.items()}
    parts = {'attn.qkv': layer(3 * d), 'attn.proj': layer(d), **both}
    parts |= {f'ls{j}': {'gamma': (d,)} for j in (1, 2)}
    hub |= {f'blocks.{i}.{name}': leaves for name, leaves in parts.items()}
  hf, hub = (
    {f'{name}.{leaf}': shape for name, leaves in parts.items() for leaf, shape in leaves.items()}
    for parts in (hf, hub)
  )
  return hf, {**hub, 'cls_token': (1, 1, d), 'mask_token': (1, d), 'pos_embed': table}


def write_folder(folder):
  """Writes a folder like tests/golden/encoders, of CONFIG and its own weights and images."""
  folder.mkdir(parents=True)
  config = {'salt': SALT, 'mean': MEAN, 'std': STD, NAME: CONFIG}
  (folder / 'config.json').write_text(json.dumps(config))
  tensors = {}
  for layout, table in zip(('hf', 'hub'), shapes(CONFIG)):
    with open(folder / CONFIG[f'keys_{layout}'], 'w', newline='') as file:
      rows = [(key, 'x'.join(map(str, shape))) for key, shape in table.items()]
      csv.writer(file).writerows([('key', 'shape'), *rows])
    drawn = golden_weights.tensors(folder / CONFIG[f'keys_{layout}'], SALT)
    tensors[layout] = as_hub(drawn, CONFIG['num_layers']) if layout == 'hf' else drawn
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (2, *IMAGE, 3), np.uint8)
  larger = rng.integers(0, 256, (1, REPA_IMAGE, REPA_IMAGE, 3), np.uint8)
  small = np.stack([resize(image, (SIDE, SIDE), 'hf') for image in normalise(larger)])
  arrays = {
    'image_u8': pixels, 'repa_image_u8': larger, 'token_index': np.array([0, 3, 8]),
    'repa_rows': np.array([0, 7, SIDE - 1]),
  }
  arrays['repa_pre_rows'] = small[:, arrays['repa_rows']]
  for layout in ('hf', 'hub'):
    for method in (layout, 'timm'):
      run_name = f'{layout}_{"native" if method == layout else method}'
      found, stages = run(tensors[layout], normalise(pixels), CONFIG, method)
      arrays[run_name] = found
      if run_name == 'hf_native':
        arrays |= {f'stage/{name}': value for name, value in stages.items()}
    found, _ = run(tensors[layout], small, CONFIG, 'timm')
    arrays[f'repa_{layout}_timm/tokens'] = found[:, arrays['token_index']]
    arrays[f'repa_{layout}_timm/first7'] = found[..., :7]
    arrays[f'repa_{layout}_timm/channel_mean'] = found[:, 1:].mean(1)
  save(folder / NAME, arrays)
  table = rng.standard_normal((1, 26, 3)).astype(np.float32)
  resampled = {
    f'{method}/{rows}x{columns}': positions(table, (rows, columns), method)
    for method in ('timm', 'hf', 'hub') for rows, columns in GRIDS
  }
  save(folder / 'dinov2_pos_embed.npz', {'pos_embed': table, **resampled})


def save(path, arrays):
  """Writes arrays, floats as float32."""
  np.savez(path, **{
    name: value.astype(np.float32) if value.dtype == np.float64 else value
    for name, value in arrays.items()
  })

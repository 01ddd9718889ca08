"""The evaluator's numbers from activations as plain NumPy and SciPy, all pairs of points at once.

Float64 but for `half`, which rounds to float16 between steps. Written to agree with the formulas of
the recorded ones, not to be fast or exact where a covariance has no full rank.
"""

import numpy as np
import scipy.linalg
import scipy.special

POINTS, WIDTH, SPATIAL, CLASSES = {'ref': 430, 'sample': 390}, 48, 20, 13
SPLITS, ROWS, SCALE, K = (100, 150, 1000), 6, 70.0, 3


def fid(x, y):
  """Squared distance of the Gaussians of two sets of vectors [N, D]."""
  cov1, cov2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
  root = scipy.linalg.sqrtm(cov1 @ cov2).real
  return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(cov1 + cov2 - 2 * root)


def inception_score(p, size):
  """Mean over splits of `size` of the exponent of the mean divergence from their mean."""
  parts = [p[start : start + size] for start in range(0, len(p), size)]
  return np.mean([np.exp(scipy.special.rel_entr(q, q.mean(0)).sum(1).mean()) for q in parts])


def squared_distances(x, y, half=False):
  """[N, M] from |x|^2 - 2 x y + |y|^2, in float16 where `half` and all are finite."""
  if not half:
    return np.sum((x[:, None] - y) ** 2, axis=2)
  with np.errstate(over='ignore', invalid='ignore'):
    x16, y16 = x.astype(np.float16), y.astype(np.float16)
    products = (x16.astype(float) @ y16.astype(float).T).astype(np.float16)
    norms = [np.sum((z * z).astype(float), axis=1).astype(np.float16) for z in (x16, y16)]
    out = np.maximum(norms[0][:, None] - np.float16(2) * products + norms[1], np.float16(0))
  return out.astype(float) if np.isfinite(out).all() else squared_distances(x, y)


def radii(x, half=False):
  """Squared distances [N, 1] to the K-th neighbour."""
  return np.sort(squared_distances(x, x, half), axis=1)[:, K : K + 1]


def precision_recall(x, y, half=False):
  """Shares of y in the balls of x, and of x in the balls of y."""
  distances = squared_distances(x, y, half)
  precise = (distances <= radii(x, half)).any(axis=0)
  return precise.mean(), (distances <= radii(y, half)[:, 0]).any(axis=1).mean()


def inputs(seed):
  """Activations that float16 holds exactly, and a matrix of logits."""
  rng, out = np.random.default_rng(seed), {}
  mixing = 0.3 * rng.standard_normal((12, WIDTH))
  for i, (name, count) in enumerate(POINTS.items()):
    few, many = rng.standard_normal((count, 12)), rng.standard_normal((count, WIDTH))
    pool = np.maximum((1 - 0.1 * i) * (few @ mixing + 0.2 * many), 0)
    out[f'{name}_pool'] = pool.astype(np.float16).astype(np.float32)
    spatial = (1 + 0.1 * i) * rng.standard_normal((count, SPATIAL)) + 0.1 * i
    out[f'{name}_spatial'] = spatial.astype(np.float16).astype(np.float32)
  logits = rng.standard_normal((WIDTH, CLASSES)) / 2
  return {**out, 'softmax_w': logits.astype(np.float32), 'scale_big': np.float64(SCALE)}


def outputs(arrays):
  """Every output array of metrics.npz."""
  wide = {name: array.astype(np.float64) for name, array in arrays.items()}
  pools = wide['ref_pool'], wide['sample_pool']
  p = scipy.special.softmax(pools[1] @ wide['softmax_w'], axis=1)
  out = {
    'fid': fid(*pools), 'sfid': fid(wide['ref_spatial'], wide['sample_spatial']),
    'fid_self': fid(pools[0], pools[0]), f'softmax_probs_first{ROWS}': p[:ROWS],
    **{f'is_split{size}': inception_score(p, size) for size in SPLITS},
    'max_sqnorm_big': SCALE**2 * np.sum(pools[0] ** 2, axis=1).max(),
  }
  for name, pool in zip(POINTS, pools):
    out |= {f'mu_{name}': pool.mean(0), f'sigma_{name}': np.cov(pool, rowvar=False)}
    out |= {f'radii_{name}': radii(pool, half=True), f'radii_{name}_f32': radii(pool)}
  for end, factor, half in (('', 1, True), ('_f32', 1, False), ('_big', SCALE, True)):
    shares = precision_recall(*(factor * pool for pool in pools), half)
    out |= dict(zip((f'precision{end}', f'recall{end}'), shares))
  return out


def write(path, seed):
  """Writes a metrics.npz of other sizes than the recorded one."""
  arrays = inputs(seed)
  np.savez_compressed(path, **arrays, **outputs(arrays))

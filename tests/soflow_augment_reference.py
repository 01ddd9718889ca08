"""SoFlow's augmentation of images in float64 NumPy, every random draw given.

Points are (x, y) from the centre of an image, in pixels; matrices take the output to the input.
Padding follows the official code: one amount per side for a whole batch.
"""

import numpy as np

from tests import soflow_reference as ref

SCALE, STRETCH, SHIFT, TURN_SHARE, FLIP_SHARE = 0.2, 0.2, 0.125, 0.5, 1e8
FILTER = np.array([
  0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
  0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
  -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
])
MARGIN = 6  # pixels beside the warped corners, and beside the output before it is halved


def homogeneous(upper):
  """[B, 2, 3] -> [B, 3, 3]."""
  last = np.broadcast_to([0.0, 0.0, 1.0], (len(upper), 1, 3))
  return np.concatenate([upper, last], axis=1)


def translation(x, y):
  """[B] each -> [B, 3, 3]."""
  one, zero = np.ones_like(x), np.zeros_like(x)
  return homogeneous(np.stack([one, zero, x, zero, one, y], axis=-1).reshape(-1, 2, 3))


def scaling(x, y):
  """[B] each -> [B, 3, 3]."""
  zero = np.zeros_like(x)
  return homogeneous(np.stack([x, zero, zero, zero, y, zero], axis=-1).reshape(-1, 2, 3))


def rotation(angle):
  """[B] -> [B, 3, 3]."""
  cos, sin, zero = np.cos(angle), np.sin(angle), np.zeros_like(angle)
  return homogeneous(np.stack([cos, -sin, zero, sin, cos, zero], axis=-1).reshape(-1, 2, 3))


def quantities(draws, p):
  """Returns (flip, w_s, w_a, angle, w_x, w_y), [B] each, of the recorded draws."""
  d = {name: ref.wide(value) for name, value in draws.items()}
  flip = np.where(d['xflip_u'] < FLIP_SHARE * p, d['xflip_bit'], 0).ravel()
  w_s = np.where(d['scale_u'] < p, d['scale_n'], 0)
  w_a = np.where(d['aniso_u'] < p, d['aniso_n'], 0)
  angle = np.where(d['aniso_rot_u'] < TURN_SHARE, (2 * d['aniso_angle_u'] - 1) * np.pi, 0)
  w_x, w_y = np.where(d['trans_u'] < p, d['trans_n'], 0)
  return flip, w_s, w_a, angle, w_x, w_y


def matrix(values, side):
  """G of `quantities` for images of a side: [B, 3, 3]."""
  _, w_s, w_a, angle, w_x, w_y = values
  scale, stretch = 2 ** (SCALE * w_s), 2 ** (STRETCH * w_a)
  return (
    scaling(1 / scale, 1 / scale) @ rotation(-angle) @ scaling(1 / stretch, stretch)
    @ rotation(angle) @ translation(-SHIFT * side * w_x, -SHIFT * side * w_y)
  )


def padding(g, side):
  """Pixels (left, right, top, bottom) to pad: int [4]."""
  half = (side - 1) / 2
  corners = half * np.array([[-1, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]]) + [0, 0, 1 - half]
  warped = (g @ (corners.T))[:, :2].transpose(1, 0, 2).reshape(2, -1)
  reach = np.stack([-warped.min(1), warped.max(1)], axis=1).ravel()
  return np.ceil(np.clip(reach - half + MARGIN, 0, side - 1)).astype(np.int64)


def doubling(size):
  """[2 size, size]: a zero after each sample but the last, 6 around, then the reversed filter."""
  o, i = np.indices((2 * size, size))
  tap = 2 * i - o + 6
  return np.where((tap >= 0) & (tap < 12), FILTER[::-1][np.clip(tap, 0, 11)], 0.0)


def halving(size):
  """[size, 2 (size + 6)]: the filter at every second sample, 3 results cut at either end."""
  o, i = np.indices((size, 2 * (size + MARGIN)))
  tap = i - 2 * (o + 3) + 5
  return np.where((tap >= 0) & (tap < 12), FILTER[np.clip(tap, 0, 11)], 0.0)


def bilinear(image, x, y):
  """Reads an image [C, H, W], zero outside, at columns x and rows y [...]: [C, ...]."""
  left, top = np.floor(x).astype(int), np.floor(y).astype(int)
  out = 0.0
  for dy, dx in np.ndindex(2, 2):
    row, col = top + dy, left + dx
    inside = (row >= 0) & (row < image.shape[1]) & (col >= 0) & (col < image.shape[2])
    share = (1 - np.abs(x - col)) * (1 - np.abs(y - row)) * inside
    rows, cols = (np.clip(k, 0, n - 1) for k, n in zip((row, col), image.shape[1:]))
    out = out + share * image[:, rows, cols]
  return out


def warp(images, g, pads):
  """Resamples images [B, C, W, W] by matrices [B, 3, 3] after padding by (left, right, ...)."""
  size, (x0, x1, y0, y1) = images.shape[-1], pads
  padded = np.pad(images, ((0, 0), (0, 0), (y0, y1), (x0, x1)), mode='reflect')
  large = doubling(padded.shape[2]) @ padded @ doubling(padded.shape[3]).T
  half = np.full(len(g), 0.5)
  g = translation(half * (x0 - x1), half * (y0 - y1)) @ g
  g = translation(-half, -half) @ scaling(4 * half, 4 * half) @ g
  g = g @ scaling(half, half) @ translation(half, half)
  count = 2 * (size + MARGIN)
  row, col = np.indices((count, count)) - (count - 1) / 2
  out = []
  for image, m in zip(large, g):
    x, y, _ = np.tensordot(m, np.stack([col, row, np.ones_like(row)]), axes=1)
    out.append(bilinear(image, x + (image.shape[2] - 1) / 2, y + (image.shape[1] - 1) / 2))
  return halving(size) @ np.stack(out) @ halving(size).T


def augment(images, draws, p, pads=None):
  """The augmentation of images [B, C, W, W] in [-1, 1].

  Args:
    images: float32; draws: {name: array} as `draw_<name>` of a golden folder; p: probability.
    pads: pixels (left, right, top, bottom), or None for what the official code chooses.

  Returns:
    {'out': like images, 'labels': [B, 6], 'G_inv': [B, 3, 3], 'pad_x0x1y0y1': int [4]}.
  """
  values = quantities(draws, p)
  flip, w_s, w_a, angle, w_x, w_y = values
  images = ref.wide(images)
  images = np.where(flip[:, None, None, None] == 1, images[..., ::-1], images)
  g = matrix(values, images.shape[-1])
  pads = padding(g, images.shape[-1]) if pads is None else pads
  labels = [flip, w_s, w_a * np.cos(angle), w_a * np.sin(angle), w_x, w_y]
  return {
    'out': warp(images, g, pads), 'labels': np.stack(labels, axis=-1), 'G_inv': g,
    'pad_x0x1y0y1': np.asarray(pads),
  }

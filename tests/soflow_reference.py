"""SoFlow in float64 NumPy: time laws, losses, training steps, sampler, optimisers, averages.

A second implementation that shares nothing with the package: it is written from the formulas, and
the golden folders are checked against it or written by it (tests/soflow_golden_writer.py). Weights
keep the official names and (out, in) layouts, images are [B, C, H, W], t = 1 is noise. Gradients
come from tests/tape.py; the networks are in soflow_dit_reference and soflow_unet_reference.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file

from tests import bfm_reference, tape

MIN_GAP, DECAY_RATE, LATENT_SCALE = 1e-4, 0.025, 0.18215
PERIOD, NORM_EPS, ADAM_EPS = 10000.0, 1e-6, 1e-8
CONSTANTS = ('pos_embed', 'resample_filter')  # ends of the keys that are not trained
silu, linear = bfm_reference.silu, bfm_reference.linear


class Model(NamedTuple):
  """The weights of a network and its section of config.json."""

  weights: dict  # official key -> float64 array in the official layout
  config: dict


class Network(NamedTuple):
  """A network as the losses and samplers see it."""

  run: Callable  # (x [B, C, H, W], t [B], s [B], labels [B] or None, augment [B, 6] or None) -> x
  null: int | None  # the label that stands for none; None in a network without labels


class Settings(NamedTuple):
  """What a loss depends on besides its rows."""

  noising: str  # 'Linear' or 'Trig'
  coefficient: str  # 'Euler' or 'Trig'
  cfg_scale: float
  mix_ratio: float
  cfg_decay_time: float
  p: float
  eps: float


class Rows(NamedTuple):
  """Training rows; s and l are of the consistency loss alone."""

  x0: np.ndarray  # [B, C, H, W] data
  x1: np.ndarray  # [B, C, H, W] noise
  t: np.ndarray  # [B]
  mask: np.ndarray  # [B] bool, labels to drop
  labels: np.ndarray | None = None  # [B]
  s: np.ndarray | None = None  # [B]
  l: np.ndarray | None = None  # [B]
  augment: np.ndarray | None = None  # [B, 6]


def load_weights(path):
  """Returns {key: float64 array} of a safetensors file."""
  return {key: wide(value) for key, value in load_file(path).items()}


def settings_of(config, section='loss', case=None):
  """Returns the Settings of a loss case of config.json; without a case the common ones."""
  case = case or {}
  kinds = [{**config, **case}[key] for key in ('noising_type', 'coefficient_type')]
  return Settings(*kinds, **{**config[section], **case.get('over', {})})


def wide(x):
  """x as float64."""
  return np.asarray(x, np.float64)


def column(t):
  """[B] -> float64 [B, 1, 1, 1]."""
  return wide(t)[:, None, None, None]


def noising(kind, t):
  """alpha, beta of x_t = alpha x0 + beta x1 and their derivatives, each like t."""
  if kind == 'Linear':
    return 1 - t, t, -np.ones_like(t), np.ones_like(t)
  u = np.pi / 2 * t
  return np.cos(u), np.sin(u), -np.pi / 2 * np.sin(u), np.pi / 2 * np.cos(u)


def coefficients(kind, t, s):
  """a, b of f = a x + b NN, then da/dt, da/ds, db/dt, db/ds, each like t."""
  if kind == 'Euler':
    one, zero = np.ones_like(t), np.zeros_like(t)
    return one, s - t, zero, zero, -one, one
  u = np.pi / 2 * (s - t)
  rate_a, rate_b = np.pi / 2 * np.sin(u), np.pi / 2 * np.cos(u)
  return np.cos(u), np.sin(u), rate_a, -rate_a, -rate_b, rate_b


def gap_ratio(method, init, end, k, K):
  """r(k, K) for steps k [n] of K: [n]."""
  share = np.asarray(k) / K
  return {
    'Const': lambda: np.full(np.shape(share), end),
    'Linear': lambda: init + (end - init) * share,
    'Cosine': lambda: end + (init - end) * (1 + np.cos(np.pi * share)) / 2,
    'Exponent': lambda: init * (end / init) ** share,
  }[method]()


def middle_times(t, s, ratio):
  """(t + (s - t) r, and that but at most t - 1e-4), of one shape."""
  raw = t + (s - t) * ratio
  return raw, np.minimum(raw, t - MIN_GAP)


def drawn_times(mean, std, normals):
  """(t of flow matching, t and s of consistency), [B] each, of three times [B] normals."""
  t_vel, first, second = (
    1 / (1 + np.exp(-(d * wide(z) + m))) for m, d, z in zip(mean, std, normals)
  )
  t = np.maximum(second, MIN_GAP)
  return t_vel, t, np.minimum(first, t - MIN_GAP)


def guidance_decay(t, tau):
  """1 up to tau, then 1 - exp(-0.025 q / (1 - q)) with q = (1 - t) / (1 - tau), like t."""
  if tau >= 1:
    return np.ones_like(t)
  q = np.clip((1 - t) / (1 - tau), 0, 1 - 1e-6)
  return np.where(t <= tau, 1.0, 1 - np.exp(-DECAY_RATE * q / (1 - q)))


def softmax(x):
  """Over the last axis."""
  scores = np.exp(x - tape.stop_gradient(x).max(-1, keepdims=True))
  return scores / scores.sum(-1, keepdims=True)


def solution(network, kind, x, times, labels=None, augment=None):
  """f(x, t, s) = a x + b NN(x, t, s) for times = (t, s)."""
  a, b, *_ = coefficients(kind, *map(column, times))
  return a * x + b * network.run(x, *times, labels, augment)


def velocity(network, kind, x, t, labels=None, augment=None):
  """df/ds at s = t: a_s x + b_s NN(x, t, t), like x."""
  *_, a_s, _, b_s = coefficients(kind, column(t), column(t))
  return a_s * x + b_s * network.run(x, t, t, labels, augment)


def noisy(kind, rows):
  """(x_t, v_t) of rows, [B, C, H, W] each."""
  alpha, beta, d_alpha, d_beta = noising(kind, column(rows.t))
  return alpha * rows.x0 + beta * rows.x1, d_alpha * rows.x0 + d_beta * rows.x1


def guided_velocity(settings, t, v_t, u, own):
  """m (v_t + d (omega - 1)(v_t - u)) + (1 - m) own; own is not read if m = 1."""
  d, m = guidance_decay(column(t), settings.cfg_decay_time), settings.mix_ratio
  g = v_t + d * (settings.cfg_scale - 1) * (v_t - u)
  return g if m == 1 else m * g + (1 - m) * own


def is_guided(settings, rows):
  """Whether the guided branch of a loss is taken."""
  return rows.labels is not None and settings.cfg_scale > 1


def kept_labels(network, settings, rows):
  """Labels of the gradient pass: null where dropped, if guided."""
  dropped = is_guided(settings, rows)
  return np.where(rows.mask, network.null, rows.labels) if dropped else rows.labels


def velocity_loss(network, settings, rows):
  """Flow matching: (loss [], (mse [], mean weight [])), gradient through the prediction alone."""
  x_t, v_t = noisy(settings.noising, rows)
  kind, target = settings.coefficient, v_t
  labels = kept_labels(network, settings, rows)
  v_hat = velocity(network, kind, x_t, rows.t, labels, rows.augment)
  if is_guided(settings, rows):
    u, own = tape.stop_gradient(velocity(network, kind, x_t, rows.t)), tape.stop_gradient(v_hat)
    guided = guided_velocity(settings, rows.t, v_t, u, own)
    target = np.where(rows.mask[:, None, None, None], v_t, guided)
  error = ((v_hat - target) ** 2).mean((1, 2, 3))
  b_s = np.abs(coefficients(kind, wide(rows.t), wide(rows.t))[-1])
  e = tape.stop_gradient(error)
  weight = 1 / (b_s * (e + settings.eps) ** settings.p)
  return (weight * error).mean(), (e.mean(), weight.mean())


def consistency_target(network, settings, rows):
  """V of the consistency loss, [B, C, H, W], without gradient."""
  x_t, v_t = noisy(settings.noising, rows)
  if not is_guided(settings, rows):
    return v_t
  call, own = (network, settings.coefficient, x_t, rows.t), None
  u = tape.stop_gradient(velocity(*call, None, rows.augment))
  if settings.mix_ratio != 1:
    own = tape.stop_gradient(velocity(*call, rows.labels, rows.augment))
  guided = guided_velocity(settings, rows.t, v_t, u, own)
  return np.where(rows.mask[:, None, None, None], v_t, guided)


def consistency_loss(network, settings, rows):
  """Consistency: (loss [], (mse [], mean weight [])), gradient through NN(x_t, t, s) alone."""
  x_t, _ = noisy(settings.noising, rows)
  labels, t, s, l = kept_labels(network, settings, rows), rows.t, rows.s, rows.l
  n_t = network.run(x_t, t, s, labels, rows.augment)
  a, b, *_ = coefficients(settings.coefficient, column(t), column(s))
  f_t = a * x_t + b * tape.stop_gradient(n_t)
  gap = column(t) - column(l)
  x_l = x_t - consistency_target(network, settings, rows) * gap
  f_l = solution(network, settings.coefficient, x_l, (l, s), labels, rows.augment)
  q = (f_t - tape.stop_gradient(f_l)) / gap
  error = (q**2).mean((1, 2, 3))
  weight = 1 / (error + settings.eps) ** settings.p
  terms = (n_t * (np.sign(b) * q * weight[:, None, None, None])).mean((1, 2, 3))
  return terms.mean(), (error.mean(), weight.mean())


LOSSES = {'vel': velocity_loss, 'con': consistency_loss}


def trained(weights):
  """The weights that have a gradient."""
  return {key: value for key, value in weights.items() if not key.endswith(CONSTANTS)}


def differentiated(loss, model):
  """(loss, rest, {key: gradient}) of a function of the Model that returns (loss, rest)."""
  return tape.value_and_gradient(
    lambda weights: loss(model._replace(weights={**model.weights, **weights})),
    trained(model.weights),
  )


def norm(grads):
  """L2 norm of all gradients together."""
  return np.sqrt(sum((g * g).sum() for g in grads.values()))


def joint_loss(make, settings, parts):
  """Returns the loss over flow-matching Rows and consistency Rows, by share, as a function.

  It takes a Model, of which `make` makes the Network, and gives (loss [], [7] of loss, mse and
  weight of each part, then the loss).
  """
  total = sum(len(rows.x0) for rows in parts)

  def loss(model):
    """The sum of all per-sample terms over the number of samples."""
    out, numbers = 0.0, []
    for compute, rows in zip(LOSSES.values(), parts):
      value, metrics = compute(make(model), settings, rows)
      out = out + value * (len(rows.x0) / total)
      numbers += [float(tape.stop_gradient(value)), *metrics]
    return out, [*numbers, float(tape.stop_gradient(out))]

  return loss


def adam_moments(g, state, betas):
  """(step, m, v) after one more gradient; state is None before the first."""
  k, m, v = state or (0, 0.0, 0.0)
  return k + 1, betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g


def adamw(p, g, state, *, lr, betas, weight_decay=0.0):
  """One AdamW update of an array: (array, state)."""
  k, m, v = state = adam_moments(g, state, betas)
  m_hat, v_hat = m / (1 - betas[0] ** k), v / (1 - betas[1] ** k)
  return p * (1 - lr * weight_decay) - lr * m_hat / (np.sqrt(v_hat) + ADAM_EPS), state


def radam(p, g, state, *, lr, betas):
  """One RAdam update of an array, with eps before the bias correction of v: (array, state)."""
  k, m, v = state = adam_moments(g, state, betas)
  limit = 2 / (1 - betas[1]) - 1
  correction = 1 - betas[1] ** k
  rho = limit - 2 * k * betas[1] ** k / correction
  step = m / (1 - betas[0] ** k)
  if rho > 5:
    scale = (rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)
    step = step * np.sqrt(scale * correction) / (np.sqrt(v) + ADAM_EPS)
  return p - lr * step, state


def trajectory(update, start, grads, **settings):
  """[n, ...]: the array after each of n updates with given gradients."""
  p, state, out = wide(start), None, []
  for g in grads:
    p, state = update(p, wide(g), state, **settings)
    out.append(p)
  return np.stack(out)


def averages(start, params, decay, every=1):
  """[n, ...]: the average after each step; it takes decay^every at steps 0, every, ..."""
  ema, out = wide(start), []
  for k, p in enumerate(wide(params)):
    if k % every == 0:
      ema = decay**every * ema + (1 - decay**every) * p
    out.append(ema)
  return np.stack(out)


def train(model, make, parts, config, steps=3):
  """Yields ([8] numbers before the update, weights and average after it) of training steps."""
  t = config['train']
  rates = {key: t[key] for key in ('lr', 'betas', 'weight_decay')}
  ema, states, decay = model.weights, {}, t['ema_decay']
  for _ in range(steps):
    loss = joint_loss(make, settings_of(config), parts)
    _, numbers, grads = differentiated(loss, model)
    weights = dict(model.weights)
    for key, g in grads.items():
      weights[key], states[key] = adamw(weights[key], g, states.get(key), **rates)
    model = model._replace(weights=weights)
    ema = {key: decay * ema[key] + (1 - decay) * value for key, value in weights.items()}
    yield np.array([*numbers, norm(grads)]), weights, ema


def few_step_sample(network, settings, x, renoise, labels=None):
  """From noise x at t = 1 to data in len(renoise) + 1 calls, [B, C, H, W]."""
  steps = len(renoise) + 1
  zero = np.zeros(len(x))
  x = wide(x)
  for i in range(steps):
    x = solution(network, settings.coefficient, x, (zero + 1 - i / steps, zero), labels)
    if i < steps - 1:
      alpha, beta, *_ = noising(settings.noising, wide(1 - (i + 1) / steps))
      x = alpha * x + beta * renoise[i]
  return x


def pixels(x):
  """clip(127.5 x + 128, 0, 255) cut to uint8, in float32."""
  return np.clip(np.float32(127.5) * x + np.float32(128), 0, 255).astype(np.uint8)


def latent(moments, noise):
  """(mean + std noise) 0.18215 of moments [B, 2 C, H, W]."""
  mean, std = np.split(wide(moments), 2, axis=1)
  return (mean + std * noise) * LATENT_SCALE

"""The contract between a method and everything else."""

from collections.abc import Callable
from typing import NamedTuple


class Method(NamedTuple):
  """A way to train and to sample: pure functions over a parameter tree.

  Convention everywhere: t = 0 is data, t = 1 is noise; on the linear path x_t = (1 - t) x +
  t noise and the velocity is noise - x. Random numbers are drawn per row from `rng`, typed keys
  [B], so neither the number of devices nor the layout changes them.
  """

  init: Callable  # (rng) -> params, float32
  loss: Callable  # (params, batch, rng [B], step []) -> (loss [], {name: []}), float32
  sample: Callable  # (params, rng [B], labels [B], **options) -> latent [B, H, W, C], float32
  trainable: Callable  # (params) -> tree of bool; False means frozen
  inputs: tuple  # keys the batch must hold: 'latent', 'label', and for alignment 'feature'
  period: int  # a row's use depends on (row mod period): S segments, 1 in 4 rows, or 1
  groups: int = 1  # of devices, each with its own segments; rows stand in `rows.order`
  grad_metrics: Callable = lambda grads: {}  # (tree, None where frozen) -> {name: []}, for the log

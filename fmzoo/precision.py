"""What rounding does to SoFlow's consistency quotient: error and cost of each policy, as a table.

Errors are against float64, which is switched on for that alone. Products that a device at hand may
not have (TF32, three bfloat16 passes) are computed from their parts for the errors and are what
they are for the costs.
"""

import dataclasses
import importlib
import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmzoo import cost, rows
from fmzoo.methods import soflow, soflow_rows

RATIOS = (0.1, 0.002, 0.0003125)  # r: first and last of the ImageNet recipe, last of CIFAR-10's
GRADIENT_RATIO = 0.002
REAL = {'bfloat16_3x': 'high'}  # computed from parts: what it stands for


class Policy(NamedTuple):
  """How a training step is rounded; dtypes as of models.layers.Numerics."""

  name: str
  rows: str  # dtype of the rows that do not enter a quotient
  quotient: str  # dtype of those that do
  pairs: str  # dtype of their first rows, if roundings are shared; '' for two plain calls


POLICIES = (
  Policy('bfloat16', 'bfloat16', 'bfloat16', ''),
  Policy('TF32', 'tf32', 'tf32', ''),
  Policy('bfloat16, quotient in three passes', 'bfloat16', 'bfloat16_3x', ''),
  Policy('bfloat16, quotient in float32', 'bfloat16', 'float32', ''),
  Policy('bfloat16, shared roundings', 'bfloat16', 'bfloat16', 'bfloat16'),
  Policy('bfloat16, shared roundings, first in TF32', 'bfloat16', 'bfloat16', 'tf32'),
  Policy('bfloat16, shared roundings, first in three', 'bfloat16', 'bfloat16', 'bfloat16_3x'),
  Policy('float32', 'float32', 'float32', ''),
  Policy('float32, shared roundings', 'float32', 'float32', 'float32'),
)
EXACT = Policy('float64', 'float64', 'float64', 'float64')


class Figures(NamedTuple):
  """Of one policy; costs are those of a training step's loss and gradient."""

  errors: tuple  # of the quotient, at RATIOS
  gradient_error: float  # at GRADIENT_RATIO
  flops: int  # every product once
  passes: int | None  # FLOPs in bfloat16 passes on a TPU; None for TF32, which it does not have
  seconds: np.ndarray  # [runs]


class Subject(NamedTuple):
  """What is measured: a SoFlow recipe's method on a network with given parameters."""

  recipe: object  # build.Recipe
  params: object  # tree, float32
  batch: dict  # {'latent': [B, H, W, C], 'label': [B]}

  def config(self, ratio, **changes):
    """Returns the method's settings with r = ratio at every step."""
    values = {k: v for k, v in self.recipe.config['method'].items() if k != 'name'}
    values |= {'total_steps': 1, 'middle_schedule': 'const', 'middle_final': ratio, **changes}
    return soflow.Config(**values)

  def network(self, policy):
    """Returns the network under a policy."""
    model = importlib.import_module(f"fmzoo.models.{self.recipe.config['model']['name']}")
    shape, classes = self.recipe.data.latent_shape, self.recipe.data.num_classes

    def make(dtype, pairs=None):
      """Returns the network with other numerics; 'xla' since cuDNN takes bfloat16 alone."""
      changes = {'dtype': dtype, 'precision': 'highest'}
      if hasattr(self.recipe.network, 'attention'):
        changes['attention'] = 'xla'
      config = dataclasses.replace(self.recipe.network, **changes)
      return model.make(config, shape, classes, pairs)

    quotient = make(policy.quotient, policy.pairs or None)
    apart = quotient.apply_pairs if policy.pairs else plain_pairs(quotient.apply)
    return make(policy.rows)._replace(apply_pairs=apart)

  def rows(self, config, net):
    """Draws Rows for the subject's batch, the same for every policy."""
    keys = jax.random.split(jax.random.key(0), len(self.batch['label']))
    return soflow_rows.draw_rows(config, net, self.batch, keys, 0)[0]


def plain_pairs(apply):
  """Returns an `apply_pairs` of two calls, of which the second has no gradient."""
  def apply_pairs(params, *rows, **options):
    """See models.layers.Network."""
    first, second = (
      apply(
        jax.lax.stop_gradient(params) if i else params, *(row[i::2] for row in rows),
        **{name: value[i::2] for name, value in options.items()},
      ) for i in range(2)
    )
    return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])

  return apply_pairs


def quotient(subject, policy, ratio, params, rows):
  """Returns q of all rows, each taken as a consistency row, guidance included: [B, H, W, C]."""
  config, net = subject.config(ratio, velocity_ratio=0.0), subject.network(policy)
  classes, guided = subject.recipe.data.num_classes, config.guidance > 1
  v_null = v_own = None
  if guided:
    rows = rows._replace(labels=jnp.where(rows.dropped, classes, rows.labels))
    v_null, v_own = soflow.free_velocities(config, net, classes, params, rows)
  return soflow.consistency_quotient(config, net, params, rows, v_null=v_null, v_own=v_own)[1]


def gradient(subject, policy, ratio, params, rows):
  """Returns the gradient of the training loss, a tree."""
  config, net = subject.config(ratio), subject.network(policy)
  classes = subject.recipe.data.num_classes
  return jax.grad(
    lambda p: soflow.loss_of_rows(config, net, classes, p, rows)[0]
  )(params)


def evaluated(function, subject, policy, ratio):
  """Returns the leaves of `quotient` or `gradient` as one float64 vector, on the host."""
  config = subject.config(ratio, **({'velocity_ratio': 0.0} if function is quotient else {}))
  args = subject.params, subject.rows(config, subject.network(POLICIES[0]))
  if policy is EXACT:
    with jax.enable_x64():
      args = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, 'float64') if leaf.dtype == 'float32' else leaf, args
      )
      tree = jax.jit(lambda *args: function(subject, policy, ratio, *args))(*args)
      return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
  tree = jax.jit(lambda *args: function(subject, policy, ratio, *args))(*args)
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


def relative_error(found, exact):
  """Returns RMS(found - exact) / RMS(exact)."""
  return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def quotient_errors(subject, policies, ratio):
  """Returns the error of q of each policy at r = ratio."""
  exact = evaluated(quotient, subject, EXACT, ratio)
  return [
    relative_error(evaluated(quotient, subject, policy, ratio), exact) for policy in policies
  ]


def gradient_errors(subject, policies, ratio):
  """Returns the error of the training gradient of each policy at r = ratio."""
  exact = evaluated(gradient, subject, EXACT, ratio)
  return [
    relative_error(evaluated(gradient, subject, policy, ratio), exact) for policy in policies
  ]


def costs(subject, policies, runs):
  """Returns (FLOPs [policies], passes [policies], seconds [policies, runs]), timed in turn."""
  flops, passes, calls = [], [], []
  for policy in policies:
    policy = Policy(policy.name, *(REAL.get(dtype, dtype) for dtype in policy[1:]))
    config = subject.config(GRADIENT_RATIO)
    args = subject.params, subject.rows(config, subject.network(policy))

    def step(params, rows, policy=policy):
      """Returns the gradient that a training step computes."""
      return gradient(subject, policy, GRADIENT_RATIO, params, rows)

    flops.append(cost.matmul_flops(step, *args))
    passes.append(None if 'tf32' in policy else cost.tpu_passes(step, *args))
    calls.append((jax.jit(step), args))
    jax.block_until_ready(calls[-1][0](*args))
  seconds = [[_seconds(call, args) for call, args in calls] for _ in range(runs)]
  return flops, passes, np.array(seconds).T


def _seconds(call, args):
  """Returns what a call took, its result included."""
  start = time.perf_counter()
  jax.block_until_ready(call(*args))
  return time.perf_counter() - start


def measure(subject, runs):
  """Returns [Figures], one for each of POLICIES."""
  errors = zip(*(quotient_errors(subject, POLICIES, ratio) for ratio in RATIOS))
  gradients = gradient_errors(subject, POLICIES, GRADIENT_RATIO)
  flops, passes, seconds = costs(subject, POLICIES, runs)
  return [Figures(*row) for row in zip(errors, gradients, flops, passes, seconds)]


def table(figures):
  """Returns the figures as lines of a Markdown table; costs relative to the first policy."""
  first = figures[0]
  ratios = ' | '.join(f'q, r = {ratio:g}' for ratio in RATIOS)
  lines = [
    f'| policy | {ratios} | gradient, r = {GRADIENT_RATIO:g} | FLOPs | TPU passes | time here |',
    '|---' * (5 + len(RATIOS)) + '|',
  ]
  for policy, row in zip(POLICIES, figures):
    errors = ' | '.join(f'{error:.2%}' for error in (*row.errors, row.gradient_error))
    passes = '' if row.passes is None else f'{row.passes / first.passes:.2f}'
    seconds = np.median(row.seconds / first.seconds)
    lines.append(
      f'| {policy.name} | {errors} | {row.flops / first.flops:.3f} | {passes} | {seconds:.2f} |'
    )
  return lines


def random_params(method, seed=0):
  """Returns parameters none of which is zero: N(0, 1 / fan-in) kernels, N(0, 0.02^2) else."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    """Returns one leaf, as the network's own table where it is a table of positions."""
    scale = leaf.shape[-2] ** -0.5 if path[-1].key == 'kernel' else 0.02
    return (scale * rng.standard_normal(leaf.shape)).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(method.init, jax.random.key(0)))


def trained(recipe, workdir):
  """Returns (parameters, batch) of a run: its newest checkpoint and the first rows of its data."""
  from fmzoo import sample, sources  # with orbax and grain, which an accelerator may lack
  from fmzoo.parallel import mesh as meshes

  params, _ = sample.load_params(recipe, meshes.flat(recipe.mesh), workdir)
  source, size = sources.open_rows(recipe), recipe.data.batch_size
  inputs, frozen = sources.inputs(recipe, source, workdir)
  keys = rows.keys(jax.random.key(0), jnp.arange(size))
  return params, inputs(frozen, source.batch(np.arange(size)), keys)


def untrained(recipe):
  """Returns (parameters, batch): random numbers both, of the recipe's sizes."""
  size = recipe.data.batch_size
  latent = jax.random.normal(jax.random.key(1), (size, *recipe.data.latent_shape))
  labels = jnp.arange(size, dtype=jnp.int32) % recipe.data.num_classes
  return random_params(recipe.method), {'latent': latent, 'label': labels}


def report(recipe, workdir, *, runs):
  """Prints the table of a recipe: of the run in `workdir`, or of random numbers if there is none.

  Args:
    recipe: build.Recipe of SoFlow; data.batch_size rows are used.
    workdir: of a run, or of nothing.
    runs: timed steps of each policy, in turn.

  Raises:
    ValueError: if the recipe is of another method.
  """
  if recipe.method_name != 'soflow':
    raise ValueError(
      f"--precision measures method 'soflow', this recipe is of '{recipe.method_name}'; use one of"
      ' configs/soflow*.py'
    )
  is_trained = (pathlib.Path(workdir) / 'checkpoints').is_dir()
  params, batch = trained(recipe, workdir) if is_trained else untrained(recipe)
  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  print(
    f"{recipe.config['model']['name']} of {size / 1e6:.1f} M parameters,"
    f" {f'trained in {workdir}' if is_trained else 'random'}; batch {len(batch['label'])};"
    f' {jax.devices()[0].device_kind}', '',
    *table(measure(Subject(recipe, params, batch), runs)), sep='\n',
  )

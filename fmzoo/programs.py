"""A recipe's training step: its state, its shapes, and what it multiplies.

No data and no checkpoints are needed here, so an accelerator machine may do without their packages.
"""

import functools

import jax

from fmzoo import build, sources, step
from fmzoo.parallel import batch as batches
from fmzoo.parallel import mesh as meshes
from fmzoo.parallel import rules


def make_step(recipe, inputs, axis_name=None):
  """Returns the train step of a recipe, see step.make."""
  return step.make(
    recipe.method, recipe.tx, inputs, ema_decay=recipe.ema.decay, ema_ramp=recipe.ema.ramp,
    ema_every=recipe.ema.every_steps, accumulate_steps=recipe.optim.accumulate_steps,
    axis_name=axis_name,
  )


def init_state(recipe, params=None):
  """Returns the state before the first step; `params` default to fresh ones."""
  return step.init_state(recipe.method, recipe.tx, jax.random.key(recipe.run.seed), params)


def fresh_state(recipe, mesh, params=None):
  """Returns the arrays of `init_state`, cut over the mesh as the step takes them."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(recipe, mesh))
  return jax.jit(lambda params: init_state(recipe, params), out_shardings=shardings)(params)


def abstract_state(recipe, mesh):
  """Returns the shapes of a recipe's state, cut over the mesh by `parallel.rules`."""
  return rules.abstract(jax.eval_shape(lambda: init_state(recipe)), mesh)


def abstract_step(recipe, mesh, mode='jit'):
  """Returns (axis_name=None -> train step, shapes of its arguments) of a recipe on a mesh."""
  inputs, frozen = sources.abstract_inputs(recipe)
  batch = batches.abstract(sources.abstract_row(recipe), recipe.data.batch_size, mesh, mode)
  args = abstract_state(recipe, mesh), batch, frozen
  return functools.partial(make_step, recipe, inputs), args


def countable(recipe):
  """Returns a recipe whose products can be counted: cuDNN's attention shows none to a jaxpr."""
  if recipe.config['model'].get('attention', 'xla') == 'xla':
    return recipe
  return build.changed(recipe, {'model.attention': 'xla'})


def model_step(recipe):
  """Returns (train step, shapes of its arguments) without recomputation, as MFU counts it.

  It is that of one device for the whole batch.
  """
  recipe = countable(recipe)
  if 'remat' in recipe.config['model']:
    recipe = build.changed(recipe, {'model.remat': False})
  mesh = meshes.make(meshes.Config(data=1, fsdp=1, segment=1, mode='jit'))
  make, args = abstract_step(recipe, mesh)
  return make(), args

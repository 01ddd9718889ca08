"""The programs of a recipe that are measured: the very ones that `train` and `sample` run.

Parameters are fresh and rows are made up, since neither changes what they take: no data are needed.
"""

import functools

import jax
import numpy as np

from fmzoo import build, cost, programs, sources
from fmzoo import sampler as samplers
from fmzoo.bench.measure import Program
from fmzoo.parallel import batch as batches
from fmzoo.parallel import mesh as meshes

MEMORY_WORDS = ('the sampler', 'parameters and images', 'lower sample.batch_size')
DECODED_ROWS = samplers.DECODED_ROWS  # latents that a device decodes at a time
DIFFERENT = 16  # rows of a batch, then they repeat


def training_step(recipe):
  """Returns the Program of a training step, over the recipe's mesh and with its batch.

  Raises:
    ValueError: if the batch cannot be split over the devices.
  """
  mesh, mode = meshes.make(recipe.mesh), recipe.mesh.mode
  meshes.check_batch(
    recipe.data.batch_size, mesh, recipe.method.period, recipe.optim.accumulate_steps
  )
  make_step, shapes = programs.abstract_step(recipe, mesh, mode)
  step, args = programs.model_step(recipe)
  flops = spent = cost.products(step, *args)
  if recipe.config['model'].get('remat'):
    counted, _ = programs.abstract_step(programs.countable(recipe), mesh, mode)
    spent = cost.products(counted(), shapes[0], args[1], shapes[2])
  return Program(
    name='training step', rows=recipe.data.batch_size, mesh=mesh,
    function=meshes.compile_step(make_step, mesh, mode, shapes[0]), shapes=shapes,
    arguments=functools.partial(_arguments, recipe, mesh), following=_next_step,
    flops=flops, spent=spent,
  )


def _arguments(recipe, mesh):
  """Returns (state, batch, frozen) before the first step."""
  _, frozen = sources.abstract_inputs(recipe)
  batch = {
    name: made_up((recipe.data.batch_size, *shape.shape), shape.dtype, recipe.data.num_classes)
    for name, shape in sources.abstract_row(recipe).items()
  }
  frozen = jax.tree.map(lambda leaf: 0.02 * made_up(leaf.shape, leaf.dtype, 1), frozen)
  return (
    programs.fresh_state(recipe, mesh), batches.to_devices(batch, mesh, recipe.mesh.mode),
    jax.device_put(frozen, meshes.replicated(mesh)),
  )


def _next_step(args, results):
  """Feeds the state back, as training does; see measure.Program."""
  (_, batch, frozen), (state, metrics) = args, results
  return (state, batch, frozen), metrics


def made_up(shape, dtype, num_classes):
  """Returns an array of random numbers, or of labels in turn if it is of int32."""
  rng, dtype = np.random.default_rng(0), np.dtype(dtype)
  if dtype == np.int32:
    return (np.arange(np.prod(shape)) % num_classes).astype(dtype).reshape(shape)
  some = (min(shape[0], DIFFERENT), *shape[1:]) if shape else ()
  if dtype == np.uint8:
    return np.resize(rng.integers(0, 256, some, dtype), shape)
  return np.resize(np.abs(rng.standard_normal(some)).astype(dtype), shape)


def sampler(recipe, images=None):
  """Returns the Program of the sampler, over as many devices as the recipe's mesh has.

  It is the network's: a VAE after it is left out.

  Args:
    recipe: build.Recipe.
    images: that each device makes at a time; None is as many as for the command `sample`.
  """
  if recipe.data.vae:
    recipe = build.changed(recipe, {'data.vae': ''})
  mesh = meshes.flat(recipe.mesh)
  made = samplers.Sampler(recipe, mesh)
  rows = mesh.size * (images or samplers.chunk_rows(recipe, recipe.sample.num_images))
  params = jax.eval_shape(recipe.method.init, jax.random.key(0))
  indices = np.arange(rows, dtype=np.int32)
  # On the host, as `sample` hands them over.
  rest = recipe.sample.seed, indices, indices % recipe.data.num_classes
  counted = samplers.Sampler(programs.countable(recipe), mesh)
  own = cost.products(counted.run, params, *rest)  # of one device's part
  flops = {kind: count * mesh.size for kind, count in own.items()}

  def arguments():
    """Returns fresh parameters, and the rest."""
    init = jax.jit(recipe.method.init, out_shardings=meshes.replicated(mesh))
    return init(jax.random.key(recipe.run.seed)), *rest

  return Program(
    name='sampler', rows=rows, mesh=mesh, function=made.run,
    shapes=(params, *rest), arguments=arguments, following=lambda args, images: (args, images),
    flops=flops, spent=flops, memory_words=MEMORY_WORDS,
  )


def in_groups(decode, latents):
  """Decodes latents as the command `sample` does, see sampler.in_groups."""
  return samplers.in_groups(decode, latents)


def images_each(recipe):
  """Returns how many images a device makes at a time for the command `sample`."""
  return samplers.chunk_rows(recipe, recipe.sample.num_images)


def has_certain_cost(recipe):
  """Says whether the sampler does what is counted: guidance acts in all of its steps or in none."""
  options = recipe.sample_options
  interval = tuple(options.get('guidance_interval', (0.0, 1.0)))
  return options.get('guidance', 1.0) <= 1 or interval == (0.0, 1.0)


PROGRAMS = {'step': training_step, 'sampler': sampler}

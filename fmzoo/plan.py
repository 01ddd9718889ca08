"""What a recipe takes on a slice of TPUs, found by compiling it for them: nobody has to own one.

Memory and traffic are read from the compiled programs, FLOPs from the traced ones. Where the
training step does not fit, other layouts are tried, those first whose arithmetic looks best.
"""

import dataclasses
import functools
import itertools
import json
import math
import time

import jax
import jax.numpy as jnp
from absl import logging

from fmzoo import build, cost, sources, train
from fmzoo import sampler as samplers
from fmzoo.parallel import batch as batches
from fmzoo.parallel import chips, collectives
from fmzoo.parallel import mesh as meshes

KEYS = ('mesh.segment', 'mesh.fsdp', 'model.remat', 'optim.accumulate_steps')  # that save memory
DAY = 86_400  # seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """A compiled program, in figures of one device and one call."""

  name: str  # 'training step' or 'sampler'
  mesh: dict  # {axis: devices}
  settings: dict  # {key: value} of those KEYS that the recipe has
  rows: int  # global batch, or images
  state_bytes: int  # parameters, optimiser state and EMA; the sampler's parameters
  work_bytes: int  # beside that: batch, activations, gradients
  available_bytes: int | None  # that a program may use; None where nobody can tell
  flops: float  # of matrix products and convolutions, recomputation included
  collectives: list  # of parallel.collectives.Collective; None if it was not compiled
  compile_seconds: float

  @property
  def needed_bytes(self):
    """All that it takes."""
    return self.state_bytes + self.work_bytes

  @property
  def fits(self):
    """Whether a device has that much; None where nobody can tell."""
    return None if self.available_bytes is None else self.needed_bytes <= self.available_bytes


def plan(recipe, topology, *, mfu=None, as_json=False, with_sampler=True):
  """Compiles the training step and the sampler of a recipe for a slice, and prints a table.

  Args:
    recipe: build.Recipe.
    topology: such as 'v5e:2x4', or 'cpu:8' for simulated devices.
    mfu: share of the chips' peak, 0 to 1, at which to say how long training takes; None says
      nothing, since no compiler knows it.
    as_json: prints JSON in place of the table.
    with_sampler: whether the sampler is compiled, too.

  Returns:
    True if the training step fits in the memory, as configured or otherwise.

  Raises:
    ValueError: one line, if the slice is not known or cannot be compiled for.
  """
  if mfu is not None and not 0 < mfu <= 1:
    raise ValueError(f'--mfu={mfu} must be above 0 and at most 1, such as 0.4')
  devices = chips.topology(topology)
  chip = chips.CHIPS.get(topology.partition(':')[0])
  steps = list(_until_it_fits(recipe, devices, chip))
  last = steps[-1]
  if last.fits is not False and with_sampler:
    chosen = build.changed(recipe, {**last.settings, 'mesh.data': last.mesh['data']})
    programs = [*steps, sampler(chosen, devices, chip)]
  else:
    programs = steps
  days = None
  if mfu is not None and chip is not None:
    days = model_flops(recipe) * recipe.run.steps / (chip.flops * len(devices) * mfu) / DAY
  about = {
    'topology': topology, 'devices': len(devices), 'parameters': num_parameters(recipe),
    'steps': recipe.run.steps, 'mfu': mfu, 'days': days,
  }
  if as_json:
    rows = [dataclasses.asdict(p) | {'fits': p.fits} for p in programs]
    print(json.dumps(about | {'programs': rows}, indent=2))
  else:
    print(*table(recipe, about, programs), sep='\n')
  return last.fits is not False


def _until_it_fits(recipe, devices, chip):
  """Yields the step as configured and, where it does not fit, others up to one that does."""
  first = training_step(recipe, devices, chip)
  yield first
  if first.fits is not False:
    return
  for changes in remedies(recipe, devices, first):
    tried = training_step(build.changed(recipe, changes), devices, chip)
    yield tried
    if tried.fits:
      return


def training_step(recipe, devices, chip):
  """Compiles the training step of a recipe and returns its Program.

  Args:
    recipe: build.Recipe.
    devices: of chips.topology.
    chip: chips.Chip, None for simulated devices.
  """
  mesh = meshes.make(recipe.mesh, devices)
  size = recipe.data.batch_size
  meshes.check_batch(size, mesh, recipe.method.period, recipe.optim.accumulate_steps)
  inputs, frozen = sources.abstract_inputs(recipe)
  state = train.abstract_state(recipe, mesh)
  batch = batches.abstract(sources.abstract_row(recipe), size, mesh, 'jit')
  flops = cost.matmul_flops(train.make_step(recipe, inputs), state, batch, frozen)
  function = meshes.compile_step(
    functools.partial(train.make_step, recipe, inputs), mesh, 'jit', state
  )
  return _compiled(
    function, (state, batch, frozen), chip, name='training step', mesh=dict(mesh.shape),
    settings=settings_of(recipe), rows=size, state_bytes=bytes_of(state),
    flops=flops / mesh.size,
  )


def sampler(recipe, devices, chip):
  """Compiles the sampler of a recipe and returns its Program; every device has all parameters."""
  mesh = meshes.flat(recipe.mesh, devices)
  made = samplers.Sampler(recipe, mesh)
  size = math.ceil(min(recipe.sample.batch_size, recipe.sample.num_images) / mesh.size) * mesh.size
  params = jax.eval_shape(recipe.method.init, jax.random.key(0))
  indices = jax.ShapeDtypeStruct((size,), jnp.int32)
  flops = cost.matmul_flops(made.run, params, 0, indices, indices)
  return _compiled(
    made.run, (params, 0, indices, indices), chip, name='sampler', mesh=dict(mesh.shape),
    settings={}, rows=size, state_bytes=bytes_of(params), flops=flops,  # of one device's part
  )


def _compiled(function, args, chip, *, name, mesh, state_bytes, **known):
  """Compiles a function and returns its Program, also if it does not fit."""
  layout = ', '.join(f'{axis}={size}' for axis, size in mesh.items() if size > 1) or 'one device'
  logging.info('compiling the %s for %s', name, layout)
  begun = time.time()
  lowered = function.lower(*args)
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    refused = chips.needed_bytes(error)
    if refused is None:
      raise
    compiled, (needed, available) = None, refused
  if compiled is not None:
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes
    needed += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    available = None if chip is None else chip.usable_bytes
  return Program(
    name=name, mesh=mesh, state_bytes=state_bytes, work_bytes=needed - state_bytes,
    available_bytes=available, compile_seconds=time.time() - begun,
    collectives=None if compiled is None else collectives.collectives(compiled.as_text()),
    **known,
  )


def remedies(recipe, devices, first):
  """Yields {dotted key: value} of layouts that should fit, one of a kind, the plainest first.

  Args:
    recipe: build.Recipe whose step does not fit.
    devices: of the slice.
    first: its Program.
  """
  for kind, expected in itertools.groupby(
    estimates(recipe, devices, first), key=lambda found: found[0]
  ):
    for _, changes, needed in expected:
      if needed <= first.available_bytes:
        logging.info('it does not fit; %s may, tried next', kind)
        yield changes
        break


def estimates(recipe, devices, first):
  """Yields (kind, {dotted key: value}, bytes a device then needs by arithmetic).

  State is known to the byte for any mesh; what else a step needs is taken to stay as it is where
  the state is cut, and to shrink with the rows of a micro-batch.
  """
  if first.settings.get('model.remat') is False:
    yield 'model.remat', {'model.remat': True}, first.state_bytes + first.work_bytes // 4
  divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
  segments = [n for n in divisors if getattr(recipe.network, 'segments', 1) % n == 0]
  axes = [('mesh.fsdp', fsdp, 1) for fsdp in divisors[1:]]
  axes += [('mesh.segment', 1, segment) for segment in segments[1:]]
  axes += [('mesh.segment and mesh.fsdp', fsdp, segment) for segment in segments[1:]
           for fsdp in divisors[1:] if len(devices) % (segment * fsdp) == 0]
  for kind, fsdp, segment in axes:
    changes = {'mesh.data': -1, 'mesh.fsdp': fsdp, 'mesh.segment': segment}
    if (changed := _changed(recipe, changes, devices)) is not None:
      state = train.abstract_state(changed, meshes.make(changed.mesh, devices))
      yield kind, changes, bytes_of(state) + first.work_bytes
  count = recipe.optim.accumulate_steps
  for factor in (2, 4, 8, 16, 32):
    changes = {'optim.accumulate_steps': count * factor}
    if _changed(recipe, changes, devices) is not None:
      yield 'optim.accumulate_steps', changes, first.state_bytes + first.work_bytes // factor


def _changed(recipe, changes, devices):
  """Returns the recipe with changes, or None if its batch cannot be split so."""
  changed = build.changed(recipe, changes)
  mesh = meshes.make(changed.mesh, devices)
  parts = mesh.size // changed.mesh.segment * changed.optim.accumulate_steps
  return None if changed.data.batch_size % (parts * changed.method.period) else changed


def settings_of(recipe):
  """Returns {key: value} of those KEYS that a recipe has."""
  pairs = ((key, *key.split('.')) for key in KEYS)
  return {key: recipe.config[section][name] for key, section, name in pairs
          if name in recipe.config[section]}


def bytes_of(tree):
  """Returns the bytes that a device holds of a tree of jax.ShapeDtypeStruct."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape)
    * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
  )


def num_parameters(recipe):
  """Returns how many parameters a recipe's method has."""
  return sum(
    leaf.size for leaf in jax.tree.leaves(jax.eval_shape(recipe.method.init, jax.random.key(0)))
  )


def model_flops(recipe):
  """Returns FLOPs of a step over all devices without recomputation, as MFU counts them."""
  if 'remat' in recipe.config['model']:
    recipe = build.changed(recipe, {'model.remat': False})
  mesh = meshes.make(meshes.Config(data=1, fsdp=1, segment=1, mode='jit'))
  inputs, frozen = sources.abstract_inputs(recipe)
  batch = batches.abstract(sources.abstract_row(recipe), recipe.data.batch_size, mesh, 'jit')
  state = train.abstract_state(recipe, mesh)
  return cost.matmul_flops(train.make_step(recipe, inputs), state, batch, frozen)


def table(recipe, about, programs):
  """Returns a plan as lines: what was planned, a Markdown table, what to do."""
  name = f"{recipe.method_name} of {about['parameters']:,} parameters"
  lines = [
    f"{name} on {about['topology']}, {about['devices']} devices; bytes are of one device, GB = 1e9",
    '',
    '| program | rows | mesh | settings | state | work | needed | available | fits |'
    ' TFLOP | sent in a call | compiled in |',
    '|' + '---|' * 12,
  ]
  for program in programs:
    mesh = ' '.join(f'{axis}={size}' for axis, size in program.mesh.items() if size > 1)
    chosen = ' '.join(
      f'{key.split(".")[1]}={value}' for key, value in program.settings.items()
      if not key.startswith('mesh.') and value not in (1, False)
    )
    sizes = (program.state_bytes, program.work_bytes, program.needed_bytes)
    cells = [
      program.name, f'{program.rows}', mesh or 'one device', chosen,
      *(f'{size / 1e9:.3g}' for size in sizes),
      '' if program.available_bytes is None else f'{program.available_bytes / 1e9:.3g}',
      {True: 'yes', False: 'no', None: ''}[program.fits],
      f'{program.flops / 1e12:.3g}', _sent(program.collectives),
      f'{program.compile_seconds:.0f} s',
    ]
    lines.append(f'| {" | ".join(cells)} |')
  return [*lines, '', *_advice(programs, about)]


def _sent(found):
  """Returns collectives in words, the bytes first."""
  if found is None:
    return ''
  return ', '.join(
    f'{row.kind} {row.bytes / 1e9:.3g} GB in {row.count} (groups of {row.group_size})'
    for row in found if row.bytes >= 1e5
  ) or 'nothing'


def _advice(programs, about):
  """Returns what follows from a plan, as lines."""
  first, *others = [program for program in programs if program.name == 'training step']
  lines, last = [], (others or [first])[-1]
  if first.fits is False:
    over = (first.needed_bytes - first.available_bytes) / 1e9
    lines.append(f'As configured the training step lacks {over:.3g} GB on each device.')
    if last.fits:
      flags = ' '.join(
        f'--config.{key}={value}' for key, value in last.settings.items()
        if value != first.settings[key]
      )
      lines.append(f'It fits with {flags}')
    else:
      lines.append(
        'No layout fits that divides these devices: use a smaller data.batch_size or a larger slice'
      )
  elif first.fits:
    lines.append('It fits as configured.')
  if about['days'] is not None:
    lines.append(
      f"{about['steps']:,} steps take {about['days']:.3g} days if {about['mfu']:.0%} of the chips'"
      ' peak is reached, which is an assumption and no measurement.'
    )
  return lines

"""What a recipe takes on a slice of TPUs, found by compiling it for them: nobody has to own one.

Memory and traffic are read from the compiled programs, FLOPs from the traced ones. Where the
training step does not fit, other layouts are tried, those first whose arithmetic looks best.
"""

import dataclasses
import itertools
import json
import math
import time

import jax
import jax.numpy as jnp
from absl import logging

from fmzoo import build, cost, programs
from fmzoo import sampler as samplers
from fmzoo.parallel import chips, collectives
from fmzoo.parallel import mesh as meshes

KEYS = (  # that save memory
  'mesh.data', 'mesh.segment', 'mesh.fsdp', 'model.remat', 'optim.accumulate_steps',
)
FACTORS = (2, 4, 8, 16, 32)  # of micro-batches that are tried
REMAT = 4  # parts of the activations of which one is left if the others are computed again
DAY = 86_400  # seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """A compiled program, in figures of one device and one call."""

  name: str  # 'training step' or 'sampler'
  mesh: dict  # {axis: devices}
  settings: dict  # {key: value} of those KEYS that the recipe has
  rows: int  # global batch, or images
  parameter_bytes: int  # of the state
  state_bytes: int  # parameters, optimiser state and EMA; the sampler's parameters
  work_bytes: int  # beside that: batch, activations, gradients
  available_bytes: int | None  # that a program may use; None where nobody can tell
  flops: float  # of matrix products and convolutions, recomputation included
  collectives: list | None  # of parallel.collectives.Collective; None if it was not compiled
  compile_seconds: float

  @property
  def needed_bytes(self):
    """All that it takes."""
    return self.state_bytes + self.work_bytes

  @property
  def fits(self):
    """Whether a device has that much; None where nobody can tell."""
    return None if self.available_bytes is None else self.needed_bytes <= self.available_bytes

  @property
  def lacking_bytes(self):
    """How much more it takes than a device has; 0 if it fits or nobody can tell."""
    return 0 if self.fits is not False else self.needed_bytes - self.available_bytes


def plan(recipe, topology, *, mfu=None, as_json=False, with_sampler=True):
  """Compiles the training step and the sampler of a recipe for a slice, and prints a table.

  The sampler is the network's: a VAE after it is left out.

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
  chip = chips.CHIPS.get(topology.partition(':')[0])
  _check(recipe, mfu, chip)
  devices = chips.topology(topology)
  programs = [training_step(recipe, devices, chip)]
  known = [] if programs[0].fits is not False else remedies(recipe, devices, programs[0])
  for kind, changes, _ in known:
    if programs[-1].fits is not False or 'data.batch_size' in changes:
      break  # a batch of another size learns something else: that is for others to decide
    logging.info('it does not fit; %s, by arithmetic the next best, is tried', kind)
    programs.append(training_step(build.changed(recipe, changes), devices, chip))
  fits = programs[-1].fits is not False
  about = {
    'topology': topology, 'devices': len(devices), 'parameters': num_parameters(recipe),
    'steps': recipe.run.steps, 'mfu': mfu, 'days': _days(recipe, len(devices), chip, mfu),
    'advice': _advice(programs, known),
  }
  if fits and with_sampler:
    programs.append(sampler(recipe, devices, chip))
  if as_json:
    print(json.dumps(about | {'programs': [_plain(program) for program in programs]}, indent=2))
  else:
    print(*table(recipe, about, programs), sep='\n')
  return fits


def _check(recipe, mfu, chip):
  """Refuses what cannot be planned."""
  if mfu is not None and not 0 < mfu <= 1:
    raise ValueError(f'--mfu={mfu} must be above 0 and at most 1, such as 0.4')
  if mfu is not None and chip is None:
    raise ValueError(f'--mfu={mfu} needs chips whose peak is known, found a CPU; drop it')
  if recipe.mesh.mode != 'jit':
    raise ValueError(f"mesh.mode='{recipe.mesh.mode}' is not planned; use 'jit', its equal")


def _days(recipe, count, chip, mfu):
  """Returns days of training at a share of the peak of `count` chips, None without a share."""
  if mfu is None:
    return None
  return model_flops(recipe) * recipe.run.steps / (chip.flops * count * mfu) / DAY


def _plain(program):
  """Returns a program as JSON knows it."""
  found = program.collectives
  return dataclasses.asdict(program) | {
    'fits': program.fits, 'lacking_bytes': program.lacking_bytes,
    'collectives': None if found is None else [row._asdict() for row in found],
  }


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
  make_step, args = programs.abstract_step(recipe, mesh)
  state, flops = args[0], cost.matmul_flops(make_step(), *args)
  return _compiled(
    meshes.compile_step(make_step, mesh, 'jit', state), args, chip, name='training step',
    mesh=dict(mesh.shape), settings=settings_of(recipe), rows=size,
    parameter_bytes=bytes_of(state.params), state_bytes=bytes_of(state), flops=flops / mesh.size,
  )


def sampler(recipe, devices, chip):
  """Compiles the sampler of a recipe and returns its Program; every device has all parameters."""
  mesh = meshes.flat(recipe.mesh, devices)
  made = samplers.Sampler(build.changed(recipe, {'data.vae': ''}), mesh)
  size = samplers.chunk_rows(recipe, recipe.sample.num_images) * mesh.size
  params = jax.eval_shape(recipe.method.init, jax.random.key(0))
  indices = jax.ShapeDtypeStruct((size,), jnp.int32)
  flops = cost.matmul_flops(made.run, params, 0, indices, indices)
  return _compiled(
    made.run, (params, 0, indices, indices), chip, name='sampler', mesh=dict(mesh.shape),
    settings={}, rows=size, parameter_bytes=bytes_of(params), state_bytes=bytes_of(params),
    flops=flops,  # of one device's part
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
    needed = meshes.needed_bytes(compiled)
    available = None if chip is None else chip.usable_bytes
  return Program(
    name=name, mesh=mesh, state_bytes=state_bytes, work_bytes=needed - state_bytes,
    available_bytes=available, compile_seconds=time.time() - begun,
    collectives=None if compiled is None else collectives.collectives(compiled.as_text()),
    **known,
  )


def remedies(recipe, devices, first):
  """Returns what should fit, one of a kind, the plainest first: [(kind, changes, bytes)].

  Args:
    recipe: build.Recipe whose step does not fit.
    devices: of the slice.
    first: its Program.

  Returns:
    Kinds in words, changes {dotted key: value}, and what a device then needs by arithmetic. If
    nothing should fit, the one that comes nearest.
  """
  expected = list(estimates(recipe, devices, first))
  fitting = {}
  for kind, changes, needed in expected:
    if needed <= first.available_bytes:
      fitting.setdefault(kind, (kind, changes, needed))
  nearest = sorted(expected, key=lambda found: found[2])[:1]
  return list(fitting.values()) or nearest


def estimates(recipe, devices, first):
  """Yields (kind, {dotted key: value}, bytes that a device then needs by arithmetic).

  State and gradients are known to the byte for any mesh; the rest is taken for activations, which
  stay as they are where the state is cut, and shrink with the rows of a micro-batch.
  """
  remat = {'model.remat': True} if first.settings.get('model.remat') is False else None
  whole = [('', {}, first.state_bytes, first.parameter_bytes)]
  cuts = list(_cuts(recipe, devices))
  activations = max(first.work_bytes - first.parameter_bytes, 0)
  savings = [('', {}, 1)]
  if remat:
    savings.append(('model.remat', remat, REMAT))
  count = recipe.optim.accumulate_steps
  micro = [
    ('optim.accumulate_steps', {'optim.accumulate_steps': count * factor}, factor)
    for factor in FACTORS
  ]
  both = [(f'model.remat and {kind}', remat | changes, REMAT * factor)
          for kind, changes, factor in micro] if remat else []
  plain = [(whole, savings[1:]), (cuts, savings), (whole, micro), (cuts, [*micro, *both])]
  for pair in plain:
    for (cut, axes, state, gradients), (kind, changes, factor) in itertools.product(*pair):
      if _divides(recipe, axes | changes, devices):
        kinds = ' and '.join(filter(None, (cut, kind)))
        yield kinds, axes | changes, state + gradients + activations // factor
  for factor in FACTORS:
    size = recipe.data.batch_size // factor
    if _divides(recipe, {'data.batch_size': size}, devices):
      needed = first.state_bytes + first.parameter_bytes + activations // factor
      yield 'data.batch_size', {'data.batch_size': size}, needed


def _cuts(recipe, devices):
  """Yields (kind, {mesh key: value}, bytes of state, of parameters) of other meshes."""
  divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
  segments = [n for n in divisors if getattr(recipe.network, 'segments', 1) % n == 0]
  axes = [(fsdp, 1) for fsdp in divisors[1:]]
  axes += [(1, segment) for segment in segments[1:]]
  axes += [(fsdp, segment) for segment in segments[1:] for fsdp in divisors[1:]
           if len(devices) % (segment * fsdp) == 0]
  for fsdp, segment in axes:
    names = [name for name, size in (('mesh.segment', segment), ('mesh.fsdp', fsdp)) if size > 1]
    changes = {'mesh.data': -1, 'mesh.fsdp': fsdp, 'mesh.segment': segment}
    changed = build.changed(recipe, changes)
    state = programs.abstract_state(changed, meshes.make(changed.mesh, devices))
    yield ' and '.join(names), changes, bytes_of(state), bytes_of(state.params)


def _divides(recipe, changes, devices):
  """Says whether the batch can be split after changes."""
  if changes.get('data.batch_size') == 0:
    return False
  changed = build.changed(recipe, changes)
  mesh, steps = meshes.make(changed.mesh, devices), changed.optim.accumulate_steps
  return changed.data.batch_size % meshes.batch_unit(mesh, changed.method.period, steps) == 0


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
  step, args = programs.model_step(recipe)
  return cost.matmul_flops(step, *args)


def table(recipe, about, programs):
  """Returns a plan as lines: what was planned, a Markdown table, what to do."""
  name = f"{recipe.method_name} of {about['parameters']:,} parameters"
  lines = [
    f"{name} on {about['topology']}, {about['devices']} devices; bytes are of one device, GB = 1e9",
    '',
    '| program | rows | mesh | settings | parameters | state | work | needed | available | fits |'
    ' TFLOP | sent in a call | compiled in |',
    '|' + '---|' * 13,
  ]
  for program in programs:
    mesh = ' '.join(f'{axis}={size}' for axis, size in program.mesh.items() if size > 1)
    chosen = ' '.join(
      f'{key.split(".")[1]}={value}' for key, value in program.settings.items()
      if not key.startswith('mesh.') and value not in (1, False)
    )
    sizes = (
      program.parameter_bytes, program.state_bytes, program.work_bytes, program.needed_bytes
    )
    cells = [
      program.name, f'{program.rows}', mesh or 'one device', chosen,
      *(f'{size / 1e9:.3g}' for size in sizes),
      '' if program.available_bytes is None else f'{program.available_bytes / 1e9:.3g}',
      {True: 'yes', False: 'no', None: ''}[program.fits],
      f'{program.flops / 1e12:.3g}', _sent(program.collectives),
      f'{program.compile_seconds:.0f} s',
    ]
    lines.append(f'| {" | ".join(cells)} |')
  lines += ['', *about['advice']]
  if about['days'] is not None:
    lines.append(
      f"{about['steps']:,} steps take {about['days']:.3g} days if {about['mfu']:.0%} of the chips'"
      ' peak is reached, which is an assumption and no measurement.'
    )
  return lines


def _sent(found):
  """Returns collectives in words, the bytes first."""
  if found is None:
    return ''
  return ', '.join(
    f'{row.kind} {row.bytes / 1e9:.3g} GB in {row.count} (groups of {row.group_size})'
    for row in found if row.bytes >= 1e5
  ) or 'nothing'


def _advice(programs, known):
  """Returns what follows from the training steps of a plan, as lines.

  Args:
    programs: as configured, and those tried after it.
    known: `remedies`.
  """
  first, last = programs[0], programs[-1]
  if first.fits is not False:
    return ['It fits as configured.'] if first.fits else []
  lines = [
    f'As configured the training step lacks {first.lacking_bytes / 1e9:.3g} GB on each device.'
  ]
  tried = {kind for kind, _, _ in known[: len(programs) - 1]}
  if last.fits:
    changes = known[len(programs) - 2][1]
    lines.append(f'It fits with {_flags(changes, first)}')
  else:
    lines.append(
      'None of what was tried fits: use a smaller data.batch_size or a larger slice.'
    )
  others = [
    f'{_flags(changes, first)} ({needed / 1e9:.3g} GB)' for kind, changes, needed in known
    if kind not in tried and needed <= first.available_bytes
  ]
  if others:
    lines.append(f"By arithmetic these should fit, too: {'; '.join(others)}")
  return lines


def _flags(changes, first):
  """Returns what changes a first program, as flags of the command line."""
  return ' '.join(
    f'--config.{key}={value}' for key, value in changes.items()
    if first.settings.get(key) != value
  )

"""What an image costs by every method, over numbers of network calls: counted and measured.

On one device: a table and, with matplotlib, a plot. Conventions, which the table repeats: a GMAC is
1e9 multiply-adds of matrix products and convolutions, attention's own included, of one image and
all its network calls, read from the traced program. Guidance by a second, unconditional row doubles
them (SiT, BFM); SoFlow has learned it. The autoencoder's decoder is a row of its own.
"""

import functools
import json
import os
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from fmzoo import build, command_line, cost
from fmzoo.bench import ceiling, measure, parts, report
from fmzoo.models import vae
from fmzoo.parallel import mesh as meshes

RUNS = {'cpu': 3, 'gpu': 20, 'tpu': 20}
IMAGES = {'cpu': 4, 'gpu': 64, 'tpu': 32}  # that a device makes at a time, for the throughput
GUIDANCE = 1.5  # any above 1 costs the same
# There is no S of SoFlow: B/2 with the width of the others.
SOFLOW = {
  's': ('b2', {'model.width': 384, 'model.heads': 6}), 'b': ('b2', {}), 'l': ('l2', {}),
  'xl': ('xl2', {}),
}


ALONE = {'mesh.data': 1, 'mesh.fsdp': 1, 'mesh.segment': 1}  # whatever devices there are
MEMORY_WORDS = ('the decoder', 'weights and images', 'lower IMAGES')


class Curve(NamedTuple):
  """A method and the numbers of steps that it is measured with."""

  name: str
  recipe: str  # FILE:ARG
  changes: dict  # {dotted key: value}
  steps: tuple  # of sample.num_steps
  calls: int  # of a velocity network, by each of these steps
  is_guided: bool  # whether a second row guides


class Point(NamedTuple):
  """One method with one number of steps."""

  name: str
  calls: int  # of the (velocity) network
  gmac: float  # of an image, without guidance
  guided_gmac: float  # with it
  images: int  # of a call of the sampler, over all devices, where it is not one
  latency: float  # seconds of one image, waited for alone
  throughput: float  # images per second, that many at a time
  lowest: float  # in the slowest run
  highest: float  # in the fastest
  mfu: float  # then, of the measured ceiling


class Failure(NamedTuple):
  """A point that could not be measured."""

  name: str
  calls: int
  error: str  # why


def curves(size):
  """Returns the Curves of a size; BFM has six segments, each of which takes the steps."""
  name, changes = SOFLOW[size]
  blockwise, plain = (1, 2, 4, 8), (6, 12, 24, 48)
  return (
    Curve('SiT', f'configs/sit.py:{size}', {}, plain, 1, True),
    Curve('BFM', f'configs/bfm.py:{size}', {'sample.sampler': 'ode'}, blockwise, 6, True),
    Curve('BFM with FRN', f'configs/bfm_frn.py:{size}', {}, blockwise, 6, True),
    Curve('SoFlow', f'configs/soflow.py:{name}', changes, (1, 2, 4), 1, False),
  )


def run(size, *, runs=None, plot=None, as_json=False):
  """Measures all methods of a size, prints a table and draws a plot.

  Args:
    size: 's', 'b', 'l' or 'xl'.
    runs: timed runs of each program; None is RUNS.
    plot: .png to write; None is no plot.
    as_json: prints JSON in place of the table.

  Raises:
    ValueError: one line, before anything is run, if a plot is wanted and cannot be written or
      recipes are not found here; in the end if no point was measured.
  """
  measure.expect_one_process()
  measure.expect_recipes('pareto')
  if plot is not None:
    _expect_drawable(plot)
  place = jax.devices()[0].platform
  runs = RUNS[place] if runs is None else runs
  points = [
    _tried(
      curve.name, curve.calls * steps, functools.partial(_point, curve, steps, place, runs)
    )
    for curve in curves(size) for steps in curve.steps
  ]
  decoder = _tried('decoder of 256 x 256', 1, functools.partial(_decoder, place, runs))
  if as_json:
    print(json.dumps({
      'size': size, 'device': report.device(), 'jax': jax.__version__, 'runs': runs,
      'points': [point._asdict() for point in [*points, decoder]], 'plot': plot,
    }, indent=2))
  else:
    print(*table(points, decoder, runs, IMAGES[place]), sep='\n')
  measured = [point for point in points if isinstance(point, Point)]
  if not measured:
    raise ValueError(f'--pareto={size} measured none of its {len(points)} points; see their rows')
  if plot is not None:
    draw(measured, plot, title=f'Size {size.upper()}, one device of {report.device()}')


def _tried(name, calls, function):
  """Returns the Point that a function measures, or a Failure; leaves no compiled programs."""
  point, reason = measure.attempt(f'{name}, {calls} calls', function)
  jax.clear_caches()  # compiled programs take memory, too
  return Failure(name, calls, reason) if point is None else point


def recipe_of(curve, steps, place):
  """Returns the build.Recipe of a point, without guidance."""
  config = command_line.recipe_config('config', curve.recipe)
  plain = {'sample.guidance': 1.0} if curve.is_guided else {}
  on_cpu = {'model.dtype': 'float32'} if place == 'cpu' else {}
  config.update_from_flattened_dict(
    curve.changes | plain | on_cpu | ALONE
    | {'sample.num_steps': steps, 'sample.batch_size': IMAGES[place]}
  )
  return build.recipe(config)


def _point(curve, steps, place, runs):
  """Measures one number of steps of one method."""
  recipe = recipe_of(curve, steps, place)
  logging.info('%s, %d steps', curve.name, steps)
  one, many = (parts.sampler(recipe, images) for images in (1, IMAGES[place]))
  guided = many
  if curve.is_guided:
    guided = parts.sampler(build.changed(recipe, {'sample.guidance': GUIDANCE}), IMAGES[place])
  found = _measured(curve.name, curve.calls * steps, one, many, runs)
  return found._replace(guided_gmac=_gmac(guided))


def _decoder(place, runs):
  """Measures Stable Diffusion's decoder, which makes pictures of 256 x 256 from latents."""
  logging.info('decoder')
  one, many = (decoder_program(vae.SD_VAE, 32, images) for images in (1, IMAGES[place]))
  return _measured('decoder of 256 x 256', 1, one, many, runs)


def _measured(name, calls, one, many, runs):
  """Returns the Point of programs that make one image and many."""
  (single,) = measure.measure([one], runs=runs, calls=1, with_dispatches=False)
  (several,) = measure.measure([many], runs=runs, with_dispatches=False)
  seconds = float(np.median(several.seconds))
  rates = ceiling.rates(many.flops, many.mesh)
  gmac = _gmac(many)
  return Point(
    name, calls, gmac, gmac, many.rows, float(np.median(single.seconds)), many.rows / seconds,
    many.rows / float(several.seconds.max()), many.rows / float(several.seconds.min()),
    ceiling.least_seconds(many.flops, rates) / seconds,
  )


def _gmac(program):
  """Returns 1e9 multiply-adds of an image."""
  return sum(program.flops.values()) / 2e9 / program.rows


def decoder_program(config, side, images):
  """Returns the measure.Program of an autoencoder's decoder on one device, with random weights.

  Args:
    config: vae.Config.
    side: of a latent, its pixels.
    images: of a call.
  """
  net, mesh = vae.make(config), meshes.local()
  mesh = meshes.of_this_host(mesh, 1)
  params = jax.eval_shape(net.init, jax.random.key(0))['decoder']
  latents = jax.ShapeDtypeStruct((images, side, side, config.latent_channels), jnp.float32)

  def decode(params, latents):
    """Decodes as many at a time as `sample` does."""
    return parts.in_groups(lambda group: net.decode({'decoder': params}, group), latents)

  def arguments():
    """Returns fresh parameters and latents."""
    init = jax.jit(lambda: net.init(jax.random.key(0))['decoder'])
    return init(), jax.random.normal(jax.random.key(1), latents.shape)

  flops = cost.products(decode, params, latents)
  return measure.Program(
    name='decoder', rows=images, mesh=mesh, function=jax.jit(decode), shapes=(params, latents),
    arguments=arguments, following=lambda args, images: (args, images), flops=flops, spent=flops,
    memory_words=MEMORY_WORDS,
  )


def table(points, decoder, runs, images):
  """Returns points as lines: what they are, a Markdown table.

  Args:
    points: of Point and Failure.
    decoder: Point or Failure.
    runs: timed runs of each.
    images: that are made at a time.
  """
  return [
    f'One device of {report.device()}; jax {jax.__version__}; medians of {runs} runs without'
    ' guidance.', '',
    'GMAC: 1e9 multiply-adds of an image, all network calls together, attention included, decoder'
    ' not. With guidance SiT and BFM compute two rows an image; SoFlow has learned it. A network'
    ' call of BFM with FRN is a velocity call: the first of a segment runs the feature network, the'
    ' others its residual network (FRN) instead. At size S SoFlow is of our own making: B/2 with'
    ' width 384. One image is waited for before the next is begun. The decoder takes at most'
    f' {parts.DECODED_ROWS} latents at a time, as `sample` has it do.', '',
    '| method | network calls | GMAC | with guidance | one image, ms |'
    f' images/s, {images} at a time: median (lowest, highest) | MFU |', '|---' * 7 + '|',
    *(report.row(_cells(point)) for point in [*points, decoder]),
  ]


def _cells(point):
  """Returns the seven cells of a Point or a Failure."""
  if isinstance(point, Failure):
    return [point.name, str(point.calls), point.error, *[''] * 4]
  return [
    point.name, str(point.calls), f'{point.gmac:.4g}', f'{point.guided_gmac:.4g}',
    f'{1e3 * point.latency:.4g}',
    f'{point.throughput:.4g} ({point.lowest:.4g}, {point.highest:.4g})', f'{point.mfu:.1%}',
  ]


def _expect_drawable(path):
  """Refuses a plot that cannot be drawn or written."""
  if not path.endswith('.png'):
    raise ValueError(f'--plot={path} must end in .png')
  folder = pathlib.Path(path).parent
  if not folder.is_dir():
    raise ValueError(f"--plot={path}: there is no folder '{folder}'; make it, or name another")
  if not os.access(folder, os.W_OK):
    raise ValueError(f"--plot={path}: '{folder}' cannot be written to; name another folder")
  try:
    import matplotlib  # noqa: F401, not needed for anything else
  except ImportError as error:
    raise ValueError(
      f"--plot={path} needs matplotlib, which is not installed; pip install 'fmzoo[plot]', or drop"
      ' the flag'
    ) from error


def draw(points, path, title):
  """Writes a plot: time of an image against its multiply-adds, and against network calls.

  Args:
    points: of Point, those of a method one after the other.
    path: .png.
    title: above it.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(11, 4.5), layout='constrained')
  left, right = figure.subplots(1, 2)
  for name in dict.fromkeys(point.name for point in points):
    own = [point for point in points if point.name == name]
    for axes, x in ((left, [point.gmac for point in own]), (right, [p.calls for p in own])):
      seconds = [1 / p.throughput for p in own] if axes is left else [p.latency for p in own]
      axes.plot(x, [1e3 * value for value in seconds], marker='o', label=name)
  images = points[0].images
  left.set(xlabel='GMAC of an image', ylabel=f'ms an image, {images} at a time')
  right.set(xlabel='network calls', ylabel='ms of one image')
  for axes in (left, right):
    axes.set(xscale='log', yscale='log')
    axes.grid(True, which='both', alpha=0.3)
    axes.legend()
  figure.suptitle(f'{title}; without guidance, decoder left out')
  FigureCanvasAgg(figure).print_png(path)

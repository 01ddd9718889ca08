"""Times, dispatches, compilations and ceilings of programs whose figures are known beforehand."""

import itertools
import time
import weakref
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmzoo import cost
from fmzoo.bench import ceiling, command, measure, pareto, parts, report, suite
from fmzoo.parallel import mesh as meshes
from tests import tiny

KIND = ('float32', 'default')
PAUSE = 0.05  # seconds


@pytest.fixture(autouse=True)
def short(monkeypatch):
  """A run is a hundredth of a second, a ceiling two small products."""
  monkeypatch.setattr(measure, 'SECONDS', 0.01)
  monkeypatch.setattr(ceiling, 'SIZES', {'cpu': (256,)})
  monkeypatch.setattr(ceiling, 'FLOPS', {'cpu': 2e9})
  ceiling.rate.cache_clear()
  yield
  ceiling.rate.cache_clear()


def program(function, *args, following=lambda args, results: (args, results), rows=1):
  """Returns a measure.Program of any function of arrays, on one device."""
  flops = cost.products(function, *args)
  mesh = meshes.make(meshes.Config(data=1, fsdp=1, segment=1, mode='jit'))
  return measure.Program(
    name='toy', rows=rows, mesh=mesh, function=jax.jit(function), shapes=args,
    arguments=lambda: args, following=following, flops=flops, spent=flops,
  )


def sleeper(x):
  """Returns x after a while."""
  def wait(x):
    time.sleep(PAUSE)
    return x

  return jax.pure_callback(wait, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def test_a_call_takes_as_long_as_it_sleeps():
  (found,) = measure.measure([program(sleeper, jnp.ones(3))], runs=3)
  assert found.calls == 1 and len(found.seconds) == 3
  assert np.all(found.seconds >= PAUSE) and np.median(found.seconds) < 3 * PAUSE


def test_a_run_is_as_many_calls_as_fill_it(monkeypatch):
  monkeypatch.setattr(measure, 'SECONDS', 3.5 * PAUSE)
  (found,) = measure.measure([program(sleeper, jnp.ones(3))], runs=1)
  assert 2 <= found.calls <= 4  # a pause takes a little longer than asked
  assert PAUSE <= found.seconds[0] < 3 * PAUSE


def test_programs_run_in_turn():
  order = []

  def noted(name):
    return lambda args, results: (order.append(name) or args, results)

  pair = [program(sleeper, jnp.ones(3), following=noted(name)) for name in 'ab']
  measure.measure(pair, runs=3)
  assert ''.join(order) == 'aabb' + 'ababab' + 'a' * measure.TRACED + 'b' * measure.TRACED


def test_a_second_program_in_a_call_is_seen():
  one = program(lambda x: x * 2, jnp.ones(3))
  two = one._replace(following=lambda args, results: (args, results + 1))
  assert measure.dispatches(measure.Running(one)) == 1
  assert measure.dispatches(measure.Running(two)) == 2


def test_a_compilation_in_a_timed_call_is_seen():
  lengths = iter(range(3, 100))

  def growing(args, results):
    return args, jnp.arange(next(lengths)) * 2  # of another length at every call

  (found,) = measure.measure([program(sleeper, jnp.ones(3), following=growing)], runs=2)
  assert found.compilations >= 2


def test_mfu_of_products_alone_is_about_one(optimised):
  x = jnp.ones((256, 256)) / 256
  body = program(lambda x, factor: jax.lax.scan(
    lambda x, _: (x @ factor, None), x, length=60)[0], x, x)
  (found,) = measure.measure([body], runs=10)
  rates = ceiling.rates(body.flops, body.mesh)
  assert body.flops == {KIND: 60 * 2 * 256**3}
  assert 0.5 < ceiling.least_seconds(body.flops, rates) / found.seconds.min() < 1.5


@pytest.mark.parametrize('devices', [1, 2])
def test_the_ceiling_is_a_rate_of_products_of_all_devices(devices, monkeypatch):
  """By a clock of which every run takes half a second."""
  monkeypatch.setattr(ceiling, 'SIZES', {'cpu': (64,)})
  monkeypatch.setattr(ceiling, 'FLOPS', {'cpu': 3 * 2 * 64**3})
  ticks = itertools.count()
  clock = SimpleNamespace(perf_counter=lambda: 0.5 * next(ticks))
  monkeypatch.setattr(ceiling, 'time', clock)
  found = ceiling.rate(KIND, tuple(jax.devices()[:devices]))
  assert found == ceiling.Rate(*KIND, 64, devices, devices * 3 * 2 * 64**3 / 0.5)


def test_a_sampler_on_two_devices_multiplies_twice_as_much():
  one, two = (
    parts.sampler(tiny.recipe('fm', mesh__data=count), images=2) for count in (1, 2)
  )
  assert (one.rows, two.rows) == (2, 4)
  assert two.flops == {kind: 2 * count for kind, count in one.flops.items()}


def test_a_step_of_one_program_per_device_is_measured():
  recipe = tiny.recipe('fm', mesh__data=2, mesh__mode='pmap', data__batch_size=8)
  (found,) = measure.measure([parts.training_step(recipe)], runs=1, with_dispatches=False)
  assert found.program.mesh.size == 2 and found.compilations == 0 and found.dispatches is None


@pytest.mark.parametrize('make', parts.PROGRAMS.values())
def test_attention_of_a_library_is_counted(make, monkeypatch):
  """Which here is one that has no products, as cuDNN's has none that a jaxpr shows."""
  monkeypatch.setattr(jax.nn, 'dot_product_attention', lambda q, k, v, implementation: q)
  one, other = (
    make(tiny.recipe(
      'fm', mesh__data=1, data__batch_size=8, model__dtype='bfloat16', model__attention=attention,
      model__remat=True,
    )) for attention in ('xla', 'cudnn')
  )
  assert one.flops == other.flops and one.spent == other.spent


def test_a_run_may_be_one_call(monkeypatch):
  monkeypatch.setattr(measure, 'SECONDS', 10 * PAUSE)
  (found,) = measure.measure([program(sleeper, jnp.ones(3))], runs=2, calls=1)
  assert found.calls == 1 and np.all(found.seconds >= PAUSE)


def test_tracing_is_not_warm():
  """What was traced to be counted is traced again."""
  traced = []

  def noted(x):
    traced.append(x.shape)
    return x * 2

  function, x = jax.jit(noted), jnp.ones(3)
  cost.products(function, x)
  measure.Running(program(sleeper, x)._replace(function=function))
  assert traced == [(3,), (3,)]


def test_a_peak_of_something_else_is_not_told():
  before = {'peak_bytes': 5, 'process_bytes': None}
  assert measure.risen(before, {'peak_bytes': 5, 'process_bytes': None}) == {
    'peak_bytes': None, 'process_bytes': None
  }
  assert measure.risen(before, {'peak_bytes': 6, 'process_bytes': 7}) == {
    'peak_bytes': 6, 'process_bytes': 7
  }


def test_what_fails_leaves_its_reason_and_no_arrays():
  alive = []

  def fails():
    array = np.ones(3)
    alive.append(weakref.ref(array))
    raise RuntimeError('out of\nmemory')

  assert measure.attempt('toy', fails) == (None, 'out of memory')
  assert alive[0]() is None
  assert measure.attempt('toy', lambda: 3) == (3, None)


def test_a_sampler_without_memory_names_its_own_remedy(monkeypatch):
  monkeypatch.setattr(meshes, '_free_bytes', lambda mesh: 300_000)
  one = parts.sampler(tiny.recipe('fm', mesh__data=1), images=64)
  with pytest.raises(ValueError, match='the sampler needs .* GB free; lower sample.batch_size, or'):
    measure.Running(one)


def test_processes_that_work_together_are_refused(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  options = {'runs': 1, 'as_json': False}
  for start in (
    lambda: command.bench(None, chosen=None, **options),
    lambda: command.compare([None, None], chosen=None, **options),
    lambda: suite.run(**options), lambda: pareto.run('s', **options),
  ):
    with pytest.raises(ValueError, match="2 processes work together, 'bench' measures what one"):
      start()


def test_recipes_are_looked_for_first(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  for start, flag in ((suite.run, '--suite'), (lambda: pareto.run('s'), '--pareto')):
    with pytest.raises(ValueError, match=f'{flag} measures recipes of configs/, which {tmp_path}'):
      start()


def test_kinds_of_products_are_bound_by_their_own_ceilings():
  half = ('bfloat16', 'default')
  rates = {
    kind: ceiling.Rate(*kind, 256, 1, rate) for kind, rate in ((KIND, 10.0), (half, 40.0))
  }
  assert ceiling.least_seconds({KIND: 20, half: 120}, rates) == 5.0


def test_kinds_of_products_sum_to_all_of_them():
  def mixed(x):
    half = x.astype(jnp.bfloat16)
    wide = jnp.matmul(x, x, precision='highest')
    return wide + jax.lax.scan(lambda y, _: (y @ half, None), half, length=3)[0] + x @ x

  x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
  found, one = cost.products(mixed, x), 2 * 8**3
  assert found == {
    ('float32', 'highest'): one, ('bfloat16', 'default'): 3 * one, ('float32', 'default'): one
  }
  assert sum(found.values()) == cost.matmul_flops(mixed, x) == 5 * one


def test_recomputed_products_are_told_apart():
  plain, remat = (
    parts.training_step(tiny.recipe('fm', mesh__data=1, data__batch_size=8, model__remat=remat))
    for remat in (False, True)
  )
  assert plain.flops == plain.spent == remat.flops
  assert 1.2 < sum(remat.spent.values()) / sum(plain.spent.values()) < 1.5  # a third pass of three


def test_figures_follow_from_what_was_measured():
  """Two devices, half of the time at the ceiling, half of the products in bfloat16."""
  one = program(sleeper, jnp.ones(3), rows=30)
  half = ('bfloat16', 'default')
  one = one._replace(flops={KIND: 100, half: 100}, spent={KIND: 150, half: 100})
  measured = measure.Measured(
    program=one, trace_seconds=1.0, compile_seconds=2.0, calls=7,
    seconds=np.array([5.0, 2.0, 9.0]), dispatches=1.0, compilations=0, memory_bytes=3_000_000_000,
    peak_bytes=None, process_bytes=None,
  )
  rates = {kind: ceiling.Rate(*kind, 256, 2, 80.0) for kind in (KIND, half)}
  found = report.plain(measured, rates)
  assert found['seconds'] == [5.0, 2.0, 9.0] and found['rows_per_second'] == 6.0
  assert (found['flops'], found['spent_flops'], found['flops_per_second']) == (200, 250, 40.0)
  assert found['mfu'] == 0.5 and found['float32_share'] == 0.5
  text = '\n'.join(report.table({'toy': found}))
  assert '| 5000 (2000, 9000) |' in text and '| 50.0% |' in text and '| 3 |' in text
  assert 'at most' not in text  # of what is not known there is no line

"""What programs move is what their shapes say: on eight simulated devices, and in TPU text."""

import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fmzoo.parallel import collectives as module
from fmzoo.parallel import hlo
from fmzoo.parallel.collectives import Collective

ROWS, WIDTH = 16, 32  # of a device
SIZE = ROWS * WIDTH * 4  # bytes


def mesh_of(shape=(8,), names=('data',)):
  return Mesh(np.array(jax.devices()[:8]).reshape(shape), names)


def table(function, mesh=None, dtype='float32', out='data', devices='data'):
  """Compiles a per-device function of [ROWS, WIDTH] and reads its collectives."""
  mesh = mesh or mesh_of()
  mapped = jax.shard_map(
    function, mesh=mesh, in_specs=P(devices), out_specs=P(out), check_vma=False
  )
  x = jax.ShapeDtypeStruct((8 * ROWS, WIDTH), dtype)
  return module.collectives(jax.jit(mapped).lower(x).compile().as_text())


def summed(c):
  return lax.psum(jnp.sin(c), 'data') * 0.1


def repeated(function, length):
  return lambda x: lax.scan(lambda c, _: (function(c), None), x, None, length=length)[0]


@pytest.mark.parametrize('dtype,element', [('float32', 4), ('int32', 4), ('uint8', 1)])
def test_a_sum_has_the_bytes_of_its_array(dtype, element):
  found = table(lambda x: lax.psum(x, 'data'), dtype=dtype, out=None)
  assert found == [Collective('all-reduce', 8, 1, ROWS * WIDTH * element)]


def test_arrays_that_are_summed_together_add_up():
  found = table(lambda x: lax.psum((x, x[:3] + 1, x[0, :1]), 'data'), out=None)
  assert [row.kind for row in found] == ['all-reduce']
  assert found[0].bytes == SIZE + 3 * WIDTH * 4 + 4


def test_each_kind_counts_the_larger_of_operand_and_result():
  def function(x):
    whole = lax.all_gather(x, 'data', tiled=True)
    part = lax.psum_scatter(jnp.sin(whole), 'data', tiled=True)
    mixed = lax.all_to_all(jnp.cos(part), 'data', 0, 1, tiled=True)
    return lax.ppermute(jnp.sin(mixed), 'data', [(i, (i + 1) % 8) for i in range(8)])

  assert table(function) == [
    Collective('all-gather', 8, 1, 8 * SIZE),
    Collective('reduce-scatter', 8, 1, 8 * SIZE),
    Collective('all-to-all', 8, 1, SIZE),
    Collective('collective-permute', 8, 1, SIZE),
  ]


def test_groups_have_the_size_of_their_axis():
  mesh = mesh_of((4, 2), ('segment', 'data'))
  both = ('segment', 'data')

  def function(x):
    return lax.psum(x, 'data'), lax.psum(x[:4], 'segment'), lax.psum(x[:2], both)

  assert table(function, mesh, out=both, devices=both) == [
    Collective('all-reduce', 2, 1, SIZE),
    Collective('all-reduce', 4, 1, SIZE // 4),
    Collective('all-reduce', 8, 1, SIZE // 8),
  ]


def test_permutations_within_rows_of_a_mesh_have_the_size_of_a_row():
  mesh = mesh_of((4, 2), ('segment', 'data'))
  shift = [(i, (i + 1) % 4) for i in range(4)]
  both = ('segment', 'data')
  found = table(lambda x: lax.ppermute(x, 'segment', shift), mesh, out=both, devices=both)
  assert found == [Collective('collective-permute', 4, 1, SIZE)]


def test_a_loop_counts_as_often_as_it_runs():
  assert table(repeated(summed, 8)) == [Collective('all-reduce', 8, 8, 8 * SIZE)]


def test_nested_loops_multiply():
  found = table(repeated(lambda c: summed(repeated(summed, 3)(c)), 5))
  assert found == [Collective('all-reduce', 8, 20, 20 * SIZE)]


def test_of_a_conditional_the_dearest_branch_counts():
  def function(x):
    branches = [lambda c: c, summed, lambda c: summed(summed(c))]
    return lax.switch(jnp.int32(x[0, 0]), branches, x)

  assert table(function) == [Collective('all-reduce', 8, 2, 2 * SIZE)]


def test_a_loop_of_unknown_length_is_refused():
  def function(x):
    return lax.while_loop(lambda c: jnp.sum(c) > 1, summed, x)

  with pytest.raises(ValueError, match='how often the loop .* runs cannot be read'):
    table(function)


def test_a_loop_of_unknown_length_that_sends_nothing_is_none_of_our_business():
  def function(x):
    return summed(lax.while_loop(lambda c: jnp.sum(c) > 1, lambda c: c / 2, x))

  assert table(function) == [Collective('all-reduce', 8, 1, SIZE)]


LAYERS, D = 3, 64


def sharded_step(mesh):
  """Returns (gradient of a stack of blocks cut over the devices, its abstract arguments)."""
  rows = NamedSharding(mesh, P('data'))

  def loss(params, x):
    @jax.checkpoint
    def block(h, params):
      h = h + jnp.tanh(h @ params['up']) @ params['down']
      return lax.with_sharding_constraint(h, rows), None

    return jnp.mean(jnp.square(lax.scan(block, x, params)[0]))

  def cut(shape, *spec):
    return jax.ShapeDtypeStruct(shape, 'float32', sharding=NamedSharding(mesh, P(*spec)))

  params = {
    'up': cut((LAYERS, D, 4 * D), None, None, 'data'),
    'down': cut((LAYERS, 4 * D, D), None, 'data'),
  }
  kept = jax.tree.map(lambda leaf: leaf.sharding, params)
  return jax.jit(jax.grad(loss), out_shardings=kept), (params, cut((512, D), 'data'))


def test_parameters_that_are_cut_are_gathered_twice_and_their_gradients_summed_once(optimised):
  """Forward, and again backward as a block under checkpoint is computed twice."""
  step, args = sharded_step(mesh_of())
  found = module.collectives(step.lower(*args).compile().as_text())
  size = 2 * LAYERS * D * 4 * D * 4
  assert {row.kind: (row.group_size, row.bytes) for row in found} == {
    'all-gather': (8, 2 * size), 'all-reduce': (8, size),
  }


@pytest.mark.parametrize('groups,size', [
  ('{}', 8), ('{{0,1},{2,3},{4,5},{6,7}}', 2), ('{{0,2,4,6},{1,3,5,7}}', 4), ('[4,2]<=[8]', 2),
  ('[2,4]<=[4,2]T(1,0)', 4), ("mesh['segment'=4,'data'=2] {'data'}", 2),
  ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", 4), ("mesh['a'=8] {'a':(2)4}", 4),
  ("mesh['a'=4,'b'=1,'c'=2], device_ids=([4,2]T(1,0)) {'a'}", 4),
])
def test_groups_are_read_however_they_are_written(groups, size):
  text = f"""HloModule jit_f, num_partitions=8

ENTRY %main (p: bf16[3,5]) -> bf16[3,5] {{
  %p = bf16[3,5]{{1,0}} parameter(0)
  ROOT %r = bf16[3,5]{{1,0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add
}}
"""
  assert module.collectives(text) == [Collective('all-reduce', size, 1, 30)]


@pytest.mark.parametrize('type_text,size', [
  ('f32[]', 4), ('pred[7]{0}', 7), ('bf16[2,3]{1,0:T(8,128)(2,1)S(1)}', 12), ('s4[3]', 2),
  ('f8e4m3fn[5]', 5), ('c64[2]', 16), ('(f32[2], /*index=1*/(u8[3], token[]))', 11),
])
def test_types_have_their_bytes(type_text, size):
  assert hlo.num_bytes(type_text) == size


def test_an_unknown_type_is_refused():
  with pytest.raises(ValueError, match=r"'x7\[2\]' has an element type of unknown size"):
    hlo.num_bytes('x7[2]')


def program(*lines, devices=8):
  """Returns the text of a program with these lines after its first."""
  return '\n'.join([f'HloModule jit_f, is_scheduled=true, num_partitions={devices}', '', *lines])


START = (
  '%begin (p: bf16[256,512]) -> (bf16[256,512], bf16[2048,512], u32[]) {',
  '  %p = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)',
  '  %all-gather.1 = bf16[2048,512]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7,'
  " replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0},"
  ' frontend_attributes={chain_id="0"}',
  '  ROOT %custom-call = (bf16[256,512]{1,0}, bf16[2048,512]{1,0}, u32[]{:S(2)})'
  ' custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"',
  '}',
)
REST = tuple(line for name in ('compute', 'end') for line in (
  f'%{name} (q: bf16[256,512], r: bf16[2048,512]) -> bf16[2048,512] {{',
  '  %q = bf16[256,512]{1,0} parameter(0)',
  '  %r = bf16[2048,512]{1,0} parameter(1)',
  '  %all-gather.2 = bf16[2048,512]{1,0} all-gather(%q), channel_id=7,'
  " replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0},"
  ' frontend_attributes={chain_id="0"}',
  '  ROOT %made = bf16[2048,512]{1,0} custom-call(%q, %r, %all-gather.2),'
  ' custom_call_target="AsyncCollectiveDone"',
  '}',
))
MAIN = (
  'ENTRY %main (x: bf16[256,512]) -> bf16[2048,512] {',
  '  %x = bf16[256,512]{1,0} parameter(0)',
  '  %start = (bf16[256,512]{1,0}, bf16[2048,512]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom,'
  ' calls=%begin',
  '  %a = bf16[256,512]{1,0} get-tuple-element(%start), index=0',
  '  %b = bf16[2048,512]{1,0} get-tuple-element(%start), index=1',
  '  %c = bf16[2048,512]{1,0} fusion(%a, %b), kind=kOutput, calls=%compute',
  '  ROOT %d = bf16[2048,512]{1,0} fusion(%a, %c), kind=kCustom, calls=%end',
  '}',
)


def test_what_a_tpu_spreads_over_fusions_counts_once():
  found = module.collectives(program(*START, *REST, *MAIN))
  assert found == [Collective('all-gather', 8, 1, 2048 * 512 * 2)]


def test_a_part_that_begins_nowhere_is_refused():
  text = program(*START, *REST, *MAIN).replace('AsyncCollectiveStart', 'Another')
  with pytest.raises(ValueError, match="'all-gather.1' has chain_id 0, which no Async"):
    module.collectives(text)


def test_a_fused_sum_of_which_a_slice_is_kept_is_a_reduce_scatter():
  text = program(
    '%all-reduce-scatter.2 (i: bf16[512,2048], j: f32[64]) -> (bf16[512,256], f32[8]) {',
    '  %i = bf16[512,2048]{1,0:T(8,128)(2,1)} parameter(0)',
    '  %j = f32[64]{0:T(128)} parameter(1)',
    '  %sum = (bf16[512,2048]{1,0}, f32[64]{0}) all-reduce(%i, %j), channel_id=1,'
    ' replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%add',
    '  %k = bf16[512,2048]{1,0} get-tuple-element(%sum), index=0',
    '  %zero = u32[]{:T(128)} constant(0)',
    '  %l = bf16[512,256]{1,0} dynamic-slice(%k, %zero, %zero), dynamic_slice_sizes={512,256}',
    '  %m = f32[64]{0} get-tuple-element(%sum), index=1',
    '  %n = f32[8]{0} dynamic-slice(%m, %zero), dynamic_slice_sizes={8}',
    '  ROOT %tuple = (bf16[512,256]{1,0}, f32[8]{0}) tuple(%l, %n)',
    '}',
    'ENTRY %main (x: bf16[512,2048], y: f32[64]) -> (bf16[512,256], f32[8]) {',
    '  %x = bf16[512,2048]{1,0} parameter(0)',
    '  %y = f32[64]{0} parameter(1)',
    '  ROOT %f = (bf16[512,256]{1,0}, f32[8]{0}) fusion(%x, %y), kind=kCustom,'
    ' calls=%all-reduce-scatter.2',
    '}',
  )
  assert module.collectives(text) == [Collective('reduce-scatter', 8, 1, 512 * 2048 * 2 + 64 * 4)]


def counted_loop(bound='%four', step='add(%n, %two)', first='0', test='LT'):
  """A TPU loop, whose line does not say how often it runs; two permutations a time."""
  ring = 'source_target_pairs={{0,1},{1,2},{2,3},{3,0}}'
  state = '(u32[], f32[10], u32[], u32[])'
  return program(
    f'%body (s: {state}) -> {state} {{',
    '  %two = u32[]{:T(128)} constant(2)',
    f'  %s = {state} parameter(0)',
    '  %n = u32[]{:T(128)} get-tuple-element(%s), index=0',
    '  %x = f32[10]{0} get-tuple-element(%s), index=1',
    '  %fixed = u32[]{:T(128)} get-tuple-element(%s), index=2',
    '  %other = u32[]{:T(128)} get-tuple-element(%s), index=3',
    f'  %send = (f32[10]{{0}}, f32[10]{{0}}, u32[], u32[]) collective-permute-start(%x), {ring}',
    '  %got = f32[10]{0} collective-permute-done(%send)',
    f'  %again = f32[10]{{0}} collective-permute(%got), {ring}',
    f'  %next = u32[]{{:T(128)}} {step}',
    f'  ROOT %out = {state} tuple(%next, %again, %fixed, %next)',
    '}',
    f'%condition (s: {state}) -> pred[] {{',
    f'  %s = {state} parameter(0)',
    '  %four = u32[]{:T(128)} constant(4)',
    '  %fixed = u32[]{:T(128)} get-tuple-element(%s), index=2',
    '  %other = u32[]{:T(128)} get-tuple-element(%s), index=3',
    '  %n = u32[]{:T(128)} get-tuple-element(%s), index=0',
    f'  ROOT %less = pred[]{{:T(512)}} compare(%n, {bound}), direction={test}',
    '}',
    'ENTRY %main (x: f32[10]) -> f32[10] {',
    '  %x = f32[10]{0} parameter(0)',
    f'  %first = u32[]{{:T(128)}} constant({first})',
    '  %copied = u32[]{:T(128)} copy(%first)',
    '  %nine = u32[]{:T(128)} constant(9)',
    f'  %start = {state} tuple(%copied, %x, %nine, %nine)',
    f'  %loop = {state} while(%start), condition=%condition, body=%body',
    '  ROOT %result = f32[10]{0} get-tuple-element(%loop), index=1',
    '}',
    devices=4,
  )


@pytest.mark.parametrize('changes,trips', [
  ({}, 2), ({'first': '1'}, 2), ({'first': '2'}, 1), ({'first': '7'}, 0),
  ({'bound': '%fixed'}, 5), ({'step': 'add(%fixed, %n)', 'bound': '%fixed'}, 1),
  ({'step': 'add(%once, %two)\n  %once = u32[] add(%two, %n)', 'bound': '%fixed'}, 3),
])
def test_a_loop_of_a_tpu_is_counted_by_its_constants(changes, trips):
  found = module.collectives(counted_loop(**changes))
  assert found == [Collective('collective-permute', 4, 2 * trips, 80 * trips)]


@pytest.mark.parametrize('changes', [
  {'bound': '%other'}, {'step': 'add(%n, %other)'}, {'step': 'multiply(%n, %two)'},
  {'test': 'NE'}, {'step': 'add(%two, %two)'}, {'first': '-2', 'step': 'add(%other, %other)'},
])
def test_a_loop_that_does_not_count_by_constants_is_refused(changes):
  with pytest.raises(ValueError, match="how often the loop 'loop' runs cannot be read"):
    module.collectives(counted_loop(**changes))


def test_a_loop_whose_line_says_how_often_it_runs_is_believed():
  told = 'body=%body, backend_config={"known_init_step":{"init":"0"},"known_trip_count":{"n":"6"}}'
  text = counted_loop(test='NE').replace('body=%body', told)
  assert module.collectives(text) == [Collective('collective-permute', 4, 12, 480)]


def test_the_condition_of_a_loop_runs_once_more_than_its_body():
  line = '  %four = u32[]{:T(128)} constant(4)'
  asked = '\n  %all = u32[] all-reduce(%four), replica_groups={}, to_apply=%add'
  found = module.collectives(counted_loop().replace(line, line + asked))
  assert Collective('all-reduce', 4, 3, 12) in found


def test_asynchronous_forms_count_where_they_begin():
  """As a GPU program has them, and as older programs wrap them."""
  ring = 'replica_groups=[1,2]<=[2]'
  text = program(
    '%wrapped (w: f32[6]) -> f32[3] {',
    '  %w = f32[6]{0} parameter(0)',
    f'  ROOT %rs = f32[3]{{0}} reduce-scatter(%w), {ring}, dimensions={{0}}, to_apply=%add',
    '}',
    'ENTRY %main (x: f32[6]) -> f32[3] {',
    '  %x = f32[6]{0} parameter(0)',
    f'  %a = (f32[6]{{0}}, f32[12]{{0}}) all-gather-start(%x), {ring}, dimensions={{0}}',
    '  %b = f32[12]{0} all-gather-done(%a)',
    f'  %c = f32[12]{{0}} all-reduce-start(%b), {ring}, to_apply=%add',
    '  %d = f32[12]{0} all-reduce-done(%c)',
    f'  %e = ((f32[12]{{0}}), f32[6]{{0}}) reduce-scatter-start(%d), {ring}, to_apply=%add',
    '  %f = f32[6]{0} reduce-scatter-done(%e)',
    '  %g = ((f32[6]{0}), f32[3]{0}, s32[]) async-start(%f), calls=%wrapped',
    '  ROOT %h = f32[3]{0} async-done(%g), calls=%wrapped',
    '}',
    devices=2,
  )
  assert module.collectives(text) == [
    Collective('reduce-scatter', 2, 2, 48 + 24),
    Collective('all-gather', 2, 1, 48),
    Collective('all-reduce', 2, 1, 48),
  ]


@pytest.mark.parametrize('old,new,message', [
  ('{}', '@mesh<a=8>{a}', "replica_groups of 'r' are not understood"),
  ('all-reduce(', 'ragged-all-to-all(', "'r' is a ragged-all-to-all"),
  ('ENTRY ', '', 'has no ENTRY computation; pass compiled.as_text()'),
])
def test_text_that_is_not_understood_is_refused(old, new, message):
  text = program(
    'ENTRY %main (p: f32[3]) -> f32[3] {',
    '  %p = f32[3] parameter(0)',
    '  ROOT %r = f32[3] all-reduce(%p), channel_id=1, replica_groups={}, to_apply=%add',
    '}',
  )
  with pytest.raises(ValueError, match=message.replace('(', r'\(').replace(')', r'\)')):
    module.collectives(text.replace(old, new))


def test_a_long_program_is_read_quickly():
  line = (
    '  %n{0} = f32[128,256]{{1,0:T(8,128)}} add(%n{1}, %n{1}), metadata={{op_name="jit(step)/a"}},'
    ' backend_config={{"flag_configs":[],"window_config":{{"estimated_cycles":"5206"}}}}'
  )
  lines = [line.format(i + 1, i) for i in range(32_000)]
  text = program(
    'ENTRY %main (p: f32[128,256]) -> f32[128,256] {',
    '  %n0 = f32[128,256]{1,0} parameter(0)',
    *lines,
    '  ROOT %r = f32[128,256]{1,0} all-reduce(%n32000), replica_groups={}, to_apply=%add',
    '}',
  )
  assert len(text) > 5e6
  start = time.process_time()
  assert len(module.collectives(text)) == 1
  assert time.process_time() - start < 2


TPU_PROGRAM = """
import jax
import numpy as np
from jax.sharding import Mesh
from fmzoo.parallel import chips, collectives
from tests.parallel import test_collectives as tests

step, args = tests.sharded_step(Mesh(np.array(chips.topology('v5e:2x4')), ('data',)))
for row in collectives.collectives(step.lower(*args).compile().as_text()):
  print(row.kind, row.group_size, row.count, row.bytes)
"""


def test_a_compiled_tpu_program_moves_what_its_shapes_say():
  """Gathered in bfloat16, which a TPU makes of what it multiplies, and summed in float32."""
  pytest.importorskip('libtpu')
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '0',
  }
  told = subprocess.run(
    [sys.executable, '-c', TPU_PROGRAM], capture_output=True, text=True, timeout=120,
    cwd=pathlib.Path(module.__file__).parents[2], env=environment,
  )
  numbers = 2 * LAYERS * D * 4 * D
  assert told.stdout.splitlines() == [
    f'all-gather 8 {4 * LAYERS} {2 * 2 * numbers}', f'reduce-scatter 8 {LAYERS} {4 * numbers}',
  ], told.stderr[-2000:]

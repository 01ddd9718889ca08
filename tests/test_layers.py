"""Imports point one way: every edge between fmzoo's modules is in the list below."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# module prefix -> (packages from outside, modules of fmzoo) that it may import
ALLOWED = {
  'fmzoo.shapes': ({'jax'}, set()),
  'fmzoo.paths': (set(), set()),
  'fmzoo.cost': ({'jax'}, set()),
  'fmzoo.models': ({'jax', 'flax', 'numpy'}, {'fmzoo.shapes', 'fmzoo.models'}),
  'fmzoo.program_cache': ({'jax', 'absl'}, set()),
  'fmzoo.rows': ({'jax', 'numpy'}, set()),
  'fmzoo.methods.bfm': ({'jax'}, {
    'fmzoo.rows', 'fmzoo.shapes', 'fmzoo.methods.base', 'fmzoo.methods.flow',
    'fmzoo.methods.bfm_sampler'}),
  'fmzoo.methods.bfm_frn': ({'jax'}, {
    'fmzoo.methods.base', 'fmzoo.methods.flow', 'fmzoo.methods.bfm', 'fmzoo.methods.bfm_sampler'}),
  'fmzoo.methods.soflow': ({'jax'}, {
    'fmzoo.methods.base', 'fmzoo.methods.flow', 'fmzoo.methods.soflow_rows',
    'fmzoo.methods.soflow_sampler', 'fmzoo.methods.soflow_times'}),
  'fmzoo.methods': ({'jax', 'numpy'}, {
    'fmzoo.shapes', 'fmzoo.methods.base', 'fmzoo.methods.flow', 'fmzoo.methods.ode',
    'fmzoo.methods.soflow_times'}),
  'fmzoo.data': (
    {'numpy', 'grain', 'array_record', 'sklearn', 'absl', 'tensorflow_datasets', 'google', 'PIL',
     'h5py'}, {'fmzoo.data', 'fmzoo.files', 'fmzoo.paths'}),
  'fmzoo.data.buckets': ({'tensorstore'}, {'fmzoo.paths'}),
  'fmzoo.data.prepare': ({'jax', 'numpy', 'absl'}, {
    'fmzoo.data', 'fmzoo.inputs', 'fmzoo.paths', 'fmzoo.sources', 'fmzoo.writer',
    'fmzoo.convert.vae', 'fmzoo.parallel'}),
  'fmzoo.parallel': ({'jax', 'numpy', 'absl'}, {'fmzoo.parallel'}),
  'fmzoo.metrics': ({'numpy', 'sklearn', 'jax', 'flax'}, {
    'fmzoo', 'fmzoo.data.digits', 'fmzoo.files', 'fmzoo.hashes', 'fmzoo.metrics',
    'fmzoo.models'}),
  'fmzoo.convert.weights': ({'numpy', 'safetensors', 'torch'}, {'fmzoo.convert'}),
  'fmzoo.convert': (
    {'jax', 'numpy', 'safetensors', 'ml_dtypes'}, {'fmzoo.models', 'fmzoo.convert'}),
  'fmzoo.files': (set(), set()),
  'fmzoo.hashes': ({'jax', 'numpy'}, set()),
  'fmzoo.npz': ({'numpy'}, set()),
  'fmzoo.pictures': ({'numpy', 'PIL'}, {'fmzoo.files'}),
  'fmzoo.picture_stream': ({'numpy', 'PIL'}, {'fmzoo.npz'}),
  'fmzoo.partial': ({'numpy'}, {'fmzoo.files', 'fmzoo.npz'}),
  'fmzoo.writer': ({'numpy', 'absl', 'clu', 'tqdm'}, set()),
  'fmzoo.checksums': ({'jax', 'numpy'}, set()),
  'fmzoo.manager': ({'jax', 'orbax'}, {'fmzoo.parallel.hosts'}),
  'fmzoo.checkpoint': ({'jax', 'orbax', 'absl'}, {
    'fmzoo.checksums', 'fmzoo.manager', 'fmzoo.parallel.hosts'}),
  'fmzoo.bench': ({'jax', 'numpy', 'absl'}, {
    'fmzoo.bench', 'fmzoo.build', 'fmzoo.cost', 'fmzoo.parallel', 'fmzoo.programs',
    'fmzoo.sampler', 'fmzoo.sources'}),
  'fmzoo.bench.loader': ({'numpy', 'absl'}, {'fmzoo.data.pipeline', 'fmzoo.sources'}),
  'fmzoo.bench.pareto': ({'jax', 'numpy', 'absl', 'matplotlib'}, {
    'fmzoo.bench', 'fmzoo.build', 'fmzoo.command_line', 'fmzoo.cost', 'fmzoo.models.vae',
    'fmzoo.parallel'}),
  'fmzoo.bench.suite': ({'jax', 'numpy', 'absl'}, {
    'fmzoo.bench', 'fmzoo.build', 'fmzoo.command_line', 'fmzoo.data.shards'}),
  'fmzoo.inputs': ({'jax'}, {'fmzoo.augment', 'fmzoo.methods.flow'}),
  'fmzoo.augment': ({'jax', 'numpy'}, {'fmzoo.shapes'}),
  'fmzoo.precision': ({'jax', 'numpy'}, {
    'fmzoo.build', 'fmzoo.cost', 'fmzoo.methods', 'fmzoo.parallel', 'fmzoo.rows', 'fmzoo.sample',
    'fmzoo.sources'}),
  'fmzoo.programs': ({'jax'}, {
    'fmzoo.build', 'fmzoo.parallel', 'fmzoo.sources', 'fmzoo.step'}),
  'fmzoo.step': ({'jax', 'optax'}, {'fmzoo.rows'}),
  'fmzoo.optimizer': ({'jax', 'optax'}, set()),
  'fmzoo.encoders': ({'jax', 'flax', 'numpy', 'optax', 'absl'}, {
    'fmzoo.convert.dinov2', 'fmzoo.models.digits_encoder', 'fmzoo.models.dinov2',
    'fmzoo.parallel.hosts'}),
  'fmzoo.build': ({'jax', 'ml_collections'}, {
    'fmzoo.methods', 'fmzoo.models', 'fmzoo.optimizer', 'fmzoo.parallel', 'fmzoo.paths'}),
  'fmzoo.sources': ({'absl', 'jax'}, {
    'fmzoo.convert.vae', 'fmzoo.data', 'fmzoo.encoders', 'fmzoo.inputs', 'fmzoo.models.vae'}),
  'fmzoo.sampler': ({'jax', 'numpy'}, {
    'fmzoo.cost', 'fmzoo.parallel', 'fmzoo.pictures', 'fmzoo.sources'}),
  'fmzoo.sample': ({'jax', 'numpy', 'absl'}, {
    'fmzoo.checkpoint', 'fmzoo.files', 'fmzoo.hashes', 'fmzoo.metrics.protocol', 'fmzoo.npz',
    'fmzoo.parallel',
    'fmzoo.partial', 'fmzoo.paths', 'fmzoo.pictures', 'fmzoo.sampler', 'fmzoo.sources',
    'fmzoo.writer'}),
  'fmzoo.evaluators': ({'jax', 'numpy', 'absl'}, {
    'fmzoo.convert.inception', 'fmzoo.hashes', 'fmzoo.metrics', 'fmzoo.models.inception',
    'fmzoo.parallel', 'fmzoo.picture_stream', 'fmzoo.sources', 'fmzoo.writer'}),
  'fmzoo.evaluate': ({'numpy', 'absl'}, {
    'fmzoo.evaluators', 'fmzoo.files', 'fmzoo.hashes', 'fmzoo.metrics', 'fmzoo.parallel',
    'fmzoo.picture_stream', 'fmzoo.pictures', 'fmzoo.sample', 'fmzoo.sampler', 'fmzoo.writer'}),
  'fmzoo.make_reference': ({'numpy', 'absl'}, {
    'fmzoo.data.images', 'fmzoo.evaluators', 'fmzoo.files', 'fmzoo.hashes', 'fmzoo.metrics',
    'fmzoo.parallel', 'fmzoo.picture_stream', 'fmzoo.pictures', 'fmzoo.sources', 'fmzoo.writer'}),
  'fmzoo.train': ({'jax', 'numpy', 'absl'}, {
    'fmzoo.build', 'fmzoo.data', 'fmzoo.evaluate', 'fmzoo.files', 'fmzoo.hooks', 'fmzoo.parallel',
    'fmzoo.programs', 'fmzoo.rows', 'fmzoo.sample', 'fmzoo.sampler', 'fmzoo.sources'}),
  'fmzoo.hooks': ({'jax', 'numpy', 'absl'}, {
    'fmzoo.evaluate', 'fmzoo.files', 'fmzoo.metrics.protocol', 'fmzoo.parallel', 'fmzoo.pictures',
    'fmzoo.sampler', 'fmzoo.step', 'fmzoo.writer'}),
  'fmzoo.plan': ({'jax', 'absl'}, {
    'fmzoo.build', 'fmzoo.cost', 'fmzoo.parallel', 'fmzoo.programs', 'fmzoo.sampler'}),
  'fmzoo.convert_weights': ({'jax', 'absl'}, {'fmzoo.convert', 'fmzoo.files', 'fmzoo.sample'}),
  'fmzoo.command_line': ({'absl', 'ml_collections'}, {'fmzoo.paths'}),
  'fmzoo.main': (set(), {
    'fmzoo.command_line', 'fmzoo.build', 'fmzoo.writer', 'fmzoo.train', 'fmzoo.sample',
    'fmzoo.evaluate', 'fmzoo.make_reference', 'fmzoo.data.prepare', 'fmzoo.convert_weights',
    'fmzoo.bench', 'fmzoo.parallel.ends', 'fmzoo.parallel.hosts',
    'fmzoo.plan', 'fmzoo.precision', 'fmzoo.program_cache'}),
  'configs': ({'ml_collections'}, {'configs'}),
}


def modules():
  """Yields (dotted name, syntax tree) of every module."""
  for folder in ('fmzoo', 'configs'):
    for path in sorted((ROOT / folder).rglob('*.py')):
      name = '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
      yield name, ast.parse(path.read_text())


def imports(tree):
  """Yields the dotted names that a module imports, wherever the statement stands."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, 'imports are absolute'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def rule_of(name):
  """Returns the allowances of the longest prefix in the list."""
  prefixes = [p for p in ALLOWED if name == p or name.startswith(p + '.')]
  return ALLOWED[max(prefixes, key=len)] if prefixes else None


def within(name, allowed):
  return any(
    name == module or (module != 'fmzoo' and name.startswith(module + '.')) for module in allowed
  )


@pytest.mark.parametrize('name,tree', [pytest.param(*pair, id=pair[0]) for pair in modules()])
def test_imports_point_one_way(name, tree):
  """Fails on an edge that is not in ALLOWED, inside a function or not."""
  if name == 'fmzoo':
    assert not list(imports(tree))
    return
  rule = rule_of(name)
  assert rule is not None, f'{name} is in no layer; add it to ALLOWED'
  for target in imports(tree):
    package = target.partition('.')[0]
    if package in ('fmzoo', 'configs'):
      assert within(target, rule[1]), f'{name} imports {target}'
    elif package not in sys.stdlib_module_names:
      assert package in rule[0], f'{name} imports {target}'


def test_only_build_and_the_command_line_know_config_dicts():
  for name, tree in modules():
    uses = any(target.startswith('ml_collections') for target in imports(tree))
    knows = name in ('fmzoo.build', 'fmzoo.command_line') or name.startswith('configs')
    assert not uses or knows

"""Every recipe builds, and its init, loss and sampler trace at full size, which costs no memory."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import pytest

from configs import base
from fmzoo import build

MODULES = sorted(
  path.stem for path in pathlib.Path(base.__file__).parent.glob('*.py')
  if path.stem not in ('__init__', 'base')
)


def recipes():
  """Yields FILE or FILE:ARG of every recipe, as --config takes them, without .py."""
  for name in MODULES:
    sizes = getattr(importlib.import_module(f'configs.{name}'), 'SIZES', ())
    yield from [f'{name}:{size}' for size in sizes] or [name]


RECIPES = list(recipes())
# Parameters. Of XL counted on the official network; FRN of XL: 95,621,184. SiT-XL/2 has 674,834,720
# with the learned variance, half of its last layer (1152 x 16 + 16), and without position table.
# Of SoFlow with 1,001 labels and the position table, as its log counts.
PUBLISHED = {
  'bfm_xl': 963_401_712,
  'bfm:xl': 963_401_712,
  'bfm_xl_frn': 963_401_712 + 95_621_184,
  'bfm_frn:xl': 963_401_712 + 95_621_184,
  'sit:xl': 674_834_720 - 1152 * 16 - 16 + 256 * 1152,
  'soflow:b4': 131_214_400, 'soflow:b2': 131_288_080, 'soflow:m2': 308_281_360,
  'soflow:l2': 459_399_184, 'soflow:xl2': 676_735_504, 'soflow_cifar10': 55_932_419,
}
MILLIONS = {  # of our sizes, as the heads of their recipes say: all, FRN
  'bfm:s': (53.6, 0), 'bfm:b': (194.3, 0), 'bfm:l': (631.4, 0),
  'bfm_frn:s': (53.6, 5.3), 'bfm_frn:b': (194.3, 21.3), 'bfm_frn:l': (631.4, 56.7),
}


def config_of(name):
  file, _, argument = name.partition(':')
  return importlib.import_module(f'configs.{file}').get_config(*filter(None, [argument]))


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_traces_at_full_size(name):
  config = config_of(name)
  recipe = build.recipe(config)  # traces the sampler, too
  params = jax.eval_shape(recipe.method.init, jax.random.key(0))
  batch = {
    'latent': jax.ShapeDtypeStruct((recipe.method.period, *recipe.data.latent_shape), 'float32'),
    'label': jax.ShapeDtypeStruct((recipe.method.period,), 'int32'),
  }
  if 'feature' in recipe.method.inputs:
    tokens = (recipe.data.latent_size // config.model.patch) ** 2
    batch['feature'] = jax.ShapeDtypeStruct(
      (recipe.method.period, tokens, config.model.feature_dim), 'float32'
    )
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), recipe.method.period))
  loss, metrics = jax.eval_shape(
    recipe.method.loss, params, batch, keys, jax.ShapeDtypeStruct((), 'int32')
  )
  assert loss.shape == () and loss.dtype == jnp.float32
  assert all(value.shape == () for value in metrics.values())
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  if name in PUBLISHED:
    assert count == PUBLISHED[name]
  if name in MILLIONS:
    assert abs(count / 1e6 - sum(MILLIONS[name])) < 0.1  # two rounded numbers


def test_stage_two_starts_from_where_stage_one_ends():
  for second, first in (('bfm_xl_frn', 'bfm_xl'), ('bfm_frn:s', 'bfm_s'), ('bfm_frn:xl', 'bfm_xl')):
    assert config_of(second).run.init_from == f'runs/{first}'


@pytest.mark.parametrize('name', ['bfm', 'bfm_frn', 'sit', 'soflow'])
def test_unknown_sizes_are_refused(name):
  with pytest.raises(ValueError, match="size 'xxl' is unknown; use one of [^']*xl"):
    config_of(f'{name}:xxl')


@pytest.mark.parametrize('section,key,elements,expected', [
  ('method', 'time_mean', ('a', 0.0, 0.0), 'float'),
  ('method', 'time_std', (True, 1.0, 1.0), 'float'),
  ('log', 'keep_steps', (1.5,), 'int'),
])
def test_elements_of_tuples_have_a_type(section, key, elements, expected):
  config = config_of('soflow_digits')
  config[section] = {**config[section].to_dict(), key: elements}
  with pytest.raises(ValueError) as error:
    build.recipe(config)
  assert str(error.value) == (
    f'{section}.{key}={elements!r} must be of type tuple[{expected}, ...]'
  )


@pytest.mark.parametrize('name', MODULES)
def test_recipe_says_how_it_is_run(name):
  module = importlib.import_module(f'configs.{name}')
  assert f'python -m fmzoo.main --config=configs/{name}.py' in module.__doc__


def test_recipes_share_the_keys_of_base():
  """A recipe may add keys to model, method and sample alone."""
  shared = base.get()
  for name in RECIPES:
    config = config_of(name)
    for section in set(shared) - {'model', 'method', 'sample'}:
      assert set(config[section]) == set(shared[section]), f'{name}: {section}'
    assert set(shared.sample) <= set(config.sample)


def test_pictures_have_as_many_classes_as_one_says():
  """Without classes there is nothing to guide to."""
  configs = [config_of(name) for name in ('pictures', 'pictures:1', 'pictures:7')]
  assert [config.data.num_classes for config in configs] == [1, 1, 7]
  assert [config.method.guidance for config in configs] == [1.0, 1.0, 3.0]
  for wrong in ('0', 'cats', '-1'):
    with pytest.raises(ValueError, match=f"'{wrong}' must be the number of class folders"):
      config_of(f'pictures:{wrong}')

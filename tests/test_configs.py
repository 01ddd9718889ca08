"""Every recipe builds, and its init, loss and sampler trace at full size, which costs no memory."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import pytest

from configs import base
from fmzoo import build

RECIPES = sorted(
  path.stem for path in pathlib.Path(base.__file__).parent.glob('*.py')
  if path.stem not in ('__init__', 'base')
)
PUBLISHED = {'bfm_xl': 963_401_712}  # parameters, counted on the official network


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_traces_at_full_size(name):
  config = importlib.import_module(f'configs.{name}').get_config()
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
  if name in PUBLISHED:
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PUBLISHED[name]


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_says_how_it_is_run(name):
  module = importlib.import_module(f'configs.{name}')
  assert f'python -m fmzoo.main --config=configs/{name}.py' in module.__doc__


def test_recipes_share_the_keys_of_base():
  """A recipe may add keys to model, method and sample alone."""
  shared = base.get()
  for name in RECIPES:
    config = importlib.import_module(f'configs.{name}').get_config()
    for section in set(shared) - {'model', 'method', 'sample'}:
      assert set(config[section]) == set(shared[section]), f'{name}: {section}'
    assert set(shared.sample) <= set(config.sample)

"""What a training step of every SoFlow recipe multiplies, at full size and batch; traced alone."""

import ast
import pathlib

import jax
import pytest

from fmzoo import build, cost
from fmzoo import step as steps
from fmzoo.methods import soflow
from tests.test_configs import RECIPES, config_of

TERAFLOPS = {  # of the official network, per step: forward units of the specification x 2 x GMAC
  'soflow:b4': 4.5 * 256 * 2 * 5.563e-3,
  'soflow:b2': 4.5 * 256 * 2 * 23.003e-3,
  'soflow:m2': 4.5 * 256 * 2 * 53.801e-3,
  'soflow:l2': 4.5 * 256 * 2 * 80.695e-3,
  'soflow:xl2': 4.5 * 256 * 2 * 118.618e-3,
  'soflow_cifar10': 4.0 * 1024 * 2 * 21.2e-3,
}


def test_every_recipe_has_a_line():
  assert set(TERAFLOPS) == {r for r in RECIPES if r.startswith('soflow') and 'digits' not in r}


def step_of(name):
  """Returns (loss and gradient as a training step computes them, its abstract arguments)."""
  config = config_of(name)
  if 'remat' in config.model:
    config.model.remat = False  # what is computed again is no part of the formula
  recipe = build.recipe(config)
  size, method = recipe.data.batch_size, recipe.method
  batch = {
    'latent': jax.ShapeDtypeStruct((size, *recipe.data.latent_shape), 'float32'),
    'label': jax.ShapeDtypeStruct((size,), 'int32'),
  }
  if recipe.data.augment:
    batch['augment'] = jax.ShapeDtypeStruct((size, config.model.augment_dim), 'float32')

  def step(params, batch, keys, k):
    """Loss and gradient of the trained leaves."""
    chosen, fixed = steps.partition(params, method.trainable(params))
    return jax.value_and_grad(
      lambda p: method.loss(steps.merge(p, fixed), batch, keys, k), has_aux=True
    )(chosen)

  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))
  params = jax.eval_shape(method.init, jax.random.key(0))
  return step, (params, batch, keys, jax.ShapeDtypeStruct((), 'int32'))


@pytest.mark.parametrize('name', TERAFLOPS)
def test_a_step_costs_what_the_formula_says(name):
  step, args = step_of(name)
  found = cost.matmul_flops(step, *args) / 1e12
  assert 0.98 < found / TERAFLOPS[name] < 1.02


def test_nothing_differentiates_forwards():
  """The consistency loss is two calls: the method's files name no forward-mode derivative."""
  files = sorted(pathlib.Path(soflow.__file__).parent.glob('soflow*.py'))
  assert len(files) == 4
  for path in files:
    names = {
      node.attr if isinstance(node, ast.Attribute) else node.id
      for node in ast.walk(ast.parse(path.read_text()))
      if isinstance(node, (ast.Attribute, ast.Name))
    }
    assert not names & {'jvp', 'linearize', 'jacfwd', 'jet', 'hessian'}

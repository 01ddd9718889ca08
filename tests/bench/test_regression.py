"""What every digit recipe costs: its products by formula, one program a call, compiled once."""

import pytest

from fmzoo import build
from fmzoo.bench import measure, parts
from tests import tiny
from tests.test_configs import RECIPES, config_of

DIGITS = [name for name in RECIPES if 'digits' in name]
# Multiply-adds of the digit networks for one image: N tokens of width D, from P pixels a patch.
N, D, P, MLP, LORA, PROJECTOR, FEATURE = 16, 128, 4, 4, 32, 256, 64
CORE = N * (4 + 2 * MLP) * D**2 + 2 * N**2 * D  # attention and MLP of a block
TIME, PATCHES, SHARED = 256 * D + D**2, N * P * D, 6 * D**2
DIT = TIME + PATCHES + 4 * (CORE + 6 * D**2) + 2 * D**2 + N * D * P
SOLUTION = DIT + TIME  # of two times
FEATURES = PATCHES + SHARED + 3 * (CORE + D * LORA + LORA * 6 * D)
RESIDUAL = PATCHES + CORE + 6 * D**2
# Condition and every token modulate a velocity block: N + 1 rows in its joint layers.
VELOCITY = PATCHES + (N + 1) * (SHARED + D * LORA) + N * LORA * 6 * D + CORE
VELOCITY += (N + 1) * 2 * D**2 + N * D * P
PROJECTION = N * (D * PROJECTOR + PROJECTOR**2 + PROJECTOR * FEATURE)
ENCODER = 64 * 9 * 32 + 16 * 9 * 32 * 64 + 16 * 9 * 64 * 64 + 64 * 10
BFM = FEATURES + VELOCITY + TIME + PROJECTION
# Forward, and the same for the gradients of parameters and of what goes in, but of x and t.
STEPS = {
  'sit_digits': 3 * DIT - PATCHES - 256 * D,
  'bfm_digits': 3 * BFM - 2 * PATCHES - 256 * D + ENCODER,
  # The embedding before the residual network is frozen, and its modulation has no gradient in c.
  'bfm_digits_frn': 2 * (FEATURES + TIME) + 3 * RESIDUAL - 2 * PATCHES - 6 * D**2,
  'soflow_digits': 60_473_344,  # as counted; 4.5 forward passes are 0.4 % less
}
SAMPLERS = {  # (for each image, for each batch)
  'sit_digits': (48 * DIT, 0),
  'bfm_digits': (48 * (FEATURES + VELOCITY), 48 * TIME),
  'bfm_digits_frn': (6 * FEATURES + 42 * RESIDUAL + 48 * VELOCITY, 48 * TIME),
  'soflow_digits': (SOLUTION, 0),
}


def test_every_digit_recipe_has_a_line():
  assert set(STEPS) == set(SAMPLERS) == set(DIGITS)


def recipe_of(name):
  config = config_of(name)
  config.mesh.data = 1
  return build.recipe(config)


@pytest.mark.parametrize('name', STEPS)
def test_a_training_step_multiplies_what_the_formula_says(name):
  made = parts.training_step(recipe_of(name))
  assert sum(made.flops.values()) == 2 * made.rows * STEPS[name]
  assert made.spent == made.flops


@pytest.mark.parametrize('name', SAMPLERS)
def test_a_sampler_multiplies_what_the_formula_says(name):
  made = parts.sampler(recipe_of(name))
  image, batch = SAMPLERS[name]
  assert sum(made.flops.values()) == 2 * (made.rows * image + batch)


def test_a_step_of_soflow_is_four_and_a_half_forward_passes():
  assert abs(STEPS['soflow_digits'] / (4.5 * SOLUTION) - 1) < 0.02


@pytest.mark.parametrize('method', tiny.METHODS)
@pytest.mark.parametrize('devices', [1, 2])
def test_digit_recipes_start_one_program_a_call(method, devices, monkeypatch):
  """Shrunk; and compile nothing, nor return a state that the step would not take."""
  monkeypatch.setattr(measure, 'SECONDS', 0.01)
  recipe = tiny.recipe(method, mesh__data=devices, data__batch_size=24)
  for make in parts.PROGRAMS.values():
    (found,) = measure.measure([make(recipe)], runs=1)
    assert (found.dispatches, found.compilations) == (1, 0)

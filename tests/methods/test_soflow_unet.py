"""SoFlow hands augmentation labels and dropout keys to its network, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmzoo.methods import flow, soflow, soflow_rows
from fmzoo.models import layers

CONFIG = soflow.Config(
  path='linear', solution='euler', velocity_ratio=0.75, total_steps=1, time_mean=(0.0,) * 3,
  time_std=(1.0,) * 3, guidance=1.0, mix_ratio=1.0, guidance_decay_time=1.0, label_dropout=0.0,
  weight_power=1.0, weight_eps=0.01, middle_schedule='const', middle_initial=0.1, middle_final=0.1,
)
GUIDED = {'guidance': 3.0, 'mix_ratio': 0.25, 'label_dropout': 0.1}


def rows(size):
  """Returns Rows whose labels, augmentation labels and keys all tell their number."""
  x, noise = jax.random.normal(jax.random.key(0), (2, size, 4, 4, 3))
  numbers = jnp.arange(size)
  t = jnp.linspace(0.3, 0.9, size)
  return soflow_rows.Rows(
    x, noise, numbers, jnp.zeros(size, bool), t, t / 4, t / 2,
    augment=jnp.tile(numbers[:, None].astype(jnp.float32), (1, 6)),
    dropout=jax.vmap(jax.random.key)(numbers),
  )


def calls_of(config, given):
  """Returns [(times, labels, keywords)] of every network call of a loss."""
  @jax.jit
  def run(given):
    """The loss, for the sake of the calls it makes."""
    calls = []

    def apply(params, x, t, duration, labels, **keywords):
      calls.append((t, labels, keywords))
      return params * x

    net = layers.Network(None, apply, None, apply)
    soflow.loss_of_rows(config, net, 100, jnp.float32(0.5), given)
    return calls

  return jax.device_get(run(given))


def numbers_of(keywords):
  """Returns the rows' numbers in augmentation labels and in keys."""
  keys = np.asarray(jax.random.key_data(keywords['dropout']))[:, 1]
  return np.asarray(keywords['augment'])[:, 0].astype(int), keys.astype(int)


@pytest.mark.parametrize('changes', [{}, GUIDED])
def test_every_call_has_the_labels_and_keys_of_its_rows(changes):
  """Row i has label i, augmentation label i and key i, at the middle time as well."""
  config = soflow.Config(**{**CONFIG.__dict__, **changes})
  given = rows(8)
  calls = calls_of(config, given)
  assert len(calls) == 2 + bool(changes)
  with_keywords = [call for call in calls if call[2]]  # free velocities have none
  assert sorted(len(labels) for _, labels, _ in with_keywords) == [4, 6]
  for t, labels, keywords in with_keywords:
    for numbers in numbers_of(keywords):
      np.testing.assert_array_equal(numbers, labels)
    if len(labels) == 4:  # a quarter of the rows, each at t and at the middle time
      np.testing.assert_array_equal(labels[::2], labels[1::2])
      np.testing.assert_array_equal(t[::2], np.asarray(given.t)[labels[::2]])
      np.testing.assert_array_equal(t[1::2], np.asarray(given.t_mid)[labels[::2]])


def test_rows_without_them_give_the_network_none():
  given = rows(8)._replace(augment=None, dropout=None)
  assert all(not keywords for _, _, keywords in calls_of(CONFIG, given))


def test_masks_of_both_passes_are_shared():
  """A network that is a mask: the quotient written out with one mask for both passes."""
  def apply(params, x, t, duration, labels, dropout=None):
    keep = 1.0 if dropout is None else jax.vmap(
      lambda key: jax.random.bernoulli(key, 0.5, x.shape[1:])
    )(dropout)
    return params * keep * flow.expand_as(1 + duration, x)

  net = layers.Network(None, apply, None, apply)
  config = soflow.Config(**{**CONFIG.__dict__, 'velocity_ratio': 0.0})
  given = rows(6)._replace(augment=None)
  keep = apply(1.0, given.x, 0 * given.t, 0 * given.t, given.labels, given.dropout)
  velocity = given.noise - given.x
  t, s, t_mid = (flow.expand_as(a, given.x) for a in (given.t, given.s, given.t_mid))
  n_t, n_mid = 0.5 * keep * (1 + t - s), 0.5 * keep * (1 + t_mid - s)
  quotient = velocity - n_mid - (t - s) / (t - t_mid) * (n_t - n_mid)
  _, metrics = soflow.loss_of_rows(config, net, 100, jnp.float32(0.5), given)
  np.testing.assert_allclose(metrics['consistency/mse'], np.mean(quotient**2), rtol=1e-5)

"""The DiT refuses what only other networks take."""

import jax
import jax.numpy as jnp
import pytest

from fmzoo.models import dit

TINY = dit.Config(
  patch=2, width=16, depth=1, heads=2, mlp_ratio=2.0, duration=True, dtype='float32',
  precision='highest', attention='xla', remat=False, unroll=1,
)


@pytest.mark.parametrize('given,words', [
  ({'augment': jnp.zeros((2, 6))}, r'augment of shape \(2, 6\) was given to a DiT, which has none'),
  ({'dropout': jax.random.split(jax.random.key(0), 2)}, r'dropout of shape \(2,\) was given'),
])
def test_augmentation_labels_and_dropout_keys_are_refused(given, words):
  net, t = dit.make(TINY, (4, 4, 3), 10), jnp.zeros(2)
  params = jax.eval_shape(net.init, jax.random.key(0))
  with pytest.raises(ValueError, match=words):
    net.apply(params, jnp.zeros((2, 4, 4, 3)), t, t, jnp.zeros(2, jnp.int32), **given)

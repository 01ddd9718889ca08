"""SoFlow's U-Net against numbers recorded from the official code."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from fmzoo.convert import soflow_unet as convert
from fmzoo.methods import soflow_sampler
from fmzoo.models import unet
from tests import golden_files as files
from tests.methods import test_soflow_golden as of_dit

PREFIXES = ('unet.', 'uvel.', 'ucon.', 'temb.unet')  # all that this file answers for
SIDES = {'enc': 'encoder', 'dec': 'decoder'}


class Golden(of_dit.Golden):
  """The folder, and the U-Net that its config.json describes."""

  def __init__(self, folder):
    self.config = files.config(folder)
    self.config['loss'] = self.config['unet_loss']  # for `settings`
    self.arrays = files.Arrays(folder / 'io.npz')
    u, self.classes = self.config['unet'], 0
    self.model = unet.Config(
      width=u['model_channels'], multipliers=tuple(u['channel_mult']), blocks=u['num_blocks'],
      attention_resolutions=tuple(u['attn_resolutions']), dropout=0.3, augment_dim=6,
      dtype='float32', precision='highest', remat=False,
    )
    self.shape = (u['data_size'], u['data_size'], 3)
    made = unet.make(self.model, self.shape, self.classes)
    self.net = made._replace(apply=jax.jit(made.apply))
    self.params = convert.from_official(
      load_file(folder / 'unet.safetensors'), self.model, 3,
      jax.eval_shape(made.init, jax.random.key(0)),
    )

  def official(self, params):
    return convert.to_official(params, self.model, 3)

  def inputs(self):
    """Returns (x, t, s, labels that nobody reads)."""
    x, t, s = self.image('unet.x'), self.arrays['unet.t'], self.arrays['unet.s']
    return x, t, s, np.zeros(len(x), np.int32)


@pytest.fixture(scope='module')
def golden(golden_root):
  """The folder of --golden-root alone: to compile another U-Net takes a minute."""
  return Golden(golden_root / 'soflow')


def test_network_outputs(golden):
  x, t, s, labels = golden.inputs()
  a, solution = golden.arrays, golden.settings().solution

  def check(name, value):
    files.close(files.channels_first(value), a[name], of_dit.NETWORK, name)

  augmented = golden.net.apply(
    golden.params, x, t, t - s, labels, augment=a['unet.aug_labels']
  )
  check('unet.net', augmented)
  check('unet.net_noaug', golden.net.apply(golden.params, x, t, t - s, labels))
  check('unet.solution_noaug', soflow_sampler.solve(
    golden.net, golden.params, x, solution=solution, t=t, s=s, labels=labels
  ))


def test_debug_arrays(golden):
  """Embedding, every layer's channel means, and the first block's whole output."""
  a = golden.arrays
  if not golden.config['debug']:
    assert not a.names('unet.dbg')
    return
  x, t, s, _ = golden.inputs()
  with jax.default_matmul_precision('highest'):
    _, state = jax.jit(lambda params: unet.UNet(golden.model).apply(
      {'params': params}, x, t, t - s, a['unet.aug_labels'], None, capture_intermediates=True,
      mutable='intermediates',
    ))(golden.params)

  def output(layer):
    """What a layer returned, by its official name, as it is or with the decoder's 'aux_'."""
    side, _, name = layer.partition('.')
    size, _, kind = name.partition('_')
    ours = f'{SIDES[side]}_{size.split("x")[0]}_{kind.removeprefix("aux_")}'
    return state['intermediates'][ours]['__call__'][0]

  files.close(
    state['intermediates']['embedding']['__call__'][0], a['unet.dbg.emb'], of_dit.NETWORK, 'emb'
  )
  means = [name for name in a.names('unet.dbg.') if name.endswith('.chmean')]
  assert means
  for name in means:
    layer = name.removeprefix('unet.dbg.').removesuffix('.chmean')
    files.close(np.mean(output(layer), axis=(1, 2)), a[name], of_dit.NETWORK, name)
  first = output(f'enc.{golden.shape[0]}x{golden.shape[0]}_block0')[:1]
  files.close(
    files.channels_first(first), a['unet.dbg.enc_block0_sample0'], of_dit.NETWORK, 'first block'
  )


def test_time_features(golden):
  """The network's order is sines first; the raw arrays have cosines first."""
  a, exact = golden.arrays, {'rtol': 0, 'atol': 2e-6}
  names = a.names('temb.unet')
  assert names
  for name in names:
    width = a[name].shape[-1]
    features = np.asarray(unet.sinusoid(a['temb.t'], width))
    if name.endswith('_raw'):
      features = np.roll(features, width // 2, axis=-1)
    np.testing.assert_allclose(features, a[name], err_msg=name, **exact)


def test_losses_and_gradients(golden):
  a = golden.arrays
  for case in golden.config['unet_loss_cases']:
    pre, kind = case['pre'], case['kind']
    limit = of_dit.MIN_GAP if 'mingap' in pre else (
      of_dit.CONSISTENCY if kind == 'con' else of_dit.LOSS
    )
    config = golden.settings(case, velocity_ratio=1.0 if kind == 'vel' else 0.0)
    rows = of_dit.rows_of(golden, pre, kind)._replace(augment=a[f'{pre}.aug_labels'])
    (loss, metrics), grads = golden.value_and_grad(config, golden.params, rows)
    part = 'flow' if kind == 'vel' else 'consistency'
    grads = {key: g for key, g in golden.official(grads).items() if 'resample_filter' not in key}
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values()))
    for value, name in (
      (loss, 'loss'), (metrics[f'{part}/mse'], 'mse'), (metrics[f'{part}/weight'], 'weight'),
      (norm, 'grad_norm'),
    ):
      files.close(value, a[f'{pre}.{name}'].squeeze(), limit, f'{pre}.{name}')
    named = a.names(f'{pre}.grad.')
    assert named
    for name in named:
      key = name.removeprefix(f'{pre}.grad.').removeprefix('network.')
      files.close(grads[f'network.{key}'], a[name], limit, name)


def test_samplers(golden):
  """From unet.x and with unet.renoise; the number of calls is in the name."""
  a, (x, _, _, labels) = golden.arrays, golden.inputs()
  renoise, names = golden.image('unet.renoise'), golden.arrays.names('unet.nfe')
  assert names
  for name in names:
    calls = int(name.removeprefix('unet.nfe'))
    out = soflow_sampler.few_step_sample(
      golden.net, golden.params, x, labels, config=golden.settings(), steps=calls,
      renoise=renoise[: calls - 1],
    )
    files.close(files.channels_first(out), a[name], of_dit.NETWORK, name)


def test_every_array_is_an_input_or_was_checked(golden):
  """Runs after the tests above in this file, which mark what they look at."""
  inputs = set(golden.config['input_keys'])
  unused = set(golden.arrays.unused()) - inputs
  assert not sorted(name for name in unused if name.startswith(PREFIXES))

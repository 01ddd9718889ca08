"""BFM against numbers recorded from the official code (tests/golden/bfm/README.md).

And against those of another configuration, written by the float64 reference (tests/bfm_reference).
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fmzoo.convert import bfm as convert
from fmzoo.methods import bfm, bfm_frn, bfm_sampler, flow
from fmzoo.models import blockwise, layers
from tests import bfm_golden_writer, tiny
from tests import golden_files as files

FORWARD, GRADIENT, SAMPLER = 1e-5, 3e-5, 5e-5  # limits of the README there


class Golden:
  """The folder, and the model that its config.json describes."""

  def __init__(self, folder):
    self.config = c = files.config(folder)
    self.arrays = files.Arrays(folder / 'io.npz')
    self.classes, self.segments = c['num_classes'], c['segments']
    self.settings = blockwise.Config(
      patch=c['patch_size'], width=c['hidden_size'], heads=c['num_heads'],
      mlp_ratio=c['mlp_ratio'], segments=c['segments'], segment_depth=c['segment_depth'],
      feature_depth=c['feature_alignment_depth'], frn_depth=c['frn_depth'],
      lora_width=c['adaln_lora_dim'], rotary_theta=c['rope_theta'], feature_dim=c['dim_projection'],
      projector_width=c['projector_hidden'], dtype='float32', precision='highest',
      attention='xla', remat=False, unroll=1,
    )
    shape = (c['context_size'], c['context_size'], c['in_channels'])
    net = blockwise.make(self.settings, shape, c['num_classes'])
    self.net = tiny.jitted(net)
    self.edges = bfm_sampler.segment_edges(self.segments)
    self.tensors = load_file(folder / 'weights.safetensors')
    self.params = convert.from_official(
      self.tensors, self.settings, c['in_channels'], jax.eval_shape(net.init, jax.random.key(0))
    )

  def image(self, name):
    return files.channels_last(self.arrays[name])

  def labels(self, name):
    return self.arrays[name].astype(np.int32)

  def official(self, params):
    return convert.to_official(params, self.settings, self.config['in_channels'])

  def order(self, sizes):
    """Returns where our row i (of segment i mod S) stands in a batch sorted by segment."""
    starts = np.cumsum([0, *sizes[:-1]])
    rows = [starts[i % self.segments] + i // self.segments for i in range(int(sum(sizes)))]
    assert sorted(rows) == list(range(int(sum(sizes)))), 'the split is not the official one'
    return np.array(rows)

  def check_derivatives(self, stage, loss):
    """Compares recorded gradients, and slopes along recorded directions, with those of `loss`."""
    a = self.arrays
    grads = jax.jit(jax.grad(loss))(self.params)
    official = self.official(grads)
    whole, sloped = a.names(f'{stage}_grad/'), a.names(f'{stage}_slope/')
    assert whole
    for name in whole:
      files.close(official[name.partition('/')[2]], a[name], GRADIENT, name)
    for name in sloped:
      key = name.partition('/')[2]
      direction = a[f'{stage}_direction/{key}'].astype(np.float64)
      files.close(np.vdot(official[key].astype(np.float64), direction), a[name], GRADIENT, name)
    return grads

  def rows(self, prefix, with_feature=True):
    """Returns (Rows in our order, order)."""
    order = self.order(self.arrays[f'{prefix}_split_sizes'])
    return bfm.Rows(
      self.image(f'{prefix}_images')[order], self.image(f'{prefix}_noise')[order],
      self.labels(f'{prefix}_y')[order], self.arrays[f'{prefix}_t'][order],
      self.arrays['train_zs'][order] if with_feature else None,
    ), order


@pytest.fixture(scope='module', params=['recorded', 'written'])
def golden(request, golden_root, tmp_path_factory):
  """The folder of --golden-root, and one of the reference's."""
  if request.param == 'recorded':
    return Golden(golden_root / 'bfm')
  folder = tmp_path_factory.mktemp('golden') / 'bfm'
  bfm_golden_writer.write_folder(folder, bfm_golden_writer.SECOND_CONFIG, seed=0)
  return Golden(folder)


def stage1(golden, path='linear'):
  return bfm.Config(
    path=path, edges=(), alignment_weight=golden.config['proj_loss_weight'], label_dropout=0.0
  )


def forward(golden, x, t, labels):
  """Returns (velocity, projected features) of rows in our order, any number of them."""
  c = golden.net.condition(golden.params, t, labels)
  f = golden.net.features(golden.params, x, c)
  return golden.net.velocity_by_row(golden.params, x, c, f), golden.net.project(golden.params, f)


def test_the_configuration_is_one_that_we_have(golden):
  """What the official code can vary and we cannot."""
  c = golden.config
  assert c['adaln_type'] == 'lora' and c['null_label'] == c['num_classes']
  assert c['q_norm'].lower() == c['k_norm'].lower() == 'rmsnorm'
  assert (c['norm_eps'], c['time_freq_dim']) == (layers.NORM_EPS, layers.FREQUENCIES)


def test_training_forward_and_losses(golden):
  a = golden.arrays
  rows, order = golden.rows('train')
  x_t = flow.interpolate('linear', rows.x, rows.noise, rows.t)
  target = flow.velocity_target('linear', rows.x, rows.noise, rows.t)
  v, z = forward(golden, x_t, rows.t, rows.labels)
  for name, value in (
    ('train_x_t', files.channels_first(x_t)), ('train_v_target', files.channels_first(target)),
    ('train_v', files.channels_first(v)), ('train_z', z),
    ('train_loss_per_sample', flow.row_mean((v - target) ** 2)),
  ):
    files.close(value, a[name][order], FORWARD, name)
  loss, metrics = bfm.loss_of_rows(stage1(golden), golden.net, golden.params, rows)
  files.close(metrics['velocity/mse'], a['train_loss_denoise'], FORWARD, 'denoise')
  files.close(-metrics['alignment/cosine'], a['train_loss_proj'], FORWARD, 'alignment')
  files.close(loss, a['train_loss_total'], FORWARD, 'total')


def test_cosine_path(golden):
  a = golden.arrays
  rows, order = golden.rows('train')
  x_t = flow.interpolate('trig', rows.x, rows.noise, rows.t)
  target = flow.velocity_target('trig', rows.x, rows.noise, rows.t)
  files.close(files.channels_first(x_t), a['cos_x_t'][order], FORWARD, 'x_t')
  files.close(files.channels_first(target), a['cos_v_target'][order], FORWARD, 'v')
  _, metrics = bfm.loss_of_rows(stage1(golden, 'trig'), golden.net, golden.params, rows)
  files.close(metrics['velocity/mse'], a['cos_loss_denoise'], FORWARD, 'denoise')
  files.close(-metrics['alignment/cosine'], a['cos_loss_proj'], FORWARD, 'alignment')


def test_batch_smaller_than_the_segments(golden):
  a, order = golden.arrays, golden.order(golden.arrays['small_split_sizes'])
  v, z = forward(
    golden, golden.image('small_x')[order], a['small_t'][order], golden.labels('small_y')[order]
  )
  files.close(files.channels_first(v), a['small_v'][order], FORWARD, 'v')
  files.close(z, a['small_z'][order], FORWARD, 'z')


def test_training_gradients(golden):
  a = golden.arrays
  rows, _ = golden.rows('train')
  grads = golden.check_derivatives(
    'train', lambda p: bfm.loss_of_rows(stage1(golden), golden.net, p, rows)[0]
  )
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads['frn']))
  if 'train_grad_global_norm' in a:
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(grads)))
    files.close(norm, a['train_grad_global_norm'], GRADIENT, 'global norm')


def test_frn_stage(golden):
  a = golden.arrays
  rows, order = golden.rows('ft', with_feature=False)
  config = bfm_frn.Config(path='linear', edges=(), label_dropout=0.0)
  segment = np.arange(len(order)) % golden.segments
  x_t = flow.interpolate('linear', rows.x, rows.noise, rows.t)
  t_start = golden.edges[segment]
  x_start = flow.interpolate('linear', rows.x, rows.noise, t_start)
  kappa = (t_start - rows.t) / (t_start - golden.edges[segment + 1])
  approx, target = bfm_frn.approximate(config, golden.net, golden.params, rows)
  for name, value in (
    ('ft_x_t', files.channels_first(x_t)), ('ft_t_start', t_start),
    ('ft_x_start', files.channels_first(x_start)), ('ft_coeff', kappa[:, None, None]),
    ('ft_approx', approx), ('ft_target', target),
  ):
    files.close(value, a[name][order], FORWARD, name)

  def loss(params):
    approx, target = bfm_frn.approximate(config, golden.net, params, rows)
    return jnp.mean(flow.row_mean((approx - target) ** 2))

  files.close(jax.jit(loss)(golden.params), a['ft_loss'], FORWARD, 'loss')
  golden.check_derivatives('ft', loss)


def test_sampling_forward(golden):
  a, net, p = golden.arrays, golden.net, golden.params
  x, y, cached = golden.image('samp_x'), golden.labels('samp_y'), a['samp_cached_feature']
  for s in range(golden.segments):
    t = a['samp_t'][s]
    assert (bfm_sampler.segment_of(t, golden.edges) == s).all()
    c = net.condition(p, t, y)
    f = net.features(p, x, c)
    files.close(f, a[f'samp_feature_seg{s}'], FORWARD, 'feature')
    v = jax.jit(net.velocity)(p, x, c, f, jnp.int32(s))
    files.close(files.channels_first(v), a[f'samp_v_seg{s}'], FORWARD, 'velocity')
    f = cached + a['samp_coeff'] * net.residual(p, x, c)
    if f'dbg_samp_frn_combined_feature_seg{s}' in a:
      files.close(f, a[f'dbg_samp_frn_combined_feature_seg{s}'], FORWARD, 'FRN feature')
    v = net.velocity(p, x, c, f, jnp.int32(s))
    files.close(files.channels_first(v), a[f'samp_frn_v_seg{s}'], FORWARD, 'FRN velocity')


def sampler_case(golden, name):
  """Returns (path, options) that a recorded name stands for, such as sde_fixed_cfg4."""
  frn, sde = name.startswith('frn_'), name.startswith('sde_')
  scale = re.search(r'cfg([0-9.]+)', name)
  interval = golden.config['frn_interval' if frn else 'interval']
  return 'trig' if 'cosine' in name else 'linear', {
    'sampler': 'ode_frn' if frn else 'sde' if sde else 'ode',
    'guidance': float(scale[1]) if scale else 4.0,
    'guidance_interval': tuple(interval) if 'interval' in name else (0.0, 1.0),
    'sde_end': 'corrected' if 'fixed' in name or not sde else 'official',
  }


def sampler_names(golden):
  names = golden.arrays.names()
  return [n for n in names if n.split('_')[0] in ('ode', 'frn', 'sde') and 'calls' not in n]


def plan(golden, options):
  return bfm_sampler.plan_steps(
    golden.edges, (golden.config['smp_steps'],) * golden.segments, **options
  )


def test_samplers(golden):
  a, labels = golden.arrays, golden.labels('smp_y')
  noises = jnp.asarray(files.channels_last(a['smp_sde_noise']), jnp.float32)
  names = sampler_names(golden)
  assert {'ode_cfg4', 'frn_cfg4', 'sde_cfg1', 'sde_fixed_cfg1'} <= set(names)
  for name in names:
    path, options = sampler_case(golden, name)
    steps = plan(golden, options)

    def run(params, x, path=path, options=options, steps=steps):
      calls = bfm_sampler.make_calls(
        golden.net, params, labels, golden.classes, guidance=options['guidance'],
        guided=steps.guided,
      )
      return bfm_sampler.integrate(
        path, calls, golden.edges, steps, x, sampler=options['sampler'],
        noise_at=lambda i: noises[i],
      )

    out = jax.jit(run)(golden.params, golden.image('smp_latents'))
    files.close(files.channels_first(out), a[name], SAMPLER, name)


def test_network_calls_of_the_samplers(golden):
  """Time, guidance and segment of each."""
  a, count = golden.arrays, len(golden.labels('smp_y'))
  for name in sampler_names(golden):
    if f'{name}_calls' not in a:
      continue
    times, batches, segments = a[f'{name}_calls'].T
    steps = plan(golden, sampler_case(golden, name)[1])
    np.testing.assert_allclose(steps.t, times, rtol=0, atol=6e-8)
    np.testing.assert_array_equal(steps.segment, segments)
    np.testing.assert_array_equal(bfm_sampler.segment_of(steps.t, golden.edges), segments)
    np.testing.assert_array_equal(np.where(steps.guided, 2, 1) * count, batches)


def test_score(golden):
  a, segment = golden.arrays, min(1, golden.segments - 1)
  v, x, t = golden.image(f'samp_v_seg{segment}'), golden.image('samp_x'), a['samp_t'][segment]
  for name, path in (('score_linear', 'linear'), ('score_cosine', 'trig')):
    ours = np.stack([bfm_sampler.score(path, v[i], x[i], t[i]) for i in range(len(t))])
    files.close(files.channels_first(ours), a[name], FORWARD, name)


def linear(layer, x):
  """A linear layer of our parameters."""
  return x @ layer['kernel'] + layer['bias'].reshape((1,) * (x.ndim - 1) + (-1,))


def slice_of(stack, *index):
  """The parameters of one block of a stack."""
  return jax.tree.map(lambda leaf: leaf[index], stack['blocks'])


class Debug:
  """Compares what is inside the training forward, for the first samples (all of segment 0)."""

  def __init__(self, golden):
    self.golden, self.config = golden, golden.settings
    grid = golden.config['context_size'] // self.config.patch
    self.rotary = layers.rotary_table(
      grid, self.config.width // self.config.heads, self.config.rotary_theta
    )

  def check(self, name, value):
    """Compares where the folder has such an array; what it has beyond these fails at the end."""
    if f'dbg_{name}' in self.golden.arrays:
      files.close(value, self.golden.arrays[f'dbg_{name}'], FORWARD, name)

  def condition(self, t, y):
    p, width = self.golden.params, self.config.width
    self.check('t_sinusoid', layers.sinusoid(t))
    time = layers.TimeEmbedding(width).apply({'params': p['time']}, t)
    labels = layers.LabelEmbedding(self.golden.classes, width).apply({'params': p['labels']}, y)
    self.check('t_emb', time)
    self.check('y_emb', labels)
    self.check('c', time + labels)
    return self.golden.net.condition(p, t, y)

  def in_official_order(self, patches):
    """[.., P P C] -> [.., C P P]."""
    split = patches.reshape(*patches.shape[:2], -1, self.golden.config['in_channels'])
    return jnp.swapaxes(split, 2, 3).reshape(patches.shape)

  def features(self, patches, c):
    p, few = self.golden.params, len(patches)
    active = jax.nn.silu(c)
    shared = linear(p['feature_shared'], active)
    self.check('global_adaln', shared)
    h = linear(p['feature_patches'], patches)
    self.check('rep_x_embed', h)
    for i in range(self.config.feature_depth):
      block = slice_of(p['feature_blocks'], i)
      modulation = self.modulation(f'rep_block{i}', block, active, shared)
      h = self.inside(f'rep_block{i}', block['core'], h, modulation[:few, None])
    return h

  def modulation(self, name, block, active, shared):
    """The modulation of a block: its low-rank share and that of all."""
    total = linear(block['up'], linear(block['down'], active)) + shared
    self.check(f'{name}_adaln_total', total)
    return total

  def inside(self, name, core, h, modulation):
    """One transformer block: queries, attention and MLP before their gates; returns its output."""
    heads, attention = self.config.heads, core['attn']
    shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
    x = layers.modulate(layers.layer_norm(h), shift1, scale1)
    q = linear(attention['qkv'], x).reshape(*h.shape[:2], 3, heads, -1)[:, :, 0]
    self.check(f'{name}_q_before_norm', jnp.swapaxes(q, 1, 2))
    q = layers.RMSNorm().apply({'params': attention['q_norm']}, q)
    self.check(f'{name}_q_after_norm', jnp.swapaxes(q, 1, 2))
    halves = layers.rotate(q, self.rotary).reshape(*q.shape[:3], 2, -1)
    turned = jnp.swapaxes(halves, 3, 4).reshape(q.shape)  # pairs side by side again
    self.check(f'{name}_q_after_rope', jnp.swapaxes(turned, 1, 2))
    attend = layers.Attention(heads, qk_norm=True)
    branch = attend.apply({'params': attention}, x, self.rotary)
    self.check(f'{name}_attn_out', branch)
    h = h + gate1 * branch
    x = layers.modulate(layers.layer_norm(h), shift2, scale2)
    branch = linear(core['mlp']['fc2'], jax.nn.gelu(linear(core['mlp']['fc1'], x)))
    self.check(f'{name}_mlp_out', branch)
    h = h + gate2 * branch
    self.check(f'{name}_out', h)
    return h

  def velocity(self, patches, c, f):
    """Everything after the features, by the definition: on the concatenation of c and f."""
    p = self.golden.params
    z = jnp.concatenate([jnp.broadcast_to(c[:, None], f.shape), f], axis=-1)
    self.check('c_repre', z)
    z = jax.nn.silu(z)
    shared = linear(p['velocity_shared'], z)
    self.check('global_adaln2', shared)
    h = linear(p['velocity_patches'], patches)
    self.check('x_embed', h)
    for i in range(self.config.segment_depth):
      block = slice_of(p['segments'], i, 0)
      modulation = self.modulation(f'vel0_block{i}', block, z, shared)
      h = self.inside(f'vel0_block{i}', block['core'], h, modulation)
    shift, scale = jnp.split(linear(p['final']['modulation'], z), 2, axis=-1)
    out = linear(p['final']['linear'], layers.modulate(layers.layer_norm(h), shift, scale))
    self.check('final_tokens', self.in_official_order(out))


def test_debug_arrays(golden):
  a, few = golden.arrays, golden.config['debug_samples']
  debug = Debug(golden)

  def run():
    debug.check('rope_cos', np.repeat(debug.rotary[0], 2, axis=1))
    debug.check('rope_sin', np.repeat(debug.rotary[1], 2, axis=1))
    patches = layers.patchify(golden.image('train_x_t')[:few], golden.settings.patch)
    debug.check('patches', debug.in_official_order(patches))
    c = debug.condition(a['train_t'], golden.labels('train_y'))
    debug.velocity(patches, c[:few], debug.features(patches, c))

  with jax.default_matmul_precision('highest'):
    run()


def test_round_trip_is_bit_equal(golden):
  back = golden.official(golden.params)
  assert set(back) == set(golden.tensors)
  for key, value in golden.tensors.items():
    assert back[key].dtype == value.dtype
    np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_every_array_was_checked(golden):
  """Runs after the tests above in this file, which mark what they look at."""
  assert golden.arrays.unused() == []

"""BFM against numbers recorded from the official code (tests/golden/bfm/README.md)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fmzoo.convert import bfm as convert
from fmzoo.methods import bfm, bfm_frn, flow
from fmzoo.models import blockwise, layers
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
      lora_width=c['adaln_lora_dim'], feature_dim=c['dim_projection'],
      projector_width=c['projector_hidden'], dtype='float32', precision='highest',
      attention='xla', remat=False, unroll=1,
    )
    shape = (c['context_size'], c['context_size'], c['in_channels'])
    net = blockwise.make(self.settings, shape, c['num_classes'])
    parts = {name: jax.jit(part) for name, part in net._asdict().items() if callable(part)}
    self.net = net._replace(**parts)  # eagerly every call would compile its scan anew
    self.params = convert.from_official(
      load_file(folder / 'weights.safetensors'), self.settings, c['in_channels']
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

  def rows(self, prefix, with_feature=True):
    """Returns (Rows in our order, order)."""
    order = self.order(self.arrays[f'{prefix}_split_sizes'])
    return bfm.Rows(
      self.image(f'{prefix}_images')[order], self.image(f'{prefix}_noise')[order],
      self.labels(f'{prefix}_y')[order], self.arrays[f'{prefix}_t'][order],
      self.arrays['train_zs'][order] if with_feature else None,
    ), order


@pytest.fixture(scope='module')
def golden(golden_root):
  return Golden(golden_root / 'bfm')


def stage1(golden, path='linear'):
  return bfm.Config(
    path=path, alignment_weight=golden.config['proj_loss_weight'], label_dropout=0.0
  )


def forward(golden, x, t, labels):
  """Returns (velocity, projected features) of rows in our order, any number of them."""
  size = len(t)
  rows = (jnp.asarray(x), jnp.asarray(t), jnp.asarray(labels))
  x, t, labels = bfm.pad_rows(rows, golden.segments)
  c = golden.net.condition(golden.params, t, labels)
  f = golden.net.features(golden.params, x, c)
  v = golden.net.velocity_by_row(golden.params, x, c, f)
  return v[:size], golden.net.project(golden.params, f)[:size]


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
  grads = jax.jit(jax.grad(
    lambda p: bfm.loss_of_rows(stage1(golden), golden.net, p, rows)[0]
  ))(golden.params)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads['frn']))
  norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(grads)))
  files.close(norm, a['train_grad_global_norm'], GRADIENT, 'global norm')
  official = golden.official(grads)
  named = a.names('train_grad/')
  assert named
  for name in named:
    files.close(official[name.removeprefix('train_grad/')], a[name], GRADIENT, name)


def test_frn_stage(golden):
  a = golden.arrays
  rows, order = golden.rows('ft', with_feature=False)
  config = bfm_frn.Config(path='linear', label_dropout=0.0)
  edges = bfm.segment_edges(golden.segments)
  segment = np.arange(len(order)) % golden.segments
  x_t = flow.interpolate('linear', rows.x, rows.noise, rows.t)
  t_start = edges[segment]
  x_start = flow.interpolate('linear', rows.x, rows.noise, t_start)
  kappa = (t_start - rows.t) / (t_start - edges[segment + 1])
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

  value, grads = jax.jit(jax.value_and_grad(loss))(golden.params)
  files.close(value, a['ft_loss'], FORWARD, 'loss')
  official = golden.official(grads)
  for name in a.names('ft_grad/'):
    files.close(official[name.removeprefix('ft_grad/')], a[name], GRADIENT, name)


def test_sampling_forward(golden):
  a, net, p = golden.arrays, golden.net, golden.params
  x, y, cached = golden.image('samp_x'), golden.labels('samp_y'), a['samp_cached_feature']
  for s in range(golden.segments):
    t = a['samp_t'][s]
    assert (bfm.segment_of(t, bfm.segment_edges(golden.segments)) == s).all()
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
  """Returns the sampler's options that a recorded name stands for."""
  frn, sde = name.startswith('frn_'), name.startswith('sde_')
  interval = 'interval' in name
  key = 'frn_interval' if frn else 'interval'
  return {
    'sampler': 'ode_frn' if frn else 'sde' if sde else 'ode',
    'guidance': 1.0 if 'cfg1' in name else 4.0,
    'guidance_interval': tuple(golden.config[key]) if interval else (0.0, 1.0),
    'sde_end': 'corrected' if 'fixed' in name or not sde else 'official',
    'path': 'trig' if 'cosine' in name else 'linear',
  }


def test_samplers_and_their_calls(golden):
  """Whole runs, and time, segment and guidance of every network call."""
  a = golden.arrays
  names = [n for n in a.names() if n.split('_')[0] in ('ode', 'frn', 'sde') and 'calls' not in n]
  assert {'ode_cfg4', 'frn_cfg4', 'sde_cfg1', 'sde_fixed_cfg1'} <= set(names)
  x, labels = golden.image('smp_latents'), golden.labels('smp_y')
  noises = jnp.asarray(files.channels_last(a['smp_sde_noise']), jnp.float32)
  edges = bfm.segment_edges(golden.segments)
  for name in names:
    case = sampler_case(golden, name)
    plan = bfm.plan_steps(
      edges, golden.config['smp_steps'], case['guidance'], case['guidance_interval'],
      case['sampler'], case['sde_end'],
    )
    out = jax.jit(lambda x, plan=plan, case=case: bfm.integrate(
      stage1(golden, case['path']), golden.net, golden.params, plan, x, labels, golden.classes,
      guidance=case['guidance'], sampler=case['sampler'], noise_at=lambda i: noises[i],
    ))(x)
    files.close(files.channels_first(out), a[name], SAMPLER, name)
    if f'{name}_calls' not in a:
      continue
    times, batches, segments = a[f'{name}_calls'].T
    extra = [] if plan.extra is None else [plan.extra[0]]
    called = np.concatenate([plan.t.ravel(), extra])
    guided = np.concatenate([plan.guided.ravel(), plan.guided[-1, -1:][: len(extra)]])
    np.testing.assert_allclose(called, times, rtol=0, atol=6e-8)
    np.testing.assert_array_equal(bfm.segment_of(jnp.asarray(called), edges), segments)
    np.testing.assert_array_equal(np.where(guided, 2, 1) * len(labels), batches)


def test_score(golden):
  a = golden.arrays
  v, x, t = golden.image('samp_v_seg1'), golden.image('samp_x'), a['samp_t'][1]
  for name, path in (('score_linear', 'linear'), ('score_cosine', 'trig')):
    ours = np.stack([bfm.score(path, v[i], x[i], t[i]) for i in range(len(t))])
    files.close(files.channels_first(ours), a[name], FORWARD, name)


def test_debug_arrays(golden):
  """Everything inside the training forward, for the first samples of the batch (segment 0)."""
  a, p, config = golden.arrays, golden.params, golden.settings
  if not a.names('dbg_'):
    return
  few = golden.config['debug_samples']
  x, t, y = golden.image('train_x_t'), a['train_t'], golden.labels('train_y')
  width, heads, channels = config.width, config.heads, golden.config['in_channels']
  grid = golden.config['context_size'] // config.patch
  rotary = layers.rotary_table(grid, width // heads)
  silu = jax.nn.silu

  def check(name, value):
    files.close(value, a[f'dbg_{name}'], FORWARD, name)

  def apply(module, name, *args):
    return module.apply({'params': name if isinstance(name, dict) else p[name]}, *args)

  with jax.default_matmul_precision('highest'):
    check('rope_cos', np.repeat(rotary[0], 2, axis=1))
    check('rope_sin', np.repeat(rotary[1], 2, axis=1))
    patches = layers.patchify(x[:few], config.patch)
    ordered = patches.reshape(*patches.shape[:2], -1, channels)
    check('patches', jnp.swapaxes(ordered, 2, 3).reshape(patches.shape))
    check('t_sinusoid', layers.sinusoid(t))
    time = apply(layers.TimeEmbedding(width), 'time', t)
    label = apply(layers.LabelEmbedding(golden.classes, width), 'labels', y)
    check('t_emb', time)
    check('y_emb', label)
    c = golden.net.condition(p, t, y)
    check('c', c)
    shared = apply(layers.dense(6 * width), 'feature_shared', silu(c))
    check('global_adaln', shared)
    h = apply(layers.dense(width), 'feature_patches', patches)
    check('rep_x_embed', h)
    for i in range(config.feature_depth):
      block = jax.tree.map(lambda leaf, i=i: leaf[i], p['feature_blocks']['blocks'])
      low = apply(layers.dense(config.lora_width), block['down'], silu(c))
      modulation = apply(layers.dense(6 * width), block['up'], low) + shared
      if i == 0:
        check('rep_block0_adaln_total', modulation)
        check_first_block(golden, check, block, h, modulation[:few, None], rotary)
      h, _ = apply(blockwise.FeatureBlock(config), block, h, silu(c)[:few], shared[:few], rotary)
      check(f'rep_block{i}_out', h)
    feature = golden.net.features(p, x, c)
    spread = jnp.broadcast_to(c[:few, None], feature[:few].shape)
    joined = jnp.concatenate([spread, feature[:few]], -1)
    check('c_repre', joined)
    active = (silu(c[:few]), silu(feature[:few]))
    shared = apply(blockwise.PairLinear(6 * width), 'velocity_shared', *active)
    check('global_adaln2', shared)
    h = apply(layers.dense(width), 'velocity_patches', patches)
    check('x_embed', h)
    for i in range(config.segment_depth):
      block = jax.tree.map(lambda leaf, i=i: leaf[0, i], p['segments']['blocks'])
      if i == 0:
        low = apply(blockwise.PairLinear(config.lora_width), block['down'], *active)
        check('vel0_block0_adaln_total', apply(layers.dense(6 * width), block['up'], low) + shared)
      h, _ = apply(blockwise.VelocityBlock(config), block, h, *active, shared, rotary)
      check(f'vel0_block{i}_out', h)
    out = apply(blockwise.Final(config, channels), 'final', h, *active)
    ordered = out.reshape(*out.shape[:2], -1, channels)
    check('final_tokens', jnp.swapaxes(ordered, 2, 3).reshape(out.shape))


def check_first_block(golden, check, block, h, modulation, rotary):
  """Queries, attention and MLP of the first feature block, before their gates."""
  config, core = golden.settings, block['core']
  shift1, scale1, gate1, shift2, scale2, _ = jnp.split(modulation, 6, axis=-1)
  inside = layers.modulate(layers.layer_norm(h), shift1, scale1)
  qkv = layers.dense(3 * config.width).apply({'params': core['attn']['qkv']}, inside)
  q = qkv.reshape(*h.shape[:2], 3, config.heads, -1)[:, :, 0]
  check('rep_block0_q_before_norm', jnp.swapaxes(q, 1, 2))
  q = layers.RMSNorm().apply({'params': core['attn']['q_norm']}, q)
  check('rep_block0_q_after_norm', jnp.swapaxes(q, 1, 2))
  check('rep_block0_q_after_rope', jnp.swapaxes(layers.rotate(q, rotary), 1, 2))
  attention = layers.Attention(config.heads, 'float32', qk_norm=True)
  branch = attention.apply({'params': core['attn']}, inside, rotary)
  check('rep_block0_attn_out', branch)
  h = h + gate1 * branch
  inside = layers.modulate(layers.layer_norm(h), shift2, scale2)
  mlp = layers.MLP(int(config.width * config.mlp_ratio), 'float32')
  check('rep_block0_mlp_out', mlp.apply({'params': core['mlp']}, inside))


def test_round_trip_is_bit_equal(golden_root, golden):
  tensors = load_file(golden_root / 'bfm' / 'weights.safetensors')
  back = golden.official(golden.params)
  assert set(back) == set(tensors)
  for key, value in tensors.items():
    assert back[key].dtype == value.dtype
    np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_every_array_was_checked(golden):
  """Runs after the tests above in this file, which mark what they look at."""
  assert golden.arrays.unused() == []

"""The second configuration of SoFlow's golden arrays, and the shapes of official weights."""

from tests import soflow_unet_reference as unet

DIT = {
  'data_size': 12, 'channels': 3, 'patch': 4, 'hidden': 24, 'depth': 3, 'heads': 3,
  'num_classes': 7, 'cfg_drop_rate': 0.2,
}
UNET = {
  'data_size': 12, 'model_channels': 12, 'channel_mult': [2, 1, 2], 'num_blocks': 2,
  'attn_resolutions': [6],
}


def linear_shapes(key, outputs, *inputs):
  """A layer of the official layout: weight (out, in, ...) and bias (out)."""
  return {f'{key}.weight': (outputs, *inputs), f'{key}.bias': (outputs,)}


def dit_shapes(config):
  """Official key -> shape of a DiT."""
  width, patch, channels = config['hidden'], config['patch'], config['channels']
  shapes = {
    'network.pos_embed': (1, (config['data_size'] // patch) ** 2, width),
    'network.y_embedder.embedding_table.weight': (config['num_classes'] + 1, width),
    **linear_shapes('network.x_embedder.proj', width, channels, patch, patch),
    **linear_shapes('network.final_layer.linear', patch * patch * channels, width),
    **linear_shapes('network.final_layer.adaLN_modulation.1', 2 * width, width),
  }
  for name in ('t', 's'):
    shapes |= linear_shapes(f'network.{name}_embedder.mlp.0', width, 256)
    shapes |= linear_shapes(f'network.{name}_embedder.mlp.2', width, width)
  for i in range(config['depth']):
    for name, outputs, inputs in (
      ('attn.qkv', 3, 1), ('attn.proj', 1, 1), ('mlp.fc1', 4, 1), ('mlp.fc2', 1, 4),
      ('adaLN_modulation.1', 6, 1),
    ):
      shapes |= linear_shapes(f'network.blocks.{i}.{name}', outputs * width, inputs * width)
  return shapes


def layer_shapes(layer, embedding):
  """A layer of the U-Net."""
  key, inputs, outputs = layer.key, layer.inputs, layer.outputs
  if layer.kind == 'conv':
    return linear_shapes(key, outputs, inputs, 3, 3)
  shapes = {
    **linear_shapes(f'{key}.norm0', inputs), **linear_shapes(f'{key}.norm1', outputs),
    **linear_shapes(f'{key}.conv0', outputs, inputs, 3, 3),
    **linear_shapes(f'{key}.conv1', outputs, outputs, 3, 3),
    **linear_shapes(f'{key}.affine', outputs, embedding),
  }
  if layer.kind != 'block':
    shapes |= {f'{key}.{name}.resample_filter': (1, 1, 4, 4) for name in ('conv0', 'skip')}
  if layer.kind != 'block' or inputs != outputs:
    shapes |= linear_shapes(f'{key}.skip', outputs, inputs, 1, 1)
  if layer.attends:
    shapes |= linear_shapes(f'{key}.norm2', outputs)
    shapes |= linear_shapes(f'{key}.qkv', 3 * outputs, outputs, 1, 1)
    shapes |= linear_shapes(f'{key}.proj', outputs, outputs, 1, 1)
  return shapes


def unet_shapes(config):
  """Official key -> shape of a U-Net, with the constant filters."""
  embedding = unet.EMBED_MULT * config['model_channels']
  waves = 2 * unet.NOISE_MULT * config['model_channels']
  encoder, decoder = unet.layers(config)
  shapes = {
    'network.map_augment.weight': (waves, unet.AUGMENT),
    **linear_shapes('network.map_layer0', embedding, waves),
    **linear_shapes('network.map_layer1', embedding, embedding),
  }
  for layer in encoder + decoder:
    shapes |= layer_shapes(layer, embedding)
  key, width = unet.output_key(config), decoder[-1].outputs
  return {
    **shapes, **linear_shapes(f'{key}_norm', width),
    **linear_shapes(f'{key}_conv', unet.COLORS, width, 3, 3),
  }


def trained_names(shapes):
  """The keys that have a gradient."""
  return [key for key in shapes if not key.endswith(('pos_embed', 'resample_filter'))]


SECOND_CONFIG = {
  'name': 'soflow_tiny_b',
  'noising_type': 'Trig',
  'coefficient_type': 'Trig',
  'debug': True,
  'dit': DIT,
  'ckpt_dit': {
    'data_size': 6, 'channels': 2, 'patch': 3, 'hidden': 20, 'depth': 1, 'heads': 1,
    'num_classes': 3, 'cfg_drop_rate': 0.2,
  },
  'unet': UNET,
  'loss': {'cfg_scale': 2.0, 'mix_ratio': 0.4, 'cfg_decay_time': 0.5, 'p': 0.6, 'eps': 0.02},
  'unet_loss': {'cfg_scale': 1.0, 'mix_ratio': 1.0, 'cfg_decay_time': 1.0, 'p': 1.0, 'eps': 0.01},
  'sched_noise': ['Linear', 'Trig'],
  'sched_coef': ['Euler', 'Trig'],
  'rk': [
    {'method': 'Cosine', 'init': 0.4, 'end': 0.01, 'K': 1000},
    {'method': 'Const', 'init': 0.4, 'end': 0.03, 'K': 500},
    {'method': 'Exponent', 'init': 0.5, 'end': 0.001, 'K': 300000},
    {'method': 'Linear', 'init': 0.2, 'end': 0.004, 'K': 700},
  ],
  'rk_ks': [[0, 1, 500, 999, 1000], [0, 250, 500], [0, 150000, 299999, 300000], [0, 7, 350, 700]],
  'loss_k': 400,
  'time_mean': [0.1, -0.8, 0.3],
  'time_std': [0.9, 1.1, 0.7],
  'decay_list': [0.5, 0.95, 1.0],
  'posembed': [[24, 3], [32, 5]],
  'B': 7,
  'loss_cases': [
    {'kind': 'vel', 'pre': 'vel.guided', 'full': True},
    {'kind': 'con', 'pre': 'con.guided', 'full': True},
    {'kind': 'vel', 'pre': 'vel.unmixed', 'noising_type': 'Linear',
     'over': {'mix_ratio': 1.0, 'cfg_decay_time': 1.0, 'p': 1.0}},
    {'kind': 'con', 'pre': 'con.unmixed', 'noising_type': 'Linear',
     'over': {'mix_ratio': 1.0, 'eps': 0.1}},
    {'kind': 'con', 'pre': 'con.euler', 'coefficient_type': 'Euler', 'over': {'p': 0.0}},
    {'kind': 'vel', 'pre': 'vel.noguide', 'over': {'cfg_scale': 1.0}},
    {'kind': 'con', 'pre': 'con.nolabel', 'noising_type': 'Linear', 'coefficient_type': 'Euler'},
    {'kind': 'con', 'pre': 'con.mingap'},
  ],
  'unet_loss_cases': [
    {'kind': 'vel', 'pre': 'uvel.noguide'},
    {'kind': 'con', 'pre': 'ucon.noguide'},
    {'kind': 'con', 'pre': 'ucon.euler', 'noising_type': 'Linear', 'coefficient_type': 'Euler'},
  ],
  'grad_names': trained_names(dit_shapes(DIT)),
  'grad_names_few': ['network.s_embedder.mlp.0.weight', 'network.blocks.2.attn.qkv.weight'],
  'unet_grad_names': trained_names(unet_shapes(UNET)),
  'train': {
    'lr': 0.002, 'betas': [0.8, 0.95], 'weight_decay': 0.05, 'ema_decay': 0.7,
    'velocity_loss_ratio': 0.6,
    'names': [
      'network.y_embedder.embedding_table.weight',
      'network.t_embedder.mlp.2.bias',
      'network.blocks.0.attn.qkv.weight',
      'network.blocks.1.mlp.fc2.weight',
      'network.final_layer.linear.bias',
      'network.pos_embed',
    ],
  },
  'nfe': [1, 3, 5],
  'aug': [
    {'pre': 'aug.p50', 'p': 0.5, 'size': 16, 'n': 5},
    {'pre': 'aug.p100', 'p': 1.0, 'size': 20, 'n': 3},
  ],
  'opt': {
    'adamw': {'lr': 0.02, 'betas': [0.8, 0.95]},
    'radam': {'lr': 0.005, 'betas': [0.9, 0.99]},
  },
  'ema_decay_test': 0.95,
}

"""SiT on ImageNet 256 x 256 latents, the baseline, at four sizes.

  python -m fmzoo.main --config=configs/sit.py:s --config.data.path=DIR      # or b, l, xl

The transformers of DiT-S/2, B/2, L/2 and XL/2 with plain flow matching: linear path, velocity, t
uniform. Global batch 256, AdamW at a constant 1e-4, EMA 0.9999, 400,000 steps as in the paper's
comparison of sizes (arXiv:2401.08740, which also predicts a variance and then does not use it).
"""

from ml_collections import ConfigDict

from configs import base

SIZES = {
  's': {'width': 384, 'heads': 6, 'depth': 12},
  'b': {'width': 768, 'heads': 12, 'depth': 12},
  'l': {'width': 1024, 'heads': 16, 'depth': 24},
  'xl': {'width': 1152, 'heads': 16, 'depth': 28},
}


def get_config(size):
  """Returns the recipe of a size of SIZES."""
  config = base.imagenet()
  config.run.steps = 400_000
  config.data.batch_size = 256
  config.model = ConfigDict({
    'name': 'dit',
    'patch': 2,
    'mlp_ratio': 4.0,
    'duration': False,
    'dtype': 'bfloat16',
    'precision': 'default',
    'attention': 'xla',
    'remat': True,
    'unroll': 1,
    **base.of_size(SIZES, size),
  })
  config.method = ConfigDict({
    'name': 'fm',
    'path': 'linear',
    'time_mean': 0.0,
    'time_std': 0.0,
    'label_dropout': 0.1,
  })
  config.ema.decay = 0.9999
  config.sample.num_steps = 250
  config.sample.guidance = 1.5
  config.sample.solver = 'euler'
  config.log.keep_steps = (100_000, 200_000, 300_000)
  return config

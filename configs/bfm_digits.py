"""BFM, stage 1, on scikit-learn's 1,797 real 8x8 digits.

  python -m fmzoo.main --config=configs/bfm_digits.py
  python -m fmzoo.main --config=configs/bfm_digits_frn.py     # then the residual network

Two CPU cores, minutes; batch 126 (21 rows for each of 6 segments), 3,000 steps. Semantic feature
guidance needs a frozen encoder: there is none for 8x8 digits, so a small classifier is trained on
the digits at the start of the run (seconds) and frozen. Everything else is the architecture and the
loss of arXiv:2510.21167 at a small size.
"""

from ml_collections import ConfigDict

from configs import base


def get_config():
  """Returns the recipe."""
  config = base.get()
  config.data.batch_size = 126
  config.model = ConfigDict({
    'name': 'blockwise',
    'patch': 2,
    'width': 128,
    'heads': 4,
    'mlp_ratio': 4.0,
    'segments': 6,
    'segment_depth': 1,
    'feature_depth': 3,
    'frn_depth': 0,
    'lora_width': 32,
    'rotary_theta': 10000.0,
    'feature_dim': 64,
    'projector_width': 256,
    'dtype': 'float32',
    'precision': 'default',
    'attention': 'xla',
    'remat': False,
    'unroll': 4,
  })
  config.method = ConfigDict({
    'name': 'bfm',
    'path': 'linear',
    'edges': (),
    'alignment_weight': 0.05,
    'label_dropout': 0.1,
  })
  config.optim.learning_rate = 1e-3
  config.optim.warmup_steps = 100
  config.optim.schedule = 'cosine'
  config.optim.clip_norm = 1.0
  config.ema.decay = 0.998
  config.ema.ramp = True
  config.sample.num_steps = 8
  config.sample.segment_steps = ()
  config.sample.guidance = 1.0
  config.sample.guidance_interval = (0.0, 1.0)
  config.sample.sampler = 'ode'
  config.sample.sde_end = 'corrected'
  config.eval.update(name='digits', num_images=1800, every_steps=0)
  return config

"""SiT (plain flow matching) on scikit-learn's 1,797 real 8x8 digits: the baseline of the table.

  python -m fmzoo.main --config=configs/sit_digits.py

Two CPU cores, minutes; batch 128, 3,000 steps (214 epochs). Same data, budget and width as
`soflow_digits.py` and `bfm_digits.py`.
"""

from ml_collections import ConfigDict

from configs import base


def get_config():
  """Returns the recipe."""
  config = base.get()
  config.model = ConfigDict({
    'name': 'dit',
    'patch': 2,
    'width': 128,
    'depth': 4,
    'heads': 4,
    'mlp_ratio': 4.0,
    'duration': False,
    'dtype': 'float32',
    'precision': 'default',
    'attention': 'xla',
    'remat': False,
    'unroll': 4,
  })
  config.method = ConfigDict({
    'name': 'fm',
    'path': 'linear',
    'time_mean': 0.0,
    'time_std': 1.0,
    'label_dropout': 0.1,
  })
  config.optim.learning_rate = 1e-3
  config.optim.warmup_steps = 100
  config.optim.schedule = 'cosine'
  config.ema.decay = 0.998
  config.ema.ramp = True
  config.sample.num_steps = 48
  config.sample.guidance = 1.0
  config.sample.solver = 'euler'
  config.eval.update(name='digits', num_images=1800, every_steps=0)
  return config

"""SoFlow on scikit-learn's 1,797 real 8x8 digits: one network call from noise to digit.

  python -m fmzoo.main --config=configs/soflow_digits.py

Two CPU cores, minutes; batch 128, 3,000 steps (214 epochs). Losses, time laws and schedules are
those of the official ImageNet recipe (arXiv:2512.15657, imagenet.yaml). Its guidance is 3.0, its
learning rate 1e-4 and constant, its EMA decay 0.9999 without ramp.
"""

from ml_collections import ConfigDict

from configs import base, soflow


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
    'duration': True,
    'dtype': 'float32',  # CPUs gain nothing from bfloat16
    'precision': 'high',
    'attention': 'xla',
    'remat': False,
    'unroll': 4,
  })
  config.method = soflow.method()
  config.method.guidance = 1.35
  config.optim.learning_rate = 1e-3
  config.optim.warmup_steps = 100
  config.optim.schedule = 'cosine'
  config.optim.b2 = 0.99
  config.ema.decay = 0.998
  config.ema.ramp = True
  config.sample.num_steps = 1
  config.sample.renoise = True
  config.eval.update(name='digits', num_images=1800, every_steps=0)
  return config

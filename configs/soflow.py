"""SoFlow on ImageNet 256 x 256 latents, at five sizes: one network call an image.

  python -m fmzoo.main --config=configs/soflow.py:b4 --config.data.path=DIR   # b2, m2, l2, xl2

Official hyper-parameters (arXiv:2512.15657, imagenet.yaml): global batch 256, AdamW at a constant
1e-4 without warm-up or clipping, EMA 0.9999. B/4 trains 400,000 steps (80 epochs) with that file.
The others train 1,200,000 (240 epochs); their file was not published with the code, so that they
share B/4's method is assumed.

Precision: float32 parameters; bfloat16 products with float32 sums, in the two calls of the
consistency quotient, too, which share their roundings (docs/precision.md). The official code uses
TF32. FID-50k with 1 / 2 calls, the paper's: B/4 11.6 / 8.2, B/2 4.85 / 4.24, M/2 3.73 / 3.42,
L/2 3.20 / 2.90, XL/2 2.96 / 2.66; ours are not measured yet.
"""

from ml_collections import ConfigDict

from configs import base

SIZES = {
  'b4': {'patch': 4, 'width': 768, 'heads': 12, 'depth': 12},
  'b2': {'patch': 2, 'width': 768, 'heads': 12, 'depth': 12},
  'm2': {'patch': 2, 'width': 1024, 'heads': 16, 'depth': 16},
  'l2': {'patch': 2, 'width': 1024, 'heads': 16, 'depth': 24},
  'xl2': {'patch': 2, 'width': 1152, 'heads': 16, 'depth': 28},
}


def method():
  """Returns the method keys of the official ImageNet recipe."""
  return ConfigDict({
    'name': 'soflow',
    'path': 'linear',
    'solution': 'euler',
    'velocity_ratio': 0.75,
    'time_mean': (-0.2, -1.0, 0.2),
    'time_std': (1.0, 0.8, 0.8),
    'guidance': 3.0,  # learned in training, so sampling pays nothing for it
    'mix_ratio': 0.25,
    'guidance_decay_time': 0.8,
    'label_dropout': 0.1,
    'weight_power': 1.0,
    'weight_eps': 0.01,
    'middle_schedule': 'exponent',
    'middle_initial': 0.1,
    'middle_final': 0.002,
  })


def get_config(size):
  """Returns the recipe of a size of SIZES."""
  config = base.imagenet()
  config.run.steps = 400_000 if size == 'b4' else 1_200_000
  config.data.batch_size = 256
  config.model = ConfigDict({
    'name': 'dit',
    'mlp_ratio': 4.0,
    'duration': True,
    'dtype': 'bfloat16',
    'precision': 'highest',  # of the conditioning, a hundredth of the work
    'attention': 'xla',
    'remat': True,
    'unroll': 1,
    **base.of_size(SIZES, size),
  })
  config.method = method()
  config.optim.b2 = 0.99
  config.ema.decay = 0.9999
  config.sample.num_steps = 1
  config.sample.renoise = True
  config.log.update(preview_every_steps=1000, checkpoint_every_steps=25_000)
  return config

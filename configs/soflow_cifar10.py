"""SoFlow on CIFAR-10, unconditional: one network call an image.

  python -m fmzoo.main --config=configs/soflow_cifar10.py --config.data.path=DIR

Official hyper-parameters (arXiv:2512.15657, cifar.yaml): consistency alone, no guidance, global
batch 1024, 800,000 steps, RAdam at a constant 1e-4, EMA 0.9999 taken every 16 steps, dropout 0.3
with one mask for both calls, geometric augmentation of 12 % with its labels given to the network.
DIR holds CIFAR-10 as its authors publish it, README.md says where.

Precision: as configs/soflow.py; the official code uses TF32, which leaves little of the consistency
quotient at the last middle times (docs/precision.md). FID-50k with 1 / 2 calls, the paper's: 2.86 /
2.28; ours is not measured yet.
"""

from ml_collections import ConfigDict

from configs import base


def get_config():
  """Returns the recipe."""
  config = base.get()
  config.run.steps = 800_000
  config.data.update(
    name='cifar10', latent_size=32, channels=3, num_classes=10, batch_size=1024, augment=0.12
  )
  config.model = ConfigDict({
    'name': 'unet',
    'width': 128,
    'multipliers': (2, 2, 2),
    'blocks': 4,
    'attention_resolutions': (16,),
    'dropout': 0.3,
    'augment_dim': 6,
    'dtype': 'bfloat16',
    'precision': 'highest',  # of the embedding, a thousandth of the work
    'remat': True,
  })
  config.method = ConfigDict({
    'name': 'soflow',
    'path': 'linear',
    'solution': 'euler',
    'velocity_ratio': 0.0,
    'time_mean': (-0.9, -4.0, -0.9),  # the first is of flow matching, which has no rows here
    'time_std': (1.6, 1.6, 1.6),
    'guidance': 1.0,
    'mix_ratio': 1.0,
    'guidance_decay_time': 1.0,
    'label_dropout': 0.0,
    'weight_power': 0.75,
    'weight_eps': 0.001,
    'middle_schedule': 'exponent',
    'middle_initial': 1.0,
    'middle_final': 0.0003125,
  })
  config.optim.update(name='radam', learning_rate=1e-4)
  config.ema.update(decay=0.9999, every_steps=16)
  config.sample.update(num_images=50_000, batch_size=256, num_steps=1, renoise=True)
  config.log.update(preview_every_steps=1000, checkpoint_every_steps=25_000)
  return config

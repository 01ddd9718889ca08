"""BFM-XL on ImageNet 256 x 256 latents, stage 1, with the official hyper-parameters.

  python -m fmzoo.main --config=configs/bfm_xl.py --config.data.path=DIR

963,401,712 parameters; global batch 1536, 1,167,600 steps (1,400 epochs of 1,281,167 images).
Training needs DINOv2 features of the images behind the latents, which fmzoo does not have yet.
Source: arXiv:2510.21167 and its official configuration, which differs from what its code reads in
places; the values are those that take effect.
"""

from ml_collections import ConfigDict

from configs import base


def get_config():
  """Returns the recipe."""
  config = base.get()
  config.run.steps = 1_167_600
  config.data.update(
    name='latents', batch_size=1536, latent_size=32, channels=4, num_classes=1000,
    latent_scale=0.18215,
  )
  config.model = ConfigDict({
    'name': 'blockwise',
    'patch': 2,
    'width': 1152,
    'heads': 16,
    'mlp_ratio': 4.0,
    'segments': 6,
    'segment_depth': 5,
    'feature_depth': 20,
    'frn_depth': 0,
    'lora_width': 288,
    'feature_dim': 768,  # DINOv2 ViT-B/14
    'projector_width': 2048,
    'dtype': 'bfloat16',
    'precision': 'default',
    'attention': 'xla',
    'remat': True,
    'unroll': 1,
  })
  config.method = ConfigDict({
    'name': 'bfm',
    'path': 'linear',
    'alignment_weight': 0.05,
    'label_dropout': 0.1,
  })
  config.optim.learning_rate = 1e-4
  config.optim.clip_norm = 1.0
  config.ema.decay = 0.9999
  config.sample.update(num_images=50_000, batch_size=256, labels='random', num_steps=41)
  config.sample.guidance = 4.0
  config.sample.guidance_interval = (0.0, 1.0)
  config.sample.sampler = 'sde'
  config.sample.sde_end = 'corrected'
  config.log.preview_every_steps = 5000
  config.log.checkpoint_every_steps = 10_000
  config.log.keep_steps = tuple(range(100_000, 1_000_001, 100_000))
  return config

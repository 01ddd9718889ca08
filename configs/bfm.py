"""BFM on ImageNet 256 x 256 latents, stage 1, at four sizes.

  python -m fmzoo.main --config=configs/bfm.py:s --config.data.path=DIR      # or b, l, xl

`xl` is the official network, with the official hyper-parameters (see configs/bfm_xl.py). S, B and L
are ours, not the paper's: the widths of DiT-S, B and L, feature network and segments as deep, in
proportion, as those of XL, and XL's other settings. Parameters: 53.6 M, 194 M, 631 M, 963 M.
"""

from ml_collections import ConfigDict

from configs import base

SIZES = {
  's': {'width': 384, 'heads': 6, 'feature_depth': 9, 'segment_depth': 2, 'lora_width': 96},
  'b': {'width': 768, 'heads': 12, 'feature_depth': 9, 'segment_depth': 2, 'lora_width': 192},
  'l': {'width': 1024, 'heads': 16, 'feature_depth': 17, 'segment_depth': 4, 'lora_width': 256},
  'xl': {'width': 1152, 'heads': 16, 'feature_depth': 20, 'segment_depth': 5, 'lora_width': 288},
}


def get_config(size):
  """Returns the recipe of a size of SIZES."""
  config = base.imagenet()
  config.run.steps = 1_167_600  # 1,400 epochs of 1,281,167 images
  config.data.batch_size = 1536
  config.model = ConfigDict({
    'name': 'blockwise',
    'patch': 2,
    'mlp_ratio': 4.0,
    'segments': 6,
    'frn_depth': 0,
    'rotary_theta': 10000.0,
    'feature_dim': 768,  # DINOv2 ViT-B/14
    'projector_width': 2048,
    'dtype': 'bfloat16',
    'precision': 'default',
    'attention': 'xla',
    'remat': True,
    'unroll': 1,
    **base.of_size(SIZES, size),
  })
  config.method = ConfigDict({
    'name': 'bfm',
    'path': 'linear',
    'edges': (),
    'alignment_weight': 0.05,
    'label_dropout': 0.1,
  })
  config.optim.clip_norm = 1.0
  config.ema.decay = 0.9999
  config.sample.num_steps = 41
  config.sample.segment_steps = ()
  config.sample.guidance = 4.0
  config.sample.guidance_interval = (0.0, 1.0)
  config.sample.sampler = 'sde'
  config.sample.sde_end = 'corrected'
  config.log.keep_steps = tuple(range(100_000, 1_000_001, 100_000))
  return config

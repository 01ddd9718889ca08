"""BFM-XL on ImageNet 256 x 256 latents, stage 1, with the official hyper-parameters.

  python -m fmzoo.main --config=configs/bfm_xl.py --config.data.path=DIR
  python -m fmzoo.main --config=configs/bfm_xl_frn.py --config.data.path=DIR     # then stage 2

963,401,712 parameters; global batch 1536, 1,167,600 steps (1,400 epochs of 1,281,167 images), AdamW
at a constant 1e-4. DIR holds VAE moments and DINOv2 features of the images, see README, 'Data'.
Source: arXiv:2510.21167 and its official configuration, which differs from what its code reads in
places; the values are those that take effect.
"""

from configs import bfm


def get_config():
  """Returns the recipe."""
  return bfm.get_config('xl')

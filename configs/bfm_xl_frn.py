"""BFM-XL on ImageNet 256 x 256 latents, stage 2 (FRN), with the official hyper-parameters.

  python -m fmzoo.main --config=configs/bfm_xl_frn.py --config.data.path=DIR

95,621,184 trained parameters behind the 963,401,712 of runs/bfm_xl (`--config.run.init_from` for
another place); global batch 256 (on several devices see configs/bfm_frn.py), AdamW at 1e-4.
The official configuration stops at 2,000,000 steps at the latest; how many its authors took is not
known. No features are needed. How to sample (8 steps a segment, guidance 4) is our choice: the
official sampling script has no FRN.
Source: arXiv:2510.21167 and its official configuration.
"""

from configs import bfm_frn


def get_config():
  """Returns the recipe."""
  return bfm_frn.get_config('xl')

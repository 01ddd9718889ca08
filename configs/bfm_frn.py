"""BFM on ImageNet 256 x 256 latents, stage 2 (the residual network, FRN), at four sizes.

  python -m fmzoo.main --config=configs/bfm_frn.py:s --config.data.path=DIR      # or b, l, xl

Starts from the averaged weights in runs/bfm_<size> (`--config.run.init_from` for another place,
also one made by `convert`), trains and averages the FRN alone. Its checkpoints hold the whole
network, so sampling needs this workdir only. `xl` is official (see configs/bfm_xl_frn.py), the FRN
of S, B and L ours, not the paper's. FRN parameters: 5.3 M, 21.3 M, 56.7 M, 95.6 M. On several
devices the official batch of 256 is no multiple of devices x 6 segments: take 240 or 288
(`--config.data.batch_size=288`), or one device (`--config.mesh.data=1`).
"""

from ml_collections import ConfigDict

from configs import bfm

DEPTHS = {'s': 2, 'b': 2, 'l': 3, 'xl': 4}  # blocks of the FRN
SIZES = bfm.SIZES


def get_config(size):
  """Returns the recipe of a size of SIZES."""
  config = bfm.get_config(size)
  config.run.init_from = f'runs/bfm_{size}'
  config.run.steps = 2_000_000
  config.data.batch_size = 256
  config.model.frn_depth = DEPTHS[size]
  config.model.remat = False
  config.method = ConfigDict({
    'name': 'bfm_frn', 'path': 'linear', 'edges': (), 'label_dropout': 0.1,
  })
  config.sample.num_steps = 8
  config.sample.sampler = 'ode_frn'
  config.log.keep_last = 5
  config.log.keep_steps += tuple(range(1_200_000, 2_000_001, 200_000))
  return config

"""BFM, stage 2, on digits: the feature residual network (FRN) behind a finished stage 1.

  python -m fmzoo.main --config=configs/bfm_digits_frn.py

Starts from the averaged weights in runs/bfm_digits (`--config.run.init_from` for another place) and
trains the FRN alone; its checkpoints hold the whole network, so sampling needs this workdir only.
"""

from ml_collections import ConfigDict

from configs import bfm_digits


def get_config():
  """Returns the recipe."""
  config = bfm_digits.get_config()
  config.run.init_from = 'runs/bfm_digits'
  config.run.steps = 2000
  config.model.frn_depth = 1
  config.method = ConfigDict({
    'name': 'bfm_frn', 'path': 'linear', 'edges': (), 'label_dropout': 0.1,
  })
  config.sample.sampler = 'ode_frn'
  return config

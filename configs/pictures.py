"""SoFlow on one's own folder of pictures, 256 x 256: one network call an image.

  python -m fmzoo.main prepare --config=configs/pictures.py:5 --from=PICTURES --config.data.vae=FILE
  python -m fmzoo.main --config=configs/pictures.py:5 --config.data.vae=FILE

5 is the number of class folders in PICTURES; 1, the default, is a folder of pictures without
classes. FILE is the VAE's diffusion_pytorch_model.safetensors. The network is DiT-B/2, the method
that of configs/soflow.py; batch, steps and mirroring are ours, for some ten thousand pictures on
one accelerator. Other recipes on latents take such a folder as well: their own keys, and
--config.data.num_classes=5.
"""

from configs import soflow


def get_config(classes='1'):
  """Returns the recipe for a number of classes."""
  if not classes.isdecimal() or int(classes) < 1:
    raise ValueError(f"'{classes}' must be the number of class folders, 1 or more")
  config = soflow.get_config('b2')
  config.run.steps = 100_000
  config.data.update(batch_size=128, num_classes=int(classes), flip=True)
  if config.data.num_classes == 1:
    config.method.update(  # there is no class to guide to
      guidance=1.0, label_dropout=0.0, mix_ratio=1.0, guidance_decay_time=1.0
    )
  config.sample.update(num_images=100, batch_size=100, labels='balanced')
  config.log.checkpoint_every_steps = 5000
  return config

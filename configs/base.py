"""Every section and every key that recipes share, with its meaning and unit.

A recipe starts from `get()`, sets what differs, and fills `model`, `method` and the sampler's own
keys in `sample`, whose keys are the fields of the classes named beside them below.
"""

from ml_collections import ConfigDict


def of_size(sizes, size):
  """Returns the model keys of a recipe's size, `--config=FILE:SIZE`."""
  if size not in sizes:
    raise ValueError(f"size '{size}' is unknown; use one of {', '.join(sizes)}")
  return sizes[size]


def imagenet():
  """Returns the sections of a recipe on ImageNet 256 x 256 latents, sampled for FID-50k."""
  config = get()
  config.data.update(
    name='latents', latent_size=32, channels=4, num_classes=1000, latent_scale=0.18215
  )
  config.optim.learning_rate = 1e-4
  config.sample.update(num_images=50_000, batch_size=256, labels='random')
  config.log.update(preview_every_steps=5000, checkpoint_every_steps=10_000)
  return config


def get():
  """Returns the sections common to all recipes."""
  config = ConfigDict()
  config.run = ConfigDict({
    'seed': 0,  # of parameters, data order and every random number of training
    'steps': 3000,  # optimiser steps in all
    'init_from': '',  # workdir of another run to start the parameters from (its EMA); '' is none
  })
  config.data = ConfigDict({
    'name': 'digits',  # 'digits' (in scikit-learn), 'cifar10' or 'latents' (stored VAE moments)
    'path': '',  # folder of the data; '' is $FMZOO_DATA_DIR or data/, then the name
    'batch_size': 128,  # global: over all devices and hosts
    'latent_size': 8,  # H = W of what is generated
    'channels': 1,  # C of what is generated
    'num_classes': 10,  # labels are 0 .. num_classes - 1
    'latent_scale': 1.0,  # moments are multiplied by it; 0.18215 for Stable Diffusion's VAE
    'vae': '',  # latents: .safetensors of their Stable Diffusion VAE; makes them, decodes samples
    'vae_dtype': 'float32',  # of its products, or 'bfloat16': faster, off by a few per cent
    'encoder': '',  # latents: DINOv2's weights for features of stored images; '' is stored features
    'flip': False,  # mirror each row with probability 1/2; latents need a mirrored copy stored
    'num_threads': 2,  # reading threads per host, or per worker
    'num_workers': 0,  # reading processes per host; 0 reads in the process that trains
    'augment': 0.0,  # cifar10: probability to scale, stretch, shift (and flips); 0 does nothing
  })
  config.model = ConfigDict()  # Config of models/<name>.py, and `name`: dit, unet or blockwise
  config.method = ConfigDict()  # Config of methods/<name>.py, and `name`
  config.optim = ConfigDict({
    'name': 'adamw',  # 'adamw' or 'radam', as PyTorch defines them
    'learning_rate': 1e-4,  # highest
    'warmup_steps': 0,  # linear, from 1 / warmup_steps of the highest
    'schedule': 'constant',  # after the warm-up: 'constant', or 'cosine' to 0 at run.steps
    'b1': 0.9,
    'b2': 0.999,
    'eps': 1e-8,
    'weight_decay': 0.0,
    'clip_norm': 0.0,  # largest global gradient norm; 0 does not clip
    'accumulate_steps': 1,  # micro-batches per step; data.batch_size stays the size of a step
    'max_bad_steps': 20,  # non-finite steps in a row; the run stops at the next log step
  })
  config.ema = ConfigDict({
    'decay': 0.9999,  # per step
    'every_steps': 1,  # updated at steps 0, n, 2 n, ... with decay^n
    'ramp': False,  # decay at most (1 + k) / (10 + k) at step k
  })
  config.sample = ConfigDict({
    'num_images': 100,  # how many
    'batch_size': 100,  # of previews, global; `sample` and `evaluate`: of each device, 64 at most
    'labels': 'balanced',  # 'random', 'balanced' or a comma list such as '3,1,4'
    'seed': 0,  # image i depends on the seed and i alone
    'weights': 'ema',  # 'ema' or 'params'
    'png_folder': False,  # also one PNG per image
    'num_steps': 1,  # network calls; per segment for BFM
  })
  config.eval = ConfigDict({
    'name': 'inception',  # 'inception': FID, sFID, IS, precision, recall; 'digits'; 'none'
    'num_images': 50_000,  # generated for it, with the labels that sample.labels says
    'every_steps': -1,  # in training; 0 is at the end only, -1 never, there is `evaluate`
    'batch_size': 64,  # images that Inception sees at a time, on a host
    'inception': '',  # its weights; '' is $FMZOO_DATA_DIR or data/, then the official file's name
    'reference': '',  # .npz of real images' statistics: ADM's, or of evaluate --make_reference
    'resize': 'tf1',  # to 299 pixels: 'tf1' (ADM, TensorFlow) or 'ptfid' (pytorch-fid)
    'distances': 'float32',  # of precision and recall, or 'float16' as ADM's evaluator has them
  })
  config.mesh = ConfigDict({
    'data': -1,  # devices along the data axis; -1 is all that the other axes leave
    'fsdp': 1,  # devices that share parameters, optimiser state and EMA: less memory on each
    'segment': 1,  # BFM: groups of devices, each with the velocity blocks of its own segments
    'mode': 'jit',  # 'jit' or 'pmap' (one program per device, the axis 'data' alone)
  })
  config.log = ConfigDict({
    'log_every_steps': 100,
    'preview_every_steps': 500,  # a grid of samples, also at the end; 0 is never
    'checkpoint_every_steps': 1000,
    'keep_last': 2,  # newest checkpoints kept
    'keep_steps': (),  # steps whose checkpoints are kept for ever
  })
  return config

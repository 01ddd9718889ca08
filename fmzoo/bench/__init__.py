"""What a recipe's programs and data reach on this machine: times, FLOPs, memory, rows read.

Needs jax, flax, optax, numpy, absl and ml_collections alone, but for `loader`, which reads data.
"""

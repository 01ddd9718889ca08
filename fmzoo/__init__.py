"""fmzoo: blockwise flow matching and solution flow models in JAX."""

__version__ = '0.1.0'

"""Rows in files to batches of numpy arrays; no jax here."""

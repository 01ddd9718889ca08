"""Meshes, shardings, batches and hosts: where arrays live, and which process does what."""

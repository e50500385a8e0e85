"""Datasets, sampling and the grain pipeline: NumPy only, so that loader processes never import JAX."""

"""Datasets, sampling and the grain pipeline: NumPy only. Nothing here uses JAX; importing it is left to grain."""

"""Datasets, sampling and input pipelines. Nothing here uses JAX, though grain may import it."""

"""Settings are in pyproject.toml; here configs/ joins the package as vpm_jax.recipes."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vpm_jax*"]), "vpm_jax.recipes"],
    package_dir={"vpm_jax.recipes": "configs"},
)

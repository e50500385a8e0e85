"""Visibility-aware Part Model (Sun et al., CVPR 2019) in JAX and Flax.

Names load on first use (PEP 562), so that data loading runs none of the model's code.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Crop": "regions",
    "RegionGrid": "regions",
    "project_regions": "regions",
    "identity_loss": "losses",
    "region_loss": "losses",
    "triplet_loss": "losses",
    "region_distance": "matching",
    "rank_metrics": "metrics",
    "UserError": "errors",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"vpm_jax.{_HOME[name]}"), name)
    raise AttributeError(f"module 'vpm_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

"""Visibility-aware Part Model (Sun et al., CVPR 2019) in JAX and Flax.

Names load on first use (PEP 562), so that data loading runs none of the model's code.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see
    from vpm_jax.api import VPM as VPM
    from vpm_jax.description import Description as Description
    from vpm_jax.errors import UserError as UserError
    from vpm_jax.losses import identity_loss as identity_loss
    from vpm_jax.losses import region_loss as region_loss
    from vpm_jax.losses import triplet_loss as triplet_loss
    from vpm_jax.matching import region_distance as region_distance
    from vpm_jax.metrics import rank_metrics as rank_metrics
    from vpm_jax.regions import Crop as Crop
    from vpm_jax.regions import RegionGrid as RegionGrid
    from vpm_jax.regions import project_regions as project_regions
    from vpm_jax.search.gallery import Gallery as Gallery

__version__ = "0.2.0"  # pyproject.toml reads it

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
    "VPM": "api",
    "Description": "description",
    "Gallery": "search.gallery",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"vpm_jax.{_HOME[name]}"), name)
    raise AttributeError(f"module 'vpm_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

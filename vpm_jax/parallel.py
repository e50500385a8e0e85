"""One device or many: a data mesh, sharded batches, replicated state."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterable, Iterator

import numpy as np

# jaxlib on CPU can miscompute some jitted reductions (jax#39103). The flag that avoids it is known to parse
# on these versions; an unknown flag would abort the process.
_CPU_REDUCTION_FLAG = "--xla_cpu_experimental_ynn_fusion_type=-reduce"
_CPU_REDUCTION_VERSIONS = ("0.10.2", "0.11", "0.12")


def prepare_backend() -> None:
    """Sets XLA's flags; call before JAX starts its backend. What the user has set stays."""
    flags = os.environ.get("XLA_FLAGS", "")
    version = importlib.metadata.version("jaxlib")
    if "ynn_fusion_type" not in flags and version.startswith(_CPU_REDUCTION_VERSIONS):
        os.environ["XLA_FLAGS"] = f"{flags} {_CPU_REDUCTION_FLAG}".strip()


def data_mesh(batch: int | None = None):
    """All devices along one axis, "data".

    Raises:
      UserError: if `batch`, the global batch size, is not a multiple of the device count.
    """
    import jax
    from jax.sharding import AxisType

    from vpm_jax.errors import UserError

    count = jax.device_count()
    if batch is not None and batch % count:
        raise UserError(
            f"A batch of {batch} images does not divide over {count} devices: "
            "choose a multiple (stage identities x images_per_identity) or fewer devices."
        )
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))


def shard(mesh, batch: dict) -> dict:
    """This host's rows of a batch, as global arrays sharded over the mesh."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {k: jax.make_array_from_process_local_data(sharding, np.asarray(v)) for k, v in batch.items()}


def replicate(mesh, tree):
    """The tree on every device."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def prefetch(batches: Iterable, place: Callable, depth: int = 2) -> Iterator:
    """Puts batches on the device `depth` ahead of their use (device_put does not wait)."""
    ahead: list = []
    for batch in batches:
        ahead.append(place(batch))
        if len(ahead) > depth:
            yield ahead.pop(0)
    yield from ahead

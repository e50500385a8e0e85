"""Searching a folder of images: a feature store on disk, ranked for partial queries."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The command python -m vpm_jax.search."""
    # Imported here because `search.store` needs no JAX.
    from vpm_jax.search import command

    return command.main(argv)

"""Searching a gallery of one's own images: a feature store on disk, and its ranking for partial queries."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The command python -m vpm_jax.search, imported when it is called."""
    from vpm_jax.search import command

    return command.main(argv)

"""Reproducing the paper's tables and figures: the plan, the runs, and the report."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The command python -m vpm_jax.reproduce."""
    # Imported here because loader processes import this file and need no JAX.
    from vpm_jax.reproduce import command

    return command.main(argv)

"""Reproducing the paper's tables and figures: what to train, what it cost, and the report beside the paper."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The command python -m vpm_jax.reproduce, imported when it is called."""
    from vpm_jax.reproduce import command

    return command.main(argv)

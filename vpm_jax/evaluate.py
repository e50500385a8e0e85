"""Evaluates a trained run on partial queries: python -m vpm_jax.evaluate --workdir runs/market

Queries are cropped to every gamma (kept area ratio), the gallery stays whole (but for match.gallery_gammas), Eq. 4
compares them. Writes evaluation.json, evaluation.md and gamma.png into the workdir.

    python -m vpm_jax.evaluate --workdir runs/market --dataset partial_reid --root Partial-REID_Dataset.zip

evaluates the same weights on another dataset's test set, into evaluation-DATASET.json and .md (and gamma-DATASET.png):
on Partial-REID and Partial-iLIDS by their own protocols, where the partial images are queries as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vpm_jax import cli
from vpm_jax.data.datasets import TITLES
from vpm_jax.runs import hosts
from vpm_jax.runs.workdir import OVERRIDES


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(
        prog="python -m vpm_jax.evaluate",
        description=__doc__,
        epilog=OVERRIDES,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="the folder of a training run")
    parser.add_argument("--output", type=Path, help="where results go (default: the workdir)")
    parser.add_argument("--dataset", metavar="NAME", help=f"another than the run's: {', '.join(TITLES)}")
    parser.add_argument(
        "--root",
        metavar="PATH",
        help="the dataset's folder, zip or CSV, or a folder that holds it (default: the run's, and of --dataset "
        "$VPM_DATA or ./data)",
    )
    parser.add_argument("--rerank", action="store_true", help="re-rank by k-reciprocal neighbours (match.rerank)")
    hosts.add_arguments(parser)
    args, overrides = parser.parse_known_args(argv)
    with hosts.joined(args):
        from vpm_jax.evaluation import evaluate_run  # not above: loader processes import this file, and need no JAX

        output = args.output or args.workdir
        evaluate_run(args.workdir, output, overrides, args.dataset, args.root, args.rerank)
    return 0


if __name__ == "__main__":
    cli.run(main)

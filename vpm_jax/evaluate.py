"""Evaluates a trained run on partial queries: python -m vpm_jax.evaluate --workdir runs/market

Queries are cropped to every gamma (kept area ratio) and compared by Eq. 4 with the gallery, which stays whole unless
match.gallery_gammas is set. Writes evaluation.json, evaluation.md and gamma.png into the workdir. An evaluation with
other keys, or of the images at --root, leaves the run's own in place and writes evaluation-1.json and so on; --output
writes into another folder.

    python -m vpm_jax.evaluate --workdir runs/market --dataset partial_reid --root Partial-REID_Dataset.zip

evaluates the same weights on the test set of another dataset and writes evaluation-DATASET.json and .md (and
gamma-DATASET.png). Partial-REID and Partial-iLIDS have their own protocols, which use the partial images as queries.

    python -m vpm_jax.evaluate --workdir runs/market --save features ranking
    python -m vpm_jax.evaluate --workdir runs/market --features runs/market/saved --config.match.visibility=uniform

write features, distances or ranked lists for other tools into the folder `saved`, and match saved features by other
keys within seconds. `vpm_jax.saved` describes the files.
"""

from __future__ import annotations

from collections.abc import Sequence

from vpm_jax import cli
from vpm_jax.data.datasets import TITLES


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog="python -m vpm_jax.evaluate", description=__doc__, epilog=cli.OVERRIDES)
    parser.add_argument("--workdir", type=cli.path, required=True, help="the folder of a training run")
    parser.add_argument("--output", type=cli.path, help="where to write results (default: the workdir)")
    parser.add_argument("--dataset", metavar="NAME", help=f"evaluate on another dataset: {', '.join(TITLES)}")
    parser.add_argument(
        "--root",
        metavar="PATH",
        help="the dataset's folder, zip or CSV, or a folder that contains it (default: the run's own; with --dataset "
        "$VPM_DATA or ./data)",
    )
    parser.add_argument("--rerank", action="store_true", help="k-reciprocal re-ranking (sets match.rerank)")
    parser.add_argument(
        "--save",
        nargs="+",
        choices=("features", "distances", "ranking"),
        default=(),
        metavar="KIND",
        help="also write into the folder `saved`: features (and visibility, .npz), distances (.npy), ranking (.csv)",
    )
    parser.add_argument("--features", type=cli.path, metavar="FOLDER", help="match features that --save wrote")
    parser.add_argument("--queries", type=int, default=0, metavar="N", help="preview: only N evenly spaced queries")
    cli.add_hosts(parser)
    args, overrides = parser.parse_known_args(argv)
    overrides += ["--config.match.rerank=True"] * args.rerank

    # Loader processes import this module again, so it stays light.
    from vpm_jax.evaluation import evaluate_run
    from vpm_jax.runs import hosts

    with hosts.joined(args):
        output = args.output or args.workdir
        evaluate_run(args.workdir, output, overrides, args.dataset, args.root, args.save, args.features, args.queries)
    return 0


if __name__ == "__main__":
    cli.run(main)

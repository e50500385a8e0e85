"""Measures which distance means the same person: python -m vpm_jax.threshold --workdir runs/market

Compares every query with every gallery image of the run's test set (or --dataset), for queries cropped to each gamma,
because a partial image needs another threshold. Writes thresholds.json, .md and .png into the workdir or --output:
the ROC and DET curves, the equal error rate, the true match rate and the distance at false match rates of 10 % to
0.01 %, and open-set identification, each with a 95 % confidence interval by identity. search query
--false-match-rate uses the file.
"""

from __future__ import annotations

from collections.abc import Sequence

from vpm_jax import cli
from vpm_jax.data.datasets import TITLES
from vpm_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog="python -m vpm_jax.threshold", description=__doc__, epilog=cli.OVERRIDES)
    parser.add_argument("--workdir", type=cli.path, required=True, help="the folder of a training run")
    parser.add_argument("--output", type=cli.path, help="where to write the results (default: the workdir)")
    parser.add_argument("--dataset", metavar="NAME", help=f"another dataset: {', '.join(TITLES)}")
    parser.add_argument("--root", metavar="PATH", help="the dataset's folder, zip or CSV (default: as for evaluate)")
    parser.add_argument("--features", type=cli.path, metavar="FOLDER", help="features that evaluate --save wrote")
    parser.add_argument("--queries", type=int, default=0, metavar="N", help="preview: only N evenly spaced queries")
    args, overrides = parser.parse_known_args(argv)

    # Loader processes import this module again, so it stays light.
    from vpm_jax import captions, evaluation, thresholds
    from vpm_jax.disk import make_folder

    output = args.output or args.workdir
    cli.check_folder("--output", output)
    opened = evaluation.open_run(
        args.workdir, overrides, args.dataset, args.root, args.features, args.queries, fingerprinted=True
    )
    config = opened.source.config
    if config.match.rerank or config.match.gallery_gammas or config.eval.multi_query:
        raise UserError(
            "With match.rerank, match.gallery_gammas or eval.multi_query, the distance of a pair depends on other "
            "images, so thresholds do not hold: turn them off."
        )
    make_folder(output)
    dataset = evaluation.by_protocol(config, opened.dataset)
    gammas = thresholds.measure(opened.source, opened.variables, dataset)
    about = evaluation.record_of(config, dataset, args.workdir.resolve().name, opened.steps, opened.trained_on, 0)
    record = about | {"model": opened.about["model"], "gammas": gammas}
    text = "\n".join(captions.lines(record)) + "\n\n" + thresholds.table(gammas)
    name = f"thresholds{evaluation.suffix(dataset, opened.trained_on)}"
    thresholds.write(output, name, record, text)
    print(f"\n{text}(written to {output / name}.md)")
    return 0


if __name__ == "__main__":
    cli.run(main)

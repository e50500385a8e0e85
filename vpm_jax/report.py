"""Writes a report page of a training run: python -m vpm_jax.report --workdir runs/market

One self-contained HTML file: results beside the paper's, gamma and training curves, the configuration, and with
--pictures ranked lists and region maps. Images of synthetic pedestrians are included by default; images of real people
only with --pictures, and such a file should not be shared.

    python -m vpm_jax.report --workdir runs/synthetic --figure search.png

draws one ranked list instead: a partial query, its region map, and its nearest images with per-region distances.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from vpm_jax import captions, cli, html, metrics, overlay, paper, plots
from vpm_jax import config as config_lib
from vpm_jax.data.datasets import further_sets
from vpm_jax.data.split import Split
from vpm_jax.disk import replacing, write_atomically
from vpm_jax.errors import UserError
from vpm_jax.progress import duration
from vpm_jax.regions import WHOLE, Crop, pixel_box
from vpm_jax.runs.workdir import read_run

if TYPE_CHECKING:
    from vpm_jax.api import VPM
    from vpm_jax.description import Description


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(
        prog="python -m vpm_jax.report",
        description=__doc__,
        epilog=cli.OVERRIDES,
    )
    parser.add_argument("--workdir", type=cli.path, required=True, help="the folder of a training run")
    parser.add_argument("--output", type=cli.path, metavar="FILE.html", help="default: report.html in the workdir")
    parser.add_argument(
        "--pictures",
        action=argparse.BooleanOptionalAction,
        help="include ranked lists and region maps, with images (default: for synthetic pedestrians only)",
    )
    parser.add_argument("--gamma", type=float, help="gamma of the ranked queries (default: the smallest evaluated)")
    parser.add_argument(
        "--queries", type=cli.positive, default=3, help="number of best, typical and worst queries (default: 3)"
    )
    parser.add_argument("--top", type=cli.positive, default=10, help="ranks to show (default: 10)")
    parser.add_argument("--figure", type=cli.path, metavar="FILE.png", help="draw one ranked list instead of the page")
    parser.add_argument("--query", metavar="NAME", help="file name of the query of --figure (default: the best query)")
    args, overrides = parser.parse_known_args(argv)
    _, config = read_run(args.workdir, overrides)
    gamma = min(config.eval.gammas) if args.gamma is None else args.gamma
    if not 0 < gamma <= 1:
        raise UserError(f"--gamma {gamma:g}: expected a kept area ratio in (0, 1].")
    pictures = config.data.name == "synthetic" if args.pictures is None else args.pictures
    if args.figure:
        cli.check_output("--figure", args.figure)
        if args.figure.suffix.lower()[1:] not in (formats := Figure().canvas.get_supported_filetypes()):
            raise UserError(f"--figure {args.figure}: expected a name that ends in one of .{', .'.join(formats)}.")
        if not pictures:
            raise UserError("--figure would show images of real people, which must not be shared: add --pictures.")
        figure(args.figure, args.workdir, overrides, config, gamma, args.query, args.top)
        print(f"Wrote {args.figure} ({args.figure.stat().st_size / 2**10:.0f} KiB).")
        return 0
    output = args.output or args.workdir / "report.html"
    cli.check_output("--output", output)

    body = results(args.workdir, config) + training(args.workdir, config)
    if pictures:
        body += ranked_lists(args.workdir, overrides, config, gamma, args.queries, args.top)
    body += configuration(config)
    title = f"{paper.title(paper.method_of(config))} on "
    title += captions.test_set(config.data.name, config.data.holdout_identities)
    write_atomically(output, html.page(title[0].upper() + title[1:], summary(config) + body))
    size = output.stat().st_size / 2**20
    print(f"Wrote {output} ({size:.1f} MiB, {'with' if pictures else 'without'} pictures): open it in a browser.")
    return 0


def summary(config: ConfigDict) -> str:
    m = config.model
    model = f"Recipe {config.recipe}: {captions.network(config)}, {m.grid[0]} x {m.grid[1]} regions, {m.locator} "
    model += f"locator, seed {config.seed}, trained on {captions.training_set(config)}"
    return f'<p class="soft">{html.escape(model)}</p>\n'


def results(workdir: Path, config: ConfigDict) -> str:
    """The evaluations in the workdir, with their gamma curves."""
    evaluations = sorted(workdir.glob("evaluation*.md"), key=lambda path: (path.name != "evaluation.md", path.name))
    if not evaluations:
        return html.section(
            "Results", "<p>Not evaluated yet. Run python -m vpm_jax.evaluate --workdir WORKDIR first.</p>"
        )
    body = ""
    for path in evaluations:
        body += gamma_plot(path.with_suffix(".json"), config) + html.markdown(
            path.read_text(encoding="utf-8", errors="replace")
        )
    return html.section("Results", body)


def gamma_plot(path: Path, config: ConfigDict) -> str:
    """Rank-1 and mAP against gamma of an evaluation.json; "" if it has no gammas."""
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
        curve = {
            float(gamma): {"rank-1": float(scores["cmc"][0]), "mAP": float(scores["mAP"])}
            for gamma, scores in evaluation["gammas"].items()
        }
        title, chance = captions.title(evaluation), float(evaluation["chance_rank1"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return ""
    model = paper.title(paper.method_of(config))
    alt = "; ".join(f"gamma {g:g}: rank-1 {s['rank-1']:.1%}, mAP {s['mAP']:.1%}" for g, s in sorted(curve.items()))
    return html.plot(
        lambda file: plots.gamma_curves(file, {model: curve}, title, chance), f"Rank-1 and mAP against gamma. {alt}"
    )


def training(workdir: Path, config: ConfigDict) -> str:
    """The curves of metrics.jsonl, with speed, memory and final loss."""
    path = workdir / "metrics.jsonl"
    try:
        lines = plots.read_steps(path)
    except (OSError, ValueError):
        return html.section("Training", "<p>This workdir has no metrics.jsonl with records.</p>")
    first, last = next(iter(lines.values())), list(lines.values())[-1]
    facts = [f"{last['step']:,} steps"]
    if speed := plots.median_speed(lines):
        facts.append(f"{speed:,.0f} images/s (median)")
    for key, form in ("memory_gib", "{:.1f} GiB"), ("loss", "final loss {:.3f}"):
        if isinstance(last.get(key), int | float):
            facts.append(form.format(last[key]))
    if isinstance(first.get("eta"), int | float):
        facts.append(f"first time estimate {duration(first['eta'])}")
    summary = ", ".join(facts)
    alt = f"Training curves: losses, accuracies, learning rate and gradient norm over the steps. {summary}"
    title = captions.run_title(paper.title(paper.method_of(config)), config)
    plot = html.plot(lambda file: plots.training_curves(file, path, title), alt)
    return html.section("Training", f'<p class="soft">{html.escape(summary)}</p>\n{plot}')


def configuration(config: ConfigDict) -> str:
    """The keys that differ from the defaults and, collapsed, all keys; without paths of this machine."""
    values, default = config_lib.flatten(config), config_lib.flatten(config_lib.default())
    del values["data.root"]
    kind, colon, weights = values["pretrained"].rpartition(":")
    values["pretrained"] = kind + colon + Path(weights).name
    values["data.distractors"] = Path(values["data.distractors"]).name
    values["data.also_train"] = ",".join(name for name, _ in further_sets(values["data.also_train"]))
    changed = [(key, value, default[key]) for key, value in values.items() if value != default[key]]
    body = html.table(("key", "this run", "default"), changed)
    every = html.table(("key", "value"), list(values.items()))
    return html.section("Configuration", f"{body}<details><summary>All {len(values)} keys</summary>{every}</details>")


# ---- Images ----


class Ranking(NamedTuple):
    """The gallery ranked for one query."""

    order: np.ndarray  # gallery indices by increasing distance
    correct: np.ndarray  # bool [G], correct matches
    junk: np.ndarray  # bool [G], not ranked

    @property
    def counted(self) -> np.ndarray:
        """`order` without junk."""
        return self.order[~self.junk[self.order]]


class Rankings(NamedTuple):
    """The gallery's distances to every query at one gamma."""

    model: VPM
    query: Split
    gallery: Split  # with junk, which pages show in gray
    crops: Sequence[Crop]  # of the queries
    distance: np.ndarray  # [Q, G]
    precision: np.ndarray  # [Q], average precision; NaN for skipped queries
    record: Mapping[str, Any]  # of the evaluation, for `captions`


def rankings(workdir: Path, overrides: Sequence[str], gamma: float) -> Rankings:
    from vpm_jax import distances, evaluation, parallel
    from vpm_jax.api import VPM
    from vpm_jax.data.pipeline import eval_crops
    from vpm_jax.description import CroppedSplit, Describer

    opened = evaluation.open_run(workdir, overrides)
    source = evaluation.with_boxes(opened.source, opened.dataset)
    config, dataset = source.config, evaluation.by_protocol(source.config, opened.dataset)
    query, gallery = dataset.query, dataset.gallery
    if config.match.rerank:  # re-ranked distances depend on the whole gallery: use that of an evaluation
        gallery = evaluation.ranked(gallery)
    [distance] = distances.distances(source, opened.variables, [CroppedSplit(query, gamma)], gallery)
    precision = metrics.average_precision(distance, query.identity, gallery.identity, query.camera, gallery.camera)
    crops = eval_crops(config.eval.crop, gamma, len(query))
    run, skipped = workdir.resolve().name, int(np.isnan(precision).sum())
    record = evaluation.record_of(config, dataset, run, opened.steps, opened.trained_on, skipped)
    # Not VPM.load, which follows the run's config: region maps and shares must follow the overrides, as distances do.
    describer = Describer(config, parallel.data_mesh(), region_maps=True)
    model = VPM(config, partial(describer.step, opened.variables), "", f"the run {run}")
    return Rankings(model, query, gallery, crops, distance, precision, record)


def ranked_lists(
    workdir: Path, overrides: Sequence[str], config: ConfigDict, gamma: float, queries: int, top: int
) -> str:
    """Sections with ranked lists of the best, typical and worst queries, and region maps at every gamma."""
    from vpm_jax import evaluation
    from vpm_jax.data.pipeline import eval_crops, eval_picture

    model, query, gallery, crops, distance, precision, _ = rankings(workdir, overrides, gamma)
    kept = captions.kept(config.eval.crop, f"{gamma:g}")
    body = f"<p>Each query is {kept}. Its region map shows the most probable region of "
    body += "every cell; stronger colors are more probable. The bars are the visibility scores, in cells. "
    body += "A correct match has the query's identity. Junk (same identity and camera, or identity -1) is not ranked. "
    body += f"Matching: {html.escape(evaluation.matching_in_words(config))}.</p>\n"
    for title, chosen in choose(precision, query.identity, queries).items():
        body += f"<h3>{title}</h3>\n"
        images = [eval_picture(query, i, crops[i]) for i in chosen]
        for index, pixels, description in zip(chosen, images, model(images), strict=True):
            ranking = rank(index, distance[index], query, gallery)
            caption = f"{query.names[index]}\nidentity {query.identity[index]}{camera(query, index)}\n"
            caption += f"AP {precision[index]:.0%}, first match at rank {first_match(ranking)}"
            regions = region_card(model, pixels, description, f"query {query.names[index]}", caption, "query")
            body += html.beside(regions, html.row(cards(ranking, distance[index], gallery, top)))
    sections = html.section(f"Ranked lists at gamma {gamma:g}", body)

    body = "<p>The same queries at every gamma.</p>\n"
    gammas = sorted({*config.eval.gammas, gamma, 1.0})
    for index in choose(precision, query.identity, 2)["Typical"]:
        images = [eval_picture(query, index, eval_crops(config.eval.crop, g, len(query))[index]) for g in gammas]
        cells = [
            region_card(model, pixels, description, f"{query.names[index]} at gamma {g:g}", f"gamma {g:g}")
            for g, pixels, description in zip(gammas, images, model(images), strict=True)
        ]
        body += html.row(cells, wide=True)
    return sections + html.section("Region maps", body)


def region_card(
    model: VPM, pixels: np.ndarray, description: Description, name: str, caption: str, kind: str = ""
) -> str:
    region_map, visibility = description.region_maps[0], description.visibility[0]
    return html.card(html.regions(pixels, region_map, visibility, name, model.grid.cols), caption, kind, kind)


def figure(
    path: Path,
    workdir: Path,
    overrides: Sequence[str],
    config: ConfigDict,
    gamma: float,
    name: str | None,
    top: int,
) -> None:
    """Draws the ranked list of the query whose file name ends with `name`, or of the best one.

    Raises:
      UserError: unless exactly one query has that name, and for distances that are not those of Eq. 4 alone.
    """
    if config.match.rerank or config.match.vector or config.match.gallery_gammas or config.eval.multi_query:
        keys = "match.rerank, match.vector, match.gallery_gammas and eval.multi_query"
        raise UserError(f"--figure explains Eq. 4 alone: leave {keys} unset.")

    from vpm_jax.data.pipeline import eval_picture

    model, query, gallery, crops, distance, precision, record = rankings(workdir, overrides, gamma)
    named = [i for i, file in enumerate(query.names) if name is not None and file.endswith(name)]
    if name is not None and len(named) != 1:
        raise UserError(f"--query {name}: {len(named)} of the {len(query)} queries match this name, expected 1.")
    [index] = named or choose(precision, query.identity, 1)["Best"]
    ranking = rank(index, distance[index], query, gallery)
    nearest = ranking.counted[:top]
    pixels, whole = (eval_picture(query, index, crop) for crop in (crops[index], WHOLE))
    images = [eval_picture(gallery, int(i), WHOLE) for i in nearest]
    description = model([pixels])
    local, weight = model.match_regions(description, images)
    neighbors = [
        overlay.Neighbor(image, bool(ranking.correct[i]), float(distance[index, i]), local[0, row], weight[0, row])
        for row, (i, image) in enumerate(zip(nearest, images, strict=True))
    ]
    frame = (*pixel_box(crops[index], *whole.shape[:2])[:2], *whole.shape[:2])
    side = f"the {config.eval.crop} " if config.eval.crop in ("top", "bottom", "left", "right") else ""
    kept = "a whole image" if crops[index] == WHOLE else f"{side}{gamma:.0%} of an image"
    titles = f"query: {kept}", f"nearest of {len(ranking.counted)} gallery images, by Eq. 4 (\u2713 correct match)"
    about = f"{captions.subject(record)} {record['network']}."
    with replacing(path) as temporary:
        region_map, visibility = description.region_maps[0], description.visibility[0]
        overlay.ranking(temporary, pixels, frame, region_map, visibility, neighbors, model.grid.cols, titles, about)
        if path.suffix.lower() == ".png":
            overlay.with_palette(temporary)


def choose(precision: np.ndarray, identity: np.ndarray, count: int) -> Mapping[str, list[int]]:
    """{"Best": queries, "Typical": ..., "Worst": ...} by average precision, each list of different identities.

    Args:
      precision: [Q]; NaN for skipped queries.
      identity: [Q].
      count: the maximum length of each list.
    """
    ranked = [int(i) for i in np.argsort(-precision, kind="stable") if np.isfinite(precision[i])]
    median = np.median(precision[ranked])
    orders = {
        "Best": ranked,
        "Typical": sorted(ranked, key=lambda i: abs(precision[i] - median)),
        "Worst": ranked[::-1],
    }
    chosen: dict[str, list[int]] = {}
    for title, order in orders.items():
        first_of_each = {int(identity[i]): i for i in reversed(order)}.values()
        chosen[title] = sorted(first_of_each, key=order.index)[:count]
    return chosen


def rank(index: int, distance: np.ndarray, query: Split, gallery: Split) -> Ranking:
    protocol = metrics.Protocol(query.identity, gallery.identity, query.camera, gallery.camera)
    matches, removed = protocol.images_of(index)
    correct, junk = np.zeros(len(distance), bool), protocol.junk.copy()
    correct[matches] = junk[removed] = True
    return Ranking(np.argsort(distance, kind="stable"), correct, junk)


def first_match(ranking: Ranking) -> int:
    """The rank of the first correct match, from 1."""
    return int(np.argmax(ranking.correct[ranking.counted])) + 1


def cards(ranking: Ranking, distance: np.ndarray, gallery: Split, top: int) -> list[str]:
    """Cards of the first `top` ranks and of the junk between them, at most `top` of it."""
    from vpm_jax.data.pipeline import eval_picture

    figures: list[str] = []
    place = junk = 0
    for i in ranking.order:
        if place == top or junk == top:
            break
        is_junk = bool(ranking.junk[i])
        place, junk = place + (not is_junk), junk + is_junk
        kind, mark = (
            ("junk", "junk") if is_junk else ("right", "✓ match") if ranking.correct[i] else ("wrong", "✗ wrong")
        )
        caption = (
            f"{'' if is_junk else f'{place}. '}{distance[i]:.3f}\nidentity {gallery.identity[i]}{camera(gallery, i)}"
        )
        image = html.picture(eval_picture(gallery, int(i), WHOLE), gallery.names[i])
        figures.append(html.card(image, caption, kind, mark))
    return figures


def camera(split: Split, index: int) -> str:
    return "" if split.camera is None else f", camera {split.camera[index]}"


if __name__ == "__main__":
    cli.run(main)

"""One page about a training run: python -m vpm_jax.report --workdir runs/market

Results beside the paper's, gamma and training curves, the configuration, and with --pictures ranked lists and region
maps, in one HTML file that needs nothing else. Pictures of the synthetic pedestrians are in it unless --no-pictures;
pictures of real people only with --pictures, and nobody else should get the file then.

    python -m vpm_jax.report --workdir runs/synthetic --figure search.png

draws one ranked list instead: a partial query, its region map, what is nearest, and how far each region is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vpm_jax import cli, html, metrics, overlay, paper, parallel, plots
from vpm_jax import config as config_lib
from vpm_jax.data.datasets import TITLES
from vpm_jax.errors import UserError
from vpm_jax.regions import WHOLE, Crop, pixel_box
from vpm_jax.runs.logs import duration, replacing, write_atomically
from vpm_jax.runs.workdir import OVERRIDES, read_run


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(
        prog="python -m vpm_jax.report",
        description=__doc__,
        epilog=OVERRIDES,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="the folder of a training run")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="default: report.html in the workdir")
    parser.add_argument(
        "--pictures",
        action=argparse.BooleanOptionalAction,
        help="ranked lists and region maps, with the dataset's pictures (default: of synthetic pedestrians only)",
    )
    parser.add_argument("--gamma", type=float, help="of the ranked lists' queries (default: the smallest evaluated)")
    parser.add_argument("--queries", type=int, default=3, help="best, worst and typical ones, each (default: 3)")
    parser.add_argument("--top", type=int, default=10, help="ranks shown of each query (default: 10)")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE.png", help="one ranked list as a figure, instead of a page"
    )
    parser.add_argument("--query", metavar="NAME", help="the query of --figure, by its file (default: the best)")
    args, overrides = parser.parse_known_args(argv)
    _, config = read_run(args.workdir, overrides)
    gamma = min(config.eval.gammas) if args.gamma is None else args.gamma
    if not 0 < gamma <= 1 or args.queries < 1 or args.top < 1:
        raise UserError(
            f"--gamma {gamma:g}, --queries {args.queries}, --top {args.top}: expected a kept area ratio in (0, 1] and "
            "numbers from 1."
        )
    pictures = config.data.name == "synthetic" if args.pictures is None else args.pictures
    if args.figure:
        cli.check_output("--figure", args.figure)
        if not pictures:
            raise UserError(
                "--figure shows pictures of real people, whom nobody else should see: say so by --pictures."
            )
        figure(args.figure, args.workdir, config, gamma, args.query, args.top)
        print(f"Wrote {args.figure} ({args.figure.stat().st_size / 2**10:.0f} KiB).")
        return 0
    output = args.output or args.workdir / "report.html"
    cli.check_output("--output", output)

    body = results(args.workdir, config) + training(args.workdir, config)
    if pictures:
        body += ranked_lists(args.workdir, config, gamma, args.queries, args.top)
    body += configuration(config)
    title = f"{paper.title(paper.method_of(config))} on {TITLES.get(config.data.name, config.data.name)}"
    write_atomically(output, html.page(title[0].upper() + title[1:], summary(config) + body))
    size = output.stat().st_size / 2**20
    print(f"Wrote {output} ({size:.1f} MiB, {'with' if pictures else 'without'} pictures): open it in a browser.")
    return 0


def summary(config: ConfigDict) -> str:
    m = config.model
    model = f"Recipe {config.recipe}: ResNet-{m.depth} of width {m.width}, {config.data.height} x {config.data.width} "
    model += f"images, {m.grid[0]} x {m.grid[1]} regions, {m.locator} locator, seed {config.seed}"
    return f'<p class="soft">{html.escape(model)}</p>\n'


def results(workdir: Path, config: ConfigDict) -> str:
    """The evaluations that the workdir holds, as they were printed, and the gamma curves of the model."""
    evaluations = sorted(workdir.glob("evaluation*.md"), key=lambda path: (path.name != "evaluation.md", path.name))
    if not evaluations:
        return html.section(
            "Results", "<p>Not evaluated yet: python -m vpm_jax.evaluate --workdir WORKDIR does it.</p>"
        )
    body = ""
    for path in evaluations:
        body += gamma_plot(path.with_suffix(".json"), config) + html.markdown(path.read_text(errors="replace"))
    return html.section("Results", body)


def gamma_plot(path: Path, config: ConfigDict) -> str:
    """Rank-1 and mAP against gamma, of an evaluation that has gammas; else ""."""
    try:
        found = json.loads(path.read_text())
        curve = {
            float(gamma): {"rank-1": float(scores["cmc"][0]), "mAP": float(scores["mAP"])}
            for gamma, scores in found["gammas"].items()
        }
        dataset, crop = str(found["dataset"]), str(found["protocol"]["crop"])
        chance = float(found["chance_rank1"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return ""  # the numbers are in the text below it
    title = plots.gamma_title(dataset, crop, plots.network(config), seeds=[1])
    model = paper.title(paper.method_of(config))
    said = "; ".join(f"gamma {g:g}: rank-1 {s['rank-1']:.1%}, mAP {s['mAP']:.1%}" for g, s in sorted(curve.items()))
    return html.plot(
        lambda file: plots.gamma_curves(file, {model: curve}, title, chance), f"Rank-1 and mAP against gamma. {said}"
    )


def training(workdir: Path, config: ConfigDict) -> str:
    """Curves of metrics.jsonl, and what the last record says of speed and memory."""
    path = workdir / "metrics.jsonl"
    try:
        lines = plots.read_steps(path)
    except (OSError, ValueError):
        return html.section("Training", "<p>This workdir has no metrics.jsonl with records.</p>")
    first, last = next(iter(lines.values())), list(lines.values())[-1]
    words = [f"{last['step']:,} steps"]
    if speed := plots.median_speed(lines):
        words.append(f"{speed:,.0f} images/s (median)")
    for key, form in (
        ("memory_gib", "{:.1f} GiB"),
        ("loss", "loss {:.3f} at the end"),
    ):
        if isinstance(last.get(key), int | float):
            words.append(form.format(last[key]))
    if isinstance(first.get("eta"), int | float):
        words.append(f"{duration(first['eta'])} were expected at the start")
    alt = "Training curves: losses, accuracies, learning rate and gradient norm over the steps. " + ", ".join(words)
    title = plots.run_title(paper.title(paper.method_of(config)), config)
    plot = html.plot(lambda file: plots.training_curves(file, path, title), alt)
    return html.section("Training", f'<p class="soft">{html.escape(", ".join(words))}</p>\n{plot}')


def configuration(config: ConfigDict) -> str:
    """The keys that differ from the defaults, and behind a fold all of them; no path of this machine."""
    values, default = config_lib.flatten(config), config_lib.flatten(config_lib.default())
    del values["data.root"]
    kind, colon, weights = values["pretrained"].rpartition(":")
    values["pretrained"] = kind + colon + Path(weights).name
    changed = [(key, value, default[key]) for key, value in values.items() if value != default[key]]
    body = html.table(("key", "this run", "default"), changed)
    every = html.table(("key", "value"), list(values.items()))
    return html.section("Configuration", f"{body}<details><summary>All {len(values)} keys</summary>{every}</details>")


# ---- Pictures ----


class Ranking(NamedTuple):
    """What one query finds."""

    query: int
    precision: float  # AP
    order: np.ndarray  # gallery images by distance
    correct: np.ndarray  # bool, of each gallery image
    junk: np.ndarray  # bool


class Rankings(NamedTuple):
    """The gallery ranked for every query at one gamma."""

    model: Any
    query: Any
    gallery: Any  # with junk, for pages to show in grey
    crops: Sequence[Crop]  # of the queries
    distance: np.ndarray  # [Q, G]
    precision: np.ndarray  # [Q], the AP of each query; NaN for those that are not counted


def rankings(workdir: Path, config: ConfigDict, gamma: float) -> Rankings:
    parallel.prepare_backend()
    from vpm_jax import evaluation
    from vpm_jax.api import VPM
    from vpm_jax.data.pipeline import eval_crops
    from vpm_jax.data.sources import load_dataset
    from vpm_jax.description import CroppedSplit, Describer

    dataset = load_dataset(config.data)
    evaluation.check(config, dataset)
    model = VPM.load(workdir)
    query, gallery = dataset.query, dataset.gallery
    if config.match.rerank:  # which depends on all that is ranked, as in an evaluation
        gallery = evaluation.ranked(gallery)
    mesh = parallel.data_mesh(config.eval.batch)
    variables = parallel.replicate(mesh, model.variables)
    cropped = [CroppedSplit(query, gamma)]
    [distance] = evaluation.distances(Describer(config, mesh), variables, cropped, gallery)
    precision = metrics.average_precision(distance, query.identity, gallery.identity, query.camera, gallery.camera)
    crops = eval_crops(config.eval.crop if gamma < 1 else "none", gamma, len(query))
    return Rankings(model, query, gallery, crops, distance, precision)


def ranked_lists(workdir: Path, config: ConfigDict, gamma: float, queries: int, top: int) -> str:
    """Sections with the ranked lists of the best, the worst and typical queries, and region maps at every gamma."""
    from vpm_jax import evaluation
    from vpm_jax.data.pipeline import eval_crops, eval_picture

    model, query, gallery, crops, distance, precision = rankings(workdir, config, gamma)
    body = f"<p>Each query keeps its {config.eval.crop} {gamma:g}; beside it, its region map: every cell in the color "
    body += "of its most probable region, the stronger the surer. The bars are the visibility scores, in cells. "
    body += "A match has the same identity. Junk (the same identity and camera, or identity -1) is not ranked. "
    body += f"Matching: {html.escape(evaluation.matching_in_words(config))}.</p>\n"
    for title, chosen in choose(precision, query.identity, queries).items():
        body += f"<h3>{title}</h3>\n"
        shown = [eval_picture(query, i, crops[i]) for i in chosen]
        for index, pixels, said in zip(chosen, shown, model(shown), strict=True):
            ranking = rank(index, precision[index], distance[index], query, gallery)
            name = f"query {query.names[index]}"
            caption = f"{query.names[index]}\nidentity {query.identity[index]}{camera(query, index)}\n"
            caption += f"AP {precision[index]:.0%}, first match at rank {first_match(ranking)}"
            seen = html.regions(pixels, said.region_maps[0], said.visibility[0], name, model.grid.cols)
            card = html.card(seen, caption, "query", "query")
            body += html.beside(card, html.row(cards(ranking, distance[index], gallery, top)))
    sections = html.section(f"Ranked lists at gamma {gamma:g}", body)

    body = "<p>The same pictures, less and less of them kept.</p>\n"
    typical = choose(precision, query.identity, 2)["Typical"]
    gammas = sorted({*config.eval.gammas, gamma, 1.0})
    for index in typical:
        shown = [
            eval_picture(query, index, eval_crops(config.eval.crop if g < 1 else "none", g, len(query))[index])
            for g in gammas
        ]
        cells = []
        for g, pixels, said in zip(gammas, shown, model(shown), strict=True):
            name = f"{query.names[index]} at gamma {g:g}"
            seen = html.regions(pixels, said.region_maps[0], said.visibility[0], name, model.grid.cols)
            cells.append(html.card(seen, f"gamma {g:g}"))
        body += html.row(cells, wide=True)
    return sections + html.section("What the locator sees", body)


def figure(path: Path, workdir: Path, config: ConfigDict, gamma: float, name: str | None, top: int) -> None:
    """Draws the ranked list of one query; `name` ends with its file's name, None for the one ranked best.

    Raises:
      UserError: for a name that no query has, or matching that is more than Eq. 4 with whole images.
    """
    if config.match.rerank or config.match.gallery_gammas:
        raise UserError(
            "--figure explains Eq. 4: leave match.rerank and match.gallery_gammas out of the configuration."
        )
    from PIL import Image

    from vpm_jax.data.pipeline import eval_picture

    model, query, gallery, crops, distance, precision = rankings(workdir, config, gamma)
    named = [i for i, file in enumerate(query.names) if name is not None and file.endswith(name)]
    if name is not None and len(named) != 1:
        raise UserError(
            f"--query {name}: {len(named)} of the {len(query)} queries have a name that ends so, expected 1."
        )
    [index] = named or choose(precision, query.identity, 1)["Best"]
    ranking = rank(index, precision[index], distance[index], query, gallery)
    counted = ranking.order[~ranking.junk[ranking.order]]
    nearest = counted[:top]
    pixels, whole = (eval_picture(query, index, crop) for crop in (crops[index], WHOLE))
    pictures = [eval_picture(gallery, int(i), WHOLE) for i in nearest]
    described = model([pixels])
    local, weight = model.match_regions(described, pictures)
    neighbors = [
        overlay.Neighbor(shown, bool(ranking.correct[i]), float(distance[index, i]), local[0, row], weight[0, row])
        for row, (i, shown) in enumerate(zip(nearest, pictures, strict=True))
    ]
    frame = (*pixel_box(crops[index], *whole.shape[:2])[:2], *whole.shape[:2])
    kept = f"the {config.eval.crop} {gamma:.0%} of a picture" if gamma < 1 else "a whole picture"
    titles = f"query: {kept}", f"nearest of {len(counted)} gallery images, by Eq. 4 (\u2713 same person)"
    with replacing(path) as temporary:
        region_map, visibility = described.region_maps[0], described.visibility[0]
        overlay.ranking(temporary, pixels, frame, region_map, visibility, neighbors, model.grid.cols, titles)
        if path.suffix.lower() == ".png":  # of a palette it has half the bytes
            full = Image.open(temporary).convert("RGB")
            palette = full.quantize(256, Image.Quantize.MAXCOVERAGE)
            full.quantize(palette=palette).save(temporary, format="PNG", optimize=True)


def choose(precision: np.ndarray, identity: np.ndarray, count: int) -> Mapping[str, list[int]]:
    """{"Best": queries, "Typical": ..., "Worst": ...} by average precision, `count` of each, of different identities.

    Args:
      precision: [Q]; NaN for queries that are not counted.
      identity: [Q].
      count: at most.
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
        one_each = list({int(identity[i]): i for i in reversed(order)}.values())[::-1]  # an identity's first
        chosen[title] = sorted(one_each, key=order.index)[:count]
    return chosen


def rank(index: int, precision: float, distance: np.ndarray, query: Any, gallery: Any) -> Ranking:
    same = gallery.identity == query.identity[index]
    junk = gallery.identity == -1
    if query.camera is not None:
        junk = junk | (same & (gallery.camera == query.camera[index]))
    return Ranking(index, precision, np.argsort(distance, kind="stable"), same & ~junk, junk)


def first_match(ranking: Ranking) -> int:
    """The rank, from 1, of the first match: junk is not counted."""
    counted = ranking.order[~ranking.junk[ranking.order]]
    return int(np.argmax(ranking.correct[counted])) + 1


def cards(ranking: Ranking, distance: np.ndarray, gallery: Any, top: int) -> list[str]:
    """The first `top` ranks, and the junk among them, of which at most `top` is shown."""
    from vpm_jax.data.pipeline import eval_picture

    made: list[str] = []
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
        shown = html.picture(eval_picture(gallery, int(i), WHOLE), gallery.names[i])
        made.append(html.card(shown, caption, kind, mark))
    return made


def camera(split: Any, index: int) -> str:
    return "" if split.camera is None else f", camera {split.camera[index]}"


if __name__ == "__main__":
    cli.run(main)

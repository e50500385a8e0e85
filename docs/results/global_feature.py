"""Region features or one global feature for real partial images? An analysis of small networks; it chooses nothing.

    python -m vpm_jax.reproduce --parts docs/results/global_feature.py --seeds 2 --output runs/global_feature
    python docs/results/global_feature.py --workdirs runs/reproduce --data data/partial

The first command trains the models of SCREEN; the second evaluates them on Partial-REID and Partial-iLIDS, beside their
results on held-out identities of Market-1501, and writes global_feature.json. `docs/results/tables.py` fills the page.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

_PADDED, _ERASED, _GLOBAL = {"data.fit": "pad"}, {"data.erasing": 0.5}, {"model.grid": (1, 1)}
SCREEN: dict[str, dict[str, object]] = {
    "base": {},
    "fit_top": _PADDED,
    "fit_random": _PADDED | {"data.place": "random"},
    "global_fit": _GLOBAL | _PADDED,
    "global_fit_erasing": _GLOBAL | _PADDED | _ERASED,
    "fit_top_erasing": _PADDED | _ERASED,
}
TITLES = {
    "fit_top": "VPM, 4 regions",
    "fit_random": "VPM, 4 regions, trained at random places",
    "fit_top_erasing": "VPM, 4 regions, random erasing",
    "global_fit": "global feature",
    "global_fit_erasing": "global feature, random erasing",
}
TESTS = {
    "partial_reid": ("Partial-REID", "Partial-REID_Dataset.zip"),
    "partial_ilids": ("Partial-iLIDS", "Partial_iLIDS.zip"),
}
RUNS = Path(__file__).parent / "runs"


def main() -> None:
    from vpm_jax.benchmark.report import hardware, versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdirs", type=Path, required=True, help="the workdirs of the first command")
    parser.add_argument("--data", type=Path, required=True, help="the folder of the partial datasets")
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for name in TITLES:
        for file in sorted(RUNS.glob(f"market1501-screen-{name}-seed*.json")):
            workdir, result = args.workdirs / file.stem, json.loads(file.read_text(encoding="utf-8"))
            if workdir.is_dir():
                found.setdefault(name, {})[file.stem] = {"market1501": result["gammas"]} | partial(workdir, args.data)
    record = {"table": table(found), "runs": found, "hardware": hardware(), "versions": versions()}
    file = Path(__file__).with_suffix(".json")
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(*(" | ".join(row) for row in record["table"]), sep="\n")


def partial(workdir: Path, data: Path) -> dict[str, Any]:
    """{dataset: its all-shot results} of a run."""
    from vpm_jax.evaluation import evaluate_run

    results = {}
    for test, (_, file) in TESTS.items():
        with tempfile.TemporaryDirectory() as folder:
            evaluate_run(workdir, Path(folder), dataset_name=test, root=str(data / file))
            record = json.loads((Path(folder) / f"evaluation-{test}.json").read_text(encoding="utf-8"))
        results[test] = record["results"]["all-shot"] | {"queries": record["protocol"]["queries"]}
    return results


def table(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Means over the seeds, with the standard deviation over them and the binomial error of rank-1 in brackets."""
    columns = ["held-out identities, gamma 0.5", "whole", *(title for title, _ in TESTS.values())]
    rows = [["rank-1 / mAP", "seeds", *columns]]
    for name, runs in found.items():
        cells = [[run["market1501"][gamma] for run in runs.values()] for gamma in ("0.5", "1.0")]
        cells += [[run[test] for run in runs.values()] for test in TESTS]
        rows.append([TITLES[name], str(len(runs)), *map(cell, cells)])
    return rows


def cell(results: list[dict[str, Any]]) -> str:
    rank1, mean_ap = (
        [100 * x for x in values] for values in zip(*((r["cmc"][0], r["mAP"]) for r in results), strict=True)
    )
    text = f"{mean(rank1):.1f}" + (f" ± {stdev(rank1):.1f}" if len(rank1) > 1 else "") + f" / {mean(mean_ap):.1f}"
    if "queries" not in results[0]:
        return text
    share = mean(rank1) / 100
    return f"{text} ({100 * (share * (1 - share) / results[0]['queries']) ** 0.5:.1f})"


if __name__ == "__main__":
    main()

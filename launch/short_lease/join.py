"""Turns what came back into a workdir and, with --results, a result file of `vpm_jax.reproduce`.

    python launch/short_lease/join.py RETURNED runs/lease --results docs/results/runs

RETURNED is the folder that held $OUT's files.
"""

from __future__ import annotations

import json
import shutil
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from vpm_jax import cli, parallel, pretrained
from vpm_jax import config as config_lib
from vpm_jax.disk import make_folder
from vpm_jax.errors import UserError
from vpm_jax.keys import WEIGHTS
from vpm_jax.pretrained import own
from vpm_jax.reproduce import estimate, experiments, results
from vpm_jax.reproduce.experiments import METHODS, SCALES, Run
from vpm_jax.schedule import schedule

PACKED = "imagenet.npz"  # what device.py calls the packed weights
# Keys that training sets from its data unless the recipe does.
OPEN = {"model.num_identities", "stage1.steps_per_epoch", "stage2.steps_per_epoch", "data.aspect"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog="python launch/short_lease/join.py", description=__doc__)
    parser.add_argument("returned", type=Path, help="holds results.tar.gz and weights.safetensors.0, .1, ...")
    parser.add_argument("workdir", type=Path, help="a new folder, for python -m vpm_jax.evaluate --workdir")
    parser.add_argument("--results", type=Path, help="the folder of result files, as of vpm_jax.reproduce")
    parser.add_argument("--method", default="vpm", choices=METHODS, help="what was trained (default: %(default)s)")
    parser.add_argument("--variant", default="", help="names what differs from the recipe, a shorter schedule too")
    args = parser.parse_args(argv)
    parallel.prepare_backend()
    archive = args.returned / "results.tar.gz"
    if not archive.exists():
        raise UserError(f"There is no {archive}: give the folder that the second command's files came back in.")
    with tempfile.TemporaryDirectory() as temporary:
        lease = Path(temporary)
        with tarfile.open(archive) as tar:
            tar.extractall(lease, filter="data")
        if not (lease / "run" / "config.json").exists():
            raise UserError(f"{archive} holds no run: give the folder of the second command, not of the first.")
        run, result = convert(lease, args.method, args.variant) if args.results else (None, None)
        make_workdir(args.returned, lease, args.workdir)
        if run and result:
            make_folder(args.results)
            results.write(args.results, run, result)
            print(f"Wrote {args.results / run.name}.json.")
    return 0


def make_workdir(returned: Path, lease: Path, workdir: Path) -> None:
    """The run's files with its weights as a checkpoint; what was logged and measured goes to `lease`."""
    parts = sorted(returned.glob("weights.safetensors.*"), key=lambda path: int(path.suffix[1:]))
    if parts:
        file = lease / "weights.safetensors"
        file.write_bytes(b"".join(part.read_bytes() for part in parts))
        trained = lease / "facts" / "trained.json"
        steps = json.loads(trained.read_text(encoding="utf-8"))["step"] if trained.exists() else 0
        own.write_workdir(workdir, pretrained.load(f"vpm:{file}"), steps)  # its config is free of the machine's paths
    ignored = shutil.ignore_patterns("config.json") if parts else None
    shutil.copytree(lease / "run", workdir, ignore=ignored, dirs_exist_ok=True)
    for name in ("logs", "facts", "ranked", "beside"):
        if (lease / name).is_dir():
            shutil.copytree(lease / name, workdir / "lease" / name, dirs_exist_ok=True)
    if parts:
        print(f"Wrote {workdir}: evaluate it with python -m vpm_jax.evaluate --workdir {workdir}")
    else:
        print(f"Wrote {workdir}, without a checkpoint: no weights came back.")


def convert(lease: Path, method: str, variant: str) -> tuple[Run, dict[str, Any]]:
    """The run that was trained, and its result.

    Raises:
      UserError: if it was not trained or evaluated to its end, or is not a run of `vpm_jax.reproduce`.
    """
    workdir, facts = lease / "run", {path.stem: json.loads(path.read_text()) for path in lease.glob("facts/*.json")}
    config = config_lib.read(workdir)
    assert config is not None
    stages = schedule(config)
    if not (workdir / "evaluation.json").exists() or "trained" not in facts:
        raise UserError("The run was not evaluated or not exported: it gives no result file.")
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    if evaluation["steps"] < stages[-1].end_step:
        raise UserError(
            f"Training was stopped after step {evaluation['steps']} of {stages[-1].end_step}: a schedule that did not "
            "end gives no result file."
        )
    run = find_run(config, facts["plan"]["config"], method, variant)
    images = sum(stage.steps * stage.batch for stage in stages)
    rate = median(record["images_per_second"] for record in estimate.records(workdir))
    resolved = experiments.fingerprint(config)
    result = results.record(run, evaluation, resolved, images, facts["trained"]["seconds"], rate)
    there = {key: facts["step"][key] for key in ("hardware", "versions")} | {"commit": facts["packed"]["commit"]}
    finished = time.gmtime((workdir / "evaluation.json").stat().st_mtime)
    return run, result | there | {"finished": time.strftime("%Y-%m-%d %H:%M UTC", finished)}


def find_run(config: Any, file: str, method: str, variant: str) -> Run:
    """The run of `vpm_jax.reproduce` that a resolved config belongs to.

    Raises:
      UserError: if no scale has this config file, or the config is not the method's.
    """
    dataset = config.data.name
    scale = next((name for name in SCALES if experiments.config_file(name, dataset) == file), None)
    if scale is None:
        raise UserError(f"{file} belongs to no scale of vpm_jax.reproduce: leave --results out.")

    def changes(asked: Any) -> dict[str, Any]:
        """The keys that differ in the trained config, except those that every run sets."""
        before = config_lib.flatten(asked)
        found = experiments.differences(asked, config)
        if found.get("pretrained") == PACKED:
            del found["pretrained"]
        by_weights = config_lib.keys_with(WEIGHTS)
        return {k: v for k, v in found.items() if k not in by_weights and not (k in OPEN and not before[k])}

    own_changes = METHODS[method].changes
    changed = {k: v for k, v in changes(experiments.base_config(scale, dataset)).items() if own_changes.get(k) != v}
    seed = changed.pop("seed", 0)
    flat = config_lib.flatten(config)
    for key in [key for key in changed if key.endswith(".epochs")]:  # or these keys would be scaled
        stage = key.removesuffix("epochs")
        changed |= {f"{stage}{name}": flat[f"{stage}{name}"] for name in ("triplet_start", "warmup_epochs")}
    overrides = [f"--config.{key}={value}" for key, value in changed.items()]
    run = experiments.make_run(dataset, scale, method, seed, "", variant, overrides)
    if other := changes(run.config):
        key, value = next(iter(other.items()))
        raise UserError(f"The run is not --method {method}: its {key} is {value}.")
    return run


if __name__ == "__main__":
    cli.run(main)

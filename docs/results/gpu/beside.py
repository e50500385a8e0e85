"""What ran beside the released recipe on the leased GPU (launch/short_lease): runs of `vpm_jax.reproduce`, in chains.

    VPM_BESIDE="python3 .gpu2/beside.py" python3 "$HOME/vpm-gpu/device.py" second 570

The first run of two chains starts with the released recipe's training, the others when 93 % of it are done. All chains
pause while that training is late. ImageNet weights are those that pack.py rounds to float16, hence "half".
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

LEASE = Path(os.environ["VPM_LEASE"])
FOLDER, RUN = LEASE / "beside", LEASE / "run"
STARTED, LEFT = time.monotonic(), float(os.environ["VPM_LEFT"])
HALF = [f"--config.pretrained={LEASE / 'imagenet.npz'}"]
# 148,480 images: market_fast with more epochs, and one size larger
LONG = ["--config.stage1.epochs=18", "--config.stage2.epochs=11"]
LARGE = ["--config.data.height=384", "--config.stage1.height=256", "--config.stage1.width=128"]
LARGE += ["--config.stage1.epochs=20", "--config.stage2.epochs=9"]
VARIANTS = {
    ("fast", "half"): HALF,
    ("fast", "long"): HALF + LONG,
    ("fast", "large"): HALF + LARGE,
    ("small", ""): [],
}
# scale, variant, method, seed; a chain's runs after "wait" start at the end of the released recipe's training
CHAINS = {
    "fast": ["fast half vpm 0", "wait", "fast half vpm-bottom 0", "fast half vpm-bilateral 0", "fast half vpm 1"],
    "small": ["small - vpm-bottom 1", "small - vpm-bilateral 1", "wait", "fast half baseline 0", "small - vpm 1"],
    "long": ["wait", "fast long vpm 0", "fast long vpm 1"],
    "large": ["wait", "fast large vpm 0"],
}


def read(path: Path) -> dict:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def progress() -> tuple[float, float]:
    """Images of the released recipe's training done, and still to do."""
    plan, done = read(LEASE / "facts" / "plan.json"), 0.0
    if (RUN / "training.png").exists():
        return plan["images"], 0.0
    with contextlib.suppress(OSError, ValueError, KeyError):
        done = 64.0 * json.loads((RUN / "metrics.jsonl").read_text("utf-8").strip().rpartition("\n")[2])["step"]
    return done, plan["images"] - done


def chain(name: str) -> None:
    from vpm_jax import parallel
    from vpm_jax.reproduce import command, experiments

    parallel.prepare_backend()
    for entry in CHAINS[name]:
        if entry == "wait":
            while progress()[1] > 0.07 * sum(progress()):
                time.sleep(0.5)
            continue
        scale, variant, method, seed = entry.replace(" - ", "  ").split(" ")
        overrides = VARIANTS[scale, variant]
        for test in ("", "partial_reid", "partial_ilids"):
            run = experiments.make_run("market1501", scale, method, int(seed), test, variant, overrides)
            code, reason = command.perform(run, FOLDER / "results", FOLDER / "runs")
            print(f"{time.monotonic() - STARTED:.0f} s: {run.name} {reason or 'done'}", flush=True)
            if code:
                return


def main() -> None:
    if len(sys.argv) > 1:
        return chain(sys.argv[1])
    for name in ("results", "runs"):
        (FOLDER / name).mkdir(exist_ok=True)
    data = Path(os.environ["VPM_DATA"]) / "dataset2.zip"
    data.write_bytes((Path(__file__).parent / "dataset2.zip").read_bytes())
    rate = read(LEASE / "facts" / "step.json")["images_per_second"]
    reserve = read(LEASE / "facts" / "plan.json")["reserve"] + 12
    processes = []
    for name in CHAINS:
        with open(FOLDER / f"{name}.txt", "wb") as log:
            command = [sys.executable, __file__, name]
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
    paused = False
    while any(process.poll() is None for process in processes):
        time.sleep(1)
        needed, left = progress()[1] / (0.95 * rate), LEFT - (time.monotonic() - STARTED) - reserve
        late = needed > left and needed > 0
        if late != paused:
            paused = late
            print(f"{time.monotonic() - STARTED:.0f} s: {'paused' if late else 'going on'}", flush=True)
            for process in processes:
                process.send_signal(signal.SIGSTOP if late else signal.SIGCONT)


if __name__ == "__main__":
    main()

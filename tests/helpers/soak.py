"""Kills, stops and starves training runs, and checks that each ends as if nothing had happened:

    python tests/helpers/soak.py                       # everything, with twenty kills
    python tests/helpers/soak.py --only kills --kills 200 --seed 1

Trains the smallest run of tiny_runs.py in processes of their own (JAX_PLATFORMS=cuda on a GPU, then with
XLA_FLAGS=--xla_gpu_deterministic_ops=true). A fault comes at a random moment of its kind; the same command goes on
afterwards, and when it is done its checkpoints, metrics and evaluations are compared, bit for bit, with those of a
run that nothing disturbed. Prints a line for each fault, and at the end how many of each kind, and what was lost.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paths import HELPERS, LOCAL, PYTHON_PATH

# Where a fault may come: while the data are rendered or listed, while a checkpoint is restored and programs are
# compiled, in a step, while a checkpoint is written, in an evaluation during training, and in that after it. Each lasts
# until the next begins.
MOMENTS = ("data", "start", "step", "save", "evaluate", "report")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=sorted(FAULTS), help="some of the faults (default: all)")
    parser.add_argument("--folder", type=Path, help="where the runs go, and stay (default: a temporary folder)")
    parser.add_argument("--victim", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.victim is not None:
        return be_victim(args.victim)
    with tempfile.TemporaryDirectory() as temporary:
        soak = Soak(args.folder or Path(temporary), random.Random(args.seed), args.kills)
        soak.reference()
        for name in args.only or FAULTS:
            FAULTS[name](soak)
    print("\n" + "\n".join(f"{name:>10}: {text}" for name, text in soak.results))
    print("Every run that went on is, bit for bit, the one that nothing disturbed.")
    return 0


# ---- The process that something happens to ---------------------------------------------------------------


def config_of(plan: dict[str, Any]) -> Any:
    from tiny_runs import tiny_run

    return tiny_run(Path(plan["data"]), **plan.get("keys", {}))


def be_victim(plan: dict[str, Any]) -> int:
    """Trains; the fault comes `delay` seconds after the `number`-th beginning of its moment, and not before the path
    `after` is there."""
    from vpm_jax import cli, evaluation, parallel, training
    from vpm_jax.data import sources
    from vpm_jax.runs import checkpoints

    begun: collections.Counter[str] = collections.Counter()
    durations: dict[str, list[float]] = {moment: [] for moment in MOMENTS}
    now: list[tuple[str, float]] = []  # the moment that began last, and when

    def fault() -> None:
        while not Path(plan.get("after", "/")).exists():
            time.sleep(0.01)
        FAULT_ACTS[plan["act"]]()

    def end_of_moment() -> None:
        for moment, start in now:
            durations[moment].append(time.monotonic() - start)

    def watch(owner: Any, name: str, moment: str) -> None:
        function = getattr(owner, name)

        def watched(*args, **kwargs):
            begun[moment] += 1
            end_of_moment()
            now[:] = [(moment, time.monotonic())]
            with open(plan["progress"], "a") as file:
                print(moment, args[1] if moment == "step" else "", file=file)
            if (moment, begun[moment]) == (plan.get("moment"), plan.get("number")):
                if plan["delay"]:
                    threading.Timer(plan["delay"], fault).start()
                else:
                    fault()
            result = function(*args, **kwargs)
            if moment == "save" and "measure" in plan:
                args[0].wait()
            return result

        setattr(owner, name, watched)

    watch(sources, "load_dataset", "data")
    watch(parallel, "data_mesh", "start")
    watch(training.Window, "add", "step")
    watch(checkpoints.Checkpoints, "save", "save")
    watch(evaluation, "evaluate", "evaluate")
    watch(evaluation, "evaluate_and_report", "report")

    def run() -> int:
        code = training.train(config_of(plan), Path(plan["workdir"]))
        end_of_moment()
        if "measure" in plan:
            Path(plan["measure"]).write_text(json.dumps(durations))
        return code

    cli.run(run)
    return 0


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_loader() -> None:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"spawn_main" in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
        except (OSError, ValueError):
            continue


FAULT_ACTS: dict[str, Callable[[], None]] = {
    "kill": kill,
    "stop": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "full": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)),
    "loader": kill_loader,
}


# ---- The one who does it, and looks ----------------------------------------------------------------------


class Soak:
    def __init__(self, folder: Path, chance: random.Random, kills: int):
        self.folder, self.chance, self.kills = folder.resolve(), chance, kills
        self.results: list[tuple[str, str]] = []
        self._runs = 0
        self.folder.mkdir(parents=True, exist_ok=True)

    def environment(self) -> dict[str, str]:
        return os.environ | {
            "PYTHONPATH": PYTHON_PATH,
            "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
            # Compiled once, quickly: what matters is that runs agree.
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            # On CPU one thread rounds otherwise than several, and how many there are depends on the cores a process
            # may use when it starts.
            "NPROC": "1",
        }

    def new_run(self, data: Path | None = None) -> dict[str, Any]:
        """The plan of a run in a new folder, with data of its own, rendered again."""
        self._runs += 1
        folder = self.folder / f"run{self._runs}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return {
            "workdir": str(folder / "run"),
            "data": str(data or folder / "data"),
            "progress": str(folder / "progress"),
        }

    def start(self, plan: dict[str, Any], **changes: Any) -> subprocess.CompletedProcess[str]:
        Path(plan["progress"]).write_text("")
        command = [sys.executable, str(HELPERS / "soak.py"), "--victim", json.dumps(plan | changes)]
        return subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=3600)

    def finish(self, plan: dict[str, Any], **changes: Any) -> None:
        """The same command again, undisturbed; what comes out is compared."""
        process = self.start(plan, **changes)
        expect(process.returncode == 0, "the run did not go on", process)
        self.compare(plan)

    def compare(self, plan: dict[str, Any]) -> None:
        from tiny_runs import assert_same_run

        workdir = Path(plan["workdir"])
        for path in workdir.glob("checkpoints/*"):
            # A kill between the writing of a checkpoint and the removal of the oldest leaves one more: no harm.
            # Damaged ones were set aside.
            if not (self.whole / "checkpoints" / path.name).exists():
                shutil.rmtree(path)
        assert_same_run(workdir, self.whole)

    def reference(self) -> None:
        plan = self.new_run()
        process = self.start(plan)  # compiles
        expect(process.returncode == 0, "the undisturbed run failed", process)
        self.whole = Path(plan["workdir"])
        again = self.new_run()
        measured = self.folder / "durations.json"
        process = self.start(again, measure=str(measured))
        expect(process.returncode == 0, "the undisturbed run failed", process)
        self.compare(again)
        self.durations = {moment: max(values) for moment, values in json.loads(measured.read_text()).items()}
        self.numbers = {moment: len(values) for moment, values in json.loads(measured.read_text()).items()}
        print("longest:", ", ".join(f"{m} {s:.2f} s" for m, s in self.durations.items()), flush=True)

    def progress(self, plan: dict[str, Any]) -> list[str]:
        return Path(plan["progress"]).read_text().splitlines()

    def newest(self, plan: dict[str, Any]) -> int:
        return max((int(p.name) for p in Path(plan["workdir"]).glob("checkpoints/*") if p.name.isdigit()), default=0)


def expect(holds: bool, what: str, process: subprocess.CompletedProcess[str]) -> None:
    if not holds:
        raise SystemExit(f"FAILED: {what}\n--- exit {process.returncode}\n{process.stdout}\n{process.stderr}")


def said(process: subprocess.CompletedProcess[str]) -> str:
    """The error's sentence: one line and no traceback."""
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    expect(process.returncode == 1 and len(lines) == 1 and "Traceback" not in process.stderr, "no sentence", process)
    return lines[0]


# ---- Faults ----------------------------------------------------------------------------------------------


def kills(soak: Soak) -> None:
    """SIGKILL at random moments of every kind, several in a run, until each run has come to its end."""
    done: collections.Counter[str] = collections.Counter()
    half_rendered = half_written = again = finished = 0
    plan, waiting = soak.new_run(), []
    while done.total() < soak.kills:
        waiting = waiting or soak.chance.sample(MOMENTS, len(MOMENTS))
        moment = waiting.pop()
        # In a run that has come far, few of a kind are left.
        if moment == "data":  # to be rendered again
            shutil.rmtree(plan["data"], ignore_errors=True)
        left = soak.numbers[moment] if moment in ("data", "start", "report") else min(3, soak.numbers[moment])
        process = soak.start(
            plan,
            act="kill",
            moment=moment,
            number=soak.chance.randint(1, left),
            delay=soak.chance.uniform(0.001, soak.durations[moment]),
        )
        if process.returncode == 0:  # it came to its end before
            soak.compare(plan)
            finished += 1
            plan = soak.new_run()
            continue
        expect(process.returncode == -signal.SIGKILL, "ended otherwise than by the kill", process)
        moment = soak.progress(plan)[-1].split()[0]  # where it really came
        done[moment] += 1
        unrendered = moment == "data" and bool(list(Path(plan["data"]).glob(".synthetic*")))
        half_rendered += unrendered
        seen = [line for line in soak.progress(plan) if line.startswith("step")]
        reached, newest = int(seen[-1].split()[1]) if seen else 0, soak.newest(plan)
        unfinished = list(Path(plan["workdir"]).glob("checkpoints/*tmp*"))
        half_written += bool(unfinished)
        again += max(0, reached - newest) if seen else 0
        print(
            f"kill {done.total()}: during {moment}, after step {reached or newest}, newest checkpoint {newest}"
            + ", one half-written" * bool(unfinished)
            + ", images half-rendered" * unrendered,
            flush=True,
        )
    soak.finish(plan)
    kinds = ", ".join(f"{n} in {moment}" for moment, n in sorted(done.items()))
    left_by = f"{half_rendered} left images half-rendered, {half_written} a checkpoint half-written"
    text = f"{done.total()} kills ({kinds}; {left_by}) in {finished + 1} runs, "
    soak.results.append(("kills", text + f"{again} steps done again, nothing lost"))


def stops(soak: Soak) -> None:
    """SIGTERM: the step is finished and saved, nothing is done again."""
    for number, moment in enumerate(("step", "save", "evaluate"), 1):
        plan = soak.new_run(soak.whole.parent / "data")
        process = soak.start(plan, act="stop", moment=moment, number=2, delay=0)
        expect(process.returncode == 128 + signal.SIGTERM, "SIGTERM did not end it in order", process)
        reached = [line for line in soak.progress(plan) if line.startswith("step")][-1].split()[1]
        expect(int(reached) == soak.newest(plan), "the last step was not saved", process)
        print(f"stop {number}: during {moment}, saved after step {reached}", flush=True)
        if moment == "evaluate":  # the evaluation cut short is made up for
            expect(soak.start(plan).returncode == 0, "the run did not go on", process)
            from tiny_runs import assert_same_run

            assert_same_run(Path(plan["workdir"]), soak.whole, but_best=int(reached))
        else:
            soak.finish(plan)
    soak.results.append(("stops", "3 times SIGTERM: each saved its last step, none was done again"))


def full_disk(soak: Soak) -> None:
    """No room for the second checkpoint, by a limit on files and, where it can be mounted, on a small disk."""
    plan = soak.new_run(soak.whole.parent / "data")
    process = soak.start(plan, act="full", moment="save", number=2, delay=0)
    print(f"full disk: {said(process)}", flush=True)
    expect(soak.newest(plan) == 3, "the checkpoint before is not there", process)
    soak.finish(plan)
    kinds = ["a limit on the size of files"]
    plan = soak.new_run(soak.whole.parent / "data")
    size = sum(path.stat().st_size for path in (soak.whole / "checkpoints" / "7").rglob("*") if path.is_file())
    workdir = Path(plan["workdir"])
    workdir.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={round(1.7 * size)}", "none", str(workdir)]
    if subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            print(f"full disk: {said(soak.start(plan))}", flush=True)
            kept = soak.newest(plan)
            subprocess.run(["mount", "-o", "remount,size=100m", str(workdir)], check=True)
            soak.finish(plan)
        finally:
            subprocess.run(["umount", str(workdir)], check=True)
        kinds.append(f"a full tmpfs after step {kept}")
    soak.results.append(("disk", f"{' and '.join(kinds)}: the checkpoint before was whole, and gone on from"))


def damage(soak: Soak) -> None:
    """A bit of the newest checkpoint flipped, a file cut, a file gone: the one before, and so said."""
    counts: collections.Counter[str] = collections.Counter()
    for kind in ("flipped", "flipped", "flipped", "cut", "gone"):
        plan = soak.new_run(soak.whole.parent / "data")
        newest = Path(plan["workdir"]) / "checkpoints" / "7"
        process = soak.start(plan, act="kill", moment="step", number=9, delay=0.0, after=str(newest))
        expect(process.returncode == -signal.SIGKILL and soak.newest(plan) == 7, "no checkpoint to damage", process)
        files = sorted(p for p in newest.rglob("d/*") if p.is_file())
        file = soak.chance.choices(files, [p.stat().st_size for p in files])[0]
        data = bytearray(file.read_bytes())
        if kind == "gone":
            file.unlink()
        elif kind == "cut":
            file.write_bytes(data[: soak.chance.randrange(len(data))])
        else:
            data[soak.chance.randrange(len(data))] ^= 1 << soak.chance.randrange(8)
            file.write_bytes(data)
        process = soak.start(plan)
        expect(process.returncode == 0, "the run did not go on", process)
        fell_back = "Continuing from step 3" in process.stderr
        counts["passed over" if fell_back else "harmless"] += 1
        expect(("after step 3 of" if fell_back else "after step 7 of") in process.stdout, "went on elsewhere", process)
        print(f"damage: a file {kind}: {'passed over' if fell_back else 'harmless'}", flush=True)
        soak.compare(plan)
    text = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
    soak.results.append(("damage", f"5 damaged checkpoints: {text}; none was believed"))


def image(soak: Soak) -> None:
    """A training image that is cut short: by choice it ends the run by its name, or another takes its place."""
    plan = soak.new_run()
    expect(soak.start(plan, act="kill", moment="step", number=1, delay=0.0).returncode != 0, "?", soak.start(plan))
    shutil.rmtree(plan["workdir"])
    victim = sorted(Path(plan["data"]).glob("*/bounding_box_train/*.jpg"))[5]
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    sentence = said(soak.start(plan))
    expect(victim.name in sentence, "the image is not named", soak.start(plan))
    print(f"image: {sentence}", flush=True)
    process = soak.start(plan, keys={"data__corrupt": "skip"})
    expect(process.returncode == 0 and victim.name in process.stderr, "was not skipped by name", process)
    counted = [line for line in process.stderr.splitlines() if "were replaced" in line]
    expect(len(counted) == 1, "was not counted", process)
    print(f"image: {counted[0]}", flush=True)
    soak.results.append(
        ("image", f"named in one sentence; skipped on request ({counted[0].removeprefix('warning: ')})")
    )


def loader(soak: Soak) -> None:
    """A loader process that is killed, as by a machine out of memory."""
    plan = soak.new_run(soak.whole.parent / "data")
    keys = {"data__workers": 1, "data__threads": 1}  # it loads a few batches ahead: not yet the last one
    sentence = said(soak.start(plan, act="loader", moment="step", number=1, delay=0.0, keys=keys))
    print(f"loader: {sentence}", flush=True)
    soak.finish(plan, keys=keys)
    soak.results.append(("loader", "a killed loader process ended the run in one sentence, and it went on"))


def host(soak: Soak) -> None:
    """Of two processes that train together one is killed: the other ends, and says so."""
    timeout, found = 15, []

    def start(plan: dict[str, Any], *more: str) -> subprocess.CompletedProcess[str]:
        config = Path(plan["workdir"]).parent / "config.py"
        config.write_text(f"from tiny_runs import tiny_run\ndef get_config():\n    return tiny_run({plan['data']!r})\n")
        program = (
            "import os, signal, sys, time\n"
            "from vpm_jax import cli, train, training\n"
            "add, (victim, step) = training.Window.add, map(int, os.environ['VICTIM'].split())\n"
            "def and_die(self, steps, metrics):\n"
            "    add(self, steps, metrics)\n"
            "    if steps == step and f'--process {victim}' in ' '.join(sys.argv):\n"
            "        print(f'killed at {time.time()}', file=sys.stderr, flush=True)\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "training.Window.add = and_die\n"
            "cli.run(train.main)\n"
        )
        command = [str(LOCAL), "2", sys.executable, "-c", program]
        command += ["--config", str(config), "--workdir", plan["workdir"], "--timeout", str(timeout)]
        env = soak.environment() | {"VICTIM": " ".join(more)}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=3600)

    from tiny_runs import assert_same_run

    whole = soak.new_run(soak.whole.parent / "data")
    process = start(whole, "0", "0")
    expect(process.returncode == 0, "two processes could not train", process)
    for victim in (1, 0):
        plan = soak.new_run(soak.whole.parent / "data")
        process = start(plan, str(victim), "9")
        took = time.time() - float(process.stderr.partition("killed at ")[2].split()[0])
        expect(process.returncode != 0 and took < 3 * timeout, "the other did not end in time", process)
        lines = [line for line in process.stderr.splitlines() if line.startswith("error: ") or "Terminating" in line]
        expect(bool(lines), "the other said nothing", process)
        print(f"host: process {victim} killed; {took:.0f} s later: {lines[0][:200]}", flush=True)
        found.append(f"{took:.0f} s")
        expect(start(plan, "0", "0").returncode == 0, "the job did not go on", process)
        assert_same_run(Path(plan["workdir"]), Path(whole["workdir"]))
    text = f"2 processes, --timeout {timeout}: the second killed, the first ended after {found[0]}; the first killed, "
    soak.results.append(("host", text + f"the second after {found[1]}; each job went on"))


FAULTS: dict[str, Callable[[Soak], None]] = {
    "kills": kills,
    "stops": stops,
    "disk": full_disk,
    "damage": damage,
    "image": image,
    "loader": loader,
    "host": host,
}

if __name__ == "__main__":
    sys.exit(main())

"""Runs on the leased machine, from the root of the carried checkout, with the standard library alone.

    python3 .gpu1/device.py first SECONDS              # installs, checks, measures the training step
    python3 "$HOME/vpm-gpu/device.py" second SECONDS   # trains, evaluates, exports; then measures more

Each ends within SECONDS and leaves $OUT complete, however it ends. See README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve().parent
CONFIG = os.environ.get("VPM_CONFIG", "configs/market_released.py")
EXTRA = os.environ.get("VPM_EXTRA", "").split()  # --config.KEY=VALUE ...
BESIDE = os.environ.get("VPM_BESIDE", "")  # a shell command to run beside training and after it
COMPILING = 130  # seconds until the next of FLAGS is tried
FLAGS = ("", "--xla_gpu_enable_triton_gemm=false", "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0")
LARGEST = 8 * 2**20  # bytes of a file in results.tar.gz


class Lease:
    """The time that is left, the processes that run, the folder between the commands, and $OUT.

    Args:
      command: "first" or "second".
      seconds: to stay within.
      rehearse: whether timings are short and extras are left out.
      clock: seconds, from anywhere.
    """

    def __init__(
        self, command: str, seconds: float, rehearse: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.rehearse, self._clock, self._began = rehearse, clock, clock()
        self._end = self._began + seconds
        self.repo, self.out, self.root = Path.cwd(), Path(os.environ["OUT"]), Path.home() / "vpm-gpu"
        self.facts, self.workdir = self.root / "facts", self.root / "run"
        self.packed = self.facts / "packed.json"
        self.summary: dict[str, Any] = {"command": command}
        self._running: list[subprocess.Popen] = []
        for folder in (self.out, self.facts, self.root / "logs"):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def weights(self) -> str:
        """The config's `pretrained`."""
        path = self.root / "imagenet.npz"
        return str(path) if path.exists() else "none"

    def left(self) -> float:
        return self._end - self._clock()

    # ---- What comes back -----------------------------------------------------------------------------------

    def note(self, **facts: Any) -> None:
        """Adds to summary.json."""
        self.summary |= facts | {"seconds": round(self._clock() - self._began, 1)}
        self._write("summary.json", json.dumps(self.summary, indent=1).encode())
        print(f"[{self.summary['seconds']:6.1f} s]", json.dumps(facts)[:1500], flush=True)

    def collect(self) -> None:
        """Writes logs, measurements and the run, without its checkpoints, into results.tar.gz."""
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w:gz") as tar:
            for folder in ("logs", "facts", "run", "ranked", "beside"):
                for path in sorted((self.root / folder).rglob("*")):
                    if path.is_file() and "checkpoints" not in path.parts and path.stat().st_size < LARGEST:
                        tar.add(path, str(path.relative_to(self.root)))
        self._write("results.tar.gz", data.getvalue())

    def _write(self, name: str, data: bytes) -> None:
        unfinished = self.out / "unfinished"
        unfinished.write_bytes(data)
        os.replace(unfinished, self.out / name)

    # ---- Processes -----------------------------------------------------------------------------------------

    def start(self, name: str, command: Sequence[str | Path], **variables: str) -> subprocess.Popen:
        """Starts a command with its output in logs/NAME.txt."""
        paths = [str(self.repo), str(self.root / "site"), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "XDG_CACHE_HOME": str(self.root / "cache"),
            "MPLCONFIGDIR": str(self.root / "matplotlib"),
            "VPM_COMMIT": read(self.packed).get("commit") or "",
        }
        if flags := variables.pop("XLA_FLAGS", ""):
            variables["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        with open(self.log(name), "wb") as log:
            process = subprocess.Popen(
                list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, env=env | variables, process_group=0
            )
        self._running.append(process)
        return process

    def finish(self, process: subprocess.Popen, seconds: float) -> int | None:
        """Waits for a process; its exit code, None if it was killed after `seconds`."""
        code: int | None = None
        try:
            code = process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            self._kill(process)
        self._running.remove(process)
        return code

    def run(self, name: str, command: Sequence[str | Path], seconds: float, **variables: str) -> bool:
        """Runs a command for at most so many seconds; whether it succeeded."""
        if seconds < 3:
            return False
        began = self._clock()
        code = self.finish(self.start(name, command, **variables), seconds)
        self.note(**{name: {"code": code, "seconds": round(self._clock() - began, 1)}})
        if code != 0:
            self.show(name)
        return code == 0

    def script(self, name: str) -> list[str | Path]:
        return [sys.executable, self.root / name]

    def log(self, name: str) -> Path:
        return self.root / "logs" / f"{name}.txt"

    def show(self, name: str, characters: int = 1500) -> None:
        """Prints the end of a log."""
        print(self.log(name).read_text(errors="replace")[-characters:].strip(), flush=True)

    def _kill(self, process: subprocess.Popen) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self, number: int, frame: FrameType | None) -> None:
        """On a signal, or when time is up: stops all processes and collects what there is."""
        for process in self._running:
            self._kill(process)
        try:
            self.note(stopped=f"by {signal.Signals(number).name}")
            self.collect()
        finally:
            os._exit(1)


def read(path: Path) -> dict[str, Any]:
    """The JSON of a file, {} where there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


# ---- The first command -------------------------------------------------------------------------------------


def first(lease: Lease) -> int:
    for path in (*HERE.glob("*.py"), *HERE.glob("imagenet.npz")):  # the second command is carried without them
        shutil.copy(path, lease.root)
    shutil.copy(HERE / "packed.json", lease.packed)
    (lease.facts / "step.json").unlink(missing_ok=True)  # of an earlier try
    lease.run("machine", ["sh", "-c", "nvidia-smi; lscpu | head -20; free -g; df -h / /dev/shm"], 20)
    if not install(lease, "wheels"):
        return fail(lease, "pip could not install the wheels: see its message in logs/pip-wheels.txt and pack again.")
    if not check(lease, "check") and not (install(lease, "spare") and check(lease, "check-spare")):
        return fail(lease, "The machine's packages do not run this code: see logs/check.txt.")
    found = measure(lease)
    if not lease.rehearse:
        for kind, seconds in (("eager", 15), ("compiled", 70)):
            if lease.left() >= seconds + 8:
                lease.run(f"torch-{kind}", torch_probe(lease, f"torch-{kind}", kind), lease.left() - 8)
    lease.collect()
    return 0 if found else fail(lease, "The training step does not run here: see logs/step-0.txt.")


def fail(lease: Lease, reason: str) -> int:
    lease.note(failed=reason)
    lease.collect()
    return 1


def install(lease: Lease, folder: str) -> bool:
    """Installs packed wheels beside the machine's packages."""
    wheels = sorted((HERE / folder).glob("*.whl"))
    if not wheels:
        return folder == "wheels"  # without wheels the machine needs none; without spares there is nothing to try
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--no-cache-dir", "--upgrade", "--target", str(lease.root / "site")]
    return lease.run(f"pip-{folder}", [*command, *wheels], 60)


def check(lease: Lease, name: str) -> bool:
    # On the CPU: quick, and wrong versions show before the GPU is used.
    weights = [lease.weights] if lease.weights != "none" else []
    if not lease.run(name, [*lease.script("check.py"), *weights], 60, JAX_PLATFORMS="cpu"):
        return False
    lease.show(name, 600)
    return True


def measure(lease: Lease) -> bool:
    """Times the training step with the first of FLAGS under which it runs, and writes step.json."""
    probe = [*lease.script("probe.py"), "--config", CONFIG, "--weights", lease.weights, *EXTRA]
    probe += ["--seconds", "0.5" if lease.rehearse else "6", "--program"]
    for number, flags in enumerate(FLAGS):
        name = f"step-{number}"
        path = lease.facts / f"{name}.json"
        seconds = lease.left() - 10 if lease.rehearse else min(COMPILING, lease.left() - 10)
        lease.run(name, [*probe, path, lease.packed], seconds, XLA_FLAGS=flags)
        facts = read(path)
        lease.note(**{name: {key: value for key, value in facts.items() if key not in ("arguments", "kernels")}})
        if "compile_s" in facts:  # it runs, though there may have been no time to measure it
            known = {"config": CONFIG, "extra": EXTRA, "flags": flags, "images_per_second": 1200.0} | facts
            (lease.facts / "step.json").write_text(json.dumps(known, indent=1))
            return True
    return False


def torch_probe(lease: Lease, name: str, kind: str, batch: int = 0) -> list[str | Path]:
    return [*lease.script("probe_torch.py"), lease.facts / f"{name}.json", CONFIG, kind, str(batch), *EXTRA]


# ---- The second command ------------------------------------------------------------------------------------


def second(lease: Lease) -> int:
    measured = read(lease.facts / "step.json")
    if not measured:
        return fail(
            lease,
            "This machine holds nothing of the first command, or that command failed: run `first` on it (carry .gpu1) "
            "and then `second` while it is still the same machine.",
        )
    if not (lease.repo / ".gpu2" / "images.tar.xz").exists():
        return fail(lease, "There is no .gpu2/images.tar.xz here: carry .gpu2 with the second command.")
    data = unpack_images(lease)
    if not plan(lease, measured):
        return fail(lease, "The schedule could not be planned: see logs/plan.txt.")
    beside = start_beside(lease, data, measured["flags"]) if BESIDE else None
    exporter = train(lease, data, measured["flags"])
    if not (lease.workdir / "evaluation.json").exists() and has_checkpoint(lease):
        lease.collect()
        command = [sys.executable, "-m", "vpm_jax.evaluate", "--workdir", lease.workdir]
        lease.run("evaluate", command, lease.left() - 12, XLA_FLAGS=measured["flags"])
    if exporter is not None:
        code = lease.finish(exporter, lease.left() - 12)
        lease.note(export=code, weights=sorted(path.name for path in lease.out.glob("weights.*")))
    results = read(lease.workdir / "evaluation.json").get("gammas", {})
    lease.note(results={g: {"rank1": round(r["cmc"][0], 4), "mAP": round(r["mAP"], 4)} for g, r in results.items()})
    lease.collect()
    if results:
        print((lease.workdir / "evaluation.md").read_text()[-2500:], flush=True)
        if not lease.rehearse:
            extras(lease, measured["flags"])
    if beside is not None:
        end_beside(lease, beside)
    return 0 if results else fail(lease, "There is no evaluation: see logs/train.txt and logs/evaluate.txt.")


def unpack_images(lease: Lease) -> Path:
    """The folder of the images: in memory where there is room for it."""
    memory = Path("/dev/shm")
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**30
    target = Path(os.environ.get("TMPDIR") or (memory if roomy else tempfile.gettempdir())) / "vpm-data"
    shutil.rmtree(target, ignore_errors=True)
    with tarfile.open(lease.repo / ".gpu2" / "images.tar.xz") as tar:
        tar.extractall(target, filter="data")
    found, packed = sum(1 for _ in target.rglob("*.jpg")), read(lease.repo / ".gpu2" / "packed.json")["images"]
    lease.note(images=found)
    if found != packed:
        raise RuntimeError(f"{found} images were unpacked of {packed}")
    return target


def plan(lease: Lease, measured: dict[str, Any]) -> bool:
    """Writes plan.json: the whole recipe, or as much of it as fits into the time that is left."""
    # Cautious: loading images slows training down.
    rate = 0.85 * min(measured["images_per_second"], measured.get("fed_images_per_second", float("inf")))
    command = [*lease.script("plan.py"), lease.facts / "plan.json", lease.packed, "--config", CONFIG, *EXTRA]
    command += [f"--rate={rate}", f"--compile={measured['compile_s']}", f"--seconds={lease.left()}"]
    command += ["--measured"] * ((measured["config"], measured["extra"]) == (CONFIG, EXTRA))
    (lease.facts / "plan.json").unlink(missing_ok=True)
    done = lease.run("plan", command, 30)
    lease.note(plan=read(lease.facts / "plan.json"))
    return done


def train(lease: Lease, data: Path, flags: str) -> subprocess.Popen | None:
    """Trains and evaluates; returns the process that exports the weights, None if there are none.

    Training that is not done when the evaluation's time begins gets SIGTERM: it saves and ends.
    """
    workdir, planned = lease.workdir, read(lease.facts / "plan.json")
    shutil.rmtree(workdir, ignore_errors=True)
    command = [sys.executable, "-m", "vpm_jax.train", "--config", CONFIG, "--workdir", workdir]
    command += [f"--config.data.root={data}", f"--config.pretrained={lease.weights}"]
    command += [f"--config.data.threads={max(2, (os.cpu_count() or 1) // 2)}", "--config.eval.batch=512"]
    process, exporter = lease.start("train", [*command, *EXTRA, *planned["overrides"]], XLA_FLAGS=flags), None
    told, shown = "", lease.left()
    while process.poll() is None:
        time.sleep(0.2)
        trained = (workdir / "training.png").exists()  # drawn between training and evaluation
        if trained and exporter is None:
            exporter = export(lease)
        if not (trained or told) and lease.left() < planned["reserve"]:
            told = f"SIGTERM with {lease.left():.0f} s left"
            process.terminate()
        if lease.left() < 15:
            lease.finish(process, 0)
            break
        if shown - lease.left() > 20:
            shown = lease.left()
            lease.show("train", 200)
    else:
        lease.finish(process, 0)
    lease.show("train", 2500)
    lease.note(train={"code": process.returncode, "told": told})
    return export(lease) if exporter is None and has_checkpoint(lease) else exporter


def start_beside(lease: Lease, data: Path, flags: str) -> subprocess.Popen:
    """Starts VPM_BESIDE in the checkout; what it writes under beside/ comes back."""
    folder = lease.root / "beside"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    known = {"VPM_DATA": str(data), "VPM_LEASE": str(lease.root), "VPM_LEFT": f"{lease.left():.0f}"}
    return lease.start("beside", ["bash", "-c", BESIDE], XLA_FLAGS=flags, **known)


def end_beside(lease: Lease, process: subprocess.Popen) -> None:
    """Waits for VPM_BESIDE as long as there is time, then asks it to end."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(lease.left() - 25, 0))
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
    lease.note(beside=lease.finish(process, min(10, lease.left() - 10)))
    lease.show("beside")
    lease.collect()


def has_checkpoint(lease: Lease) -> bool:
    return any(path.name.isdigit() for path in lease.workdir.glob("checkpoints/*"))


def export(lease: Lease) -> subprocess.Popen:
    """Exports the weights on the CPU during the evaluation, so that they come back even if it fails."""
    command = [*lease.script("export.py"), lease.workdir, lease.out, lease.facts / "trained.json"]
    return lease.start("export", command, JAX_PLATFORMS="cpu")


def extras(lease: Lease, flags: str) -> None:
    """More measurements, the most useful first, as long as there is time for one."""
    vpm, facts = [sys.executable, "-m", "vpm_jax"], lease.facts
    ranking = ["--config.eval.flip=True", "--config.match.visibility=saturated"]
    ranking += ["--config.match.gallery_gammas=(0.5,0.6,0.7,0.8,0.9)"]
    probe = [*lease.script("probe.py"), facts / "batch256.json", lease.packed, "--config", CONFIG, *EXTRA]
    rows: dict[str, tuple[float, list[str | Path]]] = {  # the seconds that each needs, and its command
        "ranked": (  # as configs/market_plus.py does
            60,
            [*vpm, "evaluate", "--workdir", lease.workdir, "--output", lease.root / "ranked", *ranking],
        ),
        "torch-compiled": (80, torch_probe(lease, "torch-compiled", "compiled")),
        "batch256": (80, [*probe, "--weights", lease.weights, "--batch", "256"]),
        "torch-batch256": (60, torch_probe(lease, "torch-batch256", "compiled", 256)),
        "extraction": (
            50,
            [*vpm, "benchmark", "extraction", "--config", CONFIG, "--json", facts / "extraction.json"],
        ),
        "matching": (40, [*vpm, "benchmark", "matching", "--json", facts / "matching.json"]),
    }
    for name, (seconds, command) in rows.items():
        if (facts / f"{name}.json").exists() or (BESIDE and name != "ranked"):  # beside others nothing is timed
            continue
        if lease.left() >= seconds + 30:
            lease.run(name, command, lease.left() - 30, XLA_FLAGS=flags)
            lease.collect()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("first", "second"))
    parser.add_argument("seconds", type=float, help="this command ends within them")
    parser.add_argument("--rehearse", action="store_true", help="time for half a second, leave PyTorch and extras out")
    args = parser.parse_args()
    if not os.environ.get("OUT"):
        raise SystemExit("Set OUT to the folder that comes back from this machine.")
    lease = Lease(args.command, args.seconds, args.rehearse)
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, lease.stop)
    signal.alarm(max(5, int(args.seconds) - 4))  # in case something hangs
    try:
        code = {"first": first, "second": second}[args.command](lease)
    except Exception as error:
        fail(lease, repr(error)[:500])
        raise
    lease.note(code=code)
    return code


if __name__ == "__main__":
    sys.exit(main())

"""Shared by all commands: argument parsing, configs with overrides, and one-sentence errors."""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import errno
import inspect
import io
import logging
import os
import runpy
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from ml_collections import ConfigDict

from vpm_jax import config as config_lib
from vpm_jax.disk import disk_trouble, no_writing
from vpm_jax.errors import UserError, first_line
from vpm_jax.keys import EVALUATE, KEYS, LISTED, RETIRED, in_words, keys_with

INCOMPLETE = 3  # exit code of a command that finished with some of its work left out
OVERRIDES = f"--config.KEY=VALUE sets any of {in_words(keys_with(EVALUATE))}: {LISTED}."  # for commands on a run


def run(main: Callable[[], Any]) -> None:
    """Runs a command. An error the user can fix becomes one sentence on stderr and exit code 1."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    # XLA's errors are raised as well; its log calls a slow compile a bug. Only works before jaxlib is loaded.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, unfailing(stream))
    try:
        sys.exit(main() or 0)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        _fail(sentence)
    except KeyboardInterrupt as interrupt:
        try:
            _fail(str(interrupt) or "Interrupted.", code=130)
        finally:
            os._exit(130)  # ending Python would wait for threads of JAX, and can crash in them


def unfailing(stream: TextIO) -> TextIO:
    """A stream that prints where `stream` does and never ends a command.

    It escapes characters that the encoding lacks, and drops all output once the reader has gone, as in `... | head`.
    """
    file = io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(file, stream.encoding, "backslashreplace", line_buffering=True)


class _Output(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # a pipe without a reader, a terminal that was closed
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)


def explain(error: BaseException) -> str | None:
    """One sentence for an error the user can fix, None for any other error."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and (trouble := disk_trouble(error)):
        return f"{error.filename or 'A result'} could not be written: {trouble}."
    if isinstance(error, MemoryError):
        return f"Out of memory ({error or 'on the host'}): use a smaller eval.batch or a machine with more memory."
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):  # from XLA
        return (
            f"The device is out of memory ({first_line(error)}): use smaller batches (eval.batch, or identities or "
            "images_per_identity of a stage) or more devices."
        )
    return None


def _fail(sentence: str, code: int = 1) -> NoReturn:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError for wrong arguments and keeps the line breaks of descriptions."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: see {self.prog} --help.")


def path(text: str) -> Path:
    """A path argument. `~` is the home directory also where shells leave it alone, as in --workdir=~/run."""
    return Path(os.path.expanduser(text))


def positive(text: str) -> int:
    """A count argument, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a positive whole number")
    return int(text)


def add_config(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Adds --config. Pass the --config.KEY=VALUE that argparse leaves to `load_config` or `override`."""
    parser.add_argument(
        "--config",
        default=default,
        metavar="NAME[:VARIANT]",
        help=f"a recipe ({', '.join(recipes())}), a Python file with get_config(), which receives VARIANT, or a run's "
        "config.json" + (f" (default: {default})" if default else ""),
    )
    lines = textwrap.wrap(", ".join(key.name for key in KEYS), 110)
    parser.epilog = "\n  ".join([f"--config.KEY=VALUE sets a key ({LISTED} with their meanings):", *lines])


def add_model(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Adds --workdir and --model, which exclude each other."""
    either = parser.add_mutually_exclusive_group(required=required)
    either.add_argument("--workdir", type=path, metavar="RUN", help="the model: the folder of a training run")
    default = "" if required else " (default: the store's model)"
    either.add_argument("--model", type=path, metavar="FILE", help=f"the model: a file{default}")


def add_hosts(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `runs.hosts.joined`."""
    group = parser.add_argument_group("many hosts", "one process per host or per GPU: see launch/")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="join as the cluster describes it (Cloud TPU, SLURM, Open MPI, Kubernetes)",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="join by hand: a free port on process 0's host")
    group.add_argument("--processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process", type=int, metavar="I", help="index of this process, from 0")
    group.add_argument(
        "--timeout",
        type=float,
        default=60,
        metavar="SECONDS",
        help="stop the job when a process has been silent this long (default: %(default)s)",
    )


def recipes() -> dict[str, Path]:
    """The files of this package's recipes by name: in an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    folder = next(filter(Path.is_dir, (package / "recipes", package.parent / "configs")), package)
    return {file.stem: file for file in sorted(folder.glob("[!_]*.py"))}


def find_config(spec: str, flag: str = "--config") -> tuple[Path, str]:
    """(the file, its variant) of `flag`: NAME[:VARIANT] of a recipe, FILE[:VARIANT], or a run's config.json.

    configs/NAME.py is the recipe wherever there is no such file. Raises UserError if there is neither.
    """
    name, _, variant = spec.rpartition(":")
    if not name or not variant.isidentifier() or path(spec).is_file():  # a colon in the path, as in C:\\own.py
        name, variant = spec, ""
    if (file := path(name)).is_file():
        return file, variant
    recipe = name.removeprefix("configs/").removesuffix(".py") if name.startswith("configs/") else name
    if recipe not in recipes():
        raise UserError(
            f"{flag} {name}: no such file, expected a recipe ({', '.join(recipes())}), a Python file with "
            "get_config(), or a run's config.json."
        )
    return recipes()[recipe], variant


def default_workdir(spec: str) -> Path:
    """runs/NAME or runs/NAME-VARIANT; for a run's config.json, the name of its folder."""
    file, variant = find_config(spec)
    stem = file.absolute().parent.name if file.name == "config.json" else file.stem
    return Path("runs", "-".join(filter(None, [stem, variant])))


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The checked config of `find_config` with --config.KEY=VALUE applied.

    Raises:
      UserError: for a missing file, a file that does not build a config, an unknown key or a wrong value.
    """
    path, variant = find_config(spec)
    config = _read_json(path, variant) if path.suffix == ".json" else _run_recipe(path, variant)
    if changes := override(config, overrides):
        print(f"A stage is shorter than in {spec}, so with it: {', '.join(changes)} (set these keys to choose others)")
    config_lib.check(config)
    return config


def _read_json(path: Path, variant: str) -> ConfigDict:
    if variant:
        raise UserError(f"--config {path}:{variant}: a saved config has no variants: leave out :{variant}.")
    try:
        return config_lib.from_json(path.read_text(encoding="utf-8", errors="replace"), str(path))
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}.") from None


def _run_recipe(path: Path, variant: str) -> ConfigDict:
    try:
        get_config = runpy.run_path(str(path))["get_config"]
        if variant and not inspect.signature(get_config).parameters:
            raise UserError(f"--config {path}:{variant}: {path} has no variants: leave out :{variant}.")
        config = get_config(variant) if variant else get_config()
    except UserError:
        raise
    except Exception as error:
        if variant and isinstance(error, ValueError):
            raise UserError(f"--config {path}:{variant}: {first_line(error)}.") from error
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path} does not build a config ({reason}): expected Python with get_config().") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config() returned {type(config).__name__}, expected a ConfigDict.")
    return config


def check_output(flag: str, path: Path) -> None:
    """Raises UserError unless `path`, the value of `flag`, can be written as a file. Call it before any work."""
    problem = "that is a folder, choose another name" if path.is_dir() else no_writing(path.parent)
    if not (problem or path.parent.is_dir()):
        problem = f"there is no folder {path.parent}, choose another name"
    if problem:
        raise UserError(f"{flag} {path}: {problem}.", code="bad-output")


def check_folder(flag: str, folder: Path) -> None:
    """Raises UserError unless `folder`, the value of `flag`, can be written or created. It creates nothing."""
    if problem := no_writing(folder):
        raise UserError(f"{flag} {folder}: {problem}.", code="bad-output")


def override(config: ConfigDict, arguments: Sequence[str]) -> list[str]:
    """Applies --config.KEY=VALUE (or --config.KEY VALUE), parsing each value as the type it replaces.

    Returns:
      What changed with a shortened stage, as `config.follow_epochs` does.

    Raises:
      UserError: for an unknown argument or key, or a value of the wrong type.
    """
    items, before, given = list(arguments), config_lib.flatten(config), set()
    while items:
        argument = items.pop(0)
        if not argument.startswith("--config."):
            raise UserError(f"Unknown argument {argument!r}: see --help; set config keys with --config.KEY=VALUE.")
        key, equals, text = argument.removeprefix("--config.").partition("=")
        keys = config_lib.flatten(config)
        if group := [k for k in keys if k.startswith(key + ".")]:
            raise UserError(f"--config.{key} is a group of keys: set one of {', '.join(group)}.")
        if not equals:
            if not items:
                raise UserError(f"{argument} has no value: write {argument}=VALUE.")
            text = items.pop(0)
        if key in RETIRED:
            raise UserError(f"Config key {key!r} no longer exists: {RETIRED[key]}.")
        if key not in keys:
            close = [k for k in keys if k.endswith("." + key)][:4] or difflib.get_close_matches(key, keys, n=1)
            hint = f"did you mean {' or '.join(close)}?" if close else f"{LISTED}."
            raise UserError(f"There is no config key {key!r}: {hint}")
        config_lib.set_key(config, key, _read_value(key, text, keys[key]))
        given.add(key)
    return config_lib.follow_epochs(config, before, given)


def _read_value(key: str, text: str, old: Any) -> Any:
    if isinstance(old, str):
        return text
    numbers, kind = (int, float), type(old)
    with contextlib.suppress(ValueError, SyntaxError):
        value = ast.literal_eval(text.capitalize() if kind is bool else text)
        if type(value) is kind and kind is not tuple:
            return value
        if kind is float and type(value) is int:
            return float(value)
        values = value if isinstance(value, tuple | list) else (value,)
        if kind is tuple and all(type(v) in numbers for v in values):
            return tuple(values)
    expected = {bool: "true or false", int: "a whole number", float: "a number", tuple: "numbers in brackets"}[kind]
    raise UserError(f"--config.{key}={text}: expected {expected}, such as {old!r}.")

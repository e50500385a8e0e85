"""What every command shares: one clear sentence for an error the user can mend, and configs with overrides."""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import inspect
import logging
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict

from vpm_jax import config as config_lib
from vpm_jax.errors import UserError, disk_trouble, no_writing
from vpm_jax.keys import LISTED, RETIRED

INCOMPLETE = 3  # the exit code of a command that did what it could


def run(main: Callable[[], Any]) -> None:
    """Runs a command: errors that the user can mend end it with one sentence on stderr and exit code 1."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        sys.exit(main() or 0)
    except BrokenPipeError:  # the reader of our output has left, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the exit's flush fails again
        sys.exit(1)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        _fail(sentence)
    except KeyboardInterrupt as interrupt:
        _fail(str(interrupt) or "Interrupted.", code=130)


def explain(error: BaseException) -> str | None:
    """One sentence for an error that the user can mend, None for any other."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and (trouble := disk_trouble(error)):
        return f"{error.filename or 'A result'} could not be written: {trouble}."
    if isinstance(error, MemoryError):
        return f"Out of memory ({error or 'on the host'}): use a smaller eval.batch or a machine with more."
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):  # XLA's
        return (
            f"The device is out of memory ({first_line(error)}): use smaller batches (eval.batch, and a stage's "
            "identities or images_per_identity) or more devices."
        )
    return None


def _fail(sentence: str, code: int = 1) -> NoReturn:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(code)


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


class Parser(argparse.ArgumentParser):
    """Mistakes in the arguments are UserErrors: one sentence and exit code 1, as for all that the user can mend.

    Descriptions keep their lines.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: see {self.prog} --help.")


def add_config(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Adds --config FILE[:VARIANT]; `load_config` and `override` take the --config.KEY=VALUE that argparse leaves."""
    parser.add_argument(
        "--config",
        default=default,
        metavar="FILE[:VARIANT]",
        help="a file with get_config(); VARIANT is passed to it; --config.KEY=VALUE sets any key that "
        "python -m vpm_jax.config lists" + (f" (default: {default})" if default else ""),
    )


def add_model(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Adds --workdir and --model, of which one may be given, or must be."""
    either = parser.add_mutually_exclusive_group(required=required)
    either.add_argument("--workdir", type=Path, metavar="RUN", help="the model: the folder of a training run")
    default = "" if required else " (default: the store's model)"
    either.add_argument("--model", type=Path, metavar="FILE", help=f"the model: a file{default}")


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config of FILE[:VARIANT] with --config.KEY=VALUE applied, checked.

    Raises:
      UserError: for a missing file, one that does not build a config, an unknown key or a wrong value.
    """
    name, _, variant = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        known = sorted(str(p) for p in Path("configs").glob("*.py"))
        have = f"; there are {', '.join(known)}" if known else ""
        raise UserError(f"--config {name}: no such file, expected a Python file with get_config(){have}.")
    try:
        get_config = runpy.run_path(str(path))["get_config"]
        if variant and not inspect.signature(get_config).parameters:
            raise UserError(f"--config {spec}: {path} has no variants: leave out :{variant}.")
        config = get_config(variant) if variant else get_config()
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path} does not build a config ({reason}): expected Python with get_config().") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config() returned {type(config).__name__}, expected a ConfigDict.")
    override(config, overrides)
    config_lib.check(config)
    return config


def check_output(flag: str, path: Path) -> None:
    """Raises UserError, before any work is done, unless `path` can be the file that `flag` asks for."""
    found = "that is a folder, choose another name" if path.is_dir() else no_writing(path.parent)
    if not (found or path.parent.is_dir()):
        found = f"there is no folder {path.parent}, choose another name"
    if found:
        raise UserError(f"{flag} {path}: {found}.", code="bad-output")


def check_folder(flag: str, folder: Path) -> None:
    """Raises UserError, before any work is done, unless `folder` can be written, or made; it makes nothing itself."""
    if found := no_writing(folder):
        raise UserError(f"{flag} {folder}: {found}.", code="bad-output")


def override(config: ConfigDict, arguments: Sequence[str]) -> None:
    """Applies --config.KEY=VALUE (or --config.KEY VALUE), each value read as the type it replaces.

    Raises:
      UserError: for an unknown argument or key, or a value of another type.
    """
    items = list(arguments)
    while items:
        argument = items.pop(0)
        if not argument.startswith("--config."):
            raise UserError(f"Unknown argument {argument!r}: see --help; config keys are set by --config.KEY=VALUE.")
        key, equals, text = argument.removeprefix("--config.").partition("=")
        keys = config_lib.flatten(config)
        if group := [k for k in keys if k.startswith(key + ".")]:
            raise UserError(f"--config.{key} is a group of keys: set one of {', '.join(group)}.")
        if not equals:
            if not items:
                raise UserError(f"{argument} has no value: write {argument}=VALUE.")
            text = items.pop(0)
        if key in RETIRED:
            raise UserError(f"There is no config key {key!r} any more: {RETIRED[key]}.")
        if key not in keys:
            close = [k for k in keys if k.endswith("." + key)][:4] or difflib.get_close_matches(key, keys, n=1)
            hint = f"did you mean {' or '.join(close)}?" if close else f"{LISTED}."
            raise UserError(f"There is no config key {key!r}: {hint}")
        config_lib.set_key(config, key, _read_value(key, text, keys[key]))


def _read_value(key: str, text: str, old: Any) -> Any:
    def wrong(expected: str) -> UserError:
        return UserError(f"--config.{key}={text}: expected {expected}, such as {old!r}.")

    if isinstance(old, str):
        return text
    if isinstance(old, bool):
        if text.lower() not in ("true", "false"):
            raise wrong("true or false")
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(old, int):
        if type(value) is not int:
            raise wrong("a whole number")
        return value
    if isinstance(old, float):
        if type(value) not in (int, float):
            raise wrong("a number")
        return float(value)
    number = (int, float)
    if type(value) in number:
        value = (value,)
    if not isinstance(value, tuple | list) or not all(type(v) in number for v in value):
        raise wrong("numbers in brackets")
    return tuple(value)

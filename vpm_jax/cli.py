"""What every command shares: one clear sentence for an error the user can mend, and configs with overrides."""

from __future__ import annotations

import argparse
import ast
import difflib
import errno
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vpm_jax import config as config_lib
from vpm_jax.errors import UserError

_DISK = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EFBIG: "a file grew past the size limit set for it (ulimit -f): raise the limit and run the command again",
    errno.EROFS: "that file system is read-only: choose another folder",
    errno.EACCES: "permission denied: choose another folder or change its permissions",
}


def disk_trouble(error: BaseException | str) -> str | None:
    """The sentence for a full disk, a size limit or a read-only folder, also from a library's own message."""
    text = str(error)
    for number, sentence in _DISK.items():
        if getattr(error, "errno", None) == number or os.strerror(number) in text:
            return sentence
    return None


def run(main: Callable[[], Any]) -> None:
    """Runs a command: errors that the user can mend end it with one sentence and exit code 1."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        code = main()
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        trouble = disk_trouble(error)
        if trouble is None:
            raise
        _fail(f"{error.filename or 'Writing'}: {trouble}.")
    except MemoryError as error:
        _fail(f"Out of memory ({error}): use a smaller batch (eval.batch) or a machine with more.")
    except KeyboardInterrupt:
        sys.exit(130)
    else:
        sys.exit(code or 0)


def _fail(sentence: str) -> None:
    sys.stdout.flush()
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(1)


def add_config(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Adds --config FILE[:VARIANT]; `read_config` takes the --config.KEY=VALUE that argparse leaves."""
    parser.add_argument(
        "--config",
        default=default,
        metavar="FILE[:VARIANT]",
        help="a file with get_config(); VARIANT is passed to it; any key is overridden by --config.KEY=VALUE"
        + (f" (default: {default})" if default else ""),
    )


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
    module_spec = importlib.util.spec_from_file_location(f"vpm_config_{path.stem}", path)
    assert module_spec and module_spec.loader
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        get_config = module.get_config
        config = get_config(variant) if variant else get_config()
    except UserError:
        raise
    except Exception as error:
        first_line = str(error).splitlines()[0] if str(error) else ""
        raise UserError(f"{path} does not build a config: {type(error).__name__}: {first_line}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config() returned {type(config).__name__}, expected a ConfigDict.")
    override(config, overrides)
    config_lib.check(config)
    return config


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
        if not equals:
            if not items:
                raise UserError(f"{argument} has no value: write {argument}=VALUE.")
            text = items.pop(0)
        keys = config_lib.flatten(config)
        if key not in keys:
            close = difflib.get_close_matches(key, keys, n=1)
            hint = f"did you mean {close[0]}?" if close else "vpm_jax/config.py lists the keys."
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

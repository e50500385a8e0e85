"""UserError, names as text, and explaining disk errors in words."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path


def printable(text: object) -> str:
    """The text with bytes of file names that are not UTF-8 as backslash escapes, since they cannot be encoded."""
    escaped = re.sub("[\udc80-\udcff]", lambda byte: f"\\x{ord(byte[0]) - 0xDC00:x}", str(text))
    return escaped.encode("utf-8", "backslashreplace").decode()


class UserError(Exception):
    """An error the user can fix. Its message is one sentence: what was found, what was expected and what to do.

    Commands print the message without a traceback and exit with code 1.
    """

    def __init__(self, sentence: str = "", *, code: str = "user-error"):
        super().__init__(printable(sentence))
        self.code = code  # names the problem for programs, which should not depend on the wording


def check_utf8(folder: Path, need: str) -> None:
    """Raises UserError unless the absolute path of the folder is UTF-8; `need` names what needs it."""
    if printable(folder.absolute()) != str(folder.absolute()):
        raise UserError(f"The path {folder.absolute()} is not UTF-8, which {need} need: choose another folder.")


_DISK = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EFBIG: "a file reached the size limit (ulimit -f): raise the limit and run the same command again",
    errno.EROFS: "that file system is read-only: choose another folder",
    errno.EACCES: "permission denied: choose another folder or change its permissions",
}


def disk_trouble(error: BaseException) -> str | None:
    """The problem with the disk and what to do, or None. Sees through libraries that wrap or quote the OS error."""
    cause: BaseException | None = error
    while cause is not None:
        for number, sentence in _DISK.items():
            if getattr(cause, "errno", None) == number or os.strerror(number) in str(cause):
                return sentence
        cause = cause.__cause__ or cause.__context__
    return None


def no_writing(folder: Path) -> str | None:
    """Why `folder` cannot be written or created, and what to do; None if it can."""
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not existing.is_dir():
        return f"{existing} is a file, expected a folder: choose another"
    if os.access(existing, os.W_OK | os.X_OK):
        return None
    return _DISK[errno.EROFS if os.statvfs(existing).f_flag & os.ST_RDONLY else errno.EACCES]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError in the block into a UserError: `path` could not be written, and why."""
    try:
        yield
    except OSError as error:
        trouble = disk_trouble(error) or f"{error.strerror or error}: choose another folder"
        raise UserError(f"{path} could not be written: {trouble}.", code="not-written") from error

"""The error a user can mend: one sentence, no traceback."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """What was found, what was expected and what to do, in one sentence.

    The commands print it as it is and exit with code 1.
    """

    def __init__(self, sentence: str = "", *, code: str = "user-error"):
        super().__init__(sentence)
        self.code = code  # names the problem for programs, which should not depend on the wording


_DISK = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EFBIG: "a file grew past the size limit set for it (ulimit -f): raise the limit and run the command again",
    errno.EROFS: "that file system is read-only: choose another folder",
    errno.EACCES: "permission denied: choose another folder or change its permissions",
}


def disk_trouble(error: BaseException) -> str | None:
    """What is wrong with the disk, and what to do; also where a library wrapped the error or only quotes it."""
    seen: BaseException | None = error
    while seen is not None:
        for number, sentence in _DISK.items():
            if getattr(seen, "errno", None) == number or os.strerror(number) in str(seen):
                return sentence
        seen = seen.__cause__ or seen.__context__
    return None


def no_writing(folder: Path) -> str | None:
    """Why nothing could be written into `folder`, and what to do; None if it can. It is made later, if need be."""
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not there.is_dir():
        return f"{there} is a file, expected a folder: choose another"
    if os.access(there, os.W_OK | os.X_OK):
        return None
    return _DISK[errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into a UserError that says that `path` could not be written, and why."""
    try:
        yield
    except OSError as error:
        trouble = disk_trouble(error) or f"{error.strerror or error}: choose another folder"
        raise UserError(f"{path} could not be written: {trouble}.", code="not-written") from error

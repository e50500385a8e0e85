"""UserError, names and errors as text, and checks of arguments."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from numbers import Integral


def printable(text: object) -> str:
    """A name or sentence on one line: `encodable`, and control characters and line breaks as backslash escapes."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: repr(match[0])[1:-1], encodable(text))


def encodable(text: object) -> str:
    """The text with bytes of file names that are not UTF-8 as backslash escapes, since they cannot be encoded."""
    escaped = re.sub("[\udc80-\udcff]", lambda byte: f"\\x{ord(byte[0]) - 0xDC00:x}", str(text))
    return escaped.encode("utf-8", "backslashreplace").decode()


def first_line(error: BaseException) -> str:
    """The start of an error's message, without a final period; the name of its type if there is no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")


class UserError(Exception):
    """An error the user can fix. Its message is one sentence: what was found, what was expected and what to do.

    Commands print the message without a traceback and exit with code 1.
    """

    def __init__(self, sentence: str = "", *, code: str = "user-error"):
        super().__init__(printable(sentence))
        self.code = code  # names the problem for programs, which should not depend on the wording


def check_count(name: str, value: object) -> None:
    """Raises UserError unless the value of the argument `name` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise UserError(f"{name} is {value!r}, expected a whole number of at least 1.")


@contextlib.contextmanager
def optional(purpose: str, packages: str) -> Iterator[None]:
    """For imports of optional packages: turns an ImportError in the block into a UserError, "missing-package".

    Args:
      purpose: what needs them, the start of the sentence.
      packages: what to `pip install`.
    """
    try:
        yield
    except ImportError as error:
        sentence = f"{purpose} needs an optional package ({first_line(error)}): pip install {packages}."
        raise UserError(sentence, code="missing-package") from None

"""Errors by their code; the sentence is tested where it is made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from vpm_jax.errors import UserError


@contextlib.contextmanager
def raises(code: str) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """The block raises a UserError of this code, in one line."""
    with pytest.raises(UserError) as error:
        yield error
    assert error.value.code == code
    assert "\n" not in str(error.value)

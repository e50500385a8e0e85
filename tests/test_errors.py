"""UserError: one sentence and a code."""

from __future__ import annotations

import os
import pickle
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from vpm_jax.errors import UserError, first_line, printable


def test_an_error_has_a_code_wherever_it_goes():
    assert UserError("No.").code == "user-error" and str(UserError()) == ""
    error = pickle.loads(pickle.dumps(UserError("No.", code="no-run")))  # loader processes send theirs
    assert (str(error), error.code) == ("No.", "no-run")


@given(st.text(st.characters(exclude_categories=())))  # surrogates too, which stand for bytes that are not UTF-8
def test_any_name_can_be_shown(name):
    shown = printable(name)
    assert shown.encode("utf-8").decode() == shown
    assert str(UserError(name)) == shown
    assert shown == printable(shown) and len(shown.splitlines()) <= 1
    control = any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name)
    assert "\\" in shown if control else shown == name


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\none.\ntwo")) == "one" and first_line(ValueError()) == "ValueError"


def test_a_name_does_not_break_a_line():
    assert printable("a\nb\r\x85\u2028c\t.jpg") == r"a\nb\r\x85\u2028c\t.jpg"


def test_a_byte_of_a_name_is_shown_as_that_byte():
    assert printable(os.fsdecode(b"Zo\xeb.png")) == "Zo\\xeb.png"

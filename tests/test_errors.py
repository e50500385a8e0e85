"""UserError: one sentence and a code."""

from __future__ import annotations

import pickle

from vpm_jax.errors import UserError


def test_an_error_has_a_code_wherever_it_goes():
    assert UserError("No.").code == "user-error" and str(UserError()) == ""
    error = pickle.loads(pickle.dumps(UserError("No.", code="no-run")))  # loader processes send theirs
    assert (str(error), error.code) == ("No.", "no-run")

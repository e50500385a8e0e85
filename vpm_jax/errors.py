"""The error a user can mend: one sentence, no traceback."""


class UserError(Exception):
    """What was found, what was expected and what to do, in one sentence.

    The commands print it as it is and exit with code 1.
    """

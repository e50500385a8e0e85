"""Lists the keys of a config: python -m vpm_jax.config [WORD ...]"""

from __future__ import annotations

import itertools
import shutil
import textwrap
from collections.abc import Iterable, Sequence

from vpm_jax import cli
from vpm_jax.errors import UserError
from vpm_jax.keys import ANY, EVALUATE, KEYS, RESUME, Key


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(
        prog="python -m vpm_jax.config",
        description="Lists the keys of a config with their defaults, meanings and values.",
        epilog="(resume): may change when a run is resumed; (evaluate): when it is evaluated or reported.",
    )
    parser.add_argument("word", nargs="*", metavar="WORD", help="list only the keys whose name contains a WORD")
    words = parser.parse_args(argv).word
    chosen = [key for key in KEYS if not words or any(word in key.name for word in words)]
    if not chosen:
        raise UserError(f"No config key has {' or '.join(words)} in its name: list all keys with no WORD.")
    print(listing(chosen, shutil.get_terminal_size((120, 0)).columns))
    print(f"\n{parser.epilog}")
    return 0


def listing(keys: Iterable[Key], width: int) -> str:
    """The keys with their defaults, meanings and values, in lines of `width` characters, one paragraph per group."""
    column = 38  # where meanings begin
    paragraphs = []
    for _, group in itertools.groupby(keys, lambda key: key.name.rpartition(".")[0]):
        lines = []
        for key in group:
            values = key.values.expected.removeprefix("one of ").removeprefix("a number from ")
            text = key.meaning + f" [{values}]" * (key.values is not ANY)
            marks = [mark for mark, flag in (("resume", RESUME), ("evaluate", EVALUATE)) if flag in key.flags]
            text += f" ({', '.join(marks)})" * bool(marks)
            meaning = textwrap.wrap(text, max(width - column, 40))
            start = f"{key.name} = {key.default}".rstrip()
            if len(start) >= column:
                lines.append(start)
                start = ""
            lines += [f"{left:{column}}{line}" for left, line in itertools.zip_longest([start], meaning, fillvalue="")]
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


if __name__ == "__main__":
    cli.run(main)

"""Text on a terminal: what would move the cursor, hide, or reorder is written out, and what is long is cut.

Ids, titles, names of files and columns come from others. An escape sequence among them would recolour the terminal or
overwrite what stands there, a carriage return would hide the line, a bidirectional override would turn it around.
`say` prints, `UserError` and the warnings of a stage pass through `visible`, so no caller has to think of it. What
belongs on one line of several is made `visible` where it is put there.
"""

from __future__ import annotations

import unicodedata
from typing import Any, TextIO

_KEPT_FORMAT = "\u200c\u200d"  # joiners carry meaning in Persian, Indic scripts and emoji
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_CUT = " … "


def visible(text: str, limit: int | None = None, *, lines: bool = False) -> str:
    r"""A text in which control characters, format characters and lone surrogates are written out.

    Args:
        text: Any text.
        limit: Most characters to keep; what is cut is cut from the middle, because messages end with the fix.
        lines: Whether line breaks stay.

    Returns:
        Printable text on one line (or on several, with `lines`); `visible` of it is the same again.

    Example:
        >>> visible("\x1b[31mred\r\n")
        '\\x1b[31mred\\r\\n'
    """
    if limit is not None and len(text) > limit:  # before and after: a huge text is not walked through
        text = _cut(text, limit)
    if not text.isprintable():
        text = "".join(c if c in _KEPT_FORMAT or (lines and c == "\n") else _written(c) for c in text)
    return text if limit is None else _cut(text, limit)


def shown(value: Any, limit: int = 100) -> str:
    """The `repr` of a value for a message: visible, cut, and never an error of its own."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"a huge {type(value).__name__}"
    return visible(text, limit)


def one_line(text: object, limit: int = 300) -> str:
    r"""A text of somebody else's (an exception's, a server's) on one line, visible and cut.

    Args:
        text: What is shown; its `str` counts, even where that is an error of its own.
        limit: Most characters to keep.

    Example:
        >>> one_line("red: \x1b[31m!\n  next")
        'red: \\x1b[31m! next'
    """
    try:
        words = str(text).split()
    except Exception:  # its author's mistake, in an exception of theirs, say
        words = [f"({type(text).__name__} without a readable text)"]
    return visible(" ".join(words), limit)


def say(text: object, *, file: TextIO | None = None) -> None:
    """Print a text, made `visible`; its lines stay.

    Args:
        text: What to print.
        file: Where to, stdout by default.
    """
    print(visible(str(text), lines=True), file=file, flush=True)


def _written(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) not in _HIDDEN:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    tail = (limit - len(_CUT)) // 3
    return f"{text[: limit - len(_CUT) - tail]}{_CUT}{text[len(text) - tail :]}"

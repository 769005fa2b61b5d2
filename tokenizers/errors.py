"""The one exception that a user's mistake raises, and how a message shows a text of somebody else's."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake the user can mend: the message names the value, the rule and the fix.

    The launchable stages print it without a traceback and exit with status 2.
    """


def shown(value: object, most: int = 300) -> str:
    r"""A foreign text (an exception's, a server's, a file's) as one line that any terminal takes.

    Args:
        value: What is shown; its `str` counts.
        most: Characters that are kept, from the beginning and the end.

    Returns:
        The text with white space made single, everything unprintable escaped, and the middle of a long one left out.

    Example:
        >>> shown("red: \x1b[31m!\n  next")
        'red: \\x1b[31m! next'
    """
    try:
        text = " ".join(str(value).split())
    except Exception:  # its author's mistake, in an exception of theirs, say
        text = f"({type(value).__name__} without a readable text)"
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 3 :]}"

"""Lines of raw files that could not be read, kept for people beside the artefact and never in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

REJECTED = ".rejected_lines.jsonl"  # behind the output's name
MOST = 10_000  # lines of a file that are kept
CHARS = 500  # of a line

_file: ContextVar[Path | None] = ContextVar("rejected", default=None)


@contextmanager
def keeping_rejected(out: Path) -> Iterator[Path]:
    """Let readers keep what they reject in `<out>.rejected_lines.jsonl`, which an earlier run may have left.

    Args:
        out: Folder of the artefact, claimed by this process.

    Yields:
        The file, which is there if a line was rejected.
    """
    file = out.with_name(out.name + REJECTED)
    file.unlink(missing_ok=True)
    token = _file.set(file)
    try:
        yield file
    finally:
        _file.reset(token)


def keep(source: Path, lines: Iterable[tuple[int, str, bytes]], more: int) -> Path | None:
    """Write rejected lines of one file, as JSON whose strings are ASCII.

    Args:
        source: The file.
        lines: Number, reason and bytes of each.
        more: How many lines were rejected beyond these.

    Returns:
        Where they are; None where no stage keeps any.
    """
    if (file := _file.get()) is None:
        return None
    with file.open("a", encoding="ascii") as out:
        for number, why, line in lines:
            text = line.decode(errors="backslashreplace")[:CHARS]
            out.write(json.dumps({"file": str(source), "line": number, "why": why, "text": text}) + "\n")
        if more:
            out.write(json.dumps({"file": str(source), "left_out": more}) + "\n")
    return file

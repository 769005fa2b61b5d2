"""How a message shows what somebody else wrote."""

from __future__ import annotations

import pytest

from reasonrec.tokenizers.errors import shown


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("as it is, ü and 壁 too", "as it is, ü and 壁 too"),
        ("two\r\n lines\tand more", "two lines and more"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\x9b31m \u202e \ud800", r"\x9b31m \u202e \ud800"),
        (ValueError("7"), "7"),
    ],
)
def test_one_line_that_any_terminal_takes(text: object, line: str) -> None:
    assert shown(text) == line


def test_long_texts_lose_their_middle() -> None:
    text = shown("begin" + "\x00" * 1_000_000 + "end", 60)
    assert len(text) < 60
    assert text.startswith("begin")
    assert text.endswith("end")


def test_a_text_that_cannot_be_made() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert shown(Broken()) == "(Broken without a readable text)"

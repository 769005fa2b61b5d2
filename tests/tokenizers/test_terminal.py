"""What reaches a terminal is printable, whatever was in the data."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrec.tokenizers.errors import MAX_MESSAGE_CHARS, UserError
from reasonrec.tokenizers.terminal import one_line, say, shown, visible

# Every plane, lone surrogates included, and what does harm more often than by chance.
TEXTS = st.text(st.characters() | st.sampled_from("\x1b\r\n\t\x00\x9b\u2028\u202e\u2066\ud800\ufeff\u200d"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Toy Story (1995)", "Toy Story (1995)"),
        ("Amélie 千と千尋 👩\u200d🚀 می\u200cخواهم", "Amélie 千と千尋 👩\u200d🚀 می\u200cخواهم"),
        ("\x1b[2J\x1b]0;owned\x07", r"\x1b[2J\x1b]0;owned\x07"),
        ("safe\rfake", r"safe\rfake"),
        ("one\ntwo\tthree", r"one\ntwo\tthree"),
        ("\u202egpj.exe\u2069", r"\u202egpj.exe\u2069"),
        ("a\u2028b\x85\x9b", r"a\u2028b\x85\x9b"),
        ("\udcff\ud83d", r"\udcff\ud83d"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_cannot_be_seen_is_written_out(text: str, expected: str) -> None:
    assert visible(text) == expected


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.none() | st.integers(10, 40), st.booleans())
def test_any_text_becomes_printable_and_stays_so(text: str, limit: int | None, lines: bool) -> None:
    found = visible(text, limit, lines=lines)
    assert visible(found, limit, lines=lines) == found
    assert limit is None or len(found) <= limit
    found.encode("utf-8")
    left = {c for c in found if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert left <= {"\u200c", "\u200d", *("\n" if lines else "")}


def test_a_long_text_keeps_both_ends() -> None:
    found = visible("begin" + "x" * 10_000_000 + "the fix", 60)
    assert found.startswith("beginx")
    assert " … " in found
    assert found.endswith("the fix")


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_a_mistake_is_one_line_that_can_be_printed(text: str) -> None:
    error = UserError(f"item {text} is unknown")
    assert str(error).startswith("item ")
    assert str(error).endswith(" is unknown")
    assert len(str(error).splitlines()) == 1
    assert str(UserError(str(error))) == str(error), "a message inside of another is not written out twice"


def test_a_message_that_quotes_a_huge_cell_is_cut() -> None:
    message = str(UserError(f"id {'x' * 100_000} is too long; map another column"))
    assert len(message) == MAX_MESSAGE_CHARS
    assert message.endswith("map another column")


def test_a_value_in_a_message_never_raises() -> None:
    assert shown("a\x1b") == r"'a\x1b'"
    assert shown([1, None]) == "[1, None]"
    assert shown(10**5000) == "a huge int"
    assert len(shown(["x" * 1000])) == 100


def test_what_is_said_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    say("a table\n\x1b[1mrow\r")
    assert capsys.readouterr().out == "a table\n\\x1b[1mrow\\r\n"


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
    assert one_line(text) == line


def test_long_texts_of_others_lose_their_middle() -> None:
    text = one_line("begin" + "\x00" * 1_000_000 + "end", 60)
    assert len(text) <= 60
    assert text.startswith("begin")
    assert text.endswith("end")


def test_a_text_that_cannot_be_made() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert one_line(Broken()) == "(Broken without a readable text)"

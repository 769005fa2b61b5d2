"""No bytes in a configuration end in a traceback: they are plain values, or refused on one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.yaml_files import MAX_BYTES, MAX_DEPTH, MAX_VALUES, load_yaml, read_yaml

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2024-05-01", "2024-05-01"),
        ("2024-05-01T18:00:00Z", "2024-05-01T18:00:00Z"),
        ("2024-99-99", "2024-99-99"),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("=", "="),
        ("<<", "<<"),
        ("!!str 7", "7"),
        ("9223372036854775807", 2**63 - 1),
        ("-9223372036854775808", -(2**63)),
        ("1.5e+3", 1500.0),
        ("1e3", "1e3"),  # as a flag has it: fit() makes a number of it where one belongs
        ("[yes, no, ~, .5]", [True, False, None, 0.5]),
    ],
)
def test_a_value_is_what_was_written(text: str, expected: Any) -> None:
    found = load_yaml(f"key: {text}\n")["key"]
    assert found == expected
    assert type(found) is type(expected)


def test_an_alias_repeats_a_value() -> None:
    assert load_yaml("a: &x {n: [1]}\nb: [*x, *x]\n") == {"a": {"n": [1]}, "b": [{"n": [1]}, {"n": [1]}]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, rf"line 5: more than {MAX_VALUES:,} values, counting what aliases \(\*name\) repeat"),
        ("\n".join(["- 1"] * (MAX_VALUES + 1)), f"more than {MAX_VALUES:,} values"),
        ("a: &x [*x]", r"line 1: \*x stands inside of what it repeats"),
        ("a: *x", "line 1: found undefined alias"),
        ("[" * 100_000, f"line 1: lists and mappings stand more than {MAX_DEPTH} levels deep"),
        ("{a: " * 10_000, f"more than {MAX_DEPTH} levels deep"),
        ("- " * 10_000, f"more than {MAX_DEPTH} levels deep"),
        ("? " * 10_000, f"more than {MAX_DEPTH} levels deep"),
        ("a: " + "9" * 5000, r"line 1: '9{40}' is no whole number of 64 bits"),
        ("a: 0x" + "f" * 5000, "is no whole number of 64 bits"),
        ("a: 9223372036854775808", "is no whole number of 64 bits; put text in quotes"),
        ("a: 0x_", "is no whole number of 64 bits"),
        ("a: {b: 1, <<: {c: 2}}", r"line 1: merge keys \(<<\) are not supported: write the keys out"),
        ("a: !!python/object/apply:os.system [ls]", "the tag !!python/object/apply:os.system is not supported"),
        ("a: !!timestamp nonsense", "the tag !!timestamp is not supported"),
        ("a: !!int x", "the tag !!int is not supported"),
        ("a: !mine x", "the tag !mine is not supported"),
        ("a: 1\nb: {c: 1, c: 2}", "line 2: key 'c' is given twice"),
        ("1: a\ntrue: b", "key True is given twice"),
        ("? [a]\n: 1", "found unhashable key"),
        ('a: "\\UFFFFFFFF"', "not valid YAML"),
        ("%YAML " + "1" * 5000 + ".1\n---\na: 1", "not valid YAML"),
        ("a: \x00", "unacceptable character #x0000"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: |\n" + "  x\n" * MAX_BYTES, f"it is longer than {MAX_BYTES >> 10} KiB"),
    ],
)  # fmt: skip
def test_what_is_refused_on_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_yaml(text)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: \xff\xfe", "is not text in UTF-8: .* at byte 3"),
        ("a: 1".encode("utf-16"), "is not text in UTF-8"),
        (b"\x7fELF\x02\x01\x01\x00\x00", "is not valid YAML: unacceptable character #x007f|is not valid YAML"),
        (b"a: 1\n" * MAX_BYTES, r"c\.yaml is larger than 256 KiB: is it a configuration\?"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_yaml(tmp_path / "c.yaml")


def plain(value: Any) -> bool:
    """Whether a value is made of what JSON knows."""
    if isinstance(value, dict):
        return all(plain(key) and plain(element) for key, element in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or type(value) in (str, int, float, bool)


# What YAML gives a meaning to, so that many of the texts are nearly YAML.
WORDS = st.sampled_from([
    *"\n :-?[]{},&*!|>'\"%@`#=~\\\t\x00.", "\n  ", ": ", "- ", "? ", "&a ", "*a", "<<: ", "!!int ", "!!str ", "!<x> ",
    "!!binary ", "!!timestamp ", "!!python/name:os ", "---\n", "...\n", "%YAML 1.1\n", "%TAG ! x\n", "0x", "0b1",
    "017", "1e3", "1.5e+300", ".inf", ".nan", "1:30", "2024-05-01", "yes", "null", '"\\x', '"\\U', "\\N", "\ufeff",
    "\ud800", "é",
])  # fmt: skip
TEXTS = st.lists(WORDS | st.text(max_size=4), max_size=30).map("".join)


def check(read: Callable[[Any], Any], source: Any) -> None:
    try:
        found = read(source)
    except UserError as error:
        found = str(error)
        if not found.isprintable():
            raise
    assert plain(found)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_a_mapping_of_plain_values_or_a_mistake(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    check(read_yaml, path)


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_any_text_is_plain_values_or_a_mistake(text: str) -> None:
    check(load_yaml, text)

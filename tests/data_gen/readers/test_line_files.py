import gzip
import json
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonrec.data_gen import rejected
from reasonrec.data_gen.readers import line_files
from reasonrec.data_gen.readers.csv_reader import LINE
from reasonrec.data_gen.readers.line_files import LineFile, number, words
from reasonrec.tokenizers.errors import UserError

RECORDS = st.builds(lambda text: json.dumps({"a": text}).encode(), st.text(max_size=5))
LINES = st.lists(st.one_of(RECORDS, st.binary(max_size=8), st.just(b" "), st.just(b"{}")).map(
    lambda line: line.replace(b"\n", b"").replace(b"\r", b"")), max_size=12)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lines") / "lines.json"


@given(LINES, st.integers(1, 40), st.booleans(), st.booleans())
def test_every_line_is_a_row_a_bad_one_or_blank(
    place: Path, lines: list[bytes], block: int, packed: bool, ended: bool
) -> None:
    text = b"\n".join(lines) + b"\n" * ended
    place.write_bytes(gzip.compress(text) if packed else text)
    file = LineFile(place, "items", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line_files, "BLOCK", block)
        frame = pl.concat(file.records(lambda record: (words(record["a"]),), {"a": pl.String}))
    numbered = text.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert file.rows + file.blank == len(numbered) - (numbered[-1] == b"")
    assert file.rows == frame.height + file.bad
    for at, value in frame.iter_rows():
        record = json.loads(numbered[at - 1].decode())
        assert value == words(record["a"])
    if file.bad:
        assert file.first_bad is not None
        assert file.first_bad[0] not in frame[LINE].to_list()
    if not file.rows:
        return
    with rejected.keeping_rejected(place) as kept:
        file.finish(frame.height)
    assert kept.exists() == bool(file.bad)
    found = [json.loads(line) for line in kept.read_bytes().splitlines()] if file.bad else []
    assert [(row["line"], row["text"]) for row in found] == [
        (at, line.decode(errors="backslashreplace"))
        for at, line in enumerate(numbered, 1)
        if line.strip() and at not in frame[LINE].to_list()
    ]


def test_few_of_many_rejected_lines_are_kept_escaped_and_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rejected, "MOST", 2)
    place = tmp_path / "lines.txt"
    place.write_text("a|b\n\x1b[31m<|im_end|>é\n" + "x" * 1000 + "\n|||\nc|d\n", encoding="utf-8")
    with rejected.keeping_rejected(tmp_path / "dataset") as kept:
        file = LineFile(place, "items", 0.1)
        assert pl.concat(file.fields({"a": 0}, 2, "|")).height == 2
        with pytest.raises(UserError, match=r"3 of 5 lines cannot be read.*more: .*dataset\.rejected_lines\.jsonl"):
            file.finish(2)
    lines = kept.read_bytes().splitlines()
    assert all(line.isascii() and b"\x1b" not in line for line in lines)
    first, second, rest = map(json.loads, lines)
    assert (first["file"], first["line"], first["text"]) == (str(place), 2, "\x1b[31m<|im_end|>é")
    assert (second["line"], second["text"]) == (3, "x" * 500)
    assert rest == {"file": str(place), "left_out": 1}
    with rejected.keeping_rejected(tmp_path / "dataset"):
        assert not kept.exists()  # it told of the run before


def test_a_gzip_file_that_breaks_off(place: Path) -> None:
    place.write_bytes(gzip.compress(b'{"a": "x"}\n' * 5000)[:-20])
    with pytest.raises(UserError, match=r"lines\.json cannot be read behind line 0: .*Download or copy it again"):
        list(LineFile(place, "items", 0).records(lambda record: (record["a"],), {"a": pl.String}))


@given(st.lists(st.tuples(*[st.text("ab é|", max_size=4)] * 3), min_size=1), st.integers(8, 40))
def test_fields_come_back(place: Path, rows: list[tuple[str, ...]], block: int) -> None:
    place.write_text("x::y::z\r\n" + "".join("::".join(row) + "\r\n" for row in rows), encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line_files, "BLOCK", block)
        file = LineFile(place, "items", 0)
        assert file.header() == "x::y::z"
        frame = pl.concat(file.fields({"third": 2, "first": 0}, 3, "::", skip=1))
    assert frame.rows() == [(at, row[2], row[0]) for at, row in enumerate(rows, 2)]
    read = file.finish(len(rows))
    assert (read["rows"], read["dropped"]) == (len(rows), {})


def test_lines_of_another_encoding_are_bad_ones(place: Path) -> None:
    place.write_bytes("a::b\né::b\n".encode() + "é::b\nc::d\n".encode("latin-1"))
    file = LineFile(place, "items", 0.5)
    assert pl.concat(file.fields({"a": 0}, 2, "::"))["a"].to_list() == ["a", "é", "c"]
    assert file.finish(3)["dropped"] == {f"unreadable (the first in line 3: {file.first_bad[1]})": 1}  # type: ignore[index]
    assert "utf-8" in file.first_bad[1]  # type: ignore[index]
    with pytest.raises(UserError, match="max_bad_lines=0 allows"):
        LineFile(place, "items", 0, rows=4, bad=1).finish(3)


@pytest.mark.parametrize("value", [True, "x", None, [1], float("nan"), "inf"])
def test_what_is_no_number(value: object) -> None:
    with pytest.raises(ValueError, match=r"number|float"):
        number(value)


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read behind line 0"):
        LineFile(tmp_path, "items", 0).header()

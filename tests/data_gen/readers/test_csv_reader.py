"""CSV files: what is well formed is read as Python's csv module reads it, what is not is named with its line."""

import csv
import gzip
import io
from pathlib import Path

import polars as pl
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reasonrec.data_gen.readers import csv_reader
from reasonrec.data_gen.readers.csv_reader import LINE, CsvFile, read_quote, read_separator
from reasonrec.tokenizers.errors import UserError

HEADER = ["id", "text", "other"]
FIELDS = st.text(alphabet='ab ,;:"\n\r\té', max_size=6)
ROWS = st.lists(st.tuples(st.integers(0, 99).map(str), FIELDS, FIELDS), min_size=1, max_size=12)


def read(table: CsvFile, columns: list[str]) -> pl.DataFrame:
    """All blocks of a file."""
    return pl.concat(list(table.blocks(columns)))


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def open_csv(path: Path, separator: str = ",", quote: str = '"', *, trusted: bool = False) -> CsvFile:
    return CsvFile(path, separator, quote, trusted)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, separator=st.sampled_from([",", ";", "\t", "::", "é"]), end=st.sampled_from(["\n", "\r\n"]),
       block=st.sampled_from([3, 40, 1 << 24]))  # fmt: skip
def test_every_row_comes_back_whatever_stands_in_it(
    rows: list[tuple[str, str, str]], separator: str, end: str, block: int, tmp_path: Path
) -> None:
    words = io.StringIO(newline="")
    writer = csv.writer(words, delimiter="\x1f", lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([HEADER, *rows])
    text = words.getvalue().replace('"\x1f"', f'"{separator}"')
    path = write(tmp_path / "t.csv", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_reader, "BLOCK", block)
        table = open_csv(path, separator, trusted=True)
        frame = read(table, HEADER)
    assert table.rows == len(rows)
    assert frame.select(HEADER).rows() == rows
    lines = [text[: text.index(f'"{row[0]}"')].count("\n") + 1 for row in rows[:1]]
    assert frame[LINE].to_list()[:1] == lines


def test_only_the_columns_that_are_asked_for_are_read_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    table = open_csv(write(tmp_path / "t.csv", '\nid,text,other\n\n1,"a\nb",x\n  \n2,c,y'))
    frame = read(table, ["other", "id"])
    assert frame.rows() == [(4, "x", "1"), (7, "y", "2")]
    assert (table.columns, table.rows, table.blank) == (HEADER, 2, 2)


def test_compressed_files_are_known_by_their_content(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbfid,text,other\n1,a,b\n"
    zstd = pyarrow.Codec("zstd").compress(text, asbytes=True)
    for data in (text, gzip.compress(text), zstd, gzip.compress(text[:20]) + gzip.compress(text[20:])):
        table = open_csv(write(tmp_path / "t.csv", data))
        assert table.columns == HEADER
        assert read(table, ["id"]).rows() == [(2, "1")]
    with pytest.raises(UserError, match=r"t\.csv cannot be read: .*is the file complete\?"):
        read(open_csv(write(tmp_path / "t.csv", gzip.compress(text)[:-9])), ["id"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('1,5" pipe,x\n2,a,b\n', r"a quote \(\"\) in line 2 does not stand around a whole field.*set quote_char: ''"),
        ('1,a,5"\n2,a,6"\n', r"a quote .* in line 2 does not"),
        ('1,a,b\n2,"pipe,x\n3,a,b\n', r"a quote .* in line 3 is never closed: '2,\"pipe,x'"),
        ('1,a,b\n2,"a" b,x\n', r"a quote .* in line 3 does not"),
        ('1,"a ""x"" "b,c\n', r"a quote .* in line 2 does not"),
        ('1,a,b\n2,"Heroes,x\n3,a,b\n4,5",x\n', r"makes lines 3 to 5 one row"),
        ('1,a,"x\n2,a,b\n3,a,y"\n', r"makes lines 2 to 4 one row.*quote_char: '\"' if that really is"),
        ("1,a,b\n2,a\n", r"line 3 has 2 fields where the header has 3 \(separator=','\): '2,a'"),
        ("1,a,b\n2,a,b,c\n", r"line 3 has 4 fields"),
        ('1,"a\nb",c\n2,a,b,\n', r"line 4 has 4 fields"),
        ("", "a header and no rows"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("block", [5, 1 << 24])
def test_what_would_swallow_or_shift_is_refused_with_its_line(
    text: str, message: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_reader, "BLOCK", block)
    path = write(tmp_path / "t.csv", "id,text,other\n" + text)
    with pytest.raises(UserError, match=message) as caught:
        read(open_csv(path), ["id"])  # the fault stands in columns that nobody asked for, too
    assert "\n" not in str(caught.value)


def test_a_quote_that_swallows_everything_is_found_before_memory_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_reader, "BLOCK", 64)
    monkeypatch.setattr(csv_reader, "LONGEST", 256)
    path = write(tmp_path / "t.csv", 'id,text,other\n1,"a,b\n' + "2,a,b\n" * 200)
    with pytest.raises(UserError, match="in line 2 is never closed"):
        read(open_csv(path), ["id"])
    path = write(tmp_path / "t.csv", "id,text,other\n1,a," + "b" * 600 + "\n")
    with pytest.raises(UserError, match="the record in line 2 is longer than"):
        read(open_csv(path), ["id"])


def test_fields_of_several_lines_that_look_like_prose_are_fields(tmp_path: Path) -> None:
    table = open_csv(write(tmp_path / "t.csv", 'id,text,other\n1,Lamp,"Small.\nWarm, white, dim."\n2,a,b\n'))
    assert read(table, ["other"])["other"].to_list() == ["Small.\nWarm, white, dim.", "b"]


def test_quotes_are_text_where_the_file_does_not_quote_and_rows_where_they_are_trusted(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", 'id,text,other\n1,"Heroes,x\n2,a,b\n3,5",x\n')
    assert read(open_csv(path, quote=""), ["text"])["text"].to_list() == ['"Heroes', "a", '5"']
    assert read(open_csv(path, trusted=True), ["id"]).rows() == [(2, "1")]
    quoted = write(tmp_path / "q.csv", "id,text,other\n1,'a, ''b''',x\n")
    assert read(open_csv(quoted, quote="'"), ["text"])["text"].to_list() == ["a, 'b'"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("id,text\n1,a\n".encode("utf-16"), "is UTF-16, not UTF-8.*iconv -f UTF-16"),
        ("id,text\n1,a\n".encode("utf-16-le"), "is UTF-16"),
        ("id,text\n1,a\n".encode("utf-32"), "is UTF-32"),
        (b"id,text\r1,a\r", r"ends its lines with CR alone.*tr '\\r' '\\n'"),
        (b"id,text\r1,a\r\n", "ends its lines with CR alone"),
        ("id,text\n1,a\n2,Amélie\n".encode("latin-1"), r"line 3 is not UTF-8 \(byte 0xe9\)"),
        ("id,text\n1,é\n".encode() + "2,Amélie\n".encode("latin-1"), r"line 3 .*encodings are mixed; mend it, or"),
        ("id,téxt\n1,a\n".encode("latin-1"), r"line 1 is not UTF-8"),
        (b"PK\x03\x04rest", "is a ZIP or Excel file"),
        (b"PAR1rest", "is a Parquet file"),
        (b"", "it is empty"),
        (b"\n\n", "it is empty"),
        (b"id,text\n", "a header and no rows"),
    ],
)
def test_files_that_are_no_table_say_what_they_are(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(open_csv(write(tmp_path / "t.csv", data)), ["id"])
    assert "\n" not in str(caught.value)


def test_a_long_separator_that_nothing_can_stand_for(tmp_path: Path) -> None:
    rows = "1::" + "".join(chr(code) for code in range(1, 32) if code not in (10, 13)) + "\n"
    with pytest.raises(UserError, match="every control character"):
        read(open_csv(write(tmp_path / "t.csv", "id::text\n" + rows), "::"), ["id"])
    with pytest.raises(UserError, match=r"line 2 has 3 fields .*'1::2::3'"):
        read(open_csv(write(tmp_path / "t.csv", "id::text\n1::2::3\n"), "::"), ["id"])


@pytest.mark.parametrize(
    ("name", "separator", "expected"),
    [
        ("a.csv", None, ","), ("a.TSV", None, "\t"), ("a.tsv.gz", None, "\t"), ("a.txt", None, ","),
        ("a.tsv", ";", ";"), ("a.csv", r"\t", "\t"), ("a.csv", "::", "::"),
    ],
)  # fmt: skip
def test_separators(name: str, separator: str | None, expected: str) -> None:
    assert read_separator(Path(name), separator) == expected


@pytest.mark.parametrize("separator", ["", "\n", '"', ',"'])
def test_separators_that_are_none(separator: str) -> None:
    with pytest.raises(UserError, match=r"write one such as ',' ';' '\|' '::' or '\\t'"):
        read_separator(Path("a.csv"), separator)


def test_quote_characters() -> None:
    assert [read_quote(word, ",") for word in (None, "", "none", "'")] == ['"', "", "", "'"]
    for word in ("''", ",", "«"):
        with pytest.raises(UserError, match="one character that is no separator"):
            read_quote(word, ",")

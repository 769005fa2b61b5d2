"""CSV files in blocks of whole records, every record checked: nothing is swallowed, nothing is shifted.

A reader that only cuts out the columns it needs does not see a stray quote or a missing field in the others, and loses
rows in silence. So each block is checked here as bytes (with numpy, no loop over lines) before polars cuts it: quotes
stand around whole fields, every record has the fields of the header. What passes has one meaning only, and the number
of records that were checked is the number of rows that have to come out. Never more than a few blocks are in memory
beside the columns that were asked for.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import polars as pl

from reasonrec.tokenizers.errors import UserError

LINE = "__line__"  # number of a record's first line in the file, the first line is 1
BLOCK = 1 << 24
LONGEST = 1 << 26  # a record beyond this is no record but a quote that nobody closed
_NEWLINE, _RETURN, _SPACE = 10, 13, 32
# What stands for a separator of several bytes inside a block; any that the block does not hold will do.
_STAND_INS = [bytes([code]) for code in (0x1F, 0x1E, 0x1D, 0x1C, *range(1, 9), *range(14, 28))]
_MAGIC = {
    b"PK\x03\x04": "a ZIP or Excel file: save the sheet as CSV (UTF-8)",
    b"PAR1": "a Parquet file: let its name end in .parquet",
    b"\xd0\xcf\x11\xe0": "an old Excel file: save the sheet as CSV (UTF-8)",
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
_BOM = b"\xef\xbb\xbf"


def read_separator(path: Path, separator: str | None) -> str:
    r"""The separator that is meant: by the file's name if none is set; the typed characters `\t` are a tab.

    Raises:
        UserError: If it is empty, a line break or a quote.
    """
    if separator is None:
        return "\t" if {".tsv", ".tab"} & {suffix.lower() for suffix in path.suffixes} else ","
    meant = separator.replace("\\t", "\t")
    if not meant or set(meant) & set('\r\n"'):
        what = "is empty" if not meant else "holds a line break or a quote"
        raise UserError(
            rf"separator={separator!r} {what}: write one such as ',' ';' '|' '::' or '\t' (a tab), or leave it out "
            "(.csv: comma, .tsv: tab)"
        )
    return meant


def read_quote(quote_char: str | None, separator: str) -> str:
    """The quote that is meant, empty for a file that does not quote.

    Raises:
        UserError: If it is no single character of ASCII, or part of the separator.
    """
    if quote_char is None:
        return '"'
    if quote_char.lower() in ("", "none"):
        return ""
    if len(quote_char) > 1 or not quote_char.isascii() or quote_char in "\r\n" or quote_char in separator:
        raise UserError(
            f"quote_char={quote_char!r} has to be one character that is no separator, such as '\"', or '' for a file "
            "that does not quote"
        )
    return quote_char


@dataclass
class CsvFile:
    """A CSV file, plain or compressed (gzip, zstd), whose header was read.

    Attributes:
        path: The file.
        separator: One or more characters between fields.
        quote: One character, or empty.
        trusted: A quoted field may look like several rows; otherwise that counts as a quote that nobody closed.
        columns: The header.
        rows: Records after the header, counted while they were read.
        blank: Lines without anything, which are no rows.
    """

    path: Path
    separator: str
    quote: str
    trusted: bool
    columns: list[str] = field(default_factory=list)
    rows: int = 0
    blank: int = 0

    def __post_init__(self) -> None:
        """Read the header."""
        for _, block in self._blocks():
            self.columns = self._header(block)[0]
            return
        raise self._empty()

    def _empty(self) -> UserError:
        return UserError(f"{self.path} cannot be read as a table: it is empty; its first line has to name the columns")

    def blocks(self, columns: list[str]) -> Iterator[pl.DataFrame]:
        """Read some columns as text, with the line each row starts in (column `LINE`), block by block.

        Raises:
            UserError: If a record does not have the header's fields, a quote does not stand around a field, or the
                text is not UTF-8.
        """
        numbers = [self.columns.index(name) for name in columns]
        header_read = False
        for line, block in self._blocks():
            if not header_read:
                _, end, lines = self._header(block)
                block, line, header_read = block[end:], line + lines, True
            if block:
                frame = self._parse(block, line, numbers, columns)
                self.rows += frame.height
                yield frame
        if not self.rows:
            raise UserError(f"{self.path} cannot be read as a table: it has a header and no rows")

    def _open(self) -> IO[bytes]:
        with self.path.open("rb") as raw:
            start = raw.read(4)
        if start[:2] == b"\x1f\x8b":
            return gzip.open(self.path)  # type: ignore[return-value]
        if start == b"\x28\xb5\x2f\xfd":
            # The standard library reads zstd from Python 3.14 on.
            import pyarrow  # type: ignore[import-untyped]

            stream: IO[bytes] = pyarrow.input_stream(str(self.path), compression="zstd")
            return stream
        return self.path.open("rb")

    def _blocks(self) -> Iterator[tuple[int, bytes]]:
        """Whole records and the number of their first line, block by block; every block ends with a line break."""
        line, rest, first = 1, b"", True
        try:
            with self._open() as stream:
                while True:
                    new = stream.read(BLOCK)
                    if first:
                        new, first = self._check_start(new), False
                    text = rest + new
                    if not new and text and not text.endswith(b"\n"):
                        text += b"\n"
                    end = self._last_record(text)
                    if end:
                        yield line, text[:end]
                        line += text.count(b"\n", 0, end)
                    rest = text[end:]
                    if rest and (not new or len(rest) > LONGEST):
                        self._check_quotes(*self._one_byte(rest), line)
                        raise UserError(f"{self.path}: the record in line {line} is longer than {LONGEST >> 20} MB")
                    if not new:
                        return
        except (OSError, EOFError, zlib.error) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.path} cannot be read: {reason}; is the file complete? Copy it again") from error

    def _check_start(self, block: bytes) -> bytes:
        """Refuse what is no text of lines; cut the byte-order mark off."""
        for magic, what in _MAGIC.items():
            if block.startswith(magic):
                raise UserError(f"{self.path} is {what}")
        if block.startswith(_UTF16) or b"\x00" in block[:1000]:
            code = "UTF-16" if not block.startswith((b"\x00\x00\xfe\xff", b"\xff\xfe\x00\x00")) else "UTF-32"
            raise UserError(
                f"{self.path} is {code}, not UTF-8 (or no text at all): `iconv -f {code} -t UTF-8 {self.path.name} > "
                "utf8.csv` converts it"
            )
        if b"\r" in block and b"\n" not in block:
            self._old_mac()
        return block.removeprefix(_BOM)

    def _old_mac(self) -> None:
        raise UserError(
            f"{self.path} ends its lines with CR alone, as old Macs did: `tr '\\r' '\\n' < {self.path.name} > "
            "unix.csv` converts it"
        )

    def _last_record(self, text: bytes) -> int:
        """Where the last whole record of a text ends, which starts with a record."""
        end = text.rfind(b"\n") + 1
        quote = self.quote.encode()
        if not end or not quote or quote not in text:
            return end
        marks = np.frombuffer(text, np.uint8)
        breaks = np.flatnonzero(marks == _NEWLINE)
        whole = breaks[np.searchsorted(np.flatnonzero(marks == quote[0]), breaks) & 1 == 0]
        return int(whole[-1]) + 1 if len(whole) else 0

    def _one_byte(self, block: bytes) -> tuple[bytes, bytes]:
        """A block with one byte for each separator, and that byte."""
        separator = self.separator.encode()
        if len(separator) == 1:
            return block, separator
        free = next((byte for byte in _STAND_INS if byte not in block), None)
        if free is None:
            raise UserError(
                f"{self.path}: separator={self.separator!r} has several bytes, and the file holds every control "
                "character that could stand for it; write the file with a separator of one character"
            )
        return block.replace(separator, free), free

    def _header(self, block: bytes) -> tuple[list[str], int, int]:
        """Names of the columns, where the header ends, and how many lines it has, blank ones before it included."""
        text, separator = self._one_byte(block)
        at = lines = 0
        while True:
            end = self._record_end(text, at)
            record = text[at:end]
            lines += record.count(b"\n")
            if record.strip():
                break
            if end >= len(text):
                raise self._empty()
            at = end
        if b"\r" in record.rstrip(b"\r\n"):
            self._old_mac()
        first = lines - record.count(b"\n") + 1
        self._check_quotes(record, separator, first)
        try:
            words = record.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise self._not_utf8(record, first, error) from None
        cut = separator.decode()
        names = next(csv.reader([words], delimiter=cut, quotechar=self.quote)) if self.quote else words.split(cut)
        # In the block as it was, the header is as much longer as its separators are.
        written = end + text.count(separator, 0, end) * (len(self.separator.encode()) - 1)
        return [name.replace(cut, self.separator) for name in names], written, lines

    def _record_end(self, text: bytes, start: int) -> int:
        quote, end = self.quote.encode(), start
        while True:
            end = text.index(b"\n", end) + 1
            if not quote or text.count(quote, start, end) % 2 == 0:
                return end

    def _parse(self, block: bytes, line: int, numbers: list[int], columns: list[str]) -> pl.DataFrame:
        """Check a block of records and cut out columns."""
        block, separator = self._one_byte(block)
        marks = np.frombuffer(block, np.uint8)
        quotes = self._check_quotes(block, separator, line)
        breaks, cuts = np.flatnonzero(marks == _NEWLINE), np.flatnonzero(marks == separator[0])
        ends, outside = breaks, cuts
        if len(quotes):
            ends = breaks[np.searchsorted(quotes, breaks) & 1 == 0]
            outside = cuts[np.searchsorted(quotes, cuts) & 1 == 0]
        starts = np.r_[0, ends[:-1] + 1]
        lines = np.asarray(np.searchsorted(breaks, starts)) + line
        fields = np.diff(np.searchsorted(outside, ends), prepend=0) + 1
        odd = np.flatnonzero(fields != len(self.columns))
        blank = np.array([i for i in odd if not block[starts[i] : ends[i]].strip()], dtype=np.int64)
        wrong = np.setdiff1d(odd, blank)
        if len(wrong):
            raise self._ragged(block[starts[wrong[0]] : ends[wrong[0]]], int(lines[wrong[0]]), int(fields[wrong[0]]))
        if len(ends) < len(breaks) and not self.trusted:
            self._check_spanning(marks, breaks, cuts, ends, starts, line)
        if len(blank):
            self.blank += len(blank)
            change = np.zeros(len(marks) + 1, dtype=np.int8)
            change[starts[blank]] += 1
            change[ends[blank] + 1] -= 1
            block = marks[np.cumsum(change[:-1], dtype=np.int8) == 0].tobytes()
            lines = np.delete(lines, blank)
        return self._cut(block, separator, lines, numbers, columns, line)

    def _cut(
        self, block: bytes, separator: bytes, lines: np.ndarray, numbers: list[int], columns: list[str], line: int
    ) -> pl.DataFrame:
        everything: dict[str, type[pl.String]] = {str(number): pl.String for number in range(len(self.columns))}
        if not block:
            return pl.DataFrame(schema={LINE: pl.Int64, **dict.fromkeys(columns, pl.String)})
        try:
            frame = pl.read_csv(
                block,
                has_header=False,
                schema=everything,
                columns=sorted(numbers),
                separator=separator.decode(),
                quote_char=self.quote or None,
            )
        except pl.exceptions.PolarsError as error:
            try:
                block.decode()
            except UnicodeDecodeError as wrong:
                raise self._not_utf8(block, line, wrong) from None
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.path}: the lines from {line} on cannot be read: {reason}") from error
        if frame.height != len(lines):
            raise UserError(
                f"{self.path}: {frame.height} rows were read where {len(lines)} stand from line {line} on; write the "
                "file again, with quotes around whole fields only"
            )
        frame = frame.select(pl.col(str(number)).alias(name) for number, name in zip(numbers, columns, strict=True))
        if separator != self.separator.encode():  # a separator inside a quoted field is text
            frame = frame.with_columns(pl.all().str.replace_all(separator.decode(), self.separator, literal=True))
        return frame.insert_column(0, pl.Series(LINE, lines, dtype=pl.Int64))

    def _check_quotes(self, block: bytes, separator: bytes, line: int) -> np.ndarray:
        """Where the quotes stand, if all stand around whole fields or are doubled inside of one.

        Raises:
            UserError: Otherwise, with the line in which the field starts.
        """
        if not self.quote or self.quote.encode() not in block:
            return np.zeros(0, dtype=np.int64)
        quote = self.quote.encode()[0]
        # A line break on either side, so that the first and the last byte have neighbours.
        marks = np.frombuffer(b"\n" + block + b"\n\n", np.uint8)
        at = np.flatnonzero(marks == quote)
        opening, closing = at[0::2], at[1::2]
        before, after = marks[opening - 1], marks[closing + 1]
        edges = np.array([separator[0], _NEWLINE, quote], dtype=np.uint8)
        closes = np.isin(after, edges) | ((after == _RETURN) & (marks[closing + 2] == _NEWLINE))
        bad = [*np.flatnonzero(~np.isin(before, edges))[:1], *np.flatnonzero(~closes)[:1]]
        if not bad and len(at) % 2 == 0:
            return at - 1
        first = int(min(bad)) if bad else len(opening) - 1
        while first > 0 and before[first] == quote:
            first -= 1  # a doubled quote: the field starts further left
        raise self._stray(block, int(opening[first]) - 1, line, "does not stand around a whole field" if bad else "")

    def _stray(self, block: bytes, at: int, line: int, what: str) -> UserError:
        start, end = block.rfind(b"\n", 0, at) + 1, block.find(b"\n", at)
        shown = self._shown(block[start : end if end >= 0 else len(block)])
        return UserError(
            f"{self.path}: a quote ({self.quote}) in line {line + block.count(_NEWLINE, 0, at)} "
            f"{what or 'is never closed'}: {shown}; set quote_char: '' if the file does not quote, or put the "
            f"field in quotes and double those inside ({self.quote * 2})"
        )

    def _ragged(self, record: bytes, line: int, fields: int) -> UserError:
        return UserError(
            f"{self.path}: line {line} has {fields} fields where the header has {len(self.columns)} "
            f"(separator={self.separator!r}): {self._shown(record)}; mend the line: a separator inside a field needs "
            "quotes around the field, and what is not there still needs its separator"
        )

    def _check_spanning(
        self,
        marks: np.ndarray,
        breaks: np.ndarray,
        cuts: np.ndarray,
        ends: np.ndarray,
        starts: np.ndarray,
        line: int,
    ) -> None:
        """Refuse a field of several lines each of which looks like a row: somebody's quote was not closed.

        Two such quotes (a title that starts with one, and a size in inches at the end of another) make a field by
        the rules of CSV, and all rows between them disappear in it.
        """
        per_line = np.diff(np.searchsorted(cuts, breaks), prepend=0)
        spaced = cuts[marks[cuts + 1] == _SPACE]  # people put a space behind a comma, rows do not
        like_row = (per_line == len(self.columns) - 1) & (np.diff(np.searchsorted(spaced, breaks), prepend=0) == 0)
        first = np.searchsorted(breaks, starts)
        several = np.diff(np.r_[first, len(breaks)]) > 1
        suspect = np.flatnonzero(several & np.logical_and.reduceat(like_row, first))
        if len(suspect):
            record = suspect[0]
            top, bottom = int(first[record]) + line, int(np.searchsorted(breaks, ends[record])) + line
            shown = self._shown(marks[starts[record] : ends[record]].tobytes())
            raise UserError(
                f"{self.path}: a quote ({self.quote}) makes lines {top} to {bottom} one row, though each looks like a "
                f"row of its own: {shown}; set quote_char: '' if the file does not quote, or quote_char: "
                f"'{self.quote}' if that really is one row"
            )

    def _not_utf8(self, block: bytes, line: int, error: UnicodeDecodeError) -> UserError:
        way = "if it is Latin-1 or Windows-1252, `iconv -f WINDOWS-1252 -t UTF-8"
        if not block[: error.start].isascii():
            way = "earlier ones are: encodings are mixed; mend it, or, without such bytes, `iconv -c -f UTF-8 -t UTF-8"
        return UserError(
            f"{self.path} cannot be read: line {line + block.count(_NEWLINE, 0, error.start)} is not UTF-8 (byte "
            f"0x{block[error.start]:02x}); {way} {self.path.name} > utf8.csv` converts it"
        )

    def _shown(self, record: bytes) -> str:
        """The beginning of a record, on one line."""
        text = record.decode(errors="replace").strip("\r\n")
        if len(self.separator.encode()) > 1:  # one byte stands for it
            text = "".join(self.separator if char.encode() in _STAND_INS else char for char in text)
        return repr(text if len(text) <= 80 else text[:79] + "…")

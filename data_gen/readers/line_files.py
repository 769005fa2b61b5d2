"""Public files of one record a line, JSON or fields with a separator, plain or gzip.

Such a file has millions of lines, and a few of them are broken. A line that cannot be read is left out, counted and
kept for people (`rejected`), and a file in which more than a share of them cannot be read is refused. Blocks of lines
are in memory one after the other, beside the fields that were asked for.
"""

from __future__ import annotations

import ast
import gzip
import json
import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import polars as pl

from reasonrec.data_gen import rejected
from reasonrec.data_gen.readers.csv_reader import LINE, LONGEST
from reasonrec.tokenizers.errors import UserError

BLOCK = 1 << 24
_WRONG = (ValueError, SyntaxError, KeyError, TypeError, OverflowError, RecursionError, MemoryError)
Row = Callable[[Mapping[str, Any]], "tuple[Any, ...] | None"]


def words(value: object) -> str | None:
    """A text of a record without white space around it, None if there is none.

    Raises:
        ValueError: If it is neither text nor a whole number.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{type(value).__name__} where a text should stand")
    # JSON can spell half a character, which no column can hold.
    return str(value).strip().encode(errors="replace").decode()


def number(value: object) -> float:
    """A number of a record.

    Raises:
        ValueError: If it is none, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not math.isfinite(found := float(value)):
        raise ValueError(f"{type(value).__name__} where a number should stand")
    return found


@dataclass
class LineFile:
    """A file of lines, and what became of them.

    Attributes:
        path: The file.
        table: What it holds, `interactions` or `items`.
        max_bad_lines: Share of its lines that may be unreadable.
        rows: Lines with something.
        blank: Lines without anything, which are no rows.
        bad: Rows that cannot be read.
        first_bad: Line of the first of these, the first line is 1, and what is wrong with it.
        rejected: What is wrong with each of them, by line, up to `rejected.MOST`.
    """

    path: Path
    table: str
    max_bad_lines: float
    rows: int = 0
    blank: int = 0
    bad: int = 0
    first_bad: tuple[int, str] | None = None
    rejected: dict[int, str] = field(default_factory=dict)

    def records(self, row: Row, schema: Mapping[str, Any], *, literal: bool = False) -> Iterator[pl.DataFrame]:
        """Read lines of JSON, block by block.

        Args:
            row: Takes the values of `schema` from a record, or None where it is not needed; what it raises makes the
                line a bad one.
            schema: Names and types of the columns.
            literal: A line may be a Python literal instead, which is parsed, never run.

        Yields:
            The columns, and the line that each row stands in (`LINE`); a frame without rows at first.
        """
        typed = {LINE: pl.Int64, **schema}
        yield pl.DataFrame(schema=typed)
        for first, block in self._blocks():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)  # odd backslashes in a description are no news
                found = list(self._values(first, block, row, literal))
            yield pl.DataFrame(found, schema=typed, orient="row")
            self._give_up()

    def _values(self, first: int, block: bytes, row: Row, literal: bool) -> Iterator[tuple[Any, ...]]:
        for at, line in enumerate(block.split(b"\n")[:-1], first):
            if not line.strip():
                self.blank += 1
                continue
            self.rows += 1
            try:
                record = _parse(line.decode(), literal)
                if not isinstance(record, dict):
                    raise ValueError("no record in braces")
                values = row(record)
            except _WRONG as error:
                self._refuse([at], f"no {error}" if isinstance(error, KeyError) else str(error))
            else:
                if values is not None:
                    yield at, *values

    def header(self) -> str:
        """The first line.

        Raises:
            UserError: If it is not UTF-8, or there is none.
        """
        for _, block in self._blocks():
            try:
                return block.partition(b"\n")[0].decode().rstrip("\r")
            except UnicodeDecodeError:
                break
        raise UserError(f"{self.path} has no first line that names its columns in UTF-8")

    def lines(self, *, encoding: str = "utf-8", skip: int = 0) -> Iterator[pl.DataFrame]:
        """Lines of text that are not empty, block by block: `LINE` and `text`.

        Args:
            encoding: How the text is encoded.
            skip: Lines at the beginning that are no rows.
        """
        for first, block in self._blocks():
            try:
                texts: list[str | None] = [*block.decode(encoding).split("\n")[:-1]]
            except UnicodeDecodeError:
                texts = [self._decoded(line, at, encoding) for at, line in enumerate(block.split(b"\n")[:-1], first)]
            numbers = pl.Series(LINE, range(first, first + len(texts)), dtype=pl.Int64)
            frame = pl.DataFrame([numbers, pl.Series("text", texts, dtype=pl.String)])
            frame = frame.filter(pl.col("text").is_not_null() & (pl.col(LINE) > skip))
            kept = frame.with_columns(pl.col("text").str.strip_chars_end("\r"))
            kept = kept.filter(pl.col("text").str.strip_chars() != "")
            self.blank += frame.height - kept.height
            self.rows += kept.height
            yield kept
            self._give_up()

    def fields(
        self, wanted: Mapping[str, int], of: int, separator: str, *, encoding: str = "utf-8", skip: int = 0
    ) -> Iterator[pl.DataFrame]:
        """Read some fields of each line, as text, block by block.

        Args:
            wanted: Our names, and the fields' numbers from 0.
            of: How many fields a line has.
            separator: What stands between two; there are no quotes.
            encoding: How the text is encoded.
            skip: Lines at the beginning that are no rows.

        Yields:
            The columns, and the line that each row stands in (`LINE`); a frame without rows at first.
        """
        yield pl.DataFrame(schema={LINE: pl.Int64, **dict.fromkeys(wanted, pl.String)})
        for block in self.lines(encoding=encoding, skip=skip):
            whole = block["text"].str.count_matches(separator, literal=True) == of - 1
            rows = self.refuse(block, ~whole, f"not {of} fields with {separator!r} between them")
            cut = rows["text"].str.split(separator)
            picked = {name: cut.list.get(place) for name, place in wanted.items()}
            yield rows.select(LINE).with_columns(**picked)

    def refuse(self, frame: pl.DataFrame, wrong: pl.Series, why: str) -> pl.DataFrame:
        """Count rows that cannot be read, and return the others."""
        if not wrong.any():
            return frame
        bad = frame.filter(wrong)
        self._refuse(bad[LINE], why)
        return frame.filter(~wrong)

    def finish(self, kept: int, dropped: Mapping[str, int] | None = None) -> dict[str, Any]:
        """What was read, for the manifest.

        Args:
            kept: How many rows are left.
            dropped: How many are not, by reason, those that cannot be read left aside.

        Raises:
            UserError: If the file has no row, or too many that cannot be read.
        """
        if not self.rows:
            raise UserError(f"{self.path} holds no row")
        if self.bad > self.max_bad_lines * self.rows:
            raise self._too_many(f"more than max_bad_lines={self.max_bad_lines} allows")
        self._keep_rejected()
        first = f"unreadable (the first in line {self.first_bad[0]}: {self.first_bad[1]})" if self.first_bad else ""
        reasons = {**(dropped or {})} | ({first: self.bad} if first else {})
        read = {"table": self.table, "rows": self.rows, "blank_lines": self.blank, "kept": kept, "dropped": reasons}
        return {**read, "ids_written_as_floats": {}}

    def _refuse(self, lines: Iterable[int], why: str) -> None:
        for line in lines:
            self.bad += 1
            if self.first_bad is None or line < self.first_bad[0]:
                self.first_bad = line, why[:100]
            if len(self.rejected) < rejected.MOST:
                self.rejected[line] = why[:100]

    def _keep_rejected(self) -> Path | None:
        """Write the rejected lines, which takes another look at the file if there are any."""
        return rejected.keep(self.path, self._rejected(), self.bad - len(self.rejected)) if self.bad else None

    def _rejected(self) -> Iterator[tuple[int, str, bytes]]:
        left = sorted(self.rejected, reverse=True)
        for first, block in self._blocks():
            lines = block.split(b"\n")
            while left and left[-1] < first + len(lines) - 1:
                at = left.pop()
                yield at, self.rejected[at], lines[at - first]
            if not left:
                return

    def _give_up(self) -> None:
        """Refuse a file of another kind before all of it is read."""
        if self.bad > 1000 and self.bad == self.rows and self.max_bad_lines < 1:
            raise self._too_many("none so far was good")

    def _too_many(self, why: str) -> UserError:
        line, reason = self.first_bad or (0, "")
        file = self._keep_rejected()
        seen = f" (all of them: {file})" if file and self.bad <= rejected.MOST else f" (more: {file})" if file else ""
        return UserError(
            f"{self.path}: {self.bad:,} of {self.rows:,} lines cannot be read, {why}; the first is line {line} "
            f"({reason}){seen}: mend or download the file again, or raise max_bad_lines to leave them out"
        )

    def _decoded(self, line: bytes, at: int, encoding: str) -> str | None:
        try:
            return line.decode(encoding)
        except UnicodeDecodeError as error:
            self.rows += 1
            self._refuse([at], str(error))
            return None

    def _open(self) -> IO[bytes]:
        with self.path.open("rb") as raw:
            start = raw.read(2)
        return gzip.open(self.path) if start == b"\x1f\x8b" else self.path.open("rb")  # type: ignore[return-value]

    def _blocks(self) -> Iterator[tuple[int, bytes]]:
        """Whole lines and the number of the first, block by block; every block ends with a line break."""
        line, rest = 1, b""
        try:
            with self._open() as stream:
                while new := stream.read(BLOCK):
                    text = rest + (new.removeprefix(b"\xef\xbb\xbf") if line == 1 and not rest else new)
                    end = text.rfind(b"\n") + 1
                    rest = text[end:]
                    if len(rest) > LONGEST:
                        raise UserError(f"{self.path}: line {line} is longer than {LONGEST >> 20} MB; is it one JSON?")
                    if end:
                        yield line, text[:end]
                        line += text.count(b"\n", 0, end)
                if rest:
                    yield line, rest + b"\n"
        except (OSError, EOFError, zlib.error) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{self.path} cannot be read behind line {line - 1}: {reason}; is the file complete? Download or copy "
                "it again"
            ) from error


def _parse(line: str, literal: bool) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        if not literal:
            raise
    return ast.literal_eval(line.strip())

"""The mapped columns of one file, CSV or Parquet, and where each value stands in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from reasonrec.data_gen.readers.csv_reader import LINE, CsvFile, read_quote, read_separator
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.registry import closest
from reasonrec.tokenizers.terminal import shown

_ROWS = 1 << 19  # of a Parquet file that are read at once
_CSV, _PARQUET = {".csv", ".tsv", ".tab", ".txt", ".dat"}, {".parquet", ".pq"}


@dataclass(frozen=True)
class Table:
    """The mapped columns of a file, or of a block of its rows.

    Attributes:
        path: The file.
        frame: Our columns as the file has them, and `LINE`: the line of a CSV file (the header is line 1) or the row
            of a Parquet file (the first is row 1).
        mapped: Our names to the file's.
        key: Name of the mapping in the configuration.
        facts: How many rows the file has, and lines without anything; full once all of it is read.
    """

    path: Path
    frame: pl.DataFrame
    mapped: Mapping[str, str]
    key: str
    facts: dict[str, Any]

    def where(self, position: int) -> str:
        """A person's number of a row."""
        unit = "row" if self.path.suffix.lower() in _PARQUET else "line"
        return f"{unit} {self.frame[LINE][position]} of {self.path}"

    def shown(self, name: str, position: int) -> str:
        """A value as the file has it."""
        value = self.frame[name][position]
        return "nothing" if value is None else shown(value)


def _is_parquet(path: Path) -> bool:
    """Whether a file is Parquet; False for CSV.

    Raises:
        UserError: If the file is missing or neither.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file (relative paths start in {Path.cwd()})")
    suffixes = {s.lower() for s in path.suffixes}
    if path.suffix.lower() in _PARQUET:
        return True
    if suffixes & _CSV:
        return False
    raise UserError(f"{path}: the name has to end in .csv, .tsv or .parquet")


def map_columns(
    path: Path,
    found: list[str],
    mapping: Mapping[str, str],
    known: Mapping[str, bool],
    key: str,
    advice: str = "",
) -> dict[str, str]:
    """Which column of a file holds what.

    Args:
        path: The file, for messages.
        found: The file's columns.
        mapping: What the user set: our name to the file's name.
        known: Our names; True if the column is needed.
        key: Name of the mapping in the configuration.
        advice: What else to try where a column is missing.

    Returns:
        Our name to the file's name, for the columns that are there.

    Raises:
        UserError: If the mapping has an unknown key, or a column is missing.
    """
    for name in mapping:
        if name not in known:
            near = closest(name, known)
            hint = f"did you mean {near}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"{key}.{name}: there is no such column in this kit; {hint}")
    mapped = {}
    for name, needed in known.items():
        column = mapping.get(name, name)
        if column in found:
            mapped[name] = column
        elif needed or name in mapping:
            folded = {c.lower().replace("_", ""): c for c in found}
            near = closest(column.lower().replace("_", ""), folded)
            hint = f" (the nearest is {folded[near]!r})" if near else ""
            raise UserError(
                f"{path} has no column {column!r}; set {key}.{name} to the right one of "
                f"{', '.join(map(repr, found))}{hint}{advice}"
            )
    taken: dict[str, str] = {}
    for name, column in mapped.items():
        if column in taken:
            raise UserError(f"{key}: {taken[column]} and {name} are both mapped to column {column!r} of {path}")
        if found.count(column) > 1:
            raise UserError(
                f"{path}: {found.count(column)} columns are called {column!r}; rename them in its first line, so that "
                f"{key}.{name} means one of them"
            )
        taken[column] = name
    return mapped


def read_table(
    path: Path,
    separator: str | None,
    quote_char: str | None,
    mapping: Mapping[str, str],
    known: Mapping[str, bool],
    key: str,
    unread: frozenset[str] = frozenset(),
) -> Table:
    """Read the mapped columns of a file; see `read_blocks`."""
    blocks = list(read_blocks(path, separator, quote_char, mapping, known, key, unread))
    return replace(blocks[-1], frame=pl.concat([block.frame for block in blocks]))


def read_blocks(
    path: Path,
    separator: str | None,
    quote_char: str | None,
    mapping: Mapping[str, str],
    known: Mapping[str, bool],
    key: str,
    unread: frozenset[str] = frozenset(),
) -> Iterator[Table]:
    """Read the mapped columns of a file, block by block.

    Args:
        path: The file.
        separator: Of a CSV file; by the file's name if None.
        quote_char: Of a CSV file; empty if it does not quote.
        mapping: Our names to the file's.
        known: Our names; True if the column is needed.
        key: Name of the mapping in the configuration.
        unread: Columns of ours that are left out.

    Raises:
        UserError: If there is no such file, no such column, or no row.
    """
    if _is_parquet(path):
        try:
            yield from _parquet_blocks(path, mapping, known, key, unread)
        except pl.exceptions.PolarsError as error:
            raise UserError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
        return
    meant = read_separator(path, separator)
    table = CsvFile(path, meant, read_quote(quote_char, meant), trusted=quote_char is not None)
    mapped = map_columns(path, table.columns, mapping, known, key, _header_advice(table))
    picked = {ours: theirs for ours, theirs in mapped.items() if ours not in unread}
    facts: dict[str, Any] = {}
    for frame in table.blocks(list(picked.values())):
        frame.columns = [LINE, *picked]
        facts |= {"rows": table.rows, "blank_lines": table.blank}
        yield Table(path, frame, mapped, key, facts)


def _parquet_blocks(
    path: Path, mapping: Mapping[str, str], known: Mapping[str, bool], key: str, unread: frozenset[str]
) -> Iterator[Table]:
    lazy = pl.scan_parquet(path)
    mapped = map_columns(path, lazy.collect_schema().names(), mapping, known, key)
    picked = {ours: theirs for ours, theirs in mapped.items() if ours not in unread}
    rows = lazy.select(pl.len()).collect().item()
    if not rows:
        raise UserError(f"{path} cannot be read as a table: it has no rows")
    wanted = lazy.select(pl.col(theirs).alias(ours) for ours, theirs in picked.items())
    read = 0
    for start in range(0, rows, _ROWS):
        frame = wanted.slice(start, _ROWS).collect()
        read += frame.height
        if read != min(start + _ROWS, rows):
            raise UserError(f"{path}: {read} rows were read of {rows}; write the file again")
        frame = frame.with_columns(pl.col(pl.Binary).cast(pl.String))  # text without a mark that it is some
        frame = frame.with_row_index(LINE, offset=start + 1)
        yield Table(path, frame, mapped, key, {"rows": rows, "blank_lines": 0})


def _header_advice(table: CsvFile) -> str:
    """A hint for a header that was not cut at all, or is none."""
    if any(name.strip().isdigit() for name in table.columns):
        return "; the first line has to name the columns, and this one looks like a row: write the names above it"
    found = next((word for word in ("\t", "::", ";", "|", ",") if word in table.columns[0]), None)
    return f"; or set separator: {found!r} (it is {table.separator!r} now)" if found else ""

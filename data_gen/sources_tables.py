"""Your own data: a table of interactions and a table of items, CSV or Parquet.

Files are scanned lazily: only the mapped columns and the rows that pass `min_rating` are ever in memory.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from reasonrec.data_gen.clean import clean_items, clean_text
from reasonrec.data_gen.filters import filter_fact
from reasonrec.data_gen.interaction_log import InteractionLog
from reasonrec.data_gen.timestamps import parse_timestamps
from reasonrec.tokenizers.errors import UserError

INTERACTION_COLUMNS = {"user_id": True, "item_id": True, "timestamp": True, "rating": False, "review": False}
ITEM_COLUMNS = {"item_id": True, "title": True, "description": False, "category": False, "brand": False}
MAX_REVIEW_CHARS = 2000
_CSV, _PARQUET = {".csv", ".tsv", ".txt"}, {".parquet", ".pq"}
_ROW = "__row__"


def scan_table(path: Path, separator: str) -> pl.LazyFrame:
    """Open a CSV (every column as text) or Parquet file lazily.

    Raises:
        UserError: If the file is missing or neither.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file (relative paths start in {Path.cwd()})")
    if path.suffix in _PARQUET:
        return pl.scan_parquet(path)
    suffixes = {s for s in path.suffixes if s not in (".gz", ".zst")}
    if suffixes & _CSV:
        # Ids keep their leading zeros and timestamps their spelling when nothing is guessed.
        return pl.scan_csv(path, separator=separator, infer_schema=False)
    raise UserError(f"{path}: the name has to end in .csv, .tsv or .parquet")


def map_columns(
    path: Path, found: list[str], mapping: Mapping[str, str], known: Mapping[str, bool], key: str
) -> dict[str, str]:
    """Which column of a file holds what.

    Args:
        path: The file, for messages.
        found: The file's columns.
        mapping: What the user set: our name to the file's name.
        known: Our names; True if the column is needed.
        key: Name of the mapping in the configuration.

    Returns:
        Our name to the file's name, for the columns that are there.

    Raises:
        UserError: If the mapping has an unknown key, or a column is missing.
    """
    for name in mapping:
        if name not in known:
            near = difflib.get_close_matches(name, list(known), n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"{key}.{name}: there is no such column in this kit; {hint}")
    mapped = {}
    for name, needed in known.items():
        column = mapping.get(name, name)
        if column in found:
            mapped[name] = column
        elif needed or name in mapping:
            folded = {c.lower().replace("_", ""): c for c in found}
            near = difflib.get_close_matches(column.lower().replace("_", ""), list(folded), n=1, cutoff=0.5)
            hint = f" (the nearest is {folded[near[0]]!r})" if near else ""
            raise UserError(
                f"{path} has no column {column!r}; set {key}.{name} to the right one of "
                f"{', '.join(map(repr, found))}{hint}"
            )
    taken: dict[str, str] = {}
    for name, column in mapped.items():
        if column in taken:
            raise UserError(f"{key}: {taken[column]} and {name} are both mapped to column {column!r} of {path}")
        taken[column] = name
    return mapped


def _collect(lazy: pl.LazyFrame, path: Path, separator: str) -> pl.DataFrame:
    try:
        return lazy.collect()
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read: {reason} (separator={separator!r}; text has to be UTF-8)") from error


def _open(
    path: Path, separator: str, mapping: Mapping[str, str], known: Mapping[str, bool], key: str
) -> tuple[pl.LazyFrame, dict[str, str]]:
    lazy = scan_table(path, separator)
    found = _collect(lazy.head(0), path, separator).columns
    mapped = map_columns(path, found, mapping, known, key)
    # The row number is that of the file, before any filter, so a message can point at a line.
    return lazy.with_row_index(_ROW).select(_ROW, *(pl.col(c).alias(n) for n, c in mapped.items())), mapped


def _where(path: Path, row: int) -> str:
    """A person's number of a row: the header of a CSV file is line 1."""
    return f"row {row + 1} of {path}" if path.suffix in _PARQUET else f"line {row + 2} of {path}"


def _ids(frame: pl.DataFrame, names: tuple[str, ...], path: Path, mapped: Mapping[str, str], key: str) -> pl.DataFrame:
    """Ids as stripped text.

    Raises:
        UserError: If an id is missing.
    """
    frame = frame.with_columns(pl.col(name).cast(pl.String).str.strip_chars() for name in names)
    for name in names:
        missing = frame.filter(pl.col(name).is_null() | (pl.col(name) == ""))
        if missing.height:
            raise UserError(
                f"{path}: {missing.height} rows have nothing in column {mapped[name]!r}, the first is "
                f"{_where(path, missing[_ROW][0])}; fill it, remove the rows, or set {key}.{name} to "
                "another column"
            )
    return frame


def _ratings(frame: pl.DataFrame, path: Path, column: str) -> pl.Series:
    ratings = frame["rating"].cast(pl.Float64, strict=False)
    wrong = frame.filter(ratings.is_null())
    if wrong.height:
        raise UserError(
            f"{path}: {wrong.height} values of column {column!r} are no ratings, the first is "
            f"{wrong['rating'][0]!r} in {_where(path, wrong[_ROW][0])}; mend them, or set "
            "interaction_columns.rating to a column of numbers"
        )
    return ratings


def read_interactions(
    path: Path, *, columns: Mapping[str, str], separator: str = ",", min_rating: float | None = None
) -> tuple[pl.DataFrame, list[dict[str, object]]]:
    """Read a table of interactions.

    Args:
        path: CSV or Parquet file.
        columns: Our names to the file's.
        separator: Of a CSV file.
        min_rating: Keep rows rated at least this.

    Returns:
        `user_id`, `item_id` (text), `timestamp` (epoch milliseconds) and possibly `review`; what the filter
        did.

    Raises:
        UserError: If a column is missing, or a value is missing or does not parse.
    """
    known = INTERACTION_COLUMNS | {"rating": min_rating is not None}
    lazy, mapped = _open(path, separator, columns, known, "interaction_columns")
    if "rating" in columns and min_rating is None:
        raise UserError("interaction_columns.rating is only read with min_rating: set that, or remove the mapping")
    # A column that happens to be called "review" but was not asked for is not read.
    unread = {"rating"} if min_rating is None else set()
    unread |= {"review"} - set(columns)
    frame = _collect(lazy.drop(unread & set(mapped)), path, separator)
    facts: list[dict[str, object]] = []
    frame = _ids(frame, ("user_id", "item_id"), path, mapped, "interaction_columns")
    if min_rating is not None:
        kept = frame.filter(_ratings(frame, path, mapped["rating"]) >= min_rating)
        facts.append(filter_fact("min_rating", frame, kept, min_rating=min_rating))
        frame = kept.drop("rating")
    times, wrong = parse_timestamps(frame["timestamp"])
    if wrong is not None:
        bad = int((times.is_null()).sum())
        raise UserError(
            f"{path}: {bad} values of column {mapped['timestamp']!r} are no timestamps, the first is "
            f"{frame['timestamp'][wrong]!r} in {_where(path, frame[_ROW][wrong])}; use epoch seconds or "
            "milliseconds, or ISO dates such as 2024-05-31T18:00:00Z, or set interaction_columns.timestamp "
            "to another column"
        )
    frame = frame.with_columns(timestamp=times).drop(_ROW)
    if "review" in frame.columns:
        words = [clean_text(text, MAX_REVIEW_CHARS) for text in frame["review"].cast(pl.String).to_list()]
        frame = frame.with_columns(pl.Series("review", words, dtype=pl.String))
    return frame, facts


def read_items(
    path: Path, *, columns: Mapping[str, str], separator: str = ",", max_description_chars: int = 2000
) -> pl.DataFrame:
    """Read a table of items and clean its text.

    Returns:
        `item_id`, `title`, `description`, `category`, `brand`, all text.

    Raises:
        UserError: If a column or an id is missing.
    """
    lazy, mapped = _open(path, separator, columns, ITEM_COLUMNS, "item_columns")
    frame = _ids(_collect(lazy, path, separator), ("item_id",), path, mapped, "item_columns")
    listed = [name for name, dtype in frame.schema.items() if isinstance(dtype, pl.List)]
    frame = frame.with_columns(pl.col(name).cast(pl.List(pl.String)).list.join(", ") for name in listed)
    return clean_items(frame.drop(_ROW), max_description_chars)


def read_tables(
    name: str,
    interactions: Path,
    items: Path,
    *,
    interaction_columns: Mapping[str, str],
    item_columns: Mapping[str, str],
    separator: str = ",",
    min_rating: float | None = None,
    max_description_chars: int = 2000,
) -> InteractionLog:
    """Read both tables; see `read_interactions` and `read_items`."""
    item_table = read_items(
        items, columns=item_columns, separator=separator, max_description_chars=max_description_chars
    )
    log, facts = read_interactions(
        interactions, columns=interaction_columns, separator=separator, min_rating=min_rating
    )
    return InteractionLog(
        name,
        log,
        item_table,
        items_name=str(items),
        files={"interactions": interactions, "items": items},
        filters=facts,
    )

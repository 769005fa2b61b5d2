"""Your own data: a table of interactions and a table of items, CSV or Parquet.

Of interactions a block at a time is in memory, of items the mapped columns. Every row of a file is counted, and what
becomes of it: nothing disappears unsaid (`csv_reader` checks the rows of CSV files, `values` says what a cell means).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl

from reasonrec.data_gen.clean import clean_items, clean_text
from reasonrec.data_gen.coded_log import CodedLog
from reasonrec.data_gen.filters import rating_facts
from reasonrec.data_gen.frames import Frames
from reasonrec.data_gen.interaction_log import InteractionLog
from reasonrec.data_gen.readers.base import (
    COLUMNS,
    DESCRIPTION_LENGTH,
    ITEM_TABLE,
    MIN_RATING,
    READERS,
    LogReader,
)
from reasonrec.data_gen.readers.csv_reader import LINE
from reasonrec.data_gen.readers.table_files import Table, read_blocks, read_table
from reasonrec.data_gen.readers.timestamps import TimesSeen
from reasonrec.data_gen.values import EXACT, as_ids, as_text, respelled
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.terminal import shown

INTERACTION_COLUMNS = {"user_id": True, "item_id": True, "timestamp": True, "rating": False, "review": False}
ITEM_COLUMNS = {"item_id": True, "title": True, "description": False, "category": False, "brand": False}
MAX_REVIEW_CHARS = 2000
MAX_ID_CHARS = 1000


def _ids(table: Table, names: tuple[str, ...], rest: Iterable[Table] = ()) -> tuple[pl.DataFrame, dict[str, int]]:
    """The frame with ids as text, and how many of each column were written as floats.

    Args:
        table: A block of the file.
        names: The columns of ids.
        rest: The blocks behind it, which a message counts.

    Raises:
        UserError: If an id is missing, lost its digits in a float, or is as long as a text.
    """
    frame, key, written = table.frame, table.key, {}
    for name in names:
        raw = frame[name]
        if raw.dtype.is_nested():
            raise UserError(f"{table.path}: column {table.mapped[name]!r} holds {raw.dtype}, no ids; set {key}.{name}")
        ids, lost = as_ids(raw)
        if lost is not None:
            raise UserError(
                f"{table.path}: {table.shown(name, lost)} in column {table.mapped[name]!r}, {table.where(lost)}, went "
                f"through a float or a spreadsheet, which keep {EXACT:,} or fewer digits apart: several ids may have "
                "become this one; export the column again, as text or as whole numbers"
            )
        if ids.null_count():
            first = ids.is_null().arg_max()
            assert first is not None
            missing = ids.null_count() + sum(as_ids(block.frame[name])[0].null_count() for block in rest)
            raise UserError(
                f"{table.path}: {missing} rows have nothing in column {table.mapped[name]!r}, the first is "
                f"{table.where(first)} (words such as nan and NULL are nothing); fill it, remove the rows, or set "
                f"{key}.{name} to another column"
            )
        longest = ids.str.len_chars().arg_max()
        if longest is not None and (length := len(ids[longest])) > MAX_ID_CHARS:
            raise UserError(
                f"{table.path}: the id in column {table.mapped[name]!r}, {table.where(longest)}, has {length:,} "
                f"characters, more than {MAX_ID_CHARS:,}: {shown(ids[longest])} is text rather than an id; set "
                f"{key}.{name} to another column, or shorten the ids in both tables"
            )
        if count := respelled(raw, ids):
            written[name] = count
        frame = frame.with_columns(ids.alias(name))
    return frame, written


def _ratings(table: Table, rest: Iterable[Table]) -> pl.Series:
    """Ratings of a block, null where there is none; a message counts in the rest of the file, too.

    Raises:
        UserError: If a value is no finite number.
    """
    raw = table.frame["rating"]
    if raw.dtype.is_nested():
        raise UserError(f"{table.path}: column {table.mapped['rating']!r} holds {raw.dtype}, no ratings")
    ratings, wrong = _read_ratings(raw)
    if wrong.any():
        first = wrong.arg_max()
        assert first is not None
        count = int(wrong.sum()) + sum(int(_read_ratings(block.frame["rating"])[1].sum()) for block in rest)
        raise UserError(
            f"{table.path}: {count} values of column {table.mapped['rating']!r} are no ratings, the first is "
            f"{table.shown('rating', first)} in {table.where(first)}; mend them, or set "
            "interaction_columns.rating to a column of numbers"
        )
    return ratings


def _read_ratings(raw: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Ratings, and which values are none."""
    text = as_text(raw)
    ratings = text.cast(pl.Float64, strict=False) if raw.dtype == pl.String else raw.cast(pl.Float64, strict=False)
    ratings = pl.select(pl.when(ratings.is_finite()).then(ratings)).to_series()
    return ratings, ratings.is_null() & text.is_not_null()


def _read_times(log: CodedLog, untimed: Frames, seen: TimesSeen, table: Table) -> str:
    """Fill a log with interactions whose times are as the file has them, and say how they were read.

    Args:
        log: The log, which knows the ids.
        untimed: The interactions.
        seen: What was seen of the times.
        table: A block of the file, for messages.

    Raises:
        UserError: If a value is no time, or contradicts the others.
    """
    kind, column, bad, good, wrong, other = "", table.mapped["timestamp"], 0, 0, "", ""
    for frame in untimed:
        times, block = seen.read(frame["timestamp"]), replace(table, frame=frame)
        kind, bad, good = times.kind, bad + times.values.null_count(), good + times.values.count()
        if times.other is not None and not other:
            other = f"{block.shown('timestamp', times.other)} in {block.where(times.other)}"
        if times.wrong is not None and not wrong:
            wrong, why = f"{block.shown('timestamp', times.wrong)} in {block.where(times.wrong)}", times.why
        if not wrong:
            log.append(frame.with_columns(timestamp=times.values).drop(LINE))
    if not wrong:
        return kind
    if other:
        raise UserError(
            f"{table.path}: column {column!r} holds more than one kind of time: {wrong} {why}, but {other} as {kind}; "
            "write all rows in one unit, and remove or fill those without a time"
        )
    beside = f" beside {kind}" if kind and good else ""
    raise UserError(
        f"{table.path}: {bad} values of column {column!r} are no timestamps{beside}, the first is {wrong}"
        f"{f' ({why})' if why else ''}; use epoch seconds or milliseconds, or ISO dates such as "
        "2024-05-31T18:00:00Z, or set interaction_columns.timestamp to another column"
    )


def read_interactions(
    path: Path,
    *,
    columns: Mapping[str, str],
    separator: str | None = None,
    quote_char: str | None = None,
    min_rating: float | None = None,
) -> tuple[CodedLog, list[dict[str, Any]], dict[str, Any]]:
    """Read a table of interactions, block by block.

    Args:
        path: CSV or Parquet file.
        columns: Our names to the file's.
        separator: Of a CSV file, one or more characters; by the file's name if None.
        quote_char: Of a CSV file; empty if it does not quote.
        min_rating: Keep rows rated at least this; rows without a rating are not.

    Returns:
        Users, items, `timestamp` (epoch milliseconds), and `rating` and `review` where they are mapped, in the order
        of the file; what the filter did; what was read.

    Raises:
        UserError: If a column is missing, or a value is missing or does not parse.
    """
    with_rating = min_rating is not None or "rating" in columns
    known = INTERACTION_COLUMNS | {"rating": with_rating}
    # A column that happens to be called "review" or "rating" but was not asked for is not read.
    unread = {"review"} - set(columns) | (set() if with_rating else {"rating"})
    blocks = read_blocks(path, separator, quote_char, columns, known, "interaction_columns", frozenset(unread))
    log, untimed, seen, written, rows, missing = CodedLog(), Frames(), TimesSeen(), Counter[str](), 0, 0
    for table in blocks:
        frame, floats = _ids(table, ("user_id", "item_id"), blocks)
        written.update(floats)
        rows += frame.height
        if with_rating:
            frame = frame.with_columns(rating=_ratings(table, blocks))
        frame = log.encode(frame)
        if min_rating is not None:
            missing += frame["rating"].null_count()
            frame = frame.filter(pl.col("rating") >= min_rating)
        if with_rating and "rating" not in columns:  # asked for as a filter alone
            frame = frame.drop("rating")
        seen.add(frame["timestamp"])
        if "review" in frame.columns:
            frame = frame.with_columns(_reviews(frame["review"]))
        untimed.append(frame)
    before = {"rows": rows, "users": len(log.users.counts), "items": len(log.items.counts)}
    kind = _read_times(log, untimed, seen, table)
    about = {"table": "interactions", **table.facts, "kept": untimed.height, "dropped": {}}
    about |= {"ids_written_as_floats": dict(written), "timestamps": kind}
    if min_rating is None:
        return log, [], about
    facts, about["dropped"] = rating_facts(before, log.counts(), missing, min_rating)
    return log, facts, about


def _reviews(column: pl.Series) -> pl.Series:
    if column.dtype.is_nested():
        raise UserError(f"interaction_columns.review is a column of {column.dtype}; reviews are text")
    words = [clean_text(text, MAX_REVIEW_CHARS) for text in as_text(column).to_list()]
    return pl.Series("review", words, dtype=pl.String)


def read_items(
    path: Path,
    *,
    columns: Mapping[str, str],
    separator: str | None = None,
    quote_char: str | None = None,
    max_description_chars: int = 2000,
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Read a table of items and clean its text.

    Returns:
        `item_id`, `title`, `description`, `category`, `brand`, all text; what was read.

    Raises:
        UserError: If a column or an id is missing, or two rows are told apart only by the spelling of a number.
    """
    table = read_table(path, separator, quote_char, columns, ITEM_COLUMNS, "item_columns")
    frame, written = _ids(table, ("item_id",))
    _check_spellings(table, frame["item_id"])
    texts = [name for name, dtype in frame.schema.items() if name in ITEM_COLUMNS and not dtype.is_nested()]
    frame = frame.with_columns(as_text(frame[name]) for name in texts).drop(LINE)
    about = {"table": "items", **table.facts, "kept": frame.height, "dropped": {}}
    return clean_items(frame, max_description_chars), {**about, "ids_written_as_floats": written}


def _check_spellings(table: Table, ids: pl.Series) -> None:
    """Refuse rows such as 7 and 7.0, which would be one item."""
    if table.frame["item_id"].dtype.is_float():
        return
    spelled = pl.DataFrame({"id": ids, "raw": as_text(table.frame["item_id"])}).with_row_index("at")
    several = spelled.filter(pl.col("raw").n_unique().over("id") > 1).unique(["id", "raw"], keep="first")
    several = several.sort("id", "at")
    if several.height:
        one, other = several["at"][0], several["at"][1]
        raise UserError(
            f"{table.path}: {table.shown('item_id', one)} ({table.where(one)}) and {table.shown('item_id', other)} "
            f"({table.where(other)}) are the same number in column {table.mapped['item_id']!r}, but different rows; "
            "write one of them otherwise, in both tables, or remove one"
        )


def read_tables(
    name: str,
    interactions: Path,
    items: Path,
    *,
    interaction_columns: Mapping[str, str],
    item_columns: Mapping[str, str],
    separator: str | None = None,
    quote_char: str | None = None,
    min_rating: float | None = None,
    max_description_chars: int = 2000,
) -> InteractionLog:
    """Read both tables; see `read_interactions` and `read_items`."""
    item_table, items_read = read_items(
        items,
        columns=item_columns,
        separator=separator,
        quote_char=quote_char,
        max_description_chars=max_description_chars,
    )
    log, facts, read = read_interactions(
        interactions,
        columns=interaction_columns,
        separator=separator,
        quote_char=quote_char,
        min_rating=min_rating,
    )
    return InteractionLog(
        name,
        log,
        item_table,
        items_name=str(items),
        files={"interactions": interactions, "items": items},
        filters=facts,
        read=[read, items_read],
    )


@dataclass(frozen=True)
class TablesReader(LogReader):
    """Your own tables.

    Raises:
        UserError: If a table is not named, or options contradict each other.
    """

    name: str = field(default="my data", metadata={"help": "name in tables and reports"})
    interactions: str | None = field(
        default=None,
        metadata={"help": "CSV or Parquet: user_id, item_id, timestamp (+ rating, review)", "path": "name"},
    )
    items: str | None = field(default=None, metadata=ITEM_TABLE)
    interaction_columns: dict[str, str] = field(default_factory=dict, metadata=COLUMNS)
    item_columns: dict[str, str] = field(default_factory=dict, metadata=COLUMNS)
    separator: str | None = field(
        default=None,
        metadata={"help": "separator of CSV files, one or more characters; .tsv: tab, else comma, if unset"},
    )
    quote_char: str | None = field(
        default=None, metadata={"help": "quote of CSV files, '' if they do not quote; a double quote if unset"}
    )
    min_rating: float | None = field(default=None, metadata=MIN_RATING)
    max_description_chars: int = field(default=2000, metadata=DESCRIPTION_LENGTH)
    redistributable: bool = field(default=True, metadata={"help": "may titles be published with a model?"})

    def __post_init__(self) -> None:
        """Refuse what cannot be read."""
        if not (self.interactions and self.items):
            raise UserError("source: tables needs both `interactions` and `items` (paths of CSV or Parquet files)")
        super().__post_init__()

    def read_log(self) -> InteractionLog:
        """Read both tables."""
        log = read_tables(
            self.name,
            Path(self.interactions or ""),
            Path(self.items or ""),
            interaction_columns=self.interaction_columns,
            item_columns=self.item_columns,
            separator=self.separator,
            quote_char=self.quote_char,
            min_rating=self.min_rating,
            max_description_chars=self.max_description_chars,
        )
        return replace(log, redistributable=self.redistributable)


READERS.add("tables", TablesReader, __name__)

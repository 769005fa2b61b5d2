"""What readers of files of one record a line share: options, checks of what was read, the log of two files."""

from __future__ import annotations

import datetime as dt
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from reasonrec.data_gen.clean import clean_items, clean_text
from reasonrec.data_gen.coded_log import CodedLog
from reasonrec.data_gen.filters import Tally, rating_facts
from reasonrec.data_gen.frames import Frames
from reasonrec.data_gen.interaction_log import InteractionLog
from reasonrec.data_gen.readers.base import DESCRIPTION_LENGTH, FOLDER, MAX_BAD_LINES, WITH_REVIEWS, LogReader
from reasonrec.data_gen.readers.csv_reader import LINE
from reasonrec.data_gen.readers.line_files import LineFile, Row
from reasonrec.data_gen.readers.tables import MAX_REVIEW_CHARS
from reasonrec.data_gen.readers.timestamps import TimesSeen
from reasonrec.data_gen.schema import ITEM_TEXT
from reasonrec.data_gen.values import as_text
from reasonrec.tokenizers.errors import UserError

# Milliseconds of 1973 and 2103, between which people have used computers.
_FIRST, _LAST = 10**11, 42 * 10**11


def interactions(
    file: LineFile, blocks: Iterable[pl.DataFrame], min_rating: float | None = None
) -> tuple[CodedLog, list[dict[str, Any]], dict[str, Any]]:
    """Check ids, times and ratings of what was read from a file, with a block of it in memory.

    Args:
        file: The file.
        blocks: `LINE`, `user_id`, `item_id`, `timestamp` (numbers or text), and possibly `rating` and `review`; one
            at least, which may have no row.
        min_rating: Keep rows rated at least this; rows without a rating are not.

    Returns:
        The same with epoch milliseconds, in the order of the file; what the filter did; what was read.

    Raises:
        UserError: If too many lines cannot be read, a bad id, time or rating among the reasons.
    """
    log, untimed, seen = CodedLog(), Frames(), TimesSeen()
    for block in blocks:
        frame = _checked(file, block)
        seen.add(frame["timestamp"])
        untimed.append(log.encode(frame))
    # How a column of times is read, whether any of them is none, and why, follows from all of it.
    wrong = [times.why for frame in untimed if (times := seen.read(frame["timestamp"])).wrong is not None]
    why = next(filter(None, wrong), "")
    before, missing, late, kind = Tally(log), 0, _Late(), ""
    for frame in untimed:
        times = seen.read(frame["timestamp"])
        frame, kind = frame.with_columns(timestamp=times.values), times.kind
        if wrong:
            outside = ~times.values.is_between(_FIRST, _LAST).fill_null(False)
            frame = file.refuse(frame, outside, f"timestamp: {why or 'no time between 1973 and 2103'}")
        late.add(frame["timestamp"])
        if min_rating is not None:
            missing += before.add(frame)["rating"].null_count()
            frame = frame.filter(pl.col("rating") >= min_rating)
        if "review" in frame.columns:
            texts = [clean_text(text, MAX_REVIEW_CHARS) for text in frame["review"].to_list()]
            frame = frame.with_columns(review=pl.Series(texts, dtype=pl.String))
        log.append(frame.drop(LINE))
    if "no dates" not in kind:
        late.warn(file.path)
    facts: list[dict[str, Any]] = []
    dropped: dict[str, int] = {}
    if min_rating is not None:
        facts, dropped = rating_facts(before.counts(), log.counts(), missing, min_rating)
    return log, facts, {**file.finish(log.frames.height, dropped), "timestamps": kind}


def _checked(file: LineFile, frame: pl.DataFrame) -> pl.DataFrame:
    """The rows of a block that have ids, and a rating that is a number or none."""
    for name in ("user_id", "item_id"):
        frame = frame.with_columns(as_text(frame[name]))
        frame = file.refuse(frame, frame[name].is_null(), f"no {name}")
    if "rating" in frame.columns:
        raw = as_text(frame["rating"])
        ratings = raw.cast(pl.Float64, strict=False)
        wrong = raw.is_not_null() & ~ratings.is_finite().fill_null(False)
        frame = file.refuse(frame.with_columns(rating=ratings), wrong, "a rating that is no number")
    return frame


class _Late:
    """Times that have not come yet."""

    def __init__(self) -> None:
        self._now, self._count, self._last = dt.datetime.now(dt.UTC).timestamp() * 1000, 0, 0

    def add(self, times: pl.Series) -> None:
        late = times.filter(times > self._now)
        if len(late):
            self._count, self._last = self._count + len(late), max(self._last, int(late.max()))  # type: ignore[arg-type]

    def warn(self, path: Path) -> None:
        if self._count:
            last = dt.datetime.fromtimestamp(self._last / 1000, dt.UTC)
            warnings.warn(
                f"{path}: {self._count:,} interactions lie in the future, the last at {last:%Y-%m-%d}; they are kept",
                stacklevel=3,
            )


def one_row_each(file: LineFile, blocks: Iterable[pl.DataFrame]) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Keep one row of each item, the first that has a title; and what was read.

    Args:
        file: The file.
        blocks: `LINE`, `item_id`, `title`, and other columns.
    """
    frame = pl.concat(blocks)
    frame = frame.with_columns(as_text(frame["item_id"]), title=pl.col("title").fill_null("").str.strip_chars())
    frame = file.refuse(frame, frame["item_id"].is_null(), "no item_id")
    kept = frame.sort(pl.col("title") == "", maintain_order=True).unique("item_id", keep="first", maintain_order=True)
    kept = kept.sort(LINE)
    again = frame.height - kept.height
    unread = file.rows - file.bad - frame.height
    reasons = {"of items that stand there before": again, "of items that nobody chose": unread}
    return kept.drop(LINE), file.finish(kept.height, reasons)


def only_file(path: str, end: str) -> Path:
    """The one file of a folder whose name ends so.

    Raises:
        UserError: If there is none, or several.
    """
    files = sorted(Path(path).glob(f"*{end}"))
    if len(files) != 1:
        held = ", ".join(file.name for file in files[:3]) or "none"
        raise UserError(f"path={path} has to hold one file NAME{end}; it holds {held}")
    return files[0]


@dataclass(frozen=True)
class LineReader(LogReader):
    """A reader of such files, which lie in one folder.

    Raises:
        UserError: If its folder is not named.
    """

    path: str | None = field(default=None, metadata=FOLDER)
    max_bad_lines: float = field(default=0.001, metadata=MAX_BAD_LINES)

    def __post_init__(self) -> None:
        """Refuse what cannot be read."""
        if not self.path:
            raise UserError("this source needs `path`, the folder with its files (docs/data.md has their names)")
        super().__post_init__()

    def file(self, table: str, *names: str) -> LineFile:
        """The first of some files that is there.

        Raises:
            UserError: If none is.
        """
        places = [Path(self.path or "") / f"{name}{end}" for name in names for end in ("", ".gz")]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            wanted = " and no ".join(names)
            raise UserError(f"path={self.path} has no {wanted} (.gz or not); docs/data.md says where it is")
        return LineFile(found, table, self.max_bad_lines)


@dataclass(frozen=True)
class RecordReader(LineReader):
    """A reader of records of reviews and of items, whose titles may not be passed on."""

    max_description_chars: int = field(default=2000, metadata=DESCRIPTION_LENGTH)
    with_reviews: bool = field(default=False, metadata=WITH_REVIEWS)

    def read_records(
        self,
        name: str,
        interaction_file: LineFile,
        interaction: Row,
        schema: Mapping[str, Any],
        item_file: LineFile,
        item: Callable[[Collection[str]], Row],
        *,
        terms: str,
        min_rating: float | None = None,
        literal: bool = False,
    ) -> InteractionLog:
        """Read both files; their order is not one in time, and of items only those that somebody had are kept.

        Args:
            name: Name of the data.
            interaction_file: Records of interactions.
            interaction: Takes the values of `schema`, and the review behind them, from one.
            schema: `user_id`, `item_id`, possibly `rating`, and `timestamp`.
            item_file: Records of items.
            item: Given the ids that occur, what takes id and `ITEM_TEXT` from a record, or None from one of others.
            terms: What may be done with the data.
            min_rating: Keep interactions rated at least this.
            literal: Lines may be Python literals.
        """

        def values(record: Mapping[str, Any]) -> tuple[Any, ...] | None:
            found = interaction(record)
            return found if self.with_reviews or found is None else found[:-1]

        columns = {**schema, "review": pl.String} if self.with_reviews else schema
        found = interaction_file.records(values, columns, literal=literal)
        log, facts, read = interactions(interaction_file, found, min_rating)
        row = item(set(log.items.words(log.items.present()).to_list()))
        texts = dict.fromkeys(("item_id", *ITEM_TEXT), pl.String)
        items, items_read = one_row_each(item_file, item_file.records(row, texts, literal=literal))
        return InteractionLog(
            name,
            log,
            clean_items(items, self.max_description_chars),
            item_file.path.name,
            files={"interactions": interaction_file.path, "items": item_file.path},
            filters=facts,
            ordered=False,
            read=[read, items_read],
            terms=terms,
            redistributable=False,
        )

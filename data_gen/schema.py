"""The dataset artefact: five tables that every later stage reads, and nothing else does the reading.

`items.parquet`, `users.parquet`, `train.parquet`, `valid.parquet` and `test.parquet` lie in one folder beside
the manifest. Items and users are numbered densely from 0; an item's number is its row in the item table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from reasonrec.data_gen.frames import Frames
from reasonrec.data_gen.lazy_table import LazyTable, read_parts, sample_rows
from reasonrec.data_gen.sequences import Sequences
from reasonrec.tokenizers.artefact import read_manifest
from reasonrec.tokenizers.catalogue import SCHEMA, TEXTS, Catalogue
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import ItemIndex
from reasonrec.tokenizers.manifest import Manifest

ITEM_TEXT = TEXTS
ITEMS: dict[str, Any] = {
    "item": pl.Int32,
    "item_id": pl.String,
    **dict.fromkeys(ITEM_TEXT, pl.String),
    "train_count": pl.Int32,
}
USERS: dict[str, Any] = {"user": pl.Int32, "user_id": pl.String}
TRAIN: dict[str, Any] = {"user": pl.Int32, "items": pl.List(pl.Int32), "first_target": pl.Int32}
# `times`: epoch milliseconds of each item; `ratings`: what the user gave each item, null where nothing; `reviews`: the
# user's words on each item; `clean_target`: the item that the user really chose, where an exposure-biased log shows
# another one as the last element (and `ratings` rate what was chosen).
TRAIN_OPTIONAL: dict[str, Any] = {
    "times": pl.List(pl.Int64),
    "ratings": pl.List(pl.Float32),
    "reviews": pl.List(pl.String),
    "clean_target": pl.Int32,
}
ROWS: dict[str, Any] = {
    "row": pl.Int32,
    "user": pl.Int32,
    "history": pl.List(pl.Int32),
    "target": pl.Int32,
    "masked": pl.List(pl.Int32),
    "same_time": pl.Boolean,
}
TABLES = ("items", "users", "train", "valid", "test")
Table = pl.DataFrame | Frames  # in memory, or on disk
ROW_GROUP = 1 << 20  # rows of a Parquet file that are packed together


@dataclass(frozen=True)
class Tables:
    """A dataset before it is written; its large tables may wait on disk.

    Attributes:
        items: Columns of `ITEMS` without `train_count`, which is counted from `train`.
        users: Columns of `USERS`.
        train: Columns of `TRAIN`, and any of `TRAIN_OPTIONAL`.
        valid: Columns of `ROWS`.
        test: Columns of `ROWS`.
        facts: What later stages have to know: name, split, mask_history, order, repeats, filters, notes; and, where
            the data have them, terms of use, and whether item texts are redistributable (they are, unless it says no).
    """

    items: pl.DataFrame
    users: pl.DataFrame
    train: Table
    valid: Table
    test: Table
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """A dataset artefact that was verified; a table is read when it is first asked for.

    Example:
        >>> dataset = Dataset.load("runs/demo/dataset")  # doctest: +SKIP
        >>> dataset.items["title"][0]  # doctest: +SKIP
        'Toy Story (1995)'

    Attributes:
        items: One row per item, in item order.
        train: One row per training sequence.
        valid: One row per validation case.
        test: One row per test case.
        users: Number and raw id of each user.
        manifest: The manifest; `manifest.hash` is what later artefacts remember.
        path: The folder it was read from.
    """

    items: pl.DataFrame
    train: pl.DataFrame
    valid: pl.DataFrame
    test: pl.DataFrame
    users: pl.DataFrame
    manifest: Manifest
    path: Path

    @classmethod
    def load(cls, path: str | Path) -> Dataset:
        """Read a dataset and check every file against its hash.

        Raises:
            UserError: If there is no finished dataset at `path`, or a file changed since it was made.
        """
        path = Path(path)
        manifest = read_manifest(path, "dataset")
        frames: dict[str, Any] = {name: path / f"{name}.parquet" for name in TABLES}  # `LazyTable` reads them
        return cls(**frames, manifest=manifest, path=path)

    def parts(self, table: str, *columns: str) -> Iterator[pl.DataFrame]:
        """Some columns of a table, a part of its rows at a time; nothing of it stays in memory.

        Args:
            table: One of `TABLES`.
            columns: Names of its columns.
        """
        return read_parts(vars(self)[table], columns)

    def sample(self, table: str, *columns: str, n: int, seed: int) -> pl.DataFrame:
        """Some columns of a seeded sample of a table's rows, as `DataFrame.sample` draws it; the others are not read.

        Args:
            table: One of `TABLES`.
            columns: Names of its columns.
            n: How many rows; all in a random order where there are no more.
            seed: Seed of the sample.
        """
        return sample_rows(vars(self)[table], columns, n, seed)

    @cached_property
    def sequences(self) -> Sequences:
        """The items of the training sequences, mapped from a file beside the dataset.

        Raises:
            UserError: If the file has to be written, and the disk is full.
        """
        if not isinstance(vars(self)["train"], Path):
            return Sequences.of(self.train)
        count = int(self.facts["n_train_sequences"])
        return Sequences.beside(self.path, self.manifest.hash, count, self.parts("train", "items"))

    @property
    def facts(self) -> dict[str, Any]:
        """What the prepare stage knows about the data: split, masking, repeats, filters, notes."""
        return self.manifest.facts

    @property
    def n_items(self) -> int:
        """Size of the catalogue."""
        return self.items.height

    @property
    def n_users(self) -> int:
        """Number of users, training and held-out ones together."""
        return int(self.facts.get("n_users") or self.users.height)

    def catalogue(self, index: ItemIndex | None = None) -> Catalogue:
        """What inference has to know of the items.

        Args:
            index: Their codes.

        Raises:
            UserError: If the codes were made from another dataset.
        """
        facts = {"n_users": self.n_users, "split": self.facts.get("split", "")}
        facts |= {name: self.facts[name] for name in ("terms", "redistributable") if name in self.facts}
        found = Catalogue(
            self.items.select(SCHEMA.keys()),
            str(self.facts.get("name", "a data set")),
            bool(self.facts["mask_history"]),
            self.manifest.hash,
            facts,
        )
        if index is None:
            return found
        index.check_dataset(self.manifest)
        return found.with_codes(index)

    def rows(self, split: Literal["valid", "test"]) -> pl.DataFrame:
        """The cases of one held-out split.

        Raises:
            UserError: If `split` is neither "valid" nor "test".
        """
        if split not in ("valid", "test"):
            raise UserError(f"split={split!r}: held-out cases are in 'valid' and 'test'")
        return self.valid if split == "valid" else self.test


for _name in TABLES:  # behind the class, whose fields would have defaults otherwise
    setattr(Dataset, _name, LazyTable(_name))


def to_lists(values: np.ndarray | pl.Series, lengths: np.ndarray) -> pl.Series:
    """Cut flat values into one list per row.

    Args:
        values: All values, row after row: shape (sum of lengths,).
        lengths: Length of each row, zeros allowed: shape (rows,).

    Returns:
        A list series of `len(lengths)` rows.
    """
    import pyarrow as pa  # type: ignore[import-untyped]  # takes a while, and most that imports this makes no lists

    flat, ends = pl.Series(values), np.cumsum(lengths, dtype=np.int64)
    return pl.Series(pa.LargeListArray.from_arrays(pa.array(np.r_[0, ends]), flat.to_arrow()))


def empty_rows() -> pl.DataFrame:
    """A held-out split without cases."""
    return pl.DataFrame(schema=ROWS)


def count_targets(train: pl.DataFrame, n_items: int) -> np.ndarray:
    """How often each item is a training target.

    Args:
        train: Training sequences with `items` and `first_target`.
        n_items: Size of the catalogue.

    Returns:
        Counts of shape (n_items,), int32; nothing held out enters them.
    """
    lengths = train["items"].list.len().to_numpy().astype(np.int64)
    flat = train["items"].explode().drop_nulls().to_numpy()
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    position = np.arange(len(flat)) - starts
    counted = flat[position >= np.repeat(train["first_target"].to_numpy(), lengths)]
    return np.bincount(counted, minlength=n_items).astype(np.int32)


def _conform(frame: pl.DataFrame, schema: Mapping[str, Any], optional: Mapping[str, Any], name: str) -> pl.DataFrame:
    missing = [column for column in schema if column not in frame.columns]
    unknown = [column for column in frame.columns if column not in schema and column not in optional]
    if missing or unknown:
        raise ValueError(f"table {name}: missing columns {missing}, unknown columns {unknown}")
    kept = {**schema, **{c: t for c, t in optional.items() if c in frame.columns}}
    return frame.select(pl.col(column).cast(dtype) for column, dtype in kept.items()).rechunk()


def _check_numbers(name: str, column: str, values: pl.Series, limit: int) -> None:
    if values.null_count() or (len(values) and not values.is_between(0, limit - 1).all()):
        raise ValueError(f"table {name}: {column} has to lie in 0..{limit - 1} and be complete")


def _check_lists(name: str, column: str, lists: pl.Series, limit: int) -> None:
    if lists.null_count() or (lists.list.len() == 0).any():
        raise ValueError(f"table {name}: no list of {column} may be empty")
    _check_numbers(name, column, lists.explode(), limit)


def _check_rows(name: str, rows: pl.DataFrame, n_users: int, n_items: int) -> None:
    _check_numbers(name, "user", rows["user"], n_users)
    _check_numbers(name, "target", rows["target"], n_items)
    _check_lists(name, "history", rows["history"], n_items)
    _check_numbers(name, "masked", rows["masked"].explode().drop_nulls(), n_items)
    if rows.filter(pl.col("masked").list.contains(pl.col("target"))).height:
        raise ValueError(f"table {name}: a target is masked, so no ranking could hit it")


def conform(frame: pl.DataFrame, name: str) -> pl.DataFrame:
    """A piece of `train`, `valid` or `test` with the columns and types of the file.

    Raises:
        ValueError: If a column is missing or unknown.
    """
    return _conform(frame, *((TRAIN, TRAIN_OPTIONAL) if name == "train" else (ROWS, {})), name)


def check_tables(tables: Tables) -> tuple[dict[str, Table], dict[str, Any]]:
    """Check the tables, piece by piece where they are on disk, and count the training targets.

    Args:
        tables: The dataset; what is on disk has the types of the files already.

    Returns:
        The tables of the five files by their names, and the facts for the manifest: `tables.facts` and the counts.

    Raises:
        ValueError: If the tables contradict each other (a bug in a reader, not a user's mistake).
    """
    large: dict[str, Table] = {"train": tables.train, "valid": tables.valid, "test": tables.test}
    large = {name: conform(part, name) if isinstance(part, pl.DataFrame) else part for name, part in large.items()}
    users = _conform(tables.users, USERS, {}, "users")
    n_items, n_users = tables.items.height, users.height
    counts = np.zeros(n_items, dtype=np.int32)
    for train in pieces(large["train"]):
        _check_numbers("train", "user", train["user"], n_users)
        _check_lists("train", "items", train["items"], n_items)
        counts += count_targets(train, n_items)
    counted = tables.items.with_columns(pl.Series("train_count", counts))
    items = _conform(counted, ITEMS, {}, "items")
    if not (items["item"] == pl.Series(range(n_items), dtype=pl.Int32)).all() or (items["title"] == "").any():
        raise ValueError("table items: items have to be numbered in row order and have a title each")
    for name in ("valid", "test"):
        for rows in pieces(large[name]):
            _check_rows(name, rows, n_users, n_items)
    facts = {
        "terms": "",
        "redistributable": True,
        **tables.facts,
        "n_users": n_users,
        "n_items": n_items,
        "n_train_targets": int(items["train_count"].sum()),
        "n_train_sequences": large["train"].height,
        "n_valid": large["valid"].height,
        "n_test": large["test"].height,
    }
    return {"items": items, "users": users, **large}, facts


def pieces(table: Table) -> Iterable[pl.DataFrame]:
    """What is in memory at a time."""
    return [table] if isinstance(table, pl.DataFrame) else table


def _write(table: Table, file: Path) -> None:
    """Write one file; a row group is in memory at a time."""
    if isinstance(table, Frames) and table.height <= ROW_GROUP:
        table = table.frame()
    elif isinstance(table, Frames):
        groups = Frames()
        for group in table.parts(ROW_GROUP):
            groups.append(group)
        table = groups
    table.lazy().sink_parquet(file, compression="zstd", row_group_size=ROW_GROUP)


def write_dataset(folder: Path, tables: Tables) -> dict[str, Any]:
    """Check the tables and write the five Parquet files.

    Args:
        folder: Where to write (the working folder of `artefact.staged`).
        tables: The dataset.

    Returns:
        The facts for the manifest, see `check_tables`.
    """
    frames, facts = check_tables(tables)
    for name, table in frames.items():
        _write(table, folder / f"{name}.parquet")
    return facts


def unique_ids(ids: Iterable[str]) -> list[str]:
    """Distinct raw ids in the order that numbers them: by value if all are whole numbers, else by
    characters.
    """
    distinct = set(ids)
    if all(word.isascii() and word.isdigit() for word in distinct):
        return sorted(distinct, key=lambda word: (int(word), word))
    return sorted(distinct)

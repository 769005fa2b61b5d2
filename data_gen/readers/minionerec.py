"""Amazon Industrial_and_Scientific in the split that MiniOneRec publishes numbers for.

The folder holds `Industrial_and_Scientific.{train,valid,test}.inter` (user, last 10 items, target),
`….item.json` (texts) and, optionally, `interaction_times.tsv`, which tells the targets bought on the same day
as their predecessor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from reasonrec.data_gen.clean import clean_items
from reasonrec.data_gen.readers.base import DESCRIPTION_LENGTH, FOLDER, READERS
from reasonrec.data_gen.schema import Tables, to_lists
from reasonrec.tokenizers.errors import UserError

NAME = "Industrial_and_Scientific"
TIMES = "interaction_times.tsv"
MAX_HISTORY = 10  # of the published rows
_COLUMNS = {"user_id:token": "user", "item_id_list:token_seq": "history", "item_id:token": "target"}


def industrial_files(path: str) -> dict[str, Path]:
    """The files of the split by role, the optional one only if it is there.

    Raises:
        UserError: If the folder or one of its files is missing.
    """
    folder = Path(path)
    files = {part: folder / f"{NAME}.{part}.inter" for part in ("train", "valid", "test")}
    files["items"] = folder / f"{NAME}.item.json"
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        raise UserError(
            f"path={path} lacks {', '.join(missing)}; put there MiniOneRec's files "
            f"data/Amazon/{NAME}.*.inter and data/Amazon/index/{NAME}.item.json (and, for the same-day "
            f"slice, {TIMES})"
        )
    times = folder / TIMES
    return files | {"times": times} if times.is_file() else files


def _read_rows(file: Path) -> pl.DataFrame:
    """One part of the split: `user`, `history` (list) and `target`, in the order of the file."""
    lazy = pl.scan_csv(file, separator="\t", infer_schema=False, quote_char=None)
    lacking = [name for name in _COLUMNS if name not in lazy.collect_schema().names()]
    if lacking:
        raise UserError(f"{file} lacks the columns {', '.join(lacking)}: it is not the published file")
    try:
        return lazy.select(
            pl.col("user_id:token").cast(pl.Int32).alias("user"),
            pl.col("item_id_list:token_seq").str.split(" ").cast(pl.List(pl.Int32)).alias("history"),
            pl.col("item_id:token").cast(pl.Int32).alias("target"),
        ).collect()
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{file}: users and items have to be whole numbers ({error})") from error


def replay(parts: list[pl.DataFrame]) -> pl.DataFrame:
    """Rebuild every user's sequence from the rows of a split and check that each row agrees with it.

    Args:
        parts: Rows of train, validation and test, each user's rows in time order throughout.

    Returns:
        Columns `user` and `sequence` (the history of the user's first row followed by all targets).

    Raises:
        UserError: If a row's history is not the last items before its target.
    """
    rows = pl.concat([part.select("user", "history", "target") for part in parts])
    users = rows.group_by("user", maintain_order=True).agg(pl.first("history"), "target")
    sequences = users.select("user", sequence=pl.concat_list("history", "target"))
    position = pl.int_range(pl.len()).over("user")
    joined = rows.with_columns(position=position).join(sequences, on="user", how="left", maintain_order="left")
    first = pl.first("history").list.len().over("user")
    joined = joined.with_columns(
        before=pl.col("sequence").list.head(first + pl.col("position")).list.tail(MAX_HISTORY)
    )
    wrong = joined.filter(pl.col("before") != pl.col("history"))
    if wrong.height:
        user, history, target = wrong.select("user", "history", "target").row(0)
        raise UserError(
            f"{NAME}: {wrong.height} rows do not continue their user's earlier rows, e.g. user {user}, "
            f"history {history}, target {target}: the three .inter files do not belong together"
        )
    return sequences


def _same_time(file: Path | None, part: str, first_row: int, n_rows: int) -> np.ndarray:
    """Whether each row's target and its predecessor have one and the same known day: shape (n_rows,)."""
    if file is None:
        return np.zeros(n_rows, dtype=bool)
    times = pl.scan_csv(file, separator="\t").select("user", "position", "split", "row", "ts_lo", "ts_hi").collect()
    day = pl.when(pl.col("ts_lo") == pl.col("ts_hi")).then("ts_lo")
    times = times.sort("user", "position").with_columns(day=day)
    same = (pl.col("day") == pl.col("day").shift()).over("user").fill_null(False)
    found = times.with_columns(same=same).filter(pl.col("split") == part).sort("row")
    # The file numbers rows through train, validation and test.
    if found["row"].to_list() != list(range(first_row, first_row + n_rows)):
        raise UserError(
            f"{file} does not have one line for each of the {n_rows} {part} rows: it belongs to another split"
        )
    return found["same"].to_numpy()


def _read_items(file: Path, max_description_chars: int) -> pl.DataFrame:
    raw = json.loads(file.read_text(encoding="utf-8"))
    ids = sorted(raw, key=int)
    if ids != [str(number) for number in range(len(ids))]:
        raise UserError(f"{file}: items have to be numbered 0, 1, 2, …")
    columns = {"title": "title", "description": "description", "brand": "brand", "category": "categories"}
    items = pl.DataFrame(
        {"item_id": ids} | {c: [str(raw[i].get(key) or "") for i in ids] for c, key in columns.items()}
    )
    return clean_items(items, max_description_chars)


def read_industrial(path: str, max_description_chars: int) -> tuple[Tables, dict[str, Path]]:
    """Read the split as it was published: rows in their order, repeats kept, nothing masked.

    Args:
        path: The folder.
        max_description_chars: Length cap of descriptions.

    Returns:
        The dataset and its files by role. A training sequence is the history of a user's first training
        row followed by all training targets, and its first item is never a target. Sequences stand in the
        order of the users' first training rows.

    Raises:
        UserError: If files are missing or contradict each other.
    """
    files = industrial_files(path)
    names = ("train", "valid", "test")
    parts = {name: _read_rows(files[name]) for name in names}
    items = _read_items(files["items"], max_description_chars)
    if items.filter(pl.col("title") == "").height:
        raise UserError(f"{files['items']}: some items have no title")
    users = replay(list(parts.values()))["user"].unique().sort()
    if users.to_list() != list(range(len(users))):
        raise UserError(f"{NAME}: users have to be numbered 0, 1, 2, …")
    sequences = replay([parts["train"]])
    starts = parts["train"].group_by("user", maintain_order=True).agg(pl.first("history").list.len())["history"]
    train = sequences.select("user", pl.col("sequence").alias("items"), first_target=starts)
    times = files.get("times")
    first_row = {"valid": parts["train"].height, "test": parts["train"].height + parts["valid"].height}
    held_out = {
        name: parts[name].with_row_index("row").with_columns(
            masked=to_lists(np.zeros(0, dtype=np.int32), np.zeros(parts[name].height, dtype=np.int64)),
            same_time=pl.Series(_same_time(times, name, first_row[name], parts[name].height)),
        )
        for name in ("valid", "test")
    }  # fmt: skip
    notes = [
        "published split by global time over target rows; cuts fall inside a day",
        "times are known to the day",
    ]
    if times is None:
        notes[1] = f"no {TIMES}: same_time is unknown and set to false"
    tables = Tables(
        items=items.with_row_index("item"),
        users=pl.DataFrame({"user": users, "user_id": users.cast(pl.String)}),
        train=train,
        valid=held_out["valid"],
        test=held_out["test"],
        facts={
            "name": NAME,
            "split": "given",
            "mask_history": False,
            "order": "sequence",
            "repeats": True,
            "filters": [],
            "notes": notes,
        },
    )
    return tables, files


@dataclass(frozen=True)
class IndustrialReader:
    """The published split.

    Raises:
        UserError: If its folder is not named.
    """

    path: str | None = field(default=None, metadata=FOLDER)
    max_description_chars: int = field(default=2000, metadata=DESCRIPTION_LENGTH)

    def __post_init__(self) -> None:
        """Refuse what cannot be read."""
        if not self.path:
            raise UserError("source: industrial needs `path`, the folder of the published split")

    def read(self) -> tuple[Tables, dict[str, Path]]:
        """Read the rows as they were published."""
        return read_industrial(self.path or "", self.max_description_chars)


READERS.add("industrial", IndustrialReader, __name__)

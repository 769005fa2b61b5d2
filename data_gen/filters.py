"""Filters on an interaction log: duplicates, items without text, k-core. Each says what it removed.

A log is sorted by user and time before it gets here (`interaction_log.sort_log`), and every filter keeps that
order. Users and items are codes (`coded_log`), and the users of a log lie in buckets, one of them in memory at a time.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from reasonrec.data_gen.coded_log import CodedLog
from reasonrec.data_gen.frames import Frames
from reasonrec.data_gen.splits import blocks
from reasonrec.tokenizers.errors import UserError

Duplicates = Literal["keep", "drop_consecutive", "keep_first"]


def count_log(log: pl.DataFrame) -> dict[str, int]:
    """Rows, users and items of a log."""
    return {"rows": log.height, "users": log["user_id"].n_unique(), "items": log["item_id"].n_unique()}


class Tally:
    """Rows, users and items of a log that is seen in pieces.

    Attributes:
        users: Whether each code of a user occurs.
        items: Whether each code of an item occurs.
    """

    def __init__(self, log: CodedLog) -> None:
        self.rows = 0
        self.users, self.items = (np.zeros(len(ids.counts), dtype=bool) for ids in (log.users, log.items))

    def add(self, piece: pl.DataFrame) -> pl.DataFrame:
        """Count a piece, and return it."""
        self.rows += piece.height
        self.users[piece["user"].to_numpy()] = True
        self.items[piece["item"].to_numpy()] = True
        return piece

    def counts(self) -> dict[str, int]:
        """As of `count_log`."""
        return {"rows": self.rows, "users": int(self.users.sum()), "items": int(self.items.sum())}


def filter_fact(step: str, before: dict[str, int], after: dict[str, int], **details: Any) -> dict[str, Any]:
    """What one filter did, for the manifest, from the counts of two logs."""
    facts: dict[str, Any] = {"step": step, **details}
    for when, counts in (("before", before), ("after", after)):
        facts |= {f"{name}_{when}": value for name, value in counts.items()}
    return facts


def describe_filters(filters: list[dict[str, Any]]) -> str:
    """One line saying what each filter removed."""
    return "; ".join(
        f"{f['step']} removed {f['rows_before'] - f['rows_after']} of {f['rows_before']} interactions"
        + (f" ({f['missing']} of them without a rating)" if f.get("missing") else "")
        for f in filters
    )


def drop_duplicates(log: pl.DataFrame, policy: Duplicates) -> pl.DataFrame:
    """Apply the policy on repeated interactions of one user with one item.

    Args:
        log: Sorted log with `user` and `item`, 32 bits each.
        policy: "keep" keeps all; "drop_consecutive" keeps the first of several in a row; "keep_first" keeps
            only the first ever.
    """
    if policy == "keep_first":
        pair = pl.col("user").cast(pl.UInt64) * (1 << 32) + pl.col("item")
        return log.filter(pair.is_first_distinct())
    if policy == "drop_consecutive":
        same = (pl.col("user") == pl.col("user").shift()) & (pl.col("item") == pl.col("item").shift())
        return log.filter(~same.fill_null(False))
    return log


def k_core(
    buckets: list[Frames], n_items: int, user_k: int, item_k: int, duplicates: Duplicates = "keep"
) -> list[Frames]:
    """Keep the k-core, the largest set in which every user and item has enough interactions.

    Removing an item can put two purchases of another one side by side, so "drop_consecutive" is part of the
    fixed point.

    Args:
        buckets: Sorted log with `user` and `item`, each user in one bucket.
        n_items: Codes of items are below this.
        user_k: Fewest interactions of a user; 0 or 1 switches the bound off.
        item_k: Fewest interactions of an item; 0 or 1 switches the bound off.
        duplicates: Policy, which the log obeys already.
    """
    kept = list(buckets)
    enough = np.ones(n_items, dtype=bool)
    while max(user_k, item_k) > 1:
        counts = np.zeros(n_items, dtype=np.int64)
        for at, bucket in enumerate(kept):
            log = bucket.frame()
            items = log["item"].to_numpy()
            left = enough[items]
            if user_k > 1 and log.height:
                first, lengths = blocks(log["user"].to_numpy())
                left &= np.repeat(np.add.reduceat(left, first, dtype=np.int64) >= user_k, lengths)
            counts += np.bincount(items[left], minlength=n_items)
            if not left.all():
                kept[at] = Frames.of(log.filter(left))
        enough = counts >= item_k
        if (counts[~enough] > 0).any():
            continue
        if duplicates != "drop_consecutive":
            break
        rows = sum(bucket.height for bucket in kept)
        kept = [Frames.of(drop_duplicates(bucket.frame(), duplicates)) for bucket in kept]
        if sum(bucket.height for bucket in kept) == rows:
            break
    return kept


def check_unique_items(items: pl.DataFrame, where: str) -> None:
    """Refuse an item table in which an id stands twice.

    Raises:
        UserError: If there are duplicate item ids.
    """
    counts = items.group_by("item_id").len().filter(pl.col("len") > 1).sort("item_id")
    if counts.height:
        examples = ", ".join(f"{item!r} ({n} times)" for item, n in counts.head(3).iter_rows())
        raise UserError(
            f"{where}: {counts.height} item ids stand in several rows, e.g. {examples}; every item needs "
            "exactly one row: remove the others"
        )


def rating_facts(
    before: dict[str, int], after: dict[str, int], missing: int, min_rating: float
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """What a filter by rating did, from the counts of two logs and how many rows had none, and rows dropped by why."""
    dropped = {"rated lower": before["rows"] - after["rows"] - missing, "without a rating": missing}
    return [filter_fact("min_rating", before, after, min_rating=min_rating, missing=missing)], dropped


def note_alike(user_ids: list[str], item_ids: list[str], items: pl.DataFrame) -> list[str]:
    """What looks like a slip of the data: ids that differ only in case or white space, and items that read the same.

    Args:
        user_ids: The users that are left.
        item_ids: The items that are left.
        items: Cleaned items.

    Returns:
        A sentence for each kind that occurs, which names no user and no title, because notes travel with a model.
        Nothing is changed: both also happen on purpose.
    """
    notes = []
    for name, left in (("user_id", user_ids), ("item_id", item_ids)):
        ids = pl.DataFrame({name: left}, schema={name: pl.String})
        folded = ids.group_by(pl.col(name).str.to_lowercase().str.replace_all(r"\s+", "").alias("folded"))
        groups = folded.agg(pl.col(name).sort()).filter(pl.col(name).list.len() > 1)[name].sort()
        if len(groups):
            example = f", e.g. {' and '.join(map(repr, groups[0].head(2)))}" if name == "item_id" else ""
            notes.append(f"{len(groups)} groups of {name}s differ only in case or white space{example}")
    texts = items.join(ids, on="item_id", how="semi")
    same = texts.group_by(pl.exclude("item_id")).agg(pl.col("item_id").sort()).filter(pl.col("item_id").list.len() > 1)
    if same.height:
        example = " and ".join(map(repr, same["item_id"].sort()[0].head(2)))
        count = int(same["item_id"].list.len().sum())
        notes.append(f"{count} items read like another one in all their text, e.g. item_id {example}")
    return notes


def have_text(log: CodedLog, items: pl.DataFrame, *, drop: bool, where: str) -> NDArray[np.bool_]:
    """Which items of a log have a title, by code.

    Args:
        log: The interactions.
        items: Cleaned items; an empty title is no text.
        drop: Whether interactions with the others will be dropped.
        where: The item table's name for the message.

    Raises:
        UserError: If an interaction's item has no text and `drop` is off.
    """
    words = log.items.words()
    known = words.is_in(items.filter(pl.col("title") != "")["item_id"].implode()).to_numpy()
    without = np.flatnonzero(~known & (log.items.counts > 0))
    if len(without) and not drop:
        names = words[without].sort()
        examples = ", ".join(repr(name) for name in names.head(3))
        raise UserError(
            f"{log.items.counts[without].sum()} interactions are with {len(names)} items that have no title in "
            f"{where}, e.g. item_id {examples} (nan, NULL and the like are no titles); add these items, or set "
            "drop_items_without_text: true to leave the interactions out"
        )
    return known


def check_not_empty(rows: int, filters: list[dict[str, Any]], advice: str) -> None:
    """Refuse to go on with nothing.

    Raises:
        UserError: If the log is empty; the message says what each filter removed.
    """
    if not rows:
        raise UserError(f"no interaction is left: {describe_filters(filters)}; {advice}")

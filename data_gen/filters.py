"""Filters on an interaction log: duplicates, items without text, k-core. Each says what it removed.

A log is sorted by user and time before it gets here (`interaction_log.sort_log`), and every filter keeps that
order.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import polars as pl

from reasonrec.tokenizers.errors import UserError

Duplicates = Literal["keep", "drop_consecutive", "keep_first"]


def count_log(log: pl.DataFrame) -> dict[str, int]:
    """Rows, users and items of a log."""
    return {"rows": log.height, "users": log["user_id"].n_unique(), "items": log["item_id"].n_unique()}


def filter_fact(step: str, before: pl.DataFrame, after: pl.DataFrame, **details: Any) -> dict[str, Any]:
    """What one filter did, for the manifest."""
    facts: dict[str, Any] = {"step": step, **details}
    for when, log in (("before", before), ("after", after)):
        facts |= {f"{name}_{when}": value for name, value in count_log(log).items()}
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
        log: Sorted log with `user_id` and `item_id`.
        policy: "keep" keeps all; "drop_consecutive" keeps the first of several in a row; "keep_first" keeps
            only the first ever.
    """
    if policy == "keep_first":
        return log.unique(["user_id", "item_id"], keep="first", maintain_order=True)
    if policy == "drop_consecutive":
        same = (pl.col("user_id") == pl.col("user_id").shift()) & (pl.col("item_id") == pl.col("item_id").shift())
        return log.filter(~same.fill_null(False))
    return log


def k_core_mask(users: np.ndarray, items: np.ndarray, user_k: int, item_k: int) -> np.ndarray:
    """Which interactions are in the (user_k, item_k)-core.

    Args:
        users: User codes from 0: shape (rows,).
        items: Item codes from 0: shape (rows,).
        user_k: Fewest interactions of a user; 0 or 1 switches the bound off.
        item_k: Fewest interactions of an item; 0 or 1 switches the bound off.

    Returns:
        Boolean array of shape (rows,): the largest set in which every user and item has enough interactions.
    """
    kept = np.ones(len(users), dtype=bool)
    n_users, n_items = (int(codes.max()) + 1 if len(codes) else 0 for codes in (users, items))
    while True:
        enough = np.bincount(users[kept], minlength=n_users)[users] >= user_k
        enough &= np.bincount(items[kept], minlength=n_items)[items] >= item_k
        smaller = kept & enough
        if smaller.sum() == kept.sum():
            return kept
        kept = smaller


def _codes(column: pl.Series) -> np.ndarray:
    return (column.rank("dense") - 1).to_numpy().astype(np.int64)


def k_core(log: pl.DataFrame, user_k: int, item_k: int, duplicates: Duplicates = "keep") -> pl.DataFrame:
    """Keep the k-core, to a fixed point.

    Removing an item can put two purchases of another one side by side, so "drop_consecutive" is part of the
    fixed point.
    """
    while log.height:
        rows = log.height
        log = log.filter(k_core_mask(_codes(log["user_id"]), _codes(log["item_id"]), user_k, item_k))
        if duplicates == "drop_consecutive":
            log = drop_duplicates(log, duplicates)
        if log.height == rows:
            break
    return log


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


def rated(log: pl.DataFrame, min_rating: float | None) -> tuple[pl.DataFrame, list[dict[str, Any]], dict[str, int]]:
    """Keep the interactions rated at least so much: they, what the filter did, and how many rows are dropped why."""
    if min_rating is None:
        return log, [], {}
    kept, missing = log.filter(pl.col("rating") >= min_rating), log["rating"].null_count()
    dropped = {"rated lower": log.height - kept.height - missing, "without a rating": missing}
    return kept, [filter_fact("min_rating", log, kept, min_rating=min_rating, missing=missing)], dropped


def note_alike(log: pl.DataFrame, items: pl.DataFrame) -> list[str]:
    """What looks like a slip of the data: ids that differ only in case or white space, and items that read the same.

    Args:
        log: The interactions that are left.
        items: Cleaned items.

    Returns:
        A sentence for each kind that occurs, which names no user and no title, because notes travel with a model.
        Nothing is changed: both also happen on purpose.
    """
    notes = []
    for name in ("user_id", "item_id"):
        ids = log.select(pl.col(name).unique())
        folded = ids.group_by(pl.col(name).str.to_lowercase().str.replace_all(r"\s+", "").alias("folded"))
        groups = folded.agg(pl.col(name).sort()).filter(pl.col(name).list.len() > 1)[name].sort()
        if len(groups):
            example = f", e.g. {' and '.join(map(repr, groups[0].head(2)))}" if name == "item_id" else ""
            notes.append(f"{len(groups)} groups of {name}s differ only in case or white space{example}")
    texts = items.join(log.select("item_id").unique(), on="item_id", how="semi")
    same = texts.group_by(pl.exclude("item_id")).agg(pl.col("item_id").sort()).filter(pl.col("item_id").list.len() > 1)
    if same.height:
        example = " and ".join(map(repr, same["item_id"].sort()[0].head(2)))
        count = int(same["item_id"].list.len().sum())
        notes.append(f"{count} items read like another one in all their text, e.g. item_id {example}")
    return notes


def require_text(log: pl.DataFrame, items: pl.DataFrame, *, drop: bool, where: str) -> pl.DataFrame:
    """Keep the interactions whose item has a title.

    Args:
        log: The interactions.
        items: Cleaned items; an empty title is no text.
        drop: Drop the others instead of refusing.
        where: The item table's name for the message.

    Raises:
        UserError: If an interaction's item has no text and `drop` is off.
    """
    known = items.filter(pl.col("title") != "").select("item_id")
    without = log.join(known, on="item_id", how="anti")
    if not without.height:
        return log
    if not drop:
        names = without["item_id"].unique().sort()
        examples = ", ".join(repr(name) for name in names.head(3))
        raise UserError(
            f"{without.height} interactions are with {len(names)} items that have no title in {where}, e.g. "
            f"item_id {examples} (nan, NULL and the like are no titles); add these items, or set "
            "drop_items_without_text: true to leave the interactions out"
        )
    return log.join(known, on="item_id", how="semi", maintain_order="left")


def check_not_empty(log: pl.DataFrame, filters: list[dict[str, Any]], advice: str) -> None:
    """Refuse to go on with nothing.

    Raises:
        UserError: If the log is empty; the message says what each filter removed.
    """
    if not log.height:
        raise UserError(f"no interaction is left: {describe_filters(filters)}; {advice}")

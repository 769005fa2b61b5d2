"""From an interaction log and an item table to a dataset: order, filters, numbers, split.

A reader (`readers/`) fills an `InteractionLog`; `build_tables` does everything that does not depend on
where it came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from reasonrec.data_gen import filters, splits
from reasonrec.data_gen.schema import Tables, unique_ids
from reasonrec.data_gen.seeded_hash import seeded_hash
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.whole import MAX_SEED

Split = Literal["leave_one_out", "time"]
SEED = {
    "help": "orders what the data leave open; draws the synthetic world",
    "at_least": 0,
    "at_most": MAX_SEED,
}


@dataclass(frozen=True)
class InteractionLog:
    """What a reader hands over.

    Attributes:
        name: Name of the data.
        interactions: `user_id`, `item_id` (strings), `timestamp` (epoch milliseconds), possibly `rating` and `review`.
        items: `item_id` and the four cleaned text columns.
        items_name: How to call the item table in messages.
        files: The raw files by role, for their hashes.
        filters: What the reader filtered already.
        ordered: Rows of one time stamp stand in the order in which things happened, as in a log that somebody wrote
            line by line; False if the file's order means nothing.
        read: What the reader read of each table: rows of the file, kept, dropped and why.
        terms: What may be done with the data, for people.
        redistributable: Whether item texts may be published with a model.
    """

    name: str
    interactions: pl.DataFrame
    items: pl.DataFrame
    items_name: str
    files: Mapping[str, Path] = field(default_factory=dict)
    filters: Sequence[dict[str, Any]] = field(default_factory=list)
    ordered: bool = True
    read: Sequence[dict[str, Any]] = field(default_factory=list)
    terms: str = ""
    redistributable: bool = True


@dataclass(frozen=True)
class LogOptions:
    """How a log becomes a dataset: options of every reader of one.

    Raises:
        UserError: If the options contradict each other.

    Attributes:
        seed: Orders interactions of one user at one time where the file has no order.
        user_k: Fewest interactions of a user.
        item_k: Fewest interactions of an item.
        duplicates: Policy on repeated interactions.
        drop_items_without_text: Leave such interactions out instead of refusing.
        split: "leave_one_out" or "time".
        split_ratios: Shares of a time split, 0.8, 0.1 and 0.1 if neither they nor dates are given.
        valid_from: First date of validation of a time split.
        test_from: First date of test of a time split.
        mask_history: Exclude a user's history from the ranking.
        max_history: Most recent items to keep in a held-out history.
    """

    seed: int = field(default=0, metadata=SEED)
    user_k: int = field(default=1, metadata={"help": "fewest interactions of a user", "at_least": 1})
    item_k: int = field(default=1, metadata={"help": "fewest interactions of an item", "at_least": 1})
    duplicates: filters.Duplicates = field(
        default="keep_first", metadata={"help": "repeated interactions of one user with one item"}
    )
    drop_items_without_text: bool = field(
        default=False, metadata={"help": "leave out interactions with untitled items"}
    )
    split: Split = field(default="leave_one_out", metadata={"help": "how to hold out"})
    split_ratios: list[float] | None = field(
        default=None, metadata={"help": "train, validation, test of a time split", "at_least": 0, "at_most": 1}
    )
    valid_from: str | None = field(default=None, metadata={"help": "ISO date (UTC) at which validation starts"})
    test_from: str | None = field(default=None, metadata={"help": "ISO date (UTC) at which the test starts"})
    mask_history: bool = field(default=False, metadata={"help": "never recommend what the user had already"})
    max_history: int | None = field(
        default=None, metadata={"help": "most recent items of a held-out history", "at_least": 1}
    )

    def __post_init__(self) -> None:
        """Refuse contradictions before anything is read."""
        if self.mask_history and self.duplicates != "keep_first":
            raise UserError(
                f"mask_history: true with duplicates: {self.duplicates}: a repeated item would be a target "
                "that is masked; use duplicates: keep_first"
            )
        if (self.valid_from is None) != (self.test_from is None):
            raise UserError("valid_from and test_from belong together: set both, or split_ratios")
        timed = [value for value in (self.split_ratios, self.valid_from) if value is not None]
        if self.split != "time" and timed:
            raise UserError(f"split_ratios and dates are for split: time, not for split: {self.split}")
        if len(timed) == 2:
            raise UserError("a time split has either split_ratios or valid_from and test_from, not both")
        if self.split_ratios is not None:
            splits.check_ratios(self.split_ratios)
        if self.valid_from is not None and self.test_from is not None:
            splits.date_cuts(self.valid_from, self.test_from)


def sort_log(interactions: pl.DataFrame, seed: int, *, ordered: bool = True) -> pl.DataFrame:
    """Sort by user and time; inside one user's time stamp the order of the file stays, if it has one.

    Args:
        interactions: The log.
        seed: Orders a time stamp where the file does not, by hash, whatever the order of the file.
        ordered: Whether the order of the file means something.
    """
    if ordered:
        return interactions.sort("user_id", "timestamp", maintain_order=True)
    tie = seeded_hash(seed, interactions["user_id"], interactions["timestamp"], interactions["item_id"])
    # Ratings and reviews are the last resort: rows that agree in everything else have to come in one order, too.
    last = [name for name in ("rating", "review") if name in interactions.columns]
    by = ["user_id", "timestamp", "tie", "item_id", *last]
    return interactions.with_columns(tie=tie).sort(by).drop("tie")


def count_ties(log: pl.DataFrame) -> int:
    """How many interactions share their user's time stamp with another one, in a sorted log."""
    same = (pl.col("user") == pl.col("user").shift()) & (pl.col("timestamp") == pl.col("timestamp").shift())
    tied = log.select(same=same.fill_null(False)).select(pl.col("same") | pl.col("same").shift(-1).fill_null(False))
    return int(tied["same"].sum())


def filter_log(source: InteractionLog, options: LogOptions) -> tuple[pl.DataFrame, list[dict[str, Any]]]:
    """Sort and filter a log.

    Returns:
        The remaining interactions, and what each filter did.

    Raises:
        UserError: If items are ambiguous or without text, or nothing is left.
    """
    filters.check_unique_items(source.items, source.items_name)
    facts = list(source.filters)
    log = sort_log(source.interactions, options.seed, ordered=source.ordered)
    filters.check_not_empty(log, facts, "check the input and min_rating")

    def record(step: str, after: pl.DataFrame, **details: Any) -> pl.DataFrame:
        facts.append(filters.filter_fact(step, log, after, **details))
        return after

    drop = options.drop_items_without_text
    log = record("items_without_text", filters.require_text(log, source.items, drop=drop, where=source.items_name))
    log = record("duplicates", filters.drop_duplicates(log, options.duplicates), policy=options.duplicates)
    core = filters.k_core(log, options.user_k, options.item_k, options.duplicates)
    log = record("k_core", core, user_k=options.user_k, item_k=options.item_k)
    filters.check_not_empty(log, facts, f"lower user_k={options.user_k} or item_k={options.item_k}")
    return log, facts


def build_tables(source: InteractionLog, options: LogOptions) -> Tables:
    """Filter, number and split a log.

    Returns:
        The dataset. Everything but the membership of users and items depends on training interactions only.

    Raises:
        UserError: If the filters or the split leave nothing to train or to test on.
    """
    log, filter_facts = filter_log(source, options)
    notes = ["k-core and catalogue membership were computed on the whole log"]
    notes += filters.note_alike(log, source.items)
    user_ids, item_ids = (unique_ids(log[name].unique().to_list()) for name in ("user_id", "item_id"))
    log = number_log(log, user_ids, item_ids)
    users, times = log["user"].to_numpy(), log["timestamp"].to_numpy()
    if options.split == "leave_one_out":
        labels = splits.leave_one_out(users)
        notes.append("other users' futures visible")
    else:
        if options.valid_from is not None and options.test_from is not None:
            cuts = splits.date_cuts(options.valid_from, options.test_from)
        else:
            cuts = splits.ratio_cuts(times, options.split_ratios or (0.8, 0.1, 0.1))
        labels = splits.by_time(times, cuts)
        notes.append(f"validation from {cuts[0]}, test from {cuts[1]} (epoch milliseconds)")
    parts = {}
    for name, part in (("valid", splits.VALID), ("test", splits.TEST)):
        parts[name] = splits.held_out_rows(
            log, labels, part, mask_history=options.mask_history, max_history=options.max_history
        )
        first = int((labels == part).sum()) - parts[name].height
        if first:
            notes.append(f"{first} {name} interactions are their user's first and make no case")
    train = splits.train_sequences(log, labels)
    if not train.height or not parts["test"].height:
        counts = np.bincount(labels, minlength=3).tolist()
        loo = options.split == "leave_one_out"
        advice = "it needs users with 3 interactions: lower item_k" if loo else "choose other cuts"
        removed = filters.describe_filters(filter_facts)
        raise UserError(
            f"split: {options.split} leaves {counts[0]} train, {counts[1]} validation and {counts[2]} test "
            f"interactions, {parts['test'].height} of the latter with a history ({removed}); {advice}"
        )
    return Tables(
        items=number_items(source.items, item_ids),
        users=pl.DataFrame({"user": range(len(user_ids)), "user_id": user_ids}),
        train=train,
        valid=parts["valid"],
        test=parts["test"],
        facts={
            "name": source.name,
            "terms": source.terms,
            "redistributable": source.redistributable,
            "split": options.split,
            "mask_history": options.mask_history,
            "order": "sequence",
            "repeats": options.duplicates != "keep_first",
            "read": list(source.read),
            "filters": filter_facts,
            "ties": {"interactions": count_ties(log), "of": log.height, "order": _tie_order(source, options)},
            "notes": notes,
        },
    )


def _tie_order(source: InteractionLog, options: LogOptions) -> str:
    return "they stand as in the file" if source.ordered else f"a hash of seed {options.seed} orders them"


def number_log(log: pl.DataFrame, user_ids: list[str], item_ids: list[str]) -> pl.DataFrame:
    """Replace raw ids by numbers (columns `user` and `item`), users in order, each user's interactions as "
    "they stand.
    """
    for name, ids in (("user", user_ids), ("item", item_ids)):
        numbers = pl.DataFrame({f"{name}_id": ids, name: pl.Series(range(len(ids)), dtype=pl.Int32)})
        log = log.join(numbers, on=f"{name}_id", how="left", maintain_order="left")
    return log.drop("user_id", "item_id").sort("user", maintain_order=True)


def number_items(items: pl.DataFrame, item_ids: list[str]) -> pl.DataFrame:
    """The catalogue in item order."""
    numbers = pl.DataFrame({"item": pl.Series(range(len(item_ids)), dtype=pl.Int32), "item_id": item_ids})
    return numbers.join(items, on="item_id", how="left", maintain_order="left")

"""From an interaction log and an item table to a dataset: order, filters, numbers, split.

A reader (`readers/`) fills an `InteractionLog`; `build_tables` does everything that does not depend on
where it came from. It works on buckets of users, so that no more of a large log is in memory than that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from reasonrec.data_gen import filters, splits
from reasonrec.data_gen.coded_log import CodedLog, Ids, buckets_of
from reasonrec.data_gen.frames import Frames
from reasonrec.data_gen.schema import Table, Tables, conform, unique_ids
from reasonrec.data_gen.seeded_hash import digests, seeded_hash
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.whole import MAX_SEED

IN_MEMORY = 1 << 16  # rows of a table that need not wait on disk
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
        interactions: `user_id`, `item_id` (strings), `timestamp` (epoch milliseconds), possibly `rating` and `review`;
            or the same in codes, on disk.
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
    interactions: pl.DataFrame | CodedLog
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


@dataclass(frozen=True)
class Ties:
    """Orders interactions of one user at one time, by hash, whatever the order of the file.

    Attributes:
        seed: Another one gives another order.
        users: Digest of each code's user.
        items: Digest of each code's item.
        places: Place of each code's item in the order of characters.
    """

    seed: int
    users: NDArray[np.uint64]
    items: NDArray[np.uint64]
    places: NDArray[np.uint32]

    @classmethod
    def of(cls, log: CodedLog, seed: int) -> Ties:
        """The order of a log."""
        items = log.items.words()
        return cls(seed, digests(log.users.words()), digests(items), items.rank("ordinal").to_numpy())


def sort_log(log: pl.DataFrame, ties: Ties | None) -> pl.DataFrame:
    """Sort by user and time.

    Args:
        log: Interactions with codes.
        ties: Orders a time stamp of a user; None if the order of the file does.
    """
    if ties is None:
        return _sort_by_time(log)
    users, items = log["user"].to_numpy(), log["item"].to_numpy()
    tie = seeded_hash(ties.seed, ties.users[users], log["timestamp"], ties.items[items])
    # Ratings and reviews are the last resort: rows that agree in everything else have to come in one order, too.
    last = [name for name in ("rating", "review") if name in log.columns]
    by = ["user", "timestamp", "tie", "place", *last]
    return log.with_columns(tie=tie, place=ties.places[items]).sort(by).drop("tie", "place")


def _sort_by_time(log: pl.DataFrame) -> pl.DataFrame:
    """Sort by user and time, what agrees in both as it stands."""
    users, times = log["user"].to_numpy().astype(np.int64), log["timestamp"].to_numpy()
    first, last = (int(times.min()), int(times.max())) if log.height else (0, 0)
    bits = (last - first).bit_length()
    if bits + int(users.max(initial=0)).bit_length() > 63:
        return log.sort("user", "timestamp", maintain_order=True)
    one = (users << bits) | (times - first)  # one column sorts in a quarter of the time that two take
    return log.with_columns(one=one).sort("one", maintain_order=True).drop("one")


def count_ties(log: pl.DataFrame) -> int:
    """How many interactions share their user's time stamp with another one, in a sorted log."""
    same = (pl.col("user") == pl.col("user").shift()) & (pl.col("timestamp") == pl.col("timestamp").shift())
    tied = log.select(same=same.fill_null(False)).select(pl.col("same") | pl.col("same").shift(-1).fill_null(False))
    return int(tied["same"].sum())


def filter_log(
    log: CodedLog, order: NDArray[np.int64], source: InteractionLog, options: LogOptions
) -> tuple[list[Frames], filters.Tally, list[dict[str, Any]]]:
    """Sort and filter a log.

    Args:
        log: The log.
        order: Codes of its users in the order of buckets.
        source: What the reader handed over with it.
        options: The filters.

    Returns:
        The remaining interactions in buckets of users, what occurs in them, and what each filter did.

    Raises:
        UserError: If items are ambiguous or without text, or nothing is left.
    """
    filters.check_unique_items(source.items, source.items_name)
    facts = list(source.filters)
    filters.check_not_empty(log.frames.height, facts, "check the input and min_rating")
    known = filters.have_text(log, source.items, drop=options.drop_items_without_text, where=source.items_name)
    buckets = buckets_of([log.frames], order, log.users.counts)
    ties = None if source.ordered else Ties.of(log, options.seed)
    titled, distinct, core = (filters.Tally(log) for _ in range(3))
    for at, bucket in enumerate(buckets):
        rows = sort_log(bucket.frame(), ties)
        rows = titled.add(rows.filter(known[rows["item"].to_numpy()]))
        buckets[at] = Frames.of(distinct.add(filters.drop_duplicates(rows, options.duplicates)))
    buckets = filters.k_core(buckets, len(known), options.user_k, options.item_k, options.duplicates)
    for bucket in buckets:
        core.add(bucket.frame())
    counts = [log.counts(), titled.counts(), distinct.counts(), core.counts()]
    details: dict[str, dict[str, Any]] = {
        "items_without_text": {},
        "duplicates": {"policy": options.duplicates},
        "k_core": {"user_k": options.user_k, "item_k": options.item_k},
    }
    for (step, told), before, after in zip(details.items(), counts, counts[1:], strict=False):
        facts.append(filters.filter_fact(step, before, after, **told))
    filters.check_not_empty(core.rows, facts, f"lower user_k={options.user_k} or item_k={options.item_k}")
    return buckets, core, facts


def coded(ids: Ids, present: NDArray[np.int64]) -> NDArray[np.int64]:
    """Codes in the order in which their ids are numbered."""
    return ids.encode(pl.Series(unique_ids(ids.words(present).to_list()))).to_numpy().astype(np.int64)


def _cuts(buckets: list[Frames], options: LogOptions) -> tuple[int, int]:
    """First time of validation and first time of test."""
    if options.valid_from is not None and options.test_from is not None:
        return splits.date_cuts(options.valid_from, options.test_from)
    times = pl.DataFrame(schema={"timestamp": pl.Int64, "len": pl.UInt32})
    for bucket in buckets:  # in memory are the distinct times
        own = bucket.frame().group_by("timestamp").len()
        times = pl.concat([times, own]).group_by("timestamp").sum()
    times = times.sort("timestamp")
    ratios = options.split_ratios or (0.8, 0.1, 0.1)
    return splits.ratio_cuts(times["timestamp"].to_numpy(), ratios, times["len"].to_numpy())


def build_tables(source: InteractionLog, options: LogOptions) -> Tables:
    """Filter, number and split a log.

    Returns:
        The dataset. Everything but the membership of users and items depends on training interactions only.

    Raises:
        UserError: If the filters or the split leave nothing to train or to test on.
    """
    log = source.interactions if isinstance(source.interactions, CodedLog) else CodedLog.of(source.interactions)
    order = coded(log.users, log.users.present())
    buckets, left, filter_facts = filter_log(log, order, source, options)
    users, items = coded(log.users, np.flatnonzero(left.users)), coded(log.items, np.flatnonzero(left.items))
    user_ids, item_ids = log.users.words(users).to_list(), log.items.words(items).to_list()
    notes = ["k-core and catalogue membership were computed on the whole log"]
    notes += filters.note_alike(user_ids, item_ids, source.items)
    if not np.array_equal(users, order[left.users[order]]):  # where the only ids that are no numbers went
        buckets = buckets_of(buckets, users, log.users.counts)
    numbers = _numbers(users, log.users), _numbers(items, log.items)
    cuts = None
    if options.split == "leave_one_out":
        notes.append("other users' futures visible")
    else:
        cuts = _cuts(buckets, options)
        notes.append(f"validation from {cuts[0]}, test from {cuts[1]} (epoch milliseconds)")
    parts, counts, ties = {name: Frames() for name in ("train", "valid", "test")}, np.zeros(3, dtype=np.int64), 0
    for bucket in buckets:
        rows = _numbered(bucket.frame(), *numbers)
        owners = rows["user"].to_numpy()
        labels = splits.leave_one_out(owners) if cuts is None else splits.by_time(rows["timestamp"].to_numpy(), cuts)
        counts += np.bincount(labels, minlength=3)
        ties += count_ties(rows)
        parts["train"].append(conform(splits.train_sequences(rows, labels), "train"))
        for name, part in (("valid", splits.VALID), ("test", splits.TEST)):
            cases = splits.held_out_rows(
                rows, labels, part, mask_history=options.mask_history, max_history=options.max_history
            )
            parts[name].append(conform(cases.with_columns(pl.col("row") + parts[name].height), name))
    for name, part in (("valid", splits.VALID), ("test", splits.TEST)):
        if first := int(counts[part]) - parts[name].height:
            notes.append(f"{first} {name} interactions are their user's first and make no case")
    if not parts["train"].height or not parts["test"].height:
        loo = options.split == "leave_one_out"
        advice = "it needs users with 3 interactions: lower item_k" if loo else "choose other cuts"
        removed = filters.describe_filters(filter_facts)
        raise UserError(
            f"split: {options.split} leaves {counts[0]} train, {counts[1]} validation and {counts[2]} test "
            f"interactions, {parts['test'].height} of the latter with a history ({removed}); {advice}"
        )
    large: dict[str, Table] = {
        name: part.frame() if part.height <= IN_MEMORY else part for name, part in parts.items()
    }
    return Tables(
        items=number_items(source.items, item_ids),
        users=pl.DataFrame({"user": range(len(user_ids)), "user_id": user_ids}),
        **large,
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
            "ties": {"interactions": ties, "of": left.rows, "order": _tie_order(source, options)},
            "notes": notes,
        },
    )


def _numbers(codes: NDArray[np.int64], ids: Ids) -> NDArray[np.int32]:
    """The number of each code that has one."""
    numbers = np.full(len(ids.counts), -1, dtype=np.int32)
    numbers[codes] = np.arange(len(codes), dtype=np.int32)
    return numbers


def _numbered(log: pl.DataFrame, users: NDArray[np.int32], items: NDArray[np.int32]) -> pl.DataFrame:
    """Numbers for codes, users in order, each user's interactions as they stand."""
    numbers = {"user": users[log["user"].to_numpy()], "item": items[log["item"].to_numpy()]}
    return log.with_columns(**{name: pl.Series(found) for name, found in numbers.items()}).sort(
        "user", maintain_order=True
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

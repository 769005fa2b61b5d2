"""Splits that do not leak: which interaction is for training, which for validation, which for the test.

A log is one row per interaction, sorted by user and time; ties inside a user's time stamp are ordered already
(`interaction_log.sort_log`). A split only labels rows; `held_out_rows` and `train_sequences` then build the
tables from the labels.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import numpy as np
import polars as pl

from reasonrec.data_gen.schema import to_lists
from reasonrec.tokenizers.errors import UserError

TRAIN, VALID, TEST = 0, 1, 2


def blocks(users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of each user's block: two arrays of shape (blocks,)."""
    first = np.flatnonzero(np.r_[True, users[1:] != users[:-1]]) if len(users) else np.zeros(0, dtype=np.int64)
    return first, np.diff(np.r_[first, len(users)])


def _segments(users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of each user's block, repeated for each of its rows: two arrays of shape (rows,)."""
    first, lengths = blocks(users)
    return np.repeat(first, lengths), np.repeat(lengths, lengths)


def leave_one_out(users: np.ndarray) -> np.ndarray:
    """Label each user's last interaction as test and the last but one as validation.

    Args:
        users: User of each row, in blocks: shape (rows,).

    Returns:
        int8 labels of shape (rows,). Users with fewer than 3 interactions are for training only.
    """
    start, length = _segments(users)
    from_end = length - 1 - (np.arange(len(users)) - start)
    labels = np.full(len(users), TRAIN, dtype=np.int8)
    labels[(from_end == 0) & (length >= 3)] = TEST
    labels[(from_end == 1) & (length >= 3)] = VALID
    return labels


def check_ratios(ratios: Sequence[float]) -> None:
    """Refuse shares that do not divide a log in three.

    Raises:
        UserError: If they are not three positive numbers that sum to 1.
    """
    if len(ratios) != 3 or any(share <= 0 for share in ratios) or abs(sum(ratios) - 1) > 1e-6:
        raise UserError(
            f"split_ratios={list(ratios)} have to be three positive shares with sum 1, e.g. [0.8, 0.1, 0.1]"
        )


def ratio_cuts(times: np.ndarray, ratios: Sequence[float], counts: np.ndarray | None = None) -> tuple[int, int]:
    """First time of validation and of test, so that the parts come nearest to the ratios.

    Args:
        times: Time of each interaction, any order: shape (rows,).
        ratios: Shares of train, validation and test; they sum to 1.
        counts: How many interactions each of `times` stands for, which are distinct and sorted then; one if None.

    Returns:
        Two time stamps; an interaction at a cut belongs to the later part, so a time stamp is never divided.

    Raises:
        UserError: If the ratios are no three shares, or some part would be empty.
    """
    check_ratios(ratios)
    distinct = times
    if counts is None:
        distinct, counts = np.unique(times, return_counts=True)
    if len(distinct) < 3:
        raise UserError(
            f"a time split needs at least 3 distinct timestamps, the log has {len(distinct)}; use split: leave_one_out"
        )
    before = np.cumsum(counts)[:-1]  # rows before a cut at distinct[1], distinct[2], …
    cut = [int(np.argmin(np.abs(before - share * counts.sum()))) for share in (ratios[0], ratios[0] + ratios[1])]
    first = min(cut[0], len(before) - 2)
    second = max(cut[1], first + 1)
    return int(distinct[first + 1]), int(distinct[second + 1])


def date_cuts(valid_from: str, test_from: str) -> tuple[int, int]:
    """Two ISO dates (UTC) as epoch milliseconds.

    Raises:
        UserError: If a date does not parse, or the two are not in order.
    """
    cuts = []
    for name, text in (("valid_from", valid_from), ("test_from", test_from)):
        try:
            moment = dt.datetime.fromisoformat(text)
        except ValueError as error:
            raise UserError(f"{name}={text!r} is no ISO date such as 2017-11-01") from error
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=dt.UTC)
        cuts.append(int(moment.timestamp() * 1000))
    if cuts[0] >= cuts[1]:
        raise UserError(f"valid_from={valid_from} has to be before test_from={test_from}")
    return cuts[0], cuts[1]


def by_time(times: np.ndarray, cuts: tuple[int, int]) -> np.ndarray:
    """Label interactions by two points in time.

    Args:
        times: Time of each interaction: shape (rows,).
        cuts: First time of validation and first time of test.

    Returns:
        int8 labels of shape (rows,).
    """
    return np.searchsorted(np.asarray(cuts), times, side="right").astype(np.int8)


def held_out_rows(
    log: pl.DataFrame, labels: np.ndarray, part: int, *, mask_history: bool, max_history: int | None = None
) -> pl.DataFrame:
    """One case for each held-out interaction that has a history.

    Args:
        log: Sorted log with `user`, `item` (numbers) and `timestamp`.
        labels: Label of each row; in each user's block they never decrease.
        part: `VALID` or `TEST`.
        mask_history: Whether the whole history is excluded from the ranking.
        max_history: Most recent items to keep in `history` (the mask always covers all of it).

    Returns:
        The table of `schema.ROWS`, by user and time. The history is everything the user did before,
        validation interactions before a test case included.
    """
    users, items = (log[name].to_numpy() for name in ("user", "item"))
    times = log["timestamp"].to_numpy()
    start, _ = _segments(users)
    position = np.arange(len(users)) - start
    at = np.flatnonzero((labels == part) & (position > 0))
    whole = position[at]
    shown = whole if max_history is None else np.minimum(whole, max_history)
    histories = to_lists(_windows(items, at - shown, shown), shown)
    if mask_history:
        rows = np.repeat(np.arange(len(at), dtype=np.int64), whole)
        pairs = rows << 32 | _windows(items, start[at], whole)
        pairs.sort()  # np.unique would hash them first, which takes ten times as long
        distinct = pairs[np.r_[True, pairs[1:] != pairs[:-1]][: len(pairs)]]
        masked = to_lists(distinct.astype(np.int32), np.bincount(distinct >> 32, minlength=len(at)))
    else:
        masked = to_lists(items[:0], np.zeros(len(at), dtype=np.int64))
    return pl.DataFrame(
        {
            "row": np.arange(len(at), dtype=np.int32),
            "user": users[at],
            "history": histories,
            "target": items[at],
            "masked": masked,
            "same_time": times[at] == times[at - 1],
        }
    )


def _windows(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate `values[start : start + length]` of all windows."""
    ends = np.cumsum(lengths)
    offsets = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)
    return values[np.repeat(starts, lengths) + offsets]


def train_sequences(log: pl.DataFrame, labels: np.ndarray) -> pl.DataFrame:
    """Each user's training interactions as one sequence.

    Args:
        log: Sorted log with `user`, `item`, `timestamp`, and possibly `rating` and `review`.
        labels: Label of each row.

    Returns:
        The table of `schema.TRAIN` with `times` (and `ratings` and `reviews` where the log has them), by user.
    """
    kept = log.filter(pl.Series(labels == TRAIN))
    users = kept["user"].to_numpy()
    first, lengths = blocks(users)
    names = {"item": "items", "timestamp": "times", "rating": "ratings", "review": "reviews"}
    lists = {of: to_lists(kept[name], lengths) for name, of in names.items() if name in kept.columns}
    return pl.DataFrame({"user": users[first], **lists, "first_target": np.zeros(len(first), dtype=np.int32)})

"""Which moments of a dataset get a reasoning trace."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from reasonrec.data_gen.reasoning.label_statistics import NO_TIME, Case
from reasonrec.data_gen.schema import Dataset
from reasonrec.data_gen.seeded_hash import seeded_hash


@dataclass(frozen=True)
class Selection:
    """Cases, and beside them what was chosen: teachers get the former, checks the latter as well.

    Attributes:
        cases: The cases.
        targets: Item that was chosen in each case (cases,).
        rows: Row in the table of the split: training sequence, or held-out case (cases,).
        positions: Place of the target in its training sequence; -1 in held-out cases (cases,).
    """

    cases: list[Case]
    targets: np.ndarray
    rows: np.ndarray
    positions: np.ndarray


def select_train(dataset: Dataset, n: int, *, min_history: int, max_history: int, seed: int) -> Selection:
    """Draw moments of the training sequences, spread evenly over the sequences.

    Args:
        dataset: The dataset; only its training sequences are read.
        n: How many; fewer if there are no more.
        min_history: Shortest history.
        max_history: Longest history; older items are cut off.
        seed: Another one draws other moments.
    """
    train = dataset.train
    lengths = train["items"].list.len().to_numpy().astype(np.int64)
    first = np.maximum(train["first_target"].to_numpy().astype(np.int64), min_history)
    counts = np.maximum(lengths - first, 0)
    row = np.repeat(np.arange(len(lengths)), counts)
    position = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
    users = train["user"].gather(row)
    drawn = seeded_hash(seed, users, pl.Series(row), pl.Series(position))
    order = np.lexsort((drawn, row))
    turn = np.arange(len(row)) - (np.cumsum(counts) - counts)[row[order]]  # 0: the first one drawn of its sequence
    chosen = order[np.lexsort((drawn[order], turn))][:n]
    chosen = chosen[np.lexsort((position[chosen], row[chosen]))]
    items, times = train["items"], train["times"] if "times" in train.columns else None
    as_set = dataset.facts["order"] == "set"
    cases, targets = [], []
    for r, p, u in zip(row[chosen].tolist(), position[chosen].tolist(), users.gather(chosen).to_list(), strict=True):
        sequence = items[r].to_numpy()
        if as_set:  # a basket has no order: any of its items may be the one to find
            sequence = np.random.default_rng([seed, r, p]).permutation(sequence)
        history = tuple(int(i) for i in sequence[max(0, p - max_history) : p])
        cases.append(Case(f"train/{r}/{p}", u, history, NO_TIME if times is None else int(times[r][p])))
        targets.append(int(sequence[p]))
    return Selection(cases, np.array(targets, dtype=np.int64), row[chosen], position[chosen])


def select_valid(dataset: Dataset, n: int, *, max_history: int, seed: int) -> Selection:
    """Draw validation cases, on which the traces are tested and never trained.

    Args:
        dataset: The dataset.
        n: How many; fewer if there are no more.
        max_history: Longest history; older items are cut off.
        seed: Another one draws other cases.
    """
    valid = dataset.rows("valid")
    rows = np.arange(valid.height)
    chosen = np.sort(np.argsort(seeded_hash(seed, valid["user"], pl.Series(rows)), kind="stable")[:n])
    picked = valid[chosen]
    # Leave-one-out: others go on after this user's case, whose own time is at least that of the newest training item.
    newest: dict[int, int] = {}
    if dataset.facts["split"] == "leave_one_out" and "times" in dataset.train.columns:
        times = dataset.train.group_by("user").agg(pl.col("times").list.max().max())
        newest = {user: time + 1 for user, time in times.iter_rows()}
    cases = [
        Case(f"valid/{row}", user, tuple(history[-max_history:]), newest.get(user, NO_TIME))
        for row, user, history in zip(chosen.tolist(), picked["user"], picked["history"].to_list(), strict=True)
    ]
    return Selection(cases, picked["target"].to_numpy().astype(np.int64), chosen, np.full(len(chosen), -1))

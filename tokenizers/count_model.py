"""How well codes can be guessed: a model that counts, over the whole path of an item's codes.

    p(v | h) = Π_l Σ_m w_{l,m} · p_m(code_l | codes before it, h)

At each level three ways to count share the probability among the legal children of the node, masked items left out:
how often the items below a child are train targets; how often they follow an item with the last one's first code; how
recently they stand in the history. The weights of each level are fitted by expectation maximisation. An item's loss is
in nats and counts every code, the one that tells equal items apart included: a first code that is easy to guess is
worth nothing if the others pay for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse

RECENT = 10
ROUNDS = 50
_SMALLEST = 0.5  # what an item without a train target counts


@dataclass(frozen=True)
class Counted:
    """What is counted in train.

    Attributes:
        counts: (items,) how often each item is a target.
        pairs: Items that follow each other in a sequence: the earlier ones (pairs,), and the later ones.
    """

    counts: NDArray[np.integer]
    pairs: tuple[NDArray[np.int64], NDArray[np.int64]]


def losses(
    codes: NDArray[np.integer], train: Counted, rows: pl.DataFrame, fitted: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Loss of each row's target.

    Args:
        codes: (items, levels) codes; -1 pads the end of shorter items.
        train: What is counted.
        rows: Held-out rows with `history`, `target` and `masked`.
        fitted: (rows,) the rows that the weights are fitted on.

    Returns:
        (rows,) nats; judge by those that are not fitted.
    """
    prefixes = _prefixes(codes)
    weights = train.counts + _SMALLEST
    first = prefixes[0]
    total = np.zeros(rows.height)
    before = np.zeros(len(codes), dtype=np.int64)  # the node above: at first the root, of all items
    for prefix in prefixes:
        children = int(prefix.max()) + 1
        follows = sparse.coo_array(
            (np.ones(len(train.pairs[0])), (first[train.pairs[0]], prefix[train.pairs[1]])),
            shape=(int(first.max()) + 1, children),
        ).tocsr()
        ways = np.array(
            [
                _ways(row, prefix, before, weights, follows, first, children)
                for row in zip(rows["history"], rows["target"], rows["masked"], strict=True)
            ]
        )  # (rows, 3) probability of the target's child, by each way to count
        total -= np.log(ways @ _fit(ways[fitted]))
        before = prefix
    return total


def _prefixes(codes: NDArray[np.integer]) -> list[NDArray[np.int64]]:
    """For each level the number of every item's node, the same for items whose codes agree so far."""
    return [
        np.unique(codes[:, : level + 1], axis=0, return_inverse=True)[1].ravel().astype(np.int64)
        for level in range(codes.shape[1])
    ]


def _ways(
    row: tuple[pl.Series, int, pl.Series],
    prefix: NDArray[np.int64],
    before: NDArray[np.int64],
    weights: NDArray[np.floating],
    follows: sparse.csr_array,
    first: NDArray[np.int64],
    children: int,
) -> tuple[float, float, float]:
    history, target, masked = row
    below = before == before[target]
    below[masked.to_numpy()] = False
    below[target] = True
    alive = np.zeros(children)
    alive[prefix[below]] = 1
    if alive.sum() == 1:  # nothing to guess
        return 1.0, 1.0, 1.0
    child = prefix[target]
    popular = np.bincount(prefix[below], weights[below], minlength=children)
    by_popularity = float(popular[child] / popular.sum())
    recent = history.to_numpy()[-RECENT:]
    if not len(recent):
        return by_popularity, by_popularity, by_popularity
    markov = follows[[first[recent[-1]]], :].toarray()[0] * alive
    decay = 1.0 / np.arange(len(recent), 0, -1)
    copied = np.bincount(prefix[recent], decay, minlength=children) * alive

    def share(of: NDArray[np.floating]) -> float:
        return float(of[child] / of.sum()) if of.sum() else by_popularity

    return by_popularity, share(markov), share(copied)


def _fit(ways: NDArray[np.float64]) -> NDArray[np.float64]:
    """The weights (3,) under which the rows are likeliest; popularity keeps a hundredth, for it excludes nothing."""
    weights = np.full(3, 1 / 3)
    for _ in range(ROUNDS if len(ways) else 0):
        shares = ways * weights
        weights = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)
    weights[0] = max(weights[0], 0.01)
    return weights / weights.sum()

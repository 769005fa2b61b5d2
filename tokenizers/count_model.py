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
_CELLS = 2_000_000  # of rows and items that are held at a time
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


class CountModel:
    """The model over the codes of a catalogue.

    Args:
        codes: (items, levels) codes; -1 pads the end of shorter items.
        train: What is counted.
        rows: Held-out rows with `history`, `target` and `masked`, on which the weights of each level are fitted; all
            ways to count have the same weight if there is none.
    """

    def __init__(self, codes: NDArray[np.integer], train: Counted, rows: pl.DataFrame) -> None:
        self._item_weights = train.counts + _SMALLEST
        self._levels = _levels(codes, train.pairs)
        self._weights = [_fit(ways) for ways in self._of_targets(rows)]

    def losses(self, rows: pl.DataFrame) -> NDArray[np.float64]:
        """Loss of each row's target.

        Args:
            rows: As those that it was fitted on, and others.

        Returns:
            (rows,) nats.
        """
        ways = self._of_targets(rows)  # (levels, rows, 3)
        return -np.log(np.einsum("lrw,lw->lr", ways, self._weights)).sum(axis=0)

    def log_probs(self, rows: pl.DataFrame) -> NDArray[np.float32]:
        """Log-probability of every item (rows, items), -inf where it is masked. A row's target is of no account."""
        parts = [np.zeros((0, len(self._item_weights)), dtype=np.float32)]
        for part in rows.iter_slices(self._step):
            allowed, recent = self._allowed(part), self._recent(part)
            total = np.where(allowed, 0.0, -np.inf)  # (rows, items)
            with np.errstate(divide="ignore"):  # of children without an item that is allowed
                for level, weights in zip(self._levels, self._weights, strict=True):
                    children = np.log(np.tensordot(weights, self._shares(level, allowed, recent), 1))
                    total += children[:, level.prefix]
            parts.append(total.astype(np.float32))
        return np.concatenate(parts)

    @property
    def _step(self) -> int:
        return max(1, _CELLS // len(self._item_weights))

    def _of_targets(self, rows: pl.DataFrame) -> NDArray[np.float64]:
        """The probability of the target's child, by each way to count (levels, rows, 3)."""
        parts = [np.zeros((len(self._levels), 0, 3))]
        for part in rows.iter_slices(self._step):
            allowed, recent = self._allowed(part), self._recent(part)
            each, target = np.arange(part.height), part["target"].to_numpy()
            allowed[each, target] = True
            found = [self._shares(level, allowed, recent)[:, each, level.prefix[target]].T for level in self._levels]
            parts.append(np.stack(found))
        return np.concatenate(parts, axis=1)

    def _allowed(self, rows: pl.DataFrame) -> NDArray[np.bool_]:
        """Which items are not masked (rows, items)."""
        allowed = np.ones((rows.height, len(self._item_weights)), dtype=bool)
        masked = rows.select(pl.int_range(pl.len()).alias("row"), "masked").explode("masked").drop_nulls()
        allowed[masked["row"].to_numpy(), masked["masked"].to_numpy()] = False
        return allowed

    def _recent(self, rows: pl.DataFrame) -> _Recent:
        ends = rows["history"].list.tail(RECENT).to_list()
        lengths = np.array([len(end) for end in ends])
        items = np.array([item for end in ends for item in end], dtype=np.int64)
        places = np.repeat(np.arange(len(ends)), lengths)
        from_end = np.array([place for length in lengths for place in range(length, 0, -1)], dtype=np.float64)
        weights = sparse.coo_array((1 / from_end, (places, items)), shape=(len(ends), len(self._item_weights))).tocsr()
        return _Recent(np.array([end[-1] if end else -1 for end in ends], dtype=np.int64), weights)

    def _shares(self, level: _Level, allowed: NDArray[np.bool_], recent: _Recent) -> NDArray[np.float64]:
        """Probability of each child under its parent, by popularity, succession and recency (3, rows, children)."""
        popular = (allowed * self._item_weights) @ level.items
        by_popularity = level.share(popular, np.zeros_like(popular))
        alive = popular > 0
        firsts = np.where(recent.last >= 0, self._levels[0].prefix[recent.last], 0)
        markov = level.follows[firsts].toarray() * (alive & (recent.last >= 0)[:, None])
        copied = (recent.weights @ level.items).toarray() * alive
        return np.stack([by_popularity, level.share(markov, by_popularity), level.share(copied, by_popularity)])


@dataclass(frozen=True)
class _Recent:
    """What stands at the ends of histories.

    Attributes:
        last: (rows,) the last item, -1 without one.
        weights: (rows, items) one for the last item, a half for the one before it, and so on.
    """

    last: NDArray[np.int64]
    weights: sparse.csr_array


@dataclass(frozen=True)
class _Level:
    """The nodes that a level of codes leads to.

    Attributes:
        prefix: (items,) the node of each item.
        items: (items, children) the same as a matrix of ones.
        parent: (children,) the node above each.
        siblings: (children, parents) the same as a matrix of ones.
        follows: (first codes, children) how often a node's items follow an item with that first code.
    """

    prefix: NDArray[np.int64]
    items: sparse.csr_array
    parent: NDArray[np.int64]
    siblings: sparse.csr_array
    follows: sparse.csr_array

    def share(self, of: NDArray[np.floating], otherwise: NDArray[np.floating]) -> NDArray[np.float64]:
        """Each child's share of what it and its siblings have (rows, children); `otherwise` where that is nothing."""
        together = (of @ self.siblings)[:, self.parent]
        return np.where(together > 0, of / np.where(together > 0, together, 1), otherwise)


def _levels(codes: NDArray[np.integer], pairs: tuple[NDArray[np.int64], NDArray[np.int64]]) -> list[_Level]:
    levels: list[_Level] = []
    before = np.zeros(len(codes), dtype=np.int64)  # the node above: at first the root, of all items
    for depth in range(codes.shape[1]):
        prefix = np.unique(codes[:, : depth + 1], axis=0, return_inverse=True)[1].ravel().astype(np.int64)
        children = int(prefix.max()) + 1
        first = levels[0].prefix if levels else prefix
        follows = sparse.coo_array(
            (np.ones(len(pairs[0])), (first[pairs[0]], prefix[pairs[1]])), shape=(int(first.max()) + 1, children)
        ).tocsr()
        parent = np.zeros(children, dtype=np.int64)
        parent[prefix] = before
        levels.append(_Level(prefix, _ones(prefix), parent, _ones(parent), follows))
        before = prefix
    return levels


def _ones(columns: NDArray[np.int64]) -> sparse.csr_array:
    """A matrix with a one in each row, at these columns."""
    return sparse.csr_array((np.ones(len(columns)), columns, np.arange(len(columns) + 1)))


def _fit(ways: NDArray[np.float64]) -> NDArray[np.float64]:
    """The weights (3,) under which the rows are likeliest; popularity keeps a hundredth, for it excludes nothing."""
    weights = np.full(3, 1 / 3)
    for _ in range(ROUNDS if len(ways) else 0):
        shares = ways * weights
        weights = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)
    weights[0] = max(weights[0], 0.01)
    return weights / weights.sum()

"""Credit for items that the same people choose, which codes made from text may not know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from reasonrec.rewards.registry import reward
from reasonrec.tokenizers.errors import UserError


class CoVisits:
    """How much two items are chosen together, in [0, 1].

    C[a, b] sums 1/|i − j| over the pairs of places i, j at most `window` apart in one sequence that hold a and b,
    a ≠ b; in sets, where order means nothing, each pair weighs 1/(size − 1). The similarity is C[a, b] / √(d_a·d_b)
    with d_a = Σ_b C[a, b], so that popular items are not close to everything (the symmetrically normalised adjacency).

    Args:
        items: Item numbers of all train sequences, one after another (n,). Held-out interactions have no place here.
        sequence: Number of the sequence of each of them (n,), not decreasing.
        n_items: Size of the catalogue.
        window: Largest distance of a pair; None for sets.

    Raises:
        UserError: If the arrays do not fit.
    """

    def __init__(self, items: ArrayLike, sequence: ArrayLike, n_items: int, window: int | None = 10) -> None:
        items, sequence = np.asarray(items, dtype=np.int64), np.asarray(sequence, dtype=np.int64)
        if items.shape != sequence.shape or items.ndim != 1:
            raise UserError(f"items has shape {items.shape} and sequence {sequence.shape}: pass two equal rows")
        if len(items) and (items.min() < 0 or items.max() >= n_items or (np.diff(sequence) < 0).any()):
            raise UserError(
                f"items are {items.min()}..{items.max()}, allowed is 0..{n_items - 1}; and sequence must not fall"
            )
        if window is not None and window < 1:
            raise UserError(f"window={window}: has to be at least 1, or None for sets")
        together = (
            _in_sets(items, sequence, n_items) if window is None else _in_order(items, sequence, n_items, window)
        )
        degree = np.asarray(together.sum(axis=1)).reshape(-1)
        scale = sparse.diags_array(1 / np.sqrt(np.where(degree > 0, degree, 1)))
        self.matrix = (scale @ together @ scale).tocsr()
        self.n_items = n_items
        nearest = self.matrix.max(axis=1)
        self.nearest: NDArray[np.float64] = np.asarray(nearest.todense(), dtype=np.float64).reshape(-1)

    def __call__(self, left: ArrayLike, right: ArrayLike) -> NDArray[np.float64]:
        """Similarity of pairs of items; 0 for an item with itself.

        Args:
            left: Item numbers (pairs,).
            right: Item numbers (pairs,).

        Returns:
            Similarities (pairs,), in [0, 1].
        """
        left, right = np.asarray(left, dtype=np.int64), np.asarray(right, dtype=np.int64)
        if not len(left):
            return np.zeros(0)
        return np.asarray(self.matrix[left, right], dtype=np.float64).reshape(-1)


@reward(name="collaborative", requires=("similarity",))
def collaborative(
    *,
    predicted_items: Sequence[int],
    target_items: Sequence[int],
    similarity: CoVisits,
    ceiling: float = 0.5,
    **_: Any,
) -> list[float]:
    """1 for the target; for another item, its co-visitation with the target, at most `ceiling`; 0 without an answer.

    The similarity is taken relative to the target's nearest neighbour, which gets `ceiling`: on the raw scale one
    target's neighbours would all look like misses. An exact hit always wins by 1 − `ceiling` at least.

    Args:
        predicted_items: Numbers of the recommended items, -1 without a valid answer.
        target_items: Numbers of the targets.
        similarity: Co-visitation in the train sequences.
        ceiling: Most that another item can get, in [0, 1).

    Returns:
        One reward per completion, in [0, 1].

    Raises:
        UserError: If `ceiling` is not in [0, 1).
    """
    if not 0 <= ceiling < 1:
        raise UserError(f"ceiling={ceiling}: has to be at least 0 and below 1, so that an exact hit wins")
    predicted, target = np.asarray(predicted_items, dtype=np.int64), np.asarray(target_items, dtype=np.int64)
    result = (predicted == target).astype(np.float64)
    other = np.flatnonzero((predicted >= 0) & (predicted != target))
    nearest = similarity.nearest[target[other]]
    close = similarity(predicted[other], target[other])
    result[other] = ceiling * np.divide(close, nearest, out=np.zeros_like(close), where=nearest > 0)
    values: list[float] = result.tolist()
    return values


def _in_order(items: NDArray[np.int64], sequence: NDArray[np.int64], n_items: int, window: int) -> sparse.csr_array:
    total = sparse.csr_array((n_items, n_items), dtype=np.float64)
    for gap in range(1, min(window, max(len(items) - 1, 0)) + 1):
        near = (sequence[gap:] == sequence[:-gap]) & (items[gap:] != items[:-gap])
        pair = (items[:-gap][near], items[gap:][near])
        total = total + sparse.coo_array((np.full(len(pair[0]), 1 / gap), pair), shape=total.shape).tocsr()
    return (total + total.T).tocsr()


def _in_sets(items: NDArray[np.int64], sequence: NDArray[np.int64], n_items: int) -> sparse.csr_array:
    _, row = np.unique(sequence, return_inverse=True)
    row = row.reshape(-1)
    size = np.bincount(row) if len(row) else np.zeros(0, dtype=np.int64)
    once = sparse.coo_array((np.ones(len(row)), (row, items)), shape=(len(size), n_items)).tocsr()
    weight = sparse.diags_array(1 / np.maximum(size - 1, 1)) if len(size) else sparse.csr_array((0, 0))
    together = (once.T @ weight @ once).tocsr()
    return (together - sparse.diags_array(together.diagonal())).tocsr()

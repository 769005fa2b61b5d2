"""From scores to ranked lists: one rule for ties, masks and items without a score."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from reasonrec.rewards.metrics import Lists, flatten
from reasonrec.tokenizers.errors import UserError

KS = (1, 5, 10, 20)  # lengths of the lists that an evaluation reports
_CHUNK_CELLS = 4_000_000


def tie_order(popularity: ArrayLike) -> NDArray[np.int64]:
    """Items by train popularity, then item number: the order of equal scores (n_items,)."""
    return np.argsort(-np.asarray(popularity, dtype=np.float64), kind="stable")


def chunk_rows(n_items: int) -> int:
    """How many rows of dense float64 scores to hold at a time (about 32 MB)."""
    return max(1, _CHUNK_CELLS // max(n_items, 1))


def top_k(
    scores: ArrayLike, k: int, popularity: ArrayLike, exclude: Lists | None = None, *, fill: bool = False
) -> NDArray[np.int32]:
    """Rank the catalogue by score, then train popularity, then item number.

    Args:
        scores: Scores (rows, n_items), higher is better; `-inf` marks an item that has no score.
        k: Length of the lists.
        popularity: Train popularity of each item (n_items,).
        exclude: Items of each row that must not appear.
        fill: Append items without a score in order of popularity; otherwise they do not appear.

    Returns:
        Item numbers (rows, k), -1 where a list is shorter.

    Raises:
        UserError: If a score is NaN (an order by it would be arbitrary), or the shapes do not fit.
    """
    scores = np.asarray(scores)
    order = tie_order(popularity)
    if scores.ndim != 2 or scores.shape[1] != len(order):
        raise UserError(f"scores have shape {scores.shape}, expected (rows, {len(order)}): one column per item")
    if exclude is None:
        hidden, hidden_row = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    else:
        hidden, hidden_row, lengths = flatten(exclude)
        if len(lengths) != len(scores):
            raise UserError(f"{len(lengths)} rows of excluded items for {len(scores)} rows of scores")
    position = np.empty(len(order), dtype=np.int64)
    position[order] = np.arange(len(order))
    result = np.full((len(scores), k), -1, dtype=np.int32)
    step = chunk_rows(len(order))
    for start in range(0, len(scores), step):
        # Columns in tie order: from here on "earlier column" is the tie rule.
        block = scores[start : start + step][:, order].astype(np.float64)
        if np.isnan(block).any():
            raise UserError("scores contain NaN: the model that made them has diverged, train it again")
        if fill:
            _fill(block)
        here = slice(*np.searchsorted(hidden_row, [start, start + step]))
        block[hidden_row[here] - start, position[hidden[here]]] = -np.inf
        result[start : start + step, : min(k, block.shape[1])] = _best(block, min(k, block.shape[1]), order)
    return result


def rank_rows(
    scores: Callable[[pl.DataFrame], ArrayLike],
    rows: pl.DataFrame,
    k: int,
    popularity: ArrayLike,
    *,
    fill: bool = False,
) -> NDArray[np.int32]:
    """Rank the catalogue for held-out rows, some of them at a time.

    Args:
        scores: Gives the scores of all items for rows, (rows, n_items).
        rows: The rows, with `masked`.
        k: Length of the lists.
        popularity: Train popularity of each item (n_items,).
        fill: See `top_k`.

    Returns:
        Item numbers (rows, k), -1 where a list is shorter.
    """
    parts = [np.empty((0, k), dtype=np.int32)]
    step = 4 * chunk_rows(len(np.asarray(popularity)))
    for start in range(0, rows.height, step):
        block = rows[start : start + step]
        parts.append(top_k(scores(block), k, popularity, block["masked"], fill=fill))
    return np.concatenate(parts)


def _fill(block: NDArray[np.float64]) -> None:
    """Give items without a score distinct scores below all others, in the order of the columns (in place)."""
    missing = np.isneginf(block)
    lowest = np.where(missing, np.inf, block).min(axis=1)
    lowest = np.where(np.isinf(lowest), 0.0, lowest)
    block[:] = np.where(missing, lowest[:, None] - 1.0 - np.arange(block.shape[1]), block)


def _best(block: NDArray[np.float64], k: int, order: NDArray[np.int64]) -> NDArray[np.int64]:
    """The k best columns of each row; equal scores by column. A sort of k entries instead of all of them."""
    n = block.shape[1]
    threshold = np.partition(block, n - k, axis=1)[:, n - k, None]
    above, level = block > threshold, block == threshold
    room = k - above.sum(axis=1, keepdims=True)
    chosen = above | (level & (np.cumsum(level, axis=1) <= room))
    columns = np.nonzero(chosen)[1].reshape(len(block), k)
    values = np.take_along_axis(block, columns, axis=1)
    by_score = np.argsort(-values, axis=1, kind="stable")
    columns = np.take_along_axis(columns, by_score, axis=1)
    values = np.take_along_axis(values, by_score, axis=1)
    return np.where(np.isneginf(values), -1, order[columns])

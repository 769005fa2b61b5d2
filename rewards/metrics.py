"""Ranking metrics: the one implementation that rewards and evaluation share.

A ranking is an integer array (rows, K) of item numbers, best first; -1 means "no item here". A row has one
target, and a hit is the target *item*. Every metric is returned per row, so that the caller can take means,
slices and intervals.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from reasonrec.tokenizers.errors import UserError

IntArray = NDArray[np.integer]
FloatArray = NDArray[np.float64]
Lists = Sequence[ArrayLike] | pl.Series


def flatten(lists: Lists) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Flatten one list per row.

    Args:
        lists: A polars list column, or a sequence of integer arrays; empty lists are fine.

    Returns:
        Values (n,), the row of each value (n,), and the length of each list (rows,).
    """
    if isinstance(lists, pl.Series):
        lengths = lists.list.len().fill_null(0).to_numpy().astype(np.int64)
        values = lists.filter(lists.list.len() > 0).list.explode().to_numpy().astype(np.int64)
    else:
        lengths = np.array([len(np.atleast_1d(np.asarray(row))) for row in lists], dtype=np.int64)
        parts = [np.atleast_1d(np.asarray(row, dtype=np.int64)) for row in lists]
        values = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    return values, np.repeat(np.arange(len(lengths)), lengths), lengths


def _check(ranking: ArrayLike, target: ArrayLike) -> tuple[IntArray, IntArray]:
    ranking, target = np.asarray(ranking), np.asarray(target)
    if ranking.ndim != 2 or target.shape != ranking.shape[:1]:
        raise UserError(f"ranking has shape {ranking.shape} and target {target.shape}: pass (rows, K) and (rows,)")
    return ranking, target


def rank_of_target(ranking: ArrayLike, target: ArrayLike) -> NDArray[np.int64]:
    """Position of the target in each list.

    Args:
        ranking: Item numbers (rows, K), best first, -1 where there is no item.
        target: Item number of each row (rows,).

    Returns:
        Rank from 1 on, 0 where the list misses the target (rows,). An empty place counts as a place, and a
        target that stands twice counts at its first place.

    Raises:
        UserError: If the shapes do not fit.
    """
    ranking, target = _check(ranking, target)
    if ranking.shape[1] == 0:
        return np.zeros(len(target), dtype=np.int64)
    hit = (ranking == target[:, None]) & (target >= 0)[:, None]
    return np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, 0).astype(np.int64)


def hit_rate(ranks: ArrayLike, k: int) -> FloatArray:
    """HR@k per row: 1 if the target is among the first k, else 0.

    Args:
        ranks: Ranks by `rank_of_target`, 0 for a miss.
        k: Length of the list that counts.
    """
    ranks = np.asarray(ranks)
    return ((ranks > 0) & (ranks <= k)).astype(np.float64)


def ndcg(ranks: ArrayLike, k: int) -> FloatArray:
    """NDCG@k per row with a single relevant item: 1/log2(rank+1) if rank ≤ k, else 0 (its ideal DCG is 1).

    Args:
        ranks: Ranks by `rank_of_target`, 0 for a miss.
        k: Length of the list that counts.
    """
    ranks = np.asarray(ranks)
    return hit_rate(ranks, k) / np.log2(np.maximum(ranks, 1) + 1)


def reciprocal_rank(ranks: ArrayLike) -> FloatArray:
    """1/rank per row over the whole list, 0 for a miss; its mean is the MRR.

    Args:
        ranks: Ranks by `rank_of_target`, 0 for a miss.
    """
    ranks = np.asarray(ranks)
    return (ranks > 0) / np.maximum(ranks, 1)


def per_row(ranking: ArrayLike, target: ArrayLike, ks: Iterable[int] = (1, 5, 10, 20)) -> dict[str, FloatArray]:
    """All metrics of all rows.

    Args:
        ranking: Item numbers (rows, K), best first, -1 where there is no item.
        target: Item number of each row (rows,).
        ks: Cut-offs.

    Returns:
        `hr@k` and `ndcg@k` for each k, and `mrr`, each (rows,).

    Example:
        >>> {name: float(value[0]) for name, value in per_row([[7, 3, 9]], [3], ks=(1, 3)).items()}
        {'hr@1': 0.0, 'ndcg@1': 0.0, 'hr@3': 1.0, 'ndcg@3': 0.6309297535714575, 'mrr': 0.5}
    """
    ranks = rank_of_target(ranking, target)
    result: dict[str, FloatArray] = {}
    for k in ks:
        result[f"hr@{k}"] = hit_rate(ranks, k)
        result[f"ndcg@{k}"] = ndcg(ranks, k)
    result["mrr"] = reciprocal_rank(ranks)
    return result


def concordance(liked: Sequence[ArrayLike], disliked: Sequence[ArrayLike]) -> FloatArray:
    """Share of each row's pairs (liked, disliked) in which the liked item has the higher score; a tie counts half.

    It is the area under the ROC curve of each row (Hanley and McNeil 1982, doi 10.1148/radiology.143.1.7063747): 0.5
    for scores that say nothing.

    Args:
        liked: Scores of the items that each row's user liked; -inf for an item without a score.
        disliked: Scores of those they disliked.

    Returns:
        One share per row (rows,); NaN where there is no pair.

    Raises:
        UserError: If the rows differ in number, or a score is NaN.

    Example:
        >>> concordance([[2.0, 1.0], [0.5]], [[1.0], []]).tolist()
        [0.75, nan]
    """
    if len(liked) != len(disliked):
        raise UserError(f"{len(liked)} rows of liked items and {len(disliked)} of disliked ones: give both for each")
    result = np.full(len(liked), np.nan)
    for row, lists in enumerate(zip(liked, disliked, strict=True)):
        high, low = (np.asarray(scores, dtype=np.float64) for scores in lists)
        if np.isnan(high).any() or np.isnan(low).any():
            raise UserError(f"row {row} has a score that is NaN: the model that made it has diverged, train it again")
        if high.size and low.size:
            result[row] = (high[:, None] > low).mean() + (high[:, None] == low).mean() / 2
    return result


def coverage(ranking: ArrayLike, n_items: int, k: int) -> float:
    """Share of the catalogue that is recommended to anybody within the first k places."""
    shown = np.unique(np.asarray(ranking)[:, :k])
    return float(((shown >= 0) & (shown < n_items)).sum() / n_items)


def valid_ratio(ranking: ArrayLike, n_items: int, masked: Lists | None = None) -> float:
    """Share of the list entries that are recommendable: in the catalogue, once in their list, not masked.

    Empty places (-1) are no entries. Anything below 1.0 is a bug of whatever made the list.

    Args:
        ranking: Item numbers (rows, K).
        n_items: Size of the catalogue.
        masked: Items that each row must not show.
    """
    ranking = np.asarray(ranking)
    entries = ranking != -1
    if not entries.any():
        return 1.0
    valid = entries & (ranking >= 0) & (ranking < n_items)
    valid &= _first_occurrence(ranking)
    if masked is not None:
        values, row, _ = flatten(masked)
        # One number for each (row, item), so that membership is one sorted look-up.
        forbidden = row * n_items + values
        here = np.arange(len(ranking))[:, None] * n_items + np.where(valid, ranking, 0)
        valid &= ~np.isin(here, forbidden)
    return float(valid.sum() / entries.sum())


def _first_occurrence(ranking: IntArray) -> NDArray[np.bool_]:
    """Whether each entry is the first of its value in its row."""
    order = np.argsort(ranking, axis=1, kind="stable")
    ordered = np.take_along_axis(ranking, order, axis=1)
    new = np.ones(ranking.shape, dtype=bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = np.empty_like(new)
    np.put_along_axis(first, order, new, axis=1)
    return first


def to_sid_level(
    ranking: ArrayLike, target: ArrayLike, sid_of_item: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rewrite a ranking of items as one of semantic IDs, for tables of papers that count those.

    Items that share an ID become one entry, at the place of the first; the list closes up behind it.

    Args:
        ranking: Item numbers (rows, K), -1 where there is no item.
        target: Item number of each row (rows,).
        sid_of_item: Number of the semantic ID of each item (n_items,); items that share an ID share the
            number.

    Returns:
        The ranking of IDs (rows, K), padded with -1 at the end, and the target IDs (rows,).
    """
    ranking, target = _check(ranking, target)
    sid_of_item = np.asarray(sid_of_item)
    sids = np.where(ranking >= 0, sid_of_item[np.maximum(ranking, 0)], -1).astype(np.int64)
    dropped = (sids < 0) | ~_first_occurrence(sids)
    order = np.argsort(dropped, axis=1, kind="stable")
    compact = np.take_along_axis(np.where(dropped, -1, sids), order, axis=1)
    return compact, sid_of_item[target].astype(np.int64)

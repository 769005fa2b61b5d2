"""Fusion of rankers: a weighted sum of what each says, scaled for every user, with weights from validation.

    s(v) = Σ_e w_e · minmax_e(v) − p · [v is in the history]

An expert's scores are scaled to 0..1 over what it may rank for a user. One that leaves items without a score counts
events, such as co-visitation: the square root of its scores is taken, and what has none is at 0. Weights sum to one;
they and the penalty p are chosen by NDCG@10 on validation rows, from a grid. Source: LIME-Rec, arXiv 2608.01260.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from reasonrec.recipes.rankers.base import Ranker
from reasonrec.recipes.rankers.model import may_repeat
from reasonrec.recipes.rankers.top_k import rank_rows, tie_order
from reasonrec.rewards.metrics import flatten, ndcg
from reasonrec.tokenizers.errors import UserError

PENALTIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
STEP = 0.05
CELLS = 30_000_000  # scores of an expert that weights are chosen on, at most
K = 10


@dataclass
class Fused:
    """Several rankers as one.

    Attributes:
        experts: The rankers.
        weights: Weight of each, in all 1.
        penalty: Taken off items of the history, where those may be recommended again.
        popularity: How often each item is a train target (n_items,): equal scores rank by it.
        name: Name in the table.
        tried: Validation NDCG@10 of the weights that were kept.
    """

    experts: Sequence[Ranker]
    weights: Sequence[float]
    penalty: float
    popularity: NDArray[np.int64]
    name: str
    tried: float = 0.0

    @classmethod
    def fit(
        cls, experts: Sequence[Ranker], valid: pl.DataFrame, popularity: NDArray[np.int64], name: str, *, seed: int = 0
    ) -> Fused:
        """Choose weights and penalty on validation rows.

        Args:
            experts: The rankers, none of which learned from these rows.
            valid: Validation rows; a seeded sample of them where the catalogue is large.
            popularity: How often each item is a train target (n_items,).
            name: Name in the table.
            seed: Seed of the sample.

        Raises:
            UserError: If there is nothing to fuse, or no validation row.
        """
        if not experts or not valid.height:
            raise UserError(
                f"{name}: {len(experts)} rankers and {valid.height} validation rows: weights are chosen on validation "
                "rows of at least one ranker; turn fuse off, or choose a split that has a validation part"
            )
        most = max(1, CELLS // len(popularity))
        if valid.height > most:
            valid = valid.sample(most, seed=seed)
        scaled = np.stack([_scaled(expert, valid, len(popularity)) for expert in experts])
        judge = _Judge(scaled, valid, popularity)
        repeats = may_repeat(valid)
        coarse = list(itertools.product(_simplex(len(experts), 2 * STEP), PENALTIES if repeats else (0.0,)))
        weights, penalty = max(coarse, key=lambda choice: judge(*choice))
        around = [
            near for near in _simplex(len(experts), STEP) if np.abs(np.subtract(near, weights)).max() <= STEP + 1e-9
        ]
        weights = max([weights, *around], key=lambda near: judge(near, penalty))
        return cls(experts, weights, penalty, popularity, name, judge(weights, penalty))

    def _scores(self, rows: pl.DataFrame) -> NDArray[np.float32]:
        """(rows, n_items)."""
        total = np.zeros((rows.height, len(self.popularity)), dtype=np.float32)
        for expert, weight in zip(self.experts, self.weights, strict=True):
            if weight:
                total += weight * _scaled(expert, rows, len(self.popularity))
        if self.penalty:
            items, row, _ = flatten(rows["history"])
            total[row, items] -= self.penalty  # once, however often it stands there
        return total

    def rank(self, rows: pl.DataFrame, k: int) -> NDArray[np.int32]:
        """See `Ranker`."""
        return rank_rows(self._scores, rows, k, self.popularity)

    def score(self, rows: pl.DataFrame, items: NDArray[np.integer]) -> NDArray[np.float32]:
        """See `Ranker`."""
        return np.take_along_axis(self._scores(rows), items.astype(np.int64), axis=1)

    def __str__(self) -> str:
        """Weights and penalty, for people."""
        parts = [f"{w:.2f} × {e.name}" for w, e in zip(self.weights, self.experts, strict=True)]
        seen = f", − {self.penalty:g} for what was had" if self.penalty else ""
        return f"{' + '.join(parts)}{seen}; chosen on validation (NDCG@{K} {self.tried:.4f})"


class _Judge:
    """NDCG@10 of weights and a penalty on the same rows."""

    def __init__(self, scaled: NDArray[np.float32], rows: pl.DataFrame, popularity: NDArray[np.int64]) -> None:
        order = tie_order(popularity)
        self.scaled = scaled[:, :, order]  # an earlier column wins a tie
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        self.target = place[rows["target"].to_numpy()]
        items, row, _ = flatten(rows["history"])
        self.history = (row, place[items])
        items, row, _ = flatten(rows["masked"])
        self.masked = (row, place[items])

    def __call__(self, weights: Sequence[float], penalty: float) -> float:
        total = np.tensordot(np.asarray(weights, dtype=np.float32), self.scaled, axes=1)  # (rows, n_items)
        total[self.history] -= np.float32(penalty)
        rows = np.arange(len(total))
        mine = total[rows, self.target][:, None]
        total[self.masked] = -np.inf
        before = np.arange(total.shape[1]) < self.target[:, None]
        ranks = 1 + ((total > mine) | ((total == mine) & before)).sum(axis=1)
        return float(ndcg(ranks, K).mean())


def _scaled(expert: Ranker, rows: pl.DataFrame, n_items: int) -> NDArray[np.float32]:
    """An expert's scores of the whole catalogue, scaled to 0..1 over the items of a row that are not masked."""
    everything = np.broadcast_to(np.arange(n_items), (rows.height, n_items))
    scores = np.array(expert.score(rows, everything), dtype=np.float32)
    if (lacking := np.isneginf(scores)).any():
        scores = np.sqrt(np.where(lacking, 0, np.maximum(scores, 0)))
    items, row, _ = flatten(rows["masked"])
    allowed = scores.copy()
    allowed[row, items] = np.nan
    low = np.nanmin(allowed, axis=1, keepdims=True, initial=np.inf)
    high = np.nanmax(allowed, axis=1, keepdims=True, initial=-np.inf)
    low, high = np.where(low > high, 0, low), np.where(low > high, 0, high)  # nothing is allowed
    return np.asarray((scores - low) / np.maximum(high - low, 1e-9), dtype=np.float32)


def _simplex(n: int, step: float) -> Iterator[tuple[float, ...]]:
    """All weights that are multiples of a step and sum to one."""
    parts = round(1 / step)
    for cuts in itertools.combinations(range(parts + n - 1), n - 1):
        ends = (-1, *cuts, parts + n - 1)
        yield tuple((ends[i + 1] - ends[i] - 1) * step for i in range(n))

"""A trained model as a ranker: items at once, without a chain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from reasonrec.data_gen.histories import UserHistory
from reasonrec.recipes.evaluation.controls import other_histories
from reasonrec.recipes.rankers.base import Ranker
from reasonrec.recipes.recommender import Recommender


def may_repeat(rows: pl.DataFrame) -> bool:
    """Whether cases may be answered by what a user had: nothing is masked in them. The baselines' rule."""
    return not rows["masked"].list.len().gt(0).any()


@dataclass
class ModelRanker:
    """Ranks by the item search.

    Attributes:
        recommender: The trained model.
        name: Name in the table.
        num_beams: Width of the search.
        exact: Search on until each list is proven.
        exhaustive: Score the whole catalogue instead.
        batch_size: Cases read at a time.
        progress: Show a progress bar.
        pooled: Hear the experts of the checkpoint.
    """

    recommender: Recommender
    name: str
    num_beams: int = 50
    exact: bool = True
    exhaustive: bool = False
    batch_size: int = 16
    progress: bool = False
    pooled: bool = False

    def rank(self, rows: pl.DataFrame, k: int) -> NDArray[np.int64]:
        """See `Ranker`."""
        return self.rank_read(UserHistory.of_rows(rows), rows, k)

    def rank_read(self, histories: list[UserHistory], rows: pl.DataFrame, k: int) -> NDArray[np.int64]:
        """`rank`, with what the model is to read in place of the rows' histories; experts hear these."""
        return self.recommender.rank(
            histories,
            k=k,
            num_beams=self.num_beams,
            exact=self.exact,
            exhaustive=self.exhaustive,
            repeats=may_repeat(rows),
            batch_size=self.batch_size,
            progress=self.progress,
            pooled=self.pooled,
            heard=UserHistory.of_rows(rows) if self.pooled else None,
        )[0]

    def score(self, rows: pl.DataFrame, items: NDArray[np.integer]) -> NDArray[np.float32]:
        """See `Ranker`: log-probabilities; a whole catalogue is faster to search than to score item by item."""
        users, n_items = UserHistory.of_rows(rows), self.recommender.policy.catalogue.n_items
        if self.pooled or items.shape[1] < n_items:
            repeats = may_repeat(rows)
            return self.recommender.score(
                users, items, repeats=repeats, batch_size=self.batch_size, pooled=self.pooled
            )
        found, scores = self.recommender.rank(
            users,
            k=n_items,
            exhaustive=True,
            repeats=True,
            batch_size=self.batch_size,
            progress=self.progress,
            pooled=False,
        )
        everything = np.empty((len(users), n_items), dtype=np.float32)
        np.put_along_axis(everything, found, scores, axis=1)
        return np.take_along_axis(everything, items.astype(np.int64), axis=1)

    def controls(self, rows: pl.DataFrame, seed: int) -> Iterable[tuple[Ranker, str]]:
        """The same model, given another user's history."""
        yield OtherHistory(replace(self, name=f"{self.name.partition(',')[0]}, another user's history"), seed), ""


@dataclass
class OtherHistory:
    """A model that is shown another user's history, behind one's own mask.

    Attributes:
        ranker: The model.
        seed: Seed of the exchange.
    """

    ranker: ModelRanker
    seed: int

    @property
    def name(self) -> str:
        """Name in the table."""
        return self.ranker.name

    def rank(self, rows: pl.DataFrame, k: int) -> NDArray[np.int64]:
        """See `Ranker`."""
        return self.ranker.rank_read(strangers(rows, self.seed), rows, k)

    def score(self, rows: pl.DataFrame, items: NDArray[np.integer]) -> NDArray[np.float32]:
        """See `Ranker`."""
        histories, ranker = strangers(rows, self.seed), self.ranker
        return ranker.recommender.score(histories, items, batch_size=ranker.batch_size, pooled=False)


def strangers(rows: pl.DataFrame, seed: int) -> list[UserHistory]:
    """Another user's history for each case, behind the case's own mask."""
    donors = zip(UserHistory.of_rows(rows), other_histories(rows, seed), strict=True)
    return [replace(own, shown=np.asarray(shown)) for own, shown in donors]

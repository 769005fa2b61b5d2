"""A trained model as a ranker: items at once, without a chain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from reasonrec.data_gen.histories import UserHistory
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
    """

    recommender: Recommender
    name: str
    num_beams: int = 50
    exact: bool = True
    exhaustive: bool = False
    batch_size: int = 16
    progress: bool = False

    def rank(self, rows: pl.DataFrame, k: int) -> NDArray[np.int64]:
        """See `Ranker`."""
        return self.rank_histories(UserHistory.of_rows(rows), k, repeats=may_repeat(rows))

    def rank_histories(self, histories: list[UserHistory], k: int, *, repeats: bool) -> NDArray[np.int64]:
        """The same for histories that stand in no table.

        Args:
            histories: What is shown, and what is masked.
            k: Length of the lists.
            repeats: Whether what is masked may appear.
        """
        return self.recommender.recommend(
            histories,
            k=k,
            num_beams=self.num_beams,
            exact=self.exact,
            exhaustive=self.exhaustive,
            repeats=repeats,
            batch_size=self.batch_size,
            progress=self.progress,
        )[0]

    def score(self, rows: pl.DataFrame, items: NDArray[np.integer]) -> NDArray[np.float32]:
        """See `Ranker`: log-probabilities."""
        return self.recommender.score(UserHistory.of_rows(rows), items, batch_size=self.batch_size)

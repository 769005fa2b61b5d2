"""One interface for everything that stands in a table: baselines, SASRec, models, and what is fused of them."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

Ranking = NDArray[np.integer]


class Ranker(Protocol):
    """Ranks the catalogue for held-out cases, and scores items that are given.

    Cases are rows with `history` (item numbers, oldest first) and `masked` (what is not to be recommended).

    Attributes:
        name: Name in the table.
    """

    name: str

    def rank(self, rows: pl.DataFrame, k: int) -> Ranking:
        """The best items of each case, of the whole catalogue but for what is masked.

        Args:
            rows: The cases.
            k: Length of the lists.

        Returns:
            Item numbers (rows, k), best first, -1 where a list is shorter.
        """
        ...

    def score(self, rows: pl.DataFrame, items: NDArray[np.integer]) -> NDArray[np.floating]:
        """How given items would be ranked, masked ones included.

        Args:
            rows: The cases.
            items: Item numbers (rows, n).

        Returns:
            (rows, n), higher is better; -inf for an item that has no score.
        """
        ...

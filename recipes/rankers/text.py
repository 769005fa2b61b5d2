"""Text neighbours: the items whose text is closest to that of a history, by a frozen encoder and without training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from reasonrec.data_gen.schema import ITEM_TEXT, Dataset
from reasonrec.recipes.rankers.baselines import history_weights
from reasonrec.recipes.rankers.top_k import rank_rows
from reasonrec.tokenizers.embed import JOINED, Compute, embed_items, with_joined


@dataclass
class TextNeighbours:
    """Scores Σ_d cos(x_d, y) / (d+1) over the last items x_d of the history, d = 0 the newest.

    Attributes:
        vectors: (n_items, dim) float32 vectors of the items, of unit length.
        popularity: How often each item is a train target (n_items,): equal scores rank by it.
        last: How many history items count.
        name: Name in the table.
    """

    vectors: NDArray[np.float32]
    popularity: NDArray[np.int64]
    last: int = 10
    name: str = "text neighbours"

    @classmethod
    def of(cls, dataset: Dataset, encoder: str, *, compute: Compute | None = None) -> TextNeighbours:
        """Encode title, category and brand of every item as one text.

        Args:
            dataset: The dataset.
            encoder: A sentence-transformers model, see `tokenizers.embed.locate_model`.
            compute: What weights of a stored dtype are computed in; as they are stored by default.

        Raises:
            UserError: If it cannot be loaded, or an item has no such text.
        """
        fields = with_joined({name: dataset.items[name].to_list() for name in ITEM_TEXT})
        vectors = embed_items(fields, {JOINED: 1.0}, encoder, compute=compute)
        return cls(vectors, dataset.items["train_count"].to_numpy().astype(np.int64))

    def scores(self, rows: pl.DataFrame) -> NDArray[np.float32]:
        """Scores of all items (rows, n_items)."""
        weights = history_weights(rows, len(self.vectors), self.last, decay=True)
        return np.asarray(weights @ self.vectors, dtype=np.float32) @ self.vectors.T

    def rank(self, rows: pl.DataFrame, k: int) -> NDArray[np.int32]:
        """See `Ranker`."""
        return rank_rows(self.scores, rows, k, self.popularity)

    def score(self, rows: pl.DataFrame, items: NDArray[np.integer]) -> NDArray[np.float32]:
        """See `Ranker`."""
        return np.take_along_axis(self.scores(rows), items.astype(np.int64), axis=1)

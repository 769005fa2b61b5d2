"""Finding items by their titles, for people."""

from __future__ import annotations

import polars as pl

from reasonrec.tokenizers.catalogue import Catalogue


class ItemSearch:
    """Items whose title or raw id holds every word of a query.

    Args:
        catalogue: The items.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._table = catalogue.items.select(
            pl.int_range(pl.len()).alias("item"),
            pl.concat_str(pl.col("title").fill_null(""), pl.lit(" "), "item_id").str.to_lowercase().alias("text"),
            pl.col("item_id").alias("id"),
            "train_count",
        )

    def __call__(self, words: str, limit: int) -> list[int]:
        """Item numbers: the item of that id, titles that begin with the query, then by how often they are chosen.

        Args:
            words: What is looked for; nothing finds everything.
            limit: Most items to return.
        """
        query = " ".join(words.lower().split())
        holds = [pl.col("text").str.contains(word, literal=True) for word in query.split()]
        found = self._table.filter(pl.all_horizontal(holds) if holds else pl.lit(True))
        order = found.sort(
            pl.col("id").str.to_lowercase() == query,
            pl.col("text").str.starts_with(query),
            "train_count",
            descending=True,
            maintain_order=True,
        )
        return order["item"].head(limit).to_list()

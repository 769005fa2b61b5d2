"""What a user had, and what of it a prompt shows: two things that must not be taken for each other.

A prompt shows the most recent items. What is not to be recommended again is everything the user had, however long ago
and however short the prompt. `UserHistory` carries both from the tables to the search, so that no caller makes one of
them from the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

from reasonrec.tokenizers.whole import item_numbers

if TYPE_CHECKING:
    from reasonrec.data_gen.schema import Dataset

Items = Sequence[int] | NDArray[np.integer]  # item numbers


@dataclass(frozen=True, eq=False)
class UserHistory:
    """One user: what is shown, and what is masked where items are not to be recommended twice.

    Attributes:
        shown: (n,) item numbers, oldest first; a prompt shows the last ones.
        masked: (m,) different item numbers in ascending order: everything the user had. Whether they are masked is
            the data set's decision (`mask_history`), or the caller's.
    """

    shown: NDArray[np.int64]
    masked: NDArray[np.int64]

    @classmethod
    def of(cls, items: Items, more: Items = ()) -> UserHistory:
        """The history of a user who had these items.

        Args:
            items: Item numbers, oldest first.
            more: Further items that the user had and that no prompt can show.

        Raises:
            UserError: If one of them is no list of whole numbers.
        """
        shown = item_numbers("history", items)
        return cls(shown, np.union1d(shown, item_numbers("more", more)))

    @classmethod
    def of_rows(cls, rows: pl.DataFrame) -> list[UserHistory]:
        """The histories of held-out rows (`history`, `masked`)."""
        pairs = zip(rows["history"].to_list(), rows["masked"].to_list(), strict=True)
        return [cls.of(history, masked) for history, masked in pairs]

    @classmethod
    def of_user(cls, dataset: Dataset, user: int) -> UserHistory:
        """All that a data set knows of a user, held-out interactions included.

        Shown are the items up to the last interaction; a held-out `history` may have been cut (`max_history`), so what
        is masked is collected from every table.

        Args:
            dataset: The data set.
            user: Number of the user.
        """
        tables = {name: getattr(dataset, name).filter(pl.col("user") == user) for name in ("train", "valid", "test")}
        shown: list[int] = tables["train"]["items"][-1].to_list() if tables["train"].height else []
        had = tables["train"]["items"].to_list()
        for rows in (tables["valid"], tables["test"]):
            had += [*rows["history"].to_list(), *rows["masked"].to_list(), rows["target"].to_list()]
            if rows.height:
                shown = [*rows["history"][-1].to_list(), rows["target"][-1]]
        return cls.of(shown, [item for items in had for item in items])

    @staticmethod
    def to_rows(histories: Sequence[UserHistory]) -> pl.DataFrame:
        """Rows with the `history` of each, the inverse of `of_rows` but for what is masked."""
        shown = [history.shown.tolist() for history in histories]
        return pl.DataFrame({"history": shown}, schema={"history": pl.List(pl.Int32)})

    def last(self, n: int) -> UserHistory:
        """Show the last `n` items only; what is masked stays."""
        return replace(self, shown=self.shown[-n:])

    def among(self, n_items: int) -> UserHistory:
        """Without items that are not in a catalogue of `n_items`."""
        return UserHistory(*(items[(items >= 0) & (items < n_items)] for items in (self.shown, self.masked)))

    def then(self, item: int) -> UserHistory:
        """The history after one more item."""
        return UserHistory(np.append(self.shown, item), np.union1d(self.masked, item))

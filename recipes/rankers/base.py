"""One interface for everything that stands in a table: baselines, SASRec, models, and what is fused of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np
import polars as pl
from numpy.typing import NDArray

Ranking = NDArray[np.integer]


class Ranker(Protocol):
    """Ranks the catalogue for held-out cases, and scores items that are given.

    Cases are rows with `history` (item numbers, oldest first) and `masked` (what is not to be recommended).

    """

    @property
    def name(self) -> str:
        """Name in the table."""

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


@runtime_checkable
class Controlled(Protocol):
    """A ranker that brings controls: itself, given something that cannot help."""

    def controls(self, rows: pl.DataFrame, seed: int) -> Iterable[tuple[Ranker, str]]:
        """The controls, each with a note; asked after `rank` of the same cases.

        Args:
            rows: The cases.
            seed: Seed of exchanges between users.
        """
        ...


@runtime_checkable
class Thinks(Protocol):
    """A ranker that writes before it ranks; what it wrote last.

    Attributes:
        tokens_per_user: Tokens generated for a case.
        cut: Share of the chains that had to be cut.
        thoughts: The first chain of each case, as text.
    """

    tokens_per_user: float
    cut: float
    thoughts: list[str]


@runtime_checkable
class Noted(Protocol):
    """A ranker that has something to say of its last ranking.

    Attributes:
        note: What a reader of its row has to know.
    """

    @property
    def note(self) -> str:
        """What a reader of its row has to know."""

"""Baselines that need no training loop: what every table of the kit is measured against.

Each is built from a dataset's train sequences and ranks the full catalogue. All obey the same rules as the
models: equal scores by train popularity and item number, items without a score after those with one, masked
items never.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.rankers.base import Ranker
from reasonrec.recipes.rankers.top_k import rank_rows, top_k
from reasonrec.rewards.metrics import flatten, per_row
from reasonrec.tokenizers.collaborative import near_pairs, set_pairs

EXPONENTS = (0.0, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class TrainLog:
    """The train sequences, flat.

    Attributes:
        items: Items of all sequences, one after another (n,).
        sequence: Number of the sequence of each entry (n,).
        user: User of each entry (n,).
        popularity: How often each item is a train target (n_items,).
    """

    items: NDArray[np.int64]
    sequence: NDArray[np.int64]
    user: NDArray[np.int64]
    popularity: NDArray[np.int64]

    @classmethod
    def of(cls, dataset: Dataset) -> TrainLog:
        """Flatten the train sequences of a dataset."""
        items, sequence, _ = flatten(dataset.train["items"])
        user = dataset.train["user"].to_numpy().astype(np.int64)[sequence]
        return cls(items, sequence, user, dataset.items["train_count"].to_numpy().astype(np.int64))

    @property
    def n_items(self) -> int:
        """Size of the catalogue."""
        return len(self.popularity)

    @property
    def counts(self) -> NDArray[np.int64]:
        """How often each item occurs in the sequences, as target or not (n_items,)."""
        return np.bincount(self.items, minlength=self.n_items)

    def pairs(self, gap: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Items that stand `gap` places apart in one sequence: (earlier, later), in the order of the log."""
        same = self.sequence[gap:] == self.sequence[:-gap]
        return self.items[:-gap][same], self.items[gap:][same]


class _Sparse(ABC):
    """Ranks by sparse positive scores, filled by popularity; what is not stored has no score."""

    log: TrainLog
    name: str

    @abstractmethod
    def scores(self, rows: pl.DataFrame) -> sparse.csr_array:
        """Scores of the items that have one (rows, n_items)."""

    def rank(self, rows: pl.DataFrame, k: int) -> NDArray[np.int32]:
        """See `Ranker`."""
        return rank_rows(lambda block: _dense(self.scores(block)), rows, k, self.log.popularity, fill=True)

    def score(self, rows: pl.DataFrame, items: NDArray[np.integer]) -> NDArray[np.float64]:
        """See `Ranker`."""
        row = np.repeat(np.arange(len(items)), items.shape[1])
        found = np.asarray(self.scores(rows)[row, items.ravel()]).reshape(items.shape)
        return np.where(found == 0, -np.inf, found)


def _dense(scores: sparse.csr_array) -> NDArray[np.float64]:
    dense: NDArray[np.float64] = scores.toarray()
    dense[dense == 0] = -np.inf
    return dense


def history_weights(rows: pl.DataFrame, n_items: int, last: int | None, *, decay: bool) -> sparse.csr_array:
    """Weights of the history items (rows, n_items): 1/(d+1) for the item d places before the end, or 1."""
    items, row, lengths = flatten(rows["history"])
    ends = np.cumsum(lengths)
    distance = ends[row] - 1 - np.arange(len(items))
    keep = np.ones(len(items), dtype=bool) if last is None else distance < last
    weight = 1.0 / (distance[keep] + 1) if decay else np.ones(int(keep.sum()))
    return sparse.coo_array((weight, (row[keep], items[keep])), shape=(rows.height, n_items)).tocsr()


@dataclass
class Popularity:
    """The same list for everybody: items by how often they are a train target.

    Attributes:
        log: The train sequences.
        by_user: Count the users that have the item in train instead of the events.
        name: Name in the table.
    """

    log: TrainLog
    by_user: bool = False
    name: str = "popularity"

    @property
    def counts(self) -> NDArray[np.float64]:
        """What items are ranked by (n_items,)."""
        if not self.by_user:
            return self.log.popularity.astype(np.float64)
        pairs = np.unique(self.log.user * self.log.n_items + self.log.items)
        return np.bincount(pairs % self.log.n_items, minlength=self.log.n_items).astype(np.float64)

    def rank(self, rows: pl.DataFrame, k: int) -> NDArray[np.int32]:
        """See `Ranker`."""
        scores = np.broadcast_to(self.counts, (rows.height, self.log.n_items))
        return top_k(scores, k, self.log.popularity, rows["masked"])

    def score(self, rows: pl.DataFrame, items: NDArray[np.integer]) -> NDArray[np.float64]:
        """See `Ranker`."""
        return self.counts[items]


@dataclass
class RandomOrder:
    """Another order for each case, drawn by chance: where nothing is known of any candidate, the row to compare with.

    Attributes:
        n_items: Size of the catalogue.
        seed: Seed of the orders.
        name: Name in the table.
    """

    n_items: int
    seed: int = 0
    name: str = "random order"

    def _scores(self, rows: pl.DataFrame) -> NDArray[np.float64]:
        return np.stack([np.random.default_rng((self.seed, row)).random(self.n_items) for row in rows["row"]])

    def rank(self, rows: pl.DataFrame, k: int) -> NDArray[np.int32]:
        """See `Ranker`."""
        return top_k(self._scores(rows), k, np.zeros(self.n_items), rows["masked"])

    def score(self, rows: pl.DataFrame, items: NDArray[np.integer]) -> NDArray[np.float64]:
        """See `Ranker`."""
        return np.take_along_axis(self._scores(rows), items.astype(np.int64), axis=1)


@dataclass
class RepeatLast:
    """The last item of the history, and nothing else: the share of immediate repeats."""

    name: str = "repeat last"

    def rank(self, rows: pl.DataFrame, k: int) -> NDArray[np.int32]:
        """See `Ranker`. A masked last item, or none, leaves the list empty."""
        result = np.full((rows.height, k), -1, dtype=np.int32)
        last = rows.select(
            pl.when(pl.col("masked").list.contains(pl.col("history").list.last()).fill_null(False))
            .then(None)
            .otherwise(pl.col("history").list.last())
            .fill_null(-1)
            .alias("last")
        )["last"]
        result[:, 0] = last.to_numpy()
        return result

    def score(self, rows: pl.DataFrame, items: NDArray[np.integer]) -> NDArray[np.float64]:
        """See `Ranker`."""
        last = rows["history"].list.last().fill_null(-1).to_numpy()
        return np.where(items == last[:, None], 0.0, -np.inf)


@dataclass
class Markov(_Sparse):
    """The most frequent successors of the last item, filled by popularity.

    Attributes:
        log: The train sequences.
        ties: Order of successors seen equally often: `first` (the pair that occurs first in the log wins;
            users in the order of the train table) or `popularity`.
        name: Name in the table.
    """

    log: TrainLog
    ties: str = "first"
    name: str = "Markov"
    _transitions: sparse.csr_array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Count the transitions."""
        n = self.log.n_items
        before, after = self.log.pairs(1)
        pair, first, count = np.unique(before * n + after, return_index=True, return_counts=True)
        score = count.astype(np.float64)
        if self.ties == "first":
            score -= first / (len(before) + 1)  # below one, so a higher count always wins
        self._transitions = sparse.coo_array((score, (pair // n, pair % n)), shape=(n, n)).tocsr()

    def scores(self, rows: pl.DataFrame) -> sparse.csr_array:
        """How often each item followed the last one (rows, n_items)."""
        return (history_weights(rows, self.log.n_items, 1, decay=False) @ self._transitions).tocsr()


@dataclass
class CoVisitation(_Sparse):
    """Item-to-item co-visitation with popularity normalisation, filled by popularity.

    C[a][b] sums 1/|i−j| over all pairs of places at most `window` apart that hold a and b, both directions,
    with self-pairs. An item y scores Σ_d C[x_d][y] / (f(x_d)^history_exponent · f(y)^exponent) / (d+1) over
    the last items x_d of the history, d = 0 the newest. In baskets, where order means nothing, a pair weighs
    1/(size−1), so that each item shares one unit among its companions, and all items of the context weigh 1.

    Attributes:
        log: The train sequences.
        exponent: Exponent of the candidate's frequency.
        history_exponent: Exponent of the history item's frequency.
        window: Largest distance of a pair; ignored for baskets.
        last: How many history items count; ignored for baskets.
        baskets: Sequences are sets.
        name: Name in the table.
        together: C (n_items, n_items).
    """

    log: TrainLog
    exponent: float = 0.5
    history_exponent: float = 0.5
    window: int = 10
    last: int = 10
    baskets: bool = False
    name: str = "co-visitation"
    together: sparse.csr_array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Count the pairs; the normalisation comes with the ranking, so that tuning counts once."""
        flat = (self.log.items, self.log.sequence, self.log.n_items)
        self.together = set_pairs(*flat) if self.baskets else near_pairs(*flat, self.window)

    def scores(self, rows: pl.DataFrame, exponent: float | None = None) -> sparse.csr_array:
        """Scores of the items that have one (rows, n_items)."""
        weights = history_weights(rows, self.log.n_items, None if self.baskets else self.last, decay=not self.baskets)
        history, candidate = self._normalisers(exponent)
        return (weights @ history @ self.together @ candidate).tocsr()

    def table(self) -> sparse.csr_array:
        """What one item in the history says for another, before the weight of its place (n_items, n_items)."""
        history, candidate = self._normalisers()
        return (history @ self.together @ candidate).tocsr()

    def _normalisers(self, exponent: float | None = None) -> tuple[sparse.dia_array, sparse.dia_array]:
        frequency = np.maximum(self.log.counts, 1).astype(np.float64)
        chosen = self.exponent if exponent is None else exponent
        return sparse.diags_array(frequency**-self.history_exponent), sparse.diags_array(frequency**-chosen)

    def tune(self, rows: pl.DataFrame, exponents: Sequence[float] = EXPONENTS, k: int = 10) -> dict[float, float]:
        """Choose the candidate's exponent by HR@k on validation rows, and keep it.

        Args:
            rows: Validation rows.
            exponents: Candidates; of equal ones the first is kept.
            k: Cut-off.

        Returns:
            Exponent to validation HR@k.
        """
        tried = {}
        for exponent in exponents:

            def scores(block: pl.DataFrame, exponent: float = exponent) -> NDArray[np.float64]:
                return _dense(self.scores(block, exponent))

            ranking = rank_rows(scores, rows, k, self.log.popularity, fill=True)
            tried[float(exponent)] = float(per_row(ranking, rows["target"].to_numpy(), (k,))[f"hr@{k}"].mean())
        self.exponent = max(tried, key=lambda exponent: tried[exponent])
        return tried


@dataclass
class PersonalFrequency(_Sparse):
    """The user's own items by how often, then how recently they occur, filled by popularity."""

    log: TrainLog
    name: str = "personal frequency"

    def scores(self, rows: pl.DataFrame) -> sparse.csr_array:
        """How often the user had each item, and how recently (rows, n_items)."""
        items, row, lengths = flatten(rows["history"])
        n, n_rows = self.log.n_items, rows.height
        place = np.arange(len(items)) - (np.cumsum(lengths) - lengths)[row]
        pair, inverse, count = np.unique(row * n + items, return_inverse=True, return_counts=True)
        newest = np.zeros(len(pair))
        np.maximum.at(newest, inverse, place)
        score = count + (newest + 1) / (float(lengths.max(initial=0)) + 2)  # recency below one: counts come first
        return sparse.coo_array((score, (pair // n, pair % n)), shape=(n_rows, n)).tocsr()


def standard(
    dataset: Dataset, *, window: int = 10, last: int = 10, exponents: Sequence[float] = EXPONENTS
) -> list[tuple[Ranker, str]]:
    """The baselines that make sense for a dataset, each with a note for the table.

    Repeat-last and personal frequency need repeats that are kept and not masked; Markov needs an order.
    The tuned co-visitation is tuned on the validation rows.

    Args:
        dataset: The dataset.
        window: Largest distance of a co-visitation pair.
        last: How many history items co-visitation looks at.
        exponents: What the tuned co-visitation may choose from.
    """
    log, facts = TrainLog.of(dataset), dataset.facts
    baskets = facts.get("order") == "set"
    repeats = bool(facts.get("repeats")) and not facts.get("mask_history")
    result: list[tuple[Ranker, str]] = [(Popularity(log), "")]
    if baskets:
        by_user = Popularity(log, by_user=True, name="popularity by users")
        result.append((by_user, "how many users have the item, instead of how often it is bought"))
    if repeats:
        result += [(RepeatLast(), "a list of one item"), (PersonalFrequency(log), "")]
    if not baskets:
        result += [(Markov(log), ""), (Markov(log, ties="popularity", name="Markov, ties by popularity"), "")]
    result.append((CoVisitation(log, window=window, last=last, baskets=baskets), "exponent 0.5"))
    valid = dataset.rows("valid")
    if valid.height:
        tuned = CoVisitation(log, window=window, last=last, baskets=baskets, name="co-visitation, tuned")
        tried = ", ".join(f"{exponent:g}: {value:.4f}" for exponent, value in tuned.tune(valid, exponents).items())
        result.append((tuned, f"exponent {tuned.exponent:g} by validation HR@10 ({tried})"))
    return result

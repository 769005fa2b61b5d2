"""Teachers of soft targets: what would be recommended at a place of a training sequence, without its own user.

A teacher learns from train sequences alone, held-out cases have no part in it, not even to choose a parameter. At each
place it knows what stands before and nothing of the user whose place it is: that user's sequences are taken off every
count (co-visitation, popularity), or the network never saw them (SASRec). What is chosen by name in `soft_targets` of
`recipes/sft.py` stands here with its options.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import softmax

from reasonrec.data_gen.schema import ROWS, Dataset, count_targets
from reasonrec.recipes.rankers import sasrec
from reasonrec.recipes.rankers.baselines import CoVisitation, TrainLog, history_weights
from reasonrec.recipes.rankers.top_k import top_k
from reasonrec.rewards.metrics import flatten
from reasonrec.tokenizers.collaborative import near_pairs, set_pairs
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.registry import Registry
from reasonrec.tokenizers.whole import whole

_NOTHING = 1e-9  # a part of a sum that is smaller is what rounding left of a difference


class ItemTeacher(ABC):
    """What comes next, by somebody else's knowledge.

    Attributes:
        alike: What is chosen gets equal shares; its weights only say what that is.
    """

    alike = False

    @abstractmethod
    def weights(self, rows: pl.DataFrame) -> NDArray[np.floating]:
        """Weights of all items (rows, n_items), none below 0; all 0 where it has nothing to say.

        Args:
            rows: Places with `row` (their number), `user`, and `history` (all that stands before; it may be empty).
        """

    def top(self, rows: pl.DataFrame, k: int, *, mask: bool) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Its best items at each place.

        Args:
            rows: See `weights`.
            k: How many.
            mask: What stands before is never recommended.

        Returns:
            Items (rows, k), -1 where there are fewer, and their shares (rows, k), which sum to 1 or are all 0.
        """
        weights = self.weights(rows).astype(np.float64)
        barred = np.where(weights > 0, weights, -np.inf)
        # Equal weights by item number: popularity would count the place's own user.
        items = top_k(barred, k, np.zeros(weights.shape[1]), rows["history"] if mask else None)
        found = np.take_along_axis(weights, items.clip(min=0).astype(np.int64), axis=1)
        found = np.where(items >= 0, 1.0 if self.alike else found, 0.0)
        total = found.sum(1, keepdims=True)
        return items, (found / np.where(total > 0, total, 1)).astype(np.float32)


class Others:
    """Train sequences, and those of some users among them.

    Args:
        dataset: The dataset.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.log = TrainLog.of(dataset)
        first = dataset.train["first_target"].to_numpy().astype(np.int64)
        _, sequence, lengths = flatten(dataset.train["items"])
        place = np.arange(len(sequence)) - (np.cumsum(lengths) - lengths)[sequence]
        by_user = np.argsort(self.log.user, kind="stable")
        self.items, self.sequence, self.user = (
            values[by_user] for values in (self.log.items, self.log.sequence, self.log.user)
        )
        self.is_target = (place >= first[sequence])[by_user]

    def of(self, users: NDArray[np.int64]) -> NDArray[np.int64]:
        """The entries of users, which are sorted and distinct, in the order of users."""
        begin, end = (np.searchsorted(self.user, users, side) for side in ("left", "right"))
        lengths = end - begin
        return np.repeat(begin - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


class CompanyTeacher(ItemTeacher):
    """Co-visitation (`baselines.CoVisitation`) of all users but the place's own, whose pairs and counts are taken off.

    Pairs are counted once for all, and once for each user by itself, as if every user had a catalogue of its own; the
    scores of a place are those of the first table without those of its user's.

    Args:
        dataset: The dataset.
        window: Largest distance of a pair.
        last: How many history items count.

    Raises:
        UserError: If no two items stand together in train.
    """

    def __init__(self, dataset: Dataset, window: int, last: int) -> None:
        self.others, self.baskets = Others(dataset), dataset.facts.get("order") == "set"
        self.all = CoVisitation(self.others.log, window=window, last=last, baskets=self.baskets)
        if not self.all.together.nnz:
            raise UserError(
                "soft_targets: co_visitation has no pairs, for no two items stand together in train: leave it out"
            )

    def weights(self, rows: pl.DataFrame) -> NDArray[np.floating]:
        """See `ItemTeacher`."""
        model, others, n = self.all, self.others, self.others.log.n_items
        users, number = np.unique(rows["user"].to_numpy().astype(np.int64), return_inverse=True)
        entries = others.of(users)
        # Numbers of (user, item), then of those that there are: the users' own catalogues.
        copies = np.searchsorted(users, others.user[entries]) * n + others.items[entries]
        real, copy = np.unique(copies, return_inverse=True)
        flat = (copy, others.sequence[entries], len(real))
        pairs = set_pairs(*flat) if self.baskets else near_pairs(*flat, model.window)
        left = np.maximum(others.log.counts - _counted(copies, len(users), n), 1)  # (users, n)

        weights = history_weights(rows, n, None if self.baskets else model.last, decay=not self.baskets).tocoo()
        row, item = weights.coords
        value = weights.data / left[number[row], item] ** model.history_exponent
        everybody = (sparse.coo_array((value, (row, item)), shape=weights.shape).tocsr() @ model.together).toarray()
        wanted = number[row] * n + item
        column = np.searchsorted(real, wanted).clip(max=len(real) - 1)
        mine = real[column] == wanted  # else it is none of the user's train items, and has no pair of its own
        shape = (rows.height, len(real))
        own = (sparse.coo_array((value[mine], (row[mine], column[mine])), shape=shape).tocsr() @ pairs).tocoo()
        row, column = own.coords
        found = everybody - sparse.coo_array((own.data, (row, real[column] % n)), shape=weights.shape).toarray()
        found[found <= _NOTHING * everybody] = 0
        return np.asarray(found / left[number] ** model.exponent)


class PopularityTeacher(ItemTeacher):
    """How often each item is a train target of other users: a control, which knows nothing of what stands before.

    Args:
        dataset: The dataset.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.others = Others(dataset)

    def weights(self, rows: pl.DataFrame) -> NDArray[np.floating]:
        """See `ItemTeacher`."""
        others, n = self.others, self.others.log.n_items
        users, number = np.unique(rows["user"].to_numpy().astype(np.int64), return_inverse=True)
        entries = others.of(users)
        entries = entries[others.is_target[entries]]
        own = _counted(np.searchsorted(users, others.user[entries]) * n + others.items[entries], len(users), n)
        return np.asarray((others.log.popularity - own)[number], dtype=np.float64)


class UniformTeacher(ItemTeacher):
    """Items drawn by chance at each place, all alike: a control, which knows nothing at all.

    Args:
        n_items: Size of the catalogue.
        seed: Seed of the draws.
    """

    alike = True

    def __init__(self, n_items: int, seed: int) -> None:
        self.n_items, self.seed = n_items, seed

    def weights(self, rows: pl.DataFrame) -> NDArray[np.floating]:
        """See `ItemTeacher`."""
        return np.stack([1 - np.random.default_rng((self.seed, row)).random(self.n_items) for row in rows["row"]])


class SequentialTeacher(ItemTeacher):
    """SASRec out of fold: each user is taught by the network that was trained on the other folds.

    Early stopping looks at the last items of the sequences that are trained on, which are left out for that purpose.

    Args:
        dataset: The dataset.
        folds: How many.
        seed: Seed of the folds and the networks.

    Raises:
        UserError: If there are too few users, or sequences are too short to hold an item out.
    """

    def __init__(self, dataset: Dataset, folds: int, seed: int) -> None:
        users = dataset.train["user"].unique().sort().to_numpy()
        if len(users) < folds:
            raise UserError(f"soft_targets: folds={folds} of {len(users)} users in train: set fewer folds, at least 2")
        self.fold = np.zeros(dataset.n_users, dtype=np.int64)
        self.fold[np.random.default_rng(seed).permutation(users)] = np.arange(len(users)) % folds
        self.models: Sequence[sasrec.Sasrec] = [
            sasrec.fit(_without(dataset, users[self.fold[users] == fold]), sasrec.SasrecConfig(seed=seed + fold))
            for fold in range(folds)
        ]

    def weights(self, rows: pl.DataFrame) -> NDArray[np.floating]:
        """See `ItemTeacher`; nothing where nothing stands before."""
        fold = self.fold[rows["user"].to_numpy()]
        known = rows["history"].list.len().to_numpy() > 0
        found = np.zeros((rows.height, len(self.models[0].popularity)))
        for number, model in enumerate(self.models):
            here = np.flatnonzero(known & (fold == number))
            if len(here):
                found[here] = softmax(model.scores(rows[here]).astype(np.float64), axis=1)
        return found


def _counted(copies: NDArray[np.int64], n_users: int, n_items: int) -> NDArray[np.int64]:
    """How often each item occurs among the entries of each user, given user * n_items + item (users, items)."""
    return np.bincount(copies, minlength=n_users * n_items).reshape(n_users, n_items)


def _without(dataset: Dataset, users: NDArray[np.integer]) -> Dataset:
    """A dataset of the train sequences of other users, which holds out their last items for early stopping."""
    train = dataset.train.filter(~pl.col("user").is_in(users.tolist())).select("user", "items", "first_target")
    length = pl.col("items").list.len()
    cut = (length > 2) & (length - 1 > pl.col("first_target"))
    before, last = pl.col("items").list.head(length - 1), pl.col("items").list.last()
    valid = (
        train.filter(cut)
        .with_row_index("row")
        .select(
            "row",
            "user",
            history=before,
            target=last,
            masked=before if dataset.facts.get("mask_history") else before.list.head(0),
            same_time=pl.lit(False),
        )
        .cast(pl.Schema(ROWS))
    )
    if not valid.height:
        raise UserError(
            "soft_targets: sasrec stops early on the last items of train sequences, and none that is left without a "
            "fold has three items: choose another teacher"
        )
    train = train.with_columns(items=pl.when(cut).then(before).otherwise(pl.col("items")))
    counts = pl.Series("train_count", count_targets(train, dataset.n_items))
    return replace(dataset, train=train, valid=valid, items=dataset.items.with_columns(counts))


@dataclass(frozen=True)
class CompanyTeaching:
    """Options of `co_visitation`.

    Attributes:
        window: Largest distance of a pair.
        last: How many history items count.
    """

    window: int = 10
    last: int = 10

    def __post_init__(self) -> None:
        for name in ("window", "last"):
            whole(f"soft_targets[{name}]", getattr(self, name), at_least=1)

    def build(self, dataset: Dataset, seed: int) -> ItemTeacher:
        """Count pairs."""
        return CompanyTeacher(dataset, self.window, self.last)


@dataclass(frozen=True)
class SequentialTeaching:
    """Options of `sasrec`.

    Attributes:
        folds: Parts of the users; each is taught by what was trained on the others.
    """

    folds: int = 2

    def __post_init__(self) -> None:
        whole("soft_targets[folds]", self.folds, at_least=2)

    def build(self, dataset: Dataset, seed: int) -> ItemTeacher:
        """Train a network for each fold."""
        return SequentialTeacher(dataset, self.folds, seed)


@dataclass(frozen=True)
class PopularityTeaching:
    """`popularity` has no options."""

    def build(self, dataset: Dataset, seed: int) -> ItemTeacher:
        """Count targets."""
        return PopularityTeacher(dataset)


@dataclass(frozen=True)
class UniformTeaching:
    """`uniform` has no options."""

    def build(self, dataset: Dataset, seed: int) -> ItemTeacher:
        """Nothing to learn."""
        return UniformTeacher(dataset.n_items, seed)


ITEM_TEACHERS: Registry[Any] = Registry("teacher", [__name__])  # options that build a teacher
ITEM_TEACHERS.add("co_visitation", CompanyTeaching, __name__)
ITEM_TEACHERS.add("sasrec", SequentialTeaching, __name__)
ITEM_TEACHERS.add("popularity", PopularityTeaching, __name__)
ITEM_TEACHERS.add("uniform", UniformTeaching, __name__)

"""What item labels (genres, departments, brands) say about a history, from training interactions alone.

Everything here is asked about a *case*: a history and the moment at which something has to be recommended. The
answers count the interactions of other users only, and only those before that moment where the data have times, so
that neither the case's own continuation nor anybody's future can colour them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import polars as pl

from reasonrec.data_gen.schema import Dataset
from reasonrec.tokenizers.errors import UserError

LabelField = Literal["auto", "category", "brand"]
NO_TIME = np.iinfo(np.int64).max  # "before" this is everything
_SEPARATOR = re.compile(r"\s*(?:,|;|\||>)\s+|\s*\|\s*")
_MOST_EVENTS = 20_000  # of one history item; the newest ones


@dataclass(frozen=True)
class Case:
    """A moment at which something has to be recommended; it does not know what was chosen.

    Attributes:
        key: Names the case within its dataset, such as `train/17/9`.
        user: Number of the user.
        history: Items, oldest first.
        time: When it happens, in the unit of the dataset's times; `NO_TIME` where there are none.
    """

    key: str
    user: int
    history: tuple[int, ...]
    time: int = NO_TIME


@dataclass(frozen=True)
class ItemLabels:
    """The labels of every item.

    Attributes:
        names: Name of each label, the most frequent first.
        of_item: Label numbers of each item, in the order in which the item lists them.
        field: Column they were read from.
    """

    names: tuple[str, ...]
    of_item: tuple[tuple[int, ...], ...]
    field: str

    @classmethod
    def of(cls, items: pl.DataFrame, field: LabelField = "auto") -> ItemLabels:
        """Read the labels of an item table.

        Args:
            items: The dataset's items.
            field: Column to read; `auto` takes the category if half of the items have one, else the brand.

        Raises:
            UserError: If no item has a label.
        """
        if field == "auto":
            field = "category" if (items["category"] != "").mean() >= 0.5 else "brand"  # type: ignore[operator]
        # A brand is one name, whatever commas it has.
        parts = [_SEPARATOR.split(text) if field == "category" else [text] for text in items[field]]
        words = [tuple(dict.fromkeys(filter(None, map(str.strip, part)))) for part in parts]
        if not any(words):
            raise UserError(
                f"label_field={field}: no item has a {field}, so there is nothing that reasons could be made of; "
                "name another column, or give the items categories in the prepare stage"
            )
        counts: dict[str, int] = {}
        for labels in words:
            for word in labels:
                counts[word] = counts.get(word, 0) + 1
        names = sorted(counts, key=lambda word: (-counts[word], word))
        number = {word: i for i, word in enumerate(names)}
        return cls(tuple(names), tuple(tuple(number[w] for w in labels) for labels in words), field)

    @cached_property
    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        """Labels of all items one after the other, and where each item's begin (items + 1,)."""
        sizes = np.array([len(labels) for labels in self.of_item])
        values = np.array([label for labels in self.of_item for label in labels], dtype=np.int64)
        return values, np.concatenate([[0], np.cumsum(sizes)])

    def count(self, items: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Sum of weights (ones by default) of each label over some items: (labels,)."""
        values, offsets = self.flat
        sizes = offsets[items + 1] - offsets[items]
        place = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        labels = values[np.repeat(offsets[items], sizes) + place]
        spread = None if weights is None else np.repeat(weights, sizes)
        return np.bincount(labels, weights=spread, minlength=len(self.names)).astype(np.float64)

    def words(self, numbers: Sequence[int]) -> tuple[str, ...]:
        """Names of some labels."""
        return tuple(self.names[i] for i in numbers)


class LabelStatistics:
    """Counts over the training interactions, asked for one case at a time.

    Args:
        dataset: The dataset; of its tables only `items` and `train` are read.
        labels: Labels of the items.
        window: Two interactions at most so far apart are neighbours.
        last: How many of a case's newest items vote for what comes next.
    """

    def __init__(self, dataset: Dataset, labels: ItemLabels, *, window: int = 5, last: int = 10) -> None:
        self.labels = labels
        self.last = last
        train = dataset.train
        self.has_times = "times" in train.columns
        lengths = train["items"].list.len().to_numpy().astype(np.int64)
        items = train["items"].explode().to_numpy().astype(np.int64)
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        user = train["user"].to_numpy().astype(np.int64)[sequence]
        times = train["times"].explode().to_numpy().astype(np.int64) if self.has_times else np.zeros(len(items), int)
        order = np.argsort(times, kind="stable")
        self._items, self._users, self._times = items[order], user[order], times[order]
        # A neighbour counts from the moment at which the later one of the two happened.
        parts = []
        for gap in range(1, min(window, len(items) - 1) + 1):
            same = sequence[gap:] == sequence[:-gap]
            a, b, when, who = items[:-gap][same], items[gap:][same], times[gap:][same], user[gap:][same]
            parts.append((a, b, when, who, np.full(len(a), 1.0 / gap)))
            if dataset.facts["order"] == "set":
                parts.append((b, a, when, who, np.full(len(a), 1.0 / gap)))
        first, second, when, who, weight = (np.concatenate(part) for part in zip(*parts, strict=True))
        order = np.lexsort((when, first))
        self._second, self._when, self._who, self._weight = (x[order] for x in (second, when, who, weight))
        self._start = np.searchsorted(first[order], np.arange(dataset.n_items + 1))
        # Running label counts, so that a case adds only what happened since the nearest milestone.
        self._milestones: list[np.ndarray] = [np.zeros(len(labels.names))]
        for begin in range(0, len(self._items), _MOST_EVENTS):
            self._milestones.append(self._milestones[-1] + labels.count(self._items[begin : begin + _MOST_EVENTS]))
        self._of_user = np.argsort(self._users, kind="stable")
        self._user_start = np.searchsorted(self._users[self._of_user], np.arange(dataset.n_users + 1))
        self._followed: tuple[Case, np.ndarray] | None = None  # a teacher and the checks ask about the same case

    def base(self, case: Case) -> np.ndarray:
        """Share of interactions that carry each label, before the case and without its user: (labels,)."""
        stop = self._before(self._times, case.time)
        begin = stop // _MOST_EVENTS
        total = self._milestones[begin] + self.labels.count(self._items[begin * _MOST_EVENTS : stop])
        own = self._of_user[self._user_start[case.user] : self._user_start[case.user + 1]]
        own = own[own < stop]
        # One interaction is spread over all labels in advance, so that no share is zero.
        prior = self.labels.count(np.arange(len(self.labels.of_item))) / len(self.labels.of_item)
        return (total - self.labels.count(self._items[own]) + prior) / (stop - len(own) + 1)

    def following(self, case: Case) -> np.ndarray:
        """Estimated chance that the next item carries each label: (labels,).

        Every one of the case's newest items votes with what followed it for other users, the newest item loudest;
        the shares of `base` weigh as much as one vote.
        """
        if self._followed is not None and self._followed[0] is case:
            return self._followed[1]
        score, norm = self.base(case), 1.0
        for distance, item in enumerate(reversed(case.history[-self.last :])):
            begin, end = int(self._start[item]), int(self._start[item + 1])
            end = begin + self._before(self._when[begin:end], case.time)
            here = slice(max(begin, end - _MOST_EVENTS), end)
            other = self._who[here] != case.user
            weight = self._weight[here][other]
            if len(weight):
                vote = 1.0 / (distance + 1)
                score = score + vote * self.labels.count(self._second[here][other], weight) / weight.sum()
                norm += vote
        self._followed = case, score / norm
        return score / norm

    def likeliest(self, case: Case, n: int) -> tuple[int, ...]:
        """The n labels with the highest chance, the blind guess."""
        return tuple(int(i) for i in np.argsort(-self.following(case), kind="stable")[:n])

    def _before(self, times: np.ndarray, moment: int) -> int:
        if not self.has_times:
            return len(times)
        return int(np.searchsorted(times, moment, side="left"))

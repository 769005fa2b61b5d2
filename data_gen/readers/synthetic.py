"""A synthetic world whose best possible ranking is computable.

Items lie in clusters; a user has one of a few hidden personas, which prefer other items of each cluster; the
clusters of consecutive items form a chain. Given a history, the posterior over personas and the probability
of every next item follow exactly, so a ranking is scored without the noise of drawn targets, and the optimum
is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from reasonrec.data_gen.clean import clean_items
from reasonrec.data_gen.interaction_log import SEED
from reasonrec.data_gen.readers.base import READERS
from reasonrec.data_gen.schema import Tables, to_lists
from reasonrec.tokenizers.errors import UserError

N_PROMOTED = 10
_CLUSTERS = (
    "lamp", "kettle", "backpack", "headphones", "novel", "sneakers", "guitar", "tent", "puzzle", "scarf",
    "drill", "camera", "bicycle", "perfume", "teapot", "telescope",
)  # fmt: skip
_KINDS = ("oak", "steel", "velvet", "glass", "bamboo", "copper", "linen", "marble")
_VARIANTS = ("small", "classic", "large", "deluxe")


@dataclass(frozen=True)
class WorldConfig:
    """Size and chances of the world.

    Attributes:
        seed: Draws preferences and promoted items (and, offset, the users).
        clusters: Number of clusters G.
        items_per_cluster: Items of a cluster M.
        personas: Number of personas U.
        zipf: Exponent of a persona's preferences inside a cluster.
        stay: Chance that the next item is of the same cluster.
        move: Chance that it is of the cluster `shift` further; the rest is spread evenly over all clusters.
        shift: That fixed shift.
        shortest: Fewest items of a user.
        longest: Most items of a user.
        disliked: Share of a persona's items that it rates at a tenth of what it would rate them otherwise.
    """

    seed: int = 0
    clusters: int = 16
    items_per_cluster: int = 32
    personas: int = 4
    zipf: float = 1.2
    stay: float = 0.5
    move: float = 0.35
    shift: int = 5
    shortest: int = 6
    longest: int = 12
    disliked: float = 0.0


@dataclass(frozen=True)
class SyntheticWorld:
    """The planted probabilities.

    Attributes:
        preferences: w_u(item | its cluster): shape (personas, n_items); each cluster's entries sum to 1.
        transitions: P(next cluster | cluster): shape (clusters, clusters).
        cluster_of: Cluster of each item: shape (n_items,).
        promoted: Items that an exposure-biased log shows in place of the user's choice.
        ratings: r_u(item) in [0, 1], how a persona likes an item that it chose: shape (personas, n_items). What is
            chosen often is not what is liked: both are drawn apart.
        shortest: Fewest items of a user.
        longest: Most items of a user.
    """

    preferences: np.ndarray
    transitions: np.ndarray
    cluster_of: np.ndarray
    promoted: np.ndarray
    ratings: np.ndarray
    shortest: int = 6
    longest: int = 12

    @classmethod
    def build(cls, config: WorldConfig) -> SyntheticWorld:
        """Draw a world."""
        rng = np.random.default_rng([config.seed, 1])
        g, m = config.clusters, config.items_per_cluster
        zipf = np.arange(1, m + 1) ** -config.zipf
        zipf /= zipf.sum()
        ranks = rng.permuted(np.tile(np.arange(m), (config.personas, g, 1)), axis=2)
        promoted = np.sort(rng.choice(g * m, size=min(N_PROMOTED, g * m), replace=False))
        transitions = np.full((g, g), (1 - config.stay - config.move) / g)
        transitions[np.arange(g), np.arange(g)] += config.stay
        transitions[np.arange(g), (np.arange(g) + config.shift) % g] += config.move
        likes = np.random.default_rng([config.seed, 4])
        ratings = likes.random((config.personas, g * m))
        return cls(
            preferences=zipf[ranks].reshape(config.personas, g * m),
            transitions=transitions,
            cluster_of=np.repeat(np.arange(g), m),
            promoted=promoted,
            ratings=np.where(likes.random(ratings.shape) < config.disliked, 0.1 * ratings, ratings),
            shortest=config.shortest,
            longest=config.longest,
        )

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> SyntheticWorld:
        """The world a synthetic dataset was drawn from.

        Raises:
            UserError: If the dataset is not synthetic.
        """
        if "world" not in facts:
            raise UserError(f"dataset {facts.get('name')!r} is not synthetic: it has no computable optimum")
        return cls.build(WorldConfig(**facts["world"]))

    @property
    def n_items(self) -> int:
        """Size of the catalogue."""
        return len(self.cluster_of)

    @cached_property
    def _log_preferences(self) -> np.ndarray:
        return np.log(self.preferences)

    def posterior(self, history: Sequence[int] | np.ndarray) -> np.ndarray:
        """Probability of each persona given a history: shape (personas,); uniform before the first item.

        q_u ∝ Π_t w_u(h_t | cluster of h_t). The chain of clusters is the same for all personas and cancels.
        """
        scores = self._log_preferences[:, np.asarray(history, dtype=np.int64)].sum(axis=1)
        weights = np.exp(scores - scores.max())
        return weights / weights.sum()

    def probabilities(self, history: Sequence[int] | np.ndarray) -> np.ndarray:
        """Probability of every next item given a history: shape (n_items,), sums to 1.

        Raises:
            ValueError: If the history is empty.
        """
        return self._of_next(history, self.preferences)

    def _of_next(self, history: Sequence[int] | np.ndarray, by_persona: np.ndarray) -> np.ndarray:
        """The chance of each item's cluster, times a mean over the personas (personas, n_items) -> (n_items,)."""
        if len(history) == 0:
            raise ValueError("the next item's probabilities need a history of at least one item")
        step = self.transitions[self.cluster_of[history[-1]]]
        return np.asarray(step[self.cluster_of] * (self.posterior(history) @ by_persona))

    def values(self, history: Sequence[int] | np.ndarray) -> np.ndarray:
        """What each item is worth in a list: the chance that it comes next, times how it is rated then (n_items,).

        v(y | h) = P(next cluster is y's) · Σ_u q_u(h) w_u(y | its cluster) r_u(y).
        """
        return self._of_next(history, self.preferences * self.ratings)

    def expected_value(self, rankings: np.ndarray, histories: Sequence[Sequence[int]], k: int = 10) -> float:
        """Mean over the cases of Σ v(item) over the first k items of a list: the expected rating of the next choice, 0
        where the list does not hold it.

        Args:
            rankings: Item numbers, best first, -1 for nothing: shape (cases, at least k).
            histories: The cases.
            k: How much of the lists counts.
        """
        return float(_listed(self.values, np.asarray(rankings)[:, :k], histories).sum(axis=1).mean())

    def best_value(self, histories: Sequence[Sequence[int]], k: int = 10) -> float:
        """The expected value of the best lists."""
        return float(np.mean([np.sort(self.values(history))[-k:].sum() for history in histories]))

    def biased_probabilities(self, history: Sequence[int] | np.ndarray, exposure_bias: float) -> np.ndarray:
        """What an exposure-biased log shows next: (1 − η) p + η q, with q uniform on the promoted items."""
        mixed = (1 - exposure_bias) * self.probabilities(history)
        mixed[self.promoted] += exposure_bias / len(self.promoted)
        return mixed

    def optimum(
        self, histories: Sequence[Sequence[int]], k: int = 10, exposure_bias: float = 0.0
    ) -> tuple[float, float]:
        """Expected HR@k and NDCG@k of the best ranking that one can learn.

        Args:
            histories: The cases.
            k: Length of the lists.
            exposure_bias: η of the log that is learnt from; the ranking is scored under clean targets all the
                same.
        """
        rankings = np.stack([self._best(history, k, exposure_bias) for history in histories])
        return self.expected_metrics(rankings, histories, k)

    def _best(self, history: Sequence[int], k: int, exposure_bias: float) -> np.ndarray:
        return np.argsort(-self.biased_probabilities(history, exposure_bias), kind="stable")[:k]

    def expected_metrics(
        self, rankings: np.ndarray, histories: Sequence[Sequence[int]], k: int = 10
    ) -> tuple[float, float]:
        """Score rankings by the true probabilities instead of drawn targets.

        Args:
            rankings: Item numbers, best first, -1 for nothing: shape (cases, at least k).
            histories: The cases.
            k: How much of the lists counts.

        Returns:
            Mean over the cases of Σ p(item) and of Σ p(item) / log2(rank + 1), each over the first k ranks.
        """
        rankings = np.asarray(rankings)[:, :k]
        discounts = 1 / np.log2(np.arange(2, rankings.shape[1] + 2))
        chances = _listed(self.probabilities, rankings, histories)
        return float(chances.sum(axis=1).mean()), float((chances @ discounts).mean())

    def sample(self, n_users: int, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
        """Draw users, all in step: one item sequence each, and their personas (n_users,)."""
        g, m = len(self.transitions), self.n_items // len(self.transitions)
        lengths = rng.integers(self.shortest, self.longest + 1, size=n_users)
        personas = rng.integers(len(self.preferences), size=n_users)
        by_cluster = np.cumsum(self.preferences.reshape(-1, g, m), axis=2)
        chain = np.cumsum(self.transitions, axis=1)
        items = np.empty((n_users, self.longest), dtype=np.int64)
        cluster = rng.integers(g, size=n_users)
        for t in range(self.longest):
            if t:
                cluster = _draw(chain[cluster], rng)
            items[:, t] = cluster * m + _draw(by_cluster[personas, cluster], rng)
        return [row[:length] for row, length in zip(items, lengths, strict=True)], personas


def _listed(
    worth: Callable[[Sequence[int]], np.ndarray], rankings: np.ndarray, histories: Sequence[Sequence[int]]
) -> np.ndarray:
    """What each listed item is worth to its case, 0 for nothing: shape of `rankings`."""
    rows = zip(rankings, histories, strict=True)
    return np.stack([np.where(ranking >= 0, worth(history)[ranking], 0.0) for ranking, history in rows])


def _draw(cumulative: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw one index from each row of cumulative probabilities; rounding may leave the last one below 1."""
    at = (cumulative < rng.random((len(cumulative), 1))).sum(axis=1)
    return np.minimum(at, cumulative.shape[1] - 1)


def synthetic_items(config: WorldConfig) -> pl.DataFrame:
    """The catalogue: titles name cluster and sub-cluster.

    Items carry a planted code (cluster, sub-cluster, variant), 16 × 8 × 4 by default.
    """
    rows = []
    for item in range(config.clusters * config.items_per_cluster):
        cluster, member = divmod(item, config.items_per_cluster)
        kind, variant = divmod(member, len(_VARIANTS))
        noun = _CLUSTERS[cluster % len(_CLUSTERS)] + (str(cluster) if cluster >= len(_CLUSTERS) else "")
        material = _KINDS[kind % len(_KINDS)] + (str(kind) if kind >= len(_KINDS) else "")
        rows.append((f"{cluster}-{kind}-{variant}", f"{_VARIANTS[variant]} {material} {noun}", noun))
    table = pl.DataFrame(rows, schema=["item_id", "title", "category"], orient="row")
    return clean_items(table, max_description_chars=0).with_row_index("item")


def make_synthetic(config: WorldConfig, train_users: int, held_out_users: int, exposure_bias: float = 0.0) -> Tables:
    """Draw a dataset: some users to train on, others (as many for validation as for the test) with one case
    each.

    Args:
        config: The world.
        train_users: Users whose whole sequences are for training.
        held_out_users: Users of each held-out split; the last item is the target, the others are the history.
        exposure_bias: η: chance that a *supervised* target is replaced by a promoted item. With η > 0 every
            training sequence is cut into its prefixes, so that histories stay clean and only the last item,
            the one target, is biased; `clean_target` holds what the user really chose (for RL).

    Returns:
        The dataset; `facts["world"]` rebuilds the world (`SyntheticWorld.from_facts`).
    """
    world = SyntheticWorld.build(config)
    rng = np.random.default_rng([config.seed, 2])
    users, personas = world.sample(train_users + 2 * held_out_users, rng)
    train, liked = users[:train_users], world.ratings[personas[:train_users]]
    cases = users[train_users : train_users + held_out_users], users[train_users + held_out_users :]
    starts = (train_users, train_users + held_out_users)
    notes = [f"{train_users} users to train on, {held_out_users} others each in validation and test, one case each"]
    if exposure_bias:
        notes.append(f"exposure-biased log: {exposure_bias} of the supervised targets are promoted items")
    return Tables(
        items=synthetic_items(config),
        users=pl.DataFrame({"user": range(len(users)), "user_id": [f"u{user}" for user in range(len(users))]}),
        train=_biased(train, liked, world, exposure_bias, np.random.default_rng([config.seed, 3]))
        if exposure_bias
        else _sequences(train, liked),
        valid=_cases(cases[0], starts[0]),
        test=_cases(cases[1], starts[1]),
        facts={
            "name": "synthetic personas",
            "split": "given",
            "mask_history": False,
            "order": "sequence",
            "repeats": True,
            "filters": [],
            "notes": notes,
            "world": asdict(config),
            "exposure_bias": exposure_bias,
        },
    )


def _sequences(users: list[np.ndarray], liked: np.ndarray) -> pl.DataFrame:
    lengths = np.array([len(items) for items in users])
    ratings = np.concatenate([row[items] for row, items in zip(liked, users, strict=True)])
    return pl.DataFrame(
        {
            "user": np.arange(len(users)),
            "items": to_lists(np.concatenate(users), lengths),
            "ratings": to_lists(ratings, lengths),
            "first_target": np.zeros(len(users), dtype=np.int32),
        }
    )


def _biased(
    users: list[np.ndarray], liked: np.ndarray, world: SyntheticWorld, exposure_bias: float, rng: np.random.Generator
) -> pl.DataFrame:
    """Every prefix of every user as one sequence whose last item is the (biased) target; what was chosen is rated."""
    owners = np.repeat(np.arange(len(users)), [len(items) - 1 for items in users])
    prefixes = [items[: end + 1].copy() for items in users for end in range(1, len(items))]
    clean = np.array([items[-1] for items in prefixes])
    ratings = np.concatenate([liked[owner][items] for owner, items in zip(owners, prefixes, strict=True)])
    shown = np.where(rng.random(len(clean)) < exposure_bias, rng.choice(world.promoted, size=len(clean)), clean)
    for items, target in zip(prefixes, shown, strict=True):
        items[-1] = target
    lengths = np.array([len(items) for items in prefixes])
    return pl.DataFrame(
        {
            "user": owners,
            "items": to_lists(np.concatenate(prefixes), lengths),
            "ratings": to_lists(ratings, lengths),
            "first_target": lengths - 1,
            "clean_target": clean,
        }
    )


def _cases(users: list[np.ndarray], first_user: int) -> pl.DataFrame:
    lengths = np.array([len(items) - 1 for items in users])
    return pl.DataFrame(
        {
            "row": np.arange(len(users)),
            "user": first_user + np.arange(len(users)),
            "history": to_lists(np.concatenate([items[:-1] for items in users]), lengths),
            "target": np.array([items[-1] for items in users]),
            "masked": to_lists(np.zeros(0, dtype=np.int64), np.zeros(len(users), dtype=np.int64)),
            "same_time": np.zeros(len(users), dtype=bool),
        }
    )


@dataclass(frozen=True)
class SyntheticReader:
    """The world as a source."""

    seed: int = field(default=0, metadata=SEED)
    train_users: int = field(default=4000, metadata={"help": "synthetic: users to train on", "at_least": 1})
    held_out_users: int = field(
        default=2000, metadata={"help": "synthetic: users of validation, and of the test", "at_least": 1}
    )
    exposure_bias: float = field(
        default=0.0,
        metadata={"help": "synthetic: share of targets that are promoted items", "at_least": 0, "below": 1},
    )

    def read(self) -> tuple[Tables, dict[str, Path]]:
        """Draw the world; it comes from no file."""
        world = WorldConfig(seed=self.seed)
        return make_synthetic(world, self.train_users, self.held_out_users, self.exposure_bias), {}


READERS.add("synthetic", SyntheticReader, __name__)

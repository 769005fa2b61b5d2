"""Fitting a checkpoint's pool, and the controls that say whether the model adds to its experts."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from reasonrec.data_gen.histories import UserHistory
from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.policies.inference import choices
from reasonrec.recipes.rankers import sasrec
from reasonrec.recipes.rankers.base import Ranker
from reasonrec.recipes.rankers.experts import Expert, Sequential
from reasonrec.recipes.rankers.model import ModelRanker, OtherHistory, strangers
from reasonrec.recipes.rankers.pool import (
    MODEL,
    ExpertsOnly,
    Level,
    Pool,
    Weights,
    fit_weights,
    losses,
    model_voice,
    with_voice,
)
from reasonrec.recipes.recommender import Recommender

MOST_ROWS = 4000  # validation rows that weights are fitted on


@dataclass(frozen=True)
class Heard:
    """What model and experts say of validation targets.

    Attributes:
        levels: One for each token of an answer.
        voices: Who speaks, the model first.
        rows: The validation rows.
    """

    levels: list[Level]
    voices: list[str]
    rows: pl.DataFrame

    @classmethod
    def of(
        cls,
        recommender: Recommender,
        experts: Mapping[str, Expert],
        valid: pl.DataFrame,
        *,
        prompts: Sequence[Sequence[int]] | None = None,
        batch_size: int = 16,
        progress: bool = False,
    ) -> Heard:
        """Ask them.

        Args:
            recommender: The model.
            experts: The experts.
            valid: Validation rows.
            prompts: What the model reads, with the begin marker last; the rows' histories by default.
            batch_size: Cases read at a time.
            progress: Show a progress bar.
        """
        policy = recommender.policy
        chosen = choices(
            policy,
            recommender.model,
            recommender.prompts(UserHistory.of_rows(valid)) if prompts is None else prompts,
            valid["target"].to_numpy(),
            batch_size=batch_size,
            progress="validation" if progress else None,
        )
        alone = cls(model_voice(policy.answers.tree, valid, chosen), [MODEL], valid)
        for name, expert in experts.items():
            alone = alone.and_by(name, expert, recommender)
        return alone

    def and_by(self, name: str, expert: Expert, recommender: Recommender) -> Heard:
        """The same, and one expert more."""
        tree = recommender.policy.answers.tree
        return Heard(with_voice(self.levels, tree, expert, self.rows), [*self.voices, name], self.rows)

    def weights(self, names: Sequence[str], fitted: NDArray[np.bool_] | None = None) -> Weights:
        """Weights of those that are heard; see `pool.fit_weights`."""
        return fit_weights(self.levels, self.voices, names, fitted)

    def losses(self, names: Sequence[str], seed: int) -> NDArray[np.float64]:
        """Negative log-likelihood of each row (rows,), under weights fitted on the other half of the users."""
        users = self.rows["user"].to_numpy()
        drawn = np.random.default_rng(seed).permutation(np.unique(users))
        half = np.isin(users, drawn[: len(drawn) // 2])
        one, two = (
            losses(self.levels, self.voices, self.weights(names, fitted), len(users)) for fitted in (half, ~half)
        )
        return np.where(half, two, one)


def sampled(valid: pl.DataFrame, seed: int, most: int = MOST_ROWS) -> pl.DataFrame:
    """The validation rows that weights are fitted on: all, or a seeded sample."""
    return valid.sample(most, seed=seed).sort("row") if valid.height > most else valid


def controls(ranker: ModelRanker, dataset: Dataset, *, seed: int = 0) -> Iterable[tuple[Ranker, str]]:
    """What a pool has to be above, before one says that the model adds to it: each with weights of its own.

    Each expert; all of them without the model; with the model reading another user's history; with one more SASRec in
    place of the model.

    Args:
        ranker: The pooled model.
        dataset: Its dataset.
        seed: Seed of exchanges, and of the sample.

    Yields:
        The controls, each with a note.
    """
    recommender, base = ranker.recommender, ranker.name.partition(",")[0]
    pool = recommender.pool
    assert pool is not None
    tree, valid = recommender.policy.answers.tree, sampled(dataset.rows("valid"), seed)
    experts, popularity = pool.experts, dataset.items["train_count"].to_numpy().astype(np.int64)
    heard = Heard.of(
        recommender,
        experts,
        valid,
        prompts=recommender.prompts(strangers(valid, seed)),
        batch_size=ranker.batch_size,
        progress=ranker.progress,
    )
    for name, expert in experts.items():
        one = Pool({name: expert}, {name: np.ones(tree.levels)})
        yield ExpertsOnly(one, tree, popularity, f"{base}, {name} alone"), ""
    alone = Pool(experts, heard.weights(list(experts)))
    yield ExpertsOnly(alone, tree, popularity, f"{base}, its experts alone"), str(alone)
    other = copy.copy(recommender)
    other.pool = Pool(experts, heard.weights([MODEL, *experts]))
    stranger = replace(ranker, recommender=other, name=f"{base}, its model reads another user's history")
    yield OtherHistory(stranger, seed), str(other.pool)
    if isinstance(first := experts.get(Sequential.name), Sequential):
        second = Sequential(sasrec.fit(dataset, replace(first.model.config, seed=first.model.config.seed + 1)))
        second.settle(valid)
        more = {**experts, "sasrec of another seed": second}
        heard = heard.and_by("sasrec of another seed", second, recommender)
        both = Pool(more, heard.weights(list(more)))
        yield ExpertsOnly(both, tree, popularity, f"{base}, a second SASRec in place of its model"), str(both)

"""A model whose search prunes paths that contradict themselves (`decoding.consistency`), as a ranker."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from reasonrec.recipes.decoding.consistency import Checkable, Checks, Consistency
from reasonrec.recipes.rankers.model import ModelRanker
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.errors import UserError


def unchecked(recommender: Recommender) -> str | None:
    """Why the paths of a model cannot be checked; None if they can."""
    answers = recommender.policy.answers
    if not isinstance(answers, Checkable):
        return f"policy {recommender.policy.name} guesses no categories along an answer, as parallel_codes does"
    if not answers.n_categories:
        return (
            "the model has no category head, for its items have no categories, or it was trained with "
            "category_weight: 0"
        )
    return None


@dataclass
class ConsistentRanker:
    """Ranks by the item search of a model, with paths that are checked.

    Attributes:
        ranker: The model and its search, a beam search.
        rules: What is pruned.
        checks: What the last ranking pruned, and what that cost.

    Raises:
        UserError: If the model has nothing to check, or the rules do not fit it or its search.
    """

    ranker: ModelRanker
    rules: Consistency
    checks: Checks = field(default_factory=Checks)

    def __post_init__(self) -> None:
        if (why := unchecked(self.ranker.recommender)) is not None:
            raise UserError(f"theta={self.rules.theta} has nothing to compare: {why}")
        self._checked()  # rules that do not fit are refused here

    @property
    def name(self) -> str:
        """Name in the table."""
        return f"{self.ranker.name}, consistent paths"

    @property
    def note(self) -> str:
        """What the last ranking pruned, and what that cost."""
        return self.checks.told(self.rules)

    def rank(self, rows: pl.DataFrame, k: int) -> NDArray[np.int64]:
        """See `Ranker`."""
        self.checks = Checks()
        return self._checked().rank(rows, k)

    def score(self, rows: pl.DataFrame, items: NDArray[np.integer]) -> NDArray[np.float32]:
        """See `Ranker`: items that are given keep their scores, for no path is searched."""
        return self.ranker.score(rows, items)

    def _checked(self) -> ModelRanker:
        """The ranker with a model that differs in its search alone."""
        recommender = copy.copy(self.ranker.recommender)
        recommender.policy = copy.copy(recommender.policy)
        answers = recommender.policy.answers
        assert isinstance(answers, Checkable)
        recommender.policy.answers = answers.checked(self.rules, self.checks)
        return replace(self.ranker, recommender=recommender)

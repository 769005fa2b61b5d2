"""How rewards become advantages: what a training chooses by name. The maths stands in `advantages`.

An algorithm is a dataclass whose fields are its options; it registers itself under its name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reasonrec.recipes.trainers.advantages import bonus_table, grpo_advantage, max_at_k_advantage, srpo_advantage
from reasonrec.tokenizers.registry import Registry

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Algorithm(ABC):
    """Turns the rewards of whole groups into advantages.

    Attributes:
        group_size: Rollouts of a prompt.
        scale: Divide by the group's standard deviation.
    """

    group_size: int
    scale: bool = True

    @abstractmethod
    def __call__(self, total: Values, hits: NDArray[np.bool_]) -> Values:
        """What each rollout was worth beside its group; a group of zeros teaches nothing.

        Args:
            total: (rows,) rewards, NaN for a rollout that could not be scored.
            hits: (rows,) whether the answer is the target.

        Returns:
            (rows,).
        """

    def split(self, advantage: Values) -> tuple[Values, Values]:
        """What counts for the tokens of a chain, and for those of its answer: by default the same.

        Args:
            advantage: (rows,) of the groups that are trained on.
        """
        return advantage, advantage


ALGORITHMS: Registry[type[Algorithm]] = Registry("algorithm", [__name__, "reasonrec.recipes.trainers.recpo"])


def build_algorithm(name: str, options: Mapping[str, Any], group_size: int, *, scale: bool = True) -> Algorithm:
    """The algorithm of a name.

    Args:
        name: Its name.
        options: Its own options.
        group_size: Rollouts of a prompt.
        scale: Divide by the group's standard deviation.

    Raises:
        UserError: If there is none of that name, it has no such option, or refuses a value.
    """
    built: Algorithm = ALGORITHMS.make(name, options, group_size=group_size, scale=scale)
    return built


@dataclass(frozen=True)
class Grpo(Algorithm):
    """Normalised in the group."""

    def __call__(self, total: Values, hits: NDArray[np.bool_]) -> Values:
        """See `grpo_advantage`."""
        return grpo_advantage(torch.from_numpy(total), self.group_size, scale=self.scale).numpy()


@dataclass(frozen=True)
class Srpo(Algorithm):
    """The same with a bonus for exact hits.

    Attributes:
        bonus_k: Subsets of so many rollouts decide the bonus.
    """

    bonus_k: int = 4

    def __post_init__(self) -> None:
        bonus_table(self.group_size, self.bonus_k)  # refuses a k that does not fit

    def __call__(self, total: Values, hits: NDArray[np.bool_]) -> Values:
        """See `srpo_advantage`."""
        rewards, exact = torch.from_numpy(total), torch.from_numpy(hits)
        return srpo_advantage(rewards, exact, self.group_size, k=self.bonus_k, scale=self.scale).numpy()


@dataclass(frozen=True)
class Pkpo(Algorithm):
    """For lists: a rollout is worth what a list of k gains by it.

    Attributes:
        k: Length of the lists.
    """

    k: int = 8

    def __post_init__(self) -> None:
        self(np.zeros(self.group_size), np.zeros(self.group_size, dtype=bool))  # refuses a k that does not fit

    def __call__(self, total: Values, hits: NDArray[np.bool_]) -> Values:
        """See `max_at_k_advantage`."""
        return max_at_k_advantage(torch.from_numpy(total), self.group_size, k=self.k, scale=self.scale).numpy()


ALGORITHMS.add("grpo", Grpo, __name__)
ALGORITHMS.add("srpo", Srpo, __name__)
ALGORITHMS.add("pkpo", Pkpo, __name__)

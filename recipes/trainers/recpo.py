"""RecPO: chains and the item behind them share an advantage. Three arms, as `algorithm` of recipes/grpo.py.

A rollout is a chain; the item action is the target v⁺ behind it, with π(v⁺ | chain) a softmax over the targets of all
groups. Source: R2ec, arXiv 2505.16994, equation 8:

    J = 1/G Σ_i [ Σ_t ℓ(r_it, A_i) + δ(i, i*) ℓ(r_item, A_i) ],    i* = argmax_j A_j

Arms:
    recpo: the equation.
    recpo_released: what the authors' public code computes. A broadcast of (rows, 1) advantages makes every token of a
        mini-batch weigh mean(A), which is 0 on whole groups, and every item mean(A · winner), winners or not.
    infonce: no reasoning: the target's probability is raised whatever was rewarded. For mode: direct.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from reasonrec.recipes.trainers.advantages import grpo_advantage
from reasonrec.recipes.trainers.algorithms import ALGORITHMS, Algorithm, Values
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.terminal import shown

Baseline = Literal["group", "leave_one_out"]


def leave_one_out(rewards: Values, group_size: int) -> Values:
    """Advantage of RLOO: A_i = r_i − mean of the others = G/(G−1) · (r_i − mean).

    Args:
        rewards: (rows,) of whole groups.
        group_size: Rollouts of a prompt, G.
    """
    groups = rewards.reshape(-1, group_size)
    centred = groups - groups.mean(axis=1, keepdims=True)
    centred[np.ptp(groups, axis=1) == 0] = 0.0  # a mean of equal rewards rounds
    return (centred * group_size / (group_size - 1)).reshape(-1)


def released_leave_one_out(rewards: Values, group_size: int) -> Values:
    """What the authors' code has under that name: A_i = r_i (1 + 1/G) − mean, which does not sum to 0.

    Args:
        rewards: (rows,) of whole groups.
        group_size: Rollouts of a prompt, G.
    """
    groups = rewards.reshape(-1, group_size)
    return (groups * (1 + 1 / group_size) - groups.mean(axis=1, keepdims=True)).reshape(-1)


def winners(advantage: Values, group_size: int) -> NDArray[np.bool_]:
    """The best rollout of each group, the first of equal ones; none where a group teaches nothing: (rows,)."""
    groups = advantage.reshape(-1, group_size)
    best = np.zeros(groups.shape, dtype=bool)
    best[np.arange(len(groups)), groups.argmax(axis=1)] = (groups != 0).any(axis=1)
    return best.reshape(-1)


def batch_means(values: Values, batch_rows: int) -> Values:
    """Each row's mean over its mini-batch, the last of which may be short: (rows,)."""
    parts = [values[begin : begin + batch_rows] for begin in range(0, len(values), batch_rows)]
    return np.concatenate([np.full(len(part), part.mean()) for part in parts])


@dataclass(frozen=True)
class RecPO(Algorithm):
    """The equation.

    Attributes:
        baseline: What a reward is compared with: `group` (GRPO) or `leave_one_out` (RLOO).
        item_weight: Factor of the item action; tokens of a chain have weight 1 each.
    """

    baseline: Baseline = "group"
    item_weight: float = 1.0

    def __post_init__(self) -> None:
        weight = self.item_weight
        if self.baseline not in ("group", "leave_one_out"):
            raise UserError(f"baseline={shown(self.baseline)}: choose group or leave_one_out")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise UserError(f"item_weight={shown(weight)} has to be a finite number, 0 or more")

    def __call__(self, total: Values, hits: NDArray[np.bool_]) -> Values:
        """Advantages in the group."""
        if self.baseline == "leave_one_out":
            return leave_one_out(np.nan_to_num(total), self.group_size)
        return grpo_advantage(torch.from_numpy(total), self.group_size, scale=self.scale).numpy()

    def split(self, advantage: Values) -> tuple[Values, Values]:
        """All tokens have their rollout's; the item action only where the rollout won its group."""
        return advantage, self.item_weight * advantage * winners(advantage, self.group_size)


@dataclass(frozen=True)
class ReleasedRecPO(RecPO):
    """What the authors' public code computes, to compare with.

    Attributes:
        batch_rows: Rows of its mini-batch; one whole group if unset.
    """

    batch_rows: int | None = None

    def __call__(self, total: Values, hits: NDArray[np.bool_]) -> Values:
        """Advantages in the group, leave-one-out as the code has it."""
        if self.baseline == "leave_one_out":
            return released_leave_one_out(np.nan_to_num(total), self.group_size)
        return super().__call__(total, hits)

    def split(self, advantage: Values) -> tuple[Values, Values]:
        """Means over the mini-batch, the same for each of its rows."""
        rows = self.batch_rows or self.group_size
        won = advantage * winners(advantage, self.group_size)
        return batch_means(advantage, rows), self.item_weight * batch_means(won, rows)


@dataclass(frozen=True)
class InfoNce(Algorithm):
    """No reasoning: every target's probability is raised, and no chain is."""

    def __call__(self, total: Values, hits: NDArray[np.bool_]) -> Values:
        """One for every rollout."""
        return np.ones_like(total)

    def split(self, advantage: Values) -> tuple[Values, Values]:
        """Nothing for a chain."""
        return np.zeros_like(advantage), advantage


ALGORITHMS.add("recpo", RecPO, __name__)
ALGORITHMS.add("recpo_released", ReleasedRecPO, __name__)
ALGORITHMS.add("infonce", InfoNce, __name__)

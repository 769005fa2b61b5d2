"""Which groups are trained on, and what the log says about all that were rolled out.

A group is the rollouts of one prompt. One whose rollouts are all worth the same teaches nothing, and with exact hits
as the only reward most groups are like that. So more prompts are rolled out than are trained on, round after round,
until enough groups have variance or the budget is spent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from reasonrec.recipes.decoding.sample import Rollouts
from reasonrec.recipes.trainers.advantages import zero_variance
from reasonrec.recipes.trainers.scoring import Scores


@dataclass
class Pool:
    """Groups that were rolled out, whole and in the order of the data.

    Attributes:
        numbers: (groups,) prompt of each group.
        rollouts: (groups × generations) rows.
        scores: Their scores.
    """

    numbers: NDArray[np.int64]
    rollouts: Rollouts
    scores: Scores

    @property
    def group_size(self) -> int:
        """Rollouts of a prompt."""
        return len(self.rollouts) // len(self.numbers)

    def rows(self, groups: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of some groups."""
        size = self.group_size
        return (np.asarray(groups, dtype=np.int64)[:, None] * size + np.arange(size)).reshape(-1)

    def take(self, groups: Sequence[int] | NDArray[np.int64]) -> Pool:
        """Some groups, in the order given."""
        rows = self.rows(groups)
        return Pool(self.numbers[np.asarray(groups)], self.rollouts.take(rows), self.scores.take(rows))

    def replaced(self, groups: NDArray[np.int64], by: Pool) -> Pool:
        """The same pool with others in the place of some groups."""
        order = np.arange(len(self.numbers))
        order[groups] = len(order) + np.arange(len(groups))
        return Pool.join([self, by]).take(order)

    @classmethod
    def join(cls, parts: Sequence[Pool]) -> Pool:
        """Several, one after the other."""
        return cls(
            np.concatenate([part.numbers for part in parts]),
            Rollouts.join([part.rollouts for part in parts]),
            Scores.join([part.scores for part in parts]),
        )


def alive(advantage: NDArray[np.float64], group_size: int) -> NDArray[np.bool_]:
    """Which groups teach something: (rows,) advantages to (groups,)."""
    return (advantage.reshape(-1, group_size) != 0).any(axis=1)


def hinted(
    pool: Pool,
    dead: NDArray[np.int64],
    answer: Callable[[int], Sequence[int]],
    again: Callable[[NDArray[np.int64], list[Sequence[int]]], Pool],
    lives: Callable[[Pool], NDArray[np.bool_]],
) -> Pool:
    """Roll dead groups out again behind the first codes of their target: the fewest behind which they teach something.

    Where the right first code is never drawn, no rollout is worth more than another (HCGRec, arXiv 2608.11980, finds
    the length beforehand and under the start; here it is found when it is needed and under the policy as it is).

    Args:
        pool: What was rolled out.
        dead: Its groups that teach nothing.
        answer: The tokens of a prompt's target, by the number of the prompt.
        again: Rolls prompts out behind given tokens.
        lives: Which groups of a pool teach something.

    Returns:
        The pool with those in their place that came to life.
    """
    tokens = {int(number): answer(int(number)) for number in pool.numbers[dead]}
    for length in range(1, max(map(len, tokens.values()), default=0)):
        dead = dead[np.array([len(tokens[int(number)]) > length for number in pool.numbers[dead]], dtype=bool)]
        if len(dead) == 0:
            break
        found = again(pool.numbers[dead], [tokens[int(number)][:length] for number in pool.numbers[dead]])
        living = lives(found)
        pool = pool.replaced(dead[living], found.take(living.nonzero()[0]))
        dead = dead[~living]
    return pool


def choose(living: NDArray[np.bool_], wanted: int) -> NDArray[np.int64]:
    """The groups to train on: living ones in the order of the data, then dead ones to fill up.

    Args:
        living: (groups,) which groups teach something.
        wanted: How many, at most as many as there are.

    Returns:
        (wanted,) numbers of groups.
    """
    return np.argsort(~living, kind="stable")[:wanted]


def telemetry(
    pool: Pool,
    advantage: NDArray[np.float64],
    permuted: NDArray[np.float64],
    chosen: NDArray[np.int64],
    depth: int,
) -> dict[str, float]:
    """What to log about one generation step.

    Args:
        pool: Everything that was rolled out.
        advantage: (rows,) advantages.
        permuted: (rows,) advantages under another prompt's targets, NaN if not computed.
        chosen: Groups that are trained on.
        depth: Most codes of an item.

    Returns:
        Name to value. `rollouts/…` count everything that was rolled out, whether it is trained on or not.
    """
    size, scores, rollouts = pool.group_size, pool.scores, pool.rollouts
    tokens = np.array([sum(mask) for mask in rollouts.mask], dtype=np.float64)
    trained = np.zeros(len(rollouts), dtype=bool)
    trained[pool.rows(chosen)] = True
    result = {
        "rollouts/groups": float(len(pool.numbers)),
        "rollouts/zero_variance": float(zero_variance(torch.from_numpy(scores.total), size).double().mean()),
        "rollouts/nonzero_advantage": float((advantage != 0).mean()),
        "rollouts/exact_hit": float(scores.hits.mean()),
        "rollouts/reward": float(np.nanmean(scores.total)) if not np.isnan(scores.total).all() else 0.0,
        "rollouts/trained_nonzero_advantage": float((advantage[trained] != 0).mean()),
        "rollouts/tokens": float(tokens.sum()),
        "rollouts/tokens_with_gradient": float(tokens[trained & (advantage != 0)].sum() / max(tokens.sum(), 1.0)),
        "rollouts/distinct_items": float(
            np.mean([len(set(group)) for group in rollouts.items.reshape(-1, size).tolist()]) / size
        ),
    }
    for level in range(1, depth + 1):
        result[f"rollouts/prefix_{level}"] = float((scores.levels >= level).mean())
    if not np.isnan(scores.permuted_total).all():
        total = torch.from_numpy(scores.permuted_total)
        result["rollouts/zero_variance_permuted"] = float(zero_variance(total, size).double().mean())
        result["rollouts/nonzero_advantage_permuted"] = float((permuted != 0).mean())
    if rollouts.chain.any():
        result["rollouts/chain_length"] = float(rollouts.chain.mean())
        result["rollouts/chain_cut"] = float(rollouts.cut.mean())
    if not np.isnan(rollouts.gap).all():
        result["rollouts/engine_gap"] = float(np.nanmean(rollouts.gap))
    return result

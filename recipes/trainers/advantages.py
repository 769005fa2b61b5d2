"""Advantages: what a rollout was worth beside the others of its group. Pure maths.

Rows are rollouts, and each run of `group_size` rows is the group of one prompt. In several processes the rows of all
of them are gathered first, so that a group is whole and every process has the same numbers. Everything is computed
in float64: in float32 the mean of equal rewards misses them by a rounding, and dividing by a standard deviation of
almost nothing makes an advantage out of it.
"""

from __future__ import annotations

from math import comb

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reasonrec.tokenizers.errors import UserError

EPSILON = 1e-6
_EQUAL = 1e-7  # relative; rewards that differ by no more are equal, because weighted sums round


def grpo_advantage(rewards: Tensor, group_size: int, *, scale: bool = True, epsilon: float = EPSILON) -> Tensor:
    """Group-normalised advantage of GRPO.

    A_i = (r_i − mean(r)) / (std(r) + ε), with mean and standard deviation (n − 1 in the denominator) of the group.
    A group of equal rewards gets zeros, exactly. Source: https://arxiv.org/abs/2402.03300, as GREAM uses it.

    Args:
        rewards: (rows,); NaN for a rollout that could not be scored, which gets 0 and does not count in its group.
        group_size: Rollouts of a prompt, n.
        scale: Divide by the standard deviation; without it a group weighs as much as its rewards differ
            (https://arxiv.org/abs/2503.20783).
        epsilon: ε.

    Returns:
        (rows,) in the dtype of `rewards`.

    Raises:
        UserError: If the rows are no whole groups of at least two.
    """
    groups = _groups(rewards, group_size)
    centred, deviation = _centred(groups)
    if scale:
        centred = centred / (deviation + epsilon)
    centred = torch.where(_constant(groups)[:, None], 0.0, centred)
    return centred.reshape(-1).to(rewards.dtype)


def bonus_table(group_size: int, k: int = 4, *, epsilon: float = EPSILON) -> tuple[Tensor, Tensor]:
    """The Pass@k bonus of a hit and of a miss, by the number of hits in the group.

    With n rollouts of which c hit: ρ = 1 − C(n−c, k)/C(n, k) is the share of subsets of k rollouts that contain a hit,
    σ = √(ρ(1−ρ)), and

        A_pos = (1 − ρ) / (σ + ε)
        A_neg = (1 − ρ − C(n−c−1, k−1)/C(n−1, k−1)) / (σ + ε).

    Both are 0 without a hit (c = 0; nothing is to be rewarded) and where every subset has one (n − c < k). c·A_pos +
    (n−c)·A_neg = 0. Source: Pass@k training, https://arxiv.org/abs/2508.10751; GREAM adds it to GRPO with k = 4.

    Args:
        group_size: Rollouts of a prompt, n.
        k: Size of the subsets.
        epsilon: ε.

    Returns:
        A_pos and A_neg, float64 (n + 1,) each, for c = 0..n.

    Raises:
        UserError: Unless 1 ≤ k ≤ n.
    """
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= group_size:
        raise UserError(
            f"k={k} with {group_size} rollouts of a prompt: the bonus takes k of them; choose 1 ≤ k ≤ num_generations"
        )
    hits = torch.arange(group_size + 1, dtype=torch.float64)
    misses = range(group_size, -1, -1)
    # Subsets of k without a hit, 1 − ρ; integers of any size, because floats would overflow.
    none = hits.new_tensor([comb(m, k) / comb(group_size, k) for m in misses])
    none_beside_a_miss = hits.new_tensor([comb(max(m - 1, 0), k - 1) / comb(group_size - 1, k - 1) for m in misses])
    deviation = ((1 - none) * none).clamp(min=0).sqrt() + epsilon
    defined = (hits > 0) & (group_size - hits >= k)
    zero = torch.zeros_like(hits)
    return torch.where(defined, none / deviation, zero), torch.where(
        defined, (none - none_beside_a_miss) / deviation, zero
    )


def pass_at_k_bonus(hits: Tensor, group_size: int, *, k: int = 4, epsilon: float = EPSILON) -> Tensor:
    """The bonus of `bonus_table` for each rollout.

    Args:
        hits: Booleans (rows,): which rollouts recommend the target exactly (`Scores.hits`). Rewards are no
            substitute: weighted sums do not equal 1.
        group_size: Rollouts of a prompt.
        k: Size of the subsets.
        epsilon: ε of the table.

    Returns:
        float64 (rows,); sums to 0 in each group.

    Raises:
        UserError: If the rows are no whole groups, `hits` are no booleans, or k does not fit.
    """
    if hits.dtype != torch.bool:
        raise UserError(f"hits has dtype {hits.dtype}: pass booleans, not rewards")
    groups = _groups(hits, group_size) > 0
    positive, negative = (table.to(hits.device) for table in bonus_table(group_size, k, epsilon=epsilon))
    count = groups.sum(1, keepdim=True)
    return torch.where(groups, positive[count], negative[count]).reshape(-1)


def srpo_advantage(
    rewards: Tensor, hits: Tensor, group_size: int, *, k: int = 4, scale: bool = True, epsilon: float = EPSILON
) -> Tensor:
    """GREAM's bonus-calibrated group advantage: `grpo_advantage` + `pass_at_k_bonus`.

    Normalising hides the scale of rewards: a lone partial match gets the same advantage in its group as a lone exact
    hit. The bonus tells them apart.

    Args:
        rewards: (rows,); NaN for a rollout that could not be scored.
        hits: Booleans (rows,): exact hits.
        group_size: Rollouts of a prompt.
        k: Size of the subsets of the bonus.
        scale: As in `grpo_advantage`.
        epsilon: ε of both.

    Returns:
        (rows,) in the dtype of `rewards`.

    Raises:
        UserError: As `grpo_advantage` and `pass_at_k_bonus`, or if rewards and hits differ in length.
    """
    if rewards.shape != hits.shape:
        raise UserError(f"rewards has shape {tuple(rewards.shape)}, hits {tuple(hits.shape)}: pass the same rows")
    base = grpo_advantage(rewards.double(), group_size, scale=scale, epsilon=epsilon)
    return (base + pass_at_k_bonus(hits, group_size, k=k, epsilon=epsilon)).to(rewards.dtype)


def max_at_k_advantage(rewards: Tensor, group_size: int, *, k: int, scale: bool = True) -> Tensor:
    """What a list of k rollouts gains by each one, where a list is worth as much as the best in it.

    A_i = mean over the subsets T of k − 1 others of max(r_i − max T, 0). That is the gradient of E[max of k] with the
    list without the rollout as its baseline (PKPO, arXiv 2505.15201, `sloo_minus_one`). An item that the others find
    as well gains nothing, so probability is spread over k items instead of piled up on one.

    Args:
        rewards: (rows,); NaN for a rollout that could not be scored, which is worth 0 to its list and gets 0.
        group_size: Rollouts of a prompt.
        k: Length of the lists.
        scale: Divide by the deviation of the group's rewards, as `grpo_advantage` does.

    Returns:
        (rows,) in the dtype of `rewards`, none below 0.

    Raises:
        UserError: If rows do not make whole groups, or k is not in 2 … group_size.
    """
    groups = _groups(rewards, group_size)  # (groups, n)
    if not 2 <= k <= group_size:
        raise UserError(f"k={k} has to be from 2 to num_generations={group_size}: a list is drawn from a group")
    worth = groups.nan_to_num(0.0)
    rest = ~torch.eye(group_size, dtype=torch.bool)
    others = worth[:, None].expand(-1, group_size, -1)[:, rest].reshape(-1, group_size, group_size - 1)
    # The j-th of the others in ascending order is the best of so many lists.
    lists = torch.tensor([comb(j, k - 2) for j in range(group_size - 1)], dtype=torch.float64)
    gains = (worth[..., None] - others.sort(dim=-1).values).clamp(min=0)  # (groups, n, n − 1)
    found = (gains * lists).sum(-1) / comb(group_size - 1, k - 1)
    if scale:
        found = found / (_centred(groups)[1] + EPSILON)
    found = torch.where(groups.isnan() | _constant(groups)[:, None], 0.0, found)
    return found.reshape(-1).to(rewards.dtype)


def zero_variance(rewards: Tensor, group_size: int) -> Tensor:
    """Which groups teach nothing: all their rewards are equal, or fewer than two could be scored.

    Args:
        rewards: (rows,); NaN for a rollout that could not be scored.
        group_size: Rollouts of a prompt.

    Returns:
        Booleans (groups,).
    """
    return _constant(_groups(rewards, group_size))


def permuted_rows(rows: int, group_size: int, seed: int) -> NDArray[np.int64]:
    """For each rollout, a row whose target to score it against: that of another group, one and the same in a group.

    All groups stand in one cycle of random order, so that each target is used once and no group keeps its own. Two
    prompts may share a target, which then stays.

    Args:
        rows: Number of rollouts.
        group_size: Rollouts of a prompt.
        seed: Seed of the cycle.

    Returns:
        Row numbers (rows,).

    Raises:
        UserError: If the rows are no whole groups, or there is only one group.
    """
    if group_size < 1 or rows % group_size or rows // group_size < 2:
        raise UserError(
            f"{rows} rollouts in groups of {group_size}: permuting targets takes at least two whole groups"
        )
    order = np.random.default_rng(seed).permutation(rows // group_size)
    other = np.empty_like(order)
    other[order] = np.roll(order, -1)
    return np.repeat(other.astype(np.int64) * group_size, group_size) + np.tile(
        np.arange(group_size), rows // group_size
    )


def by_token(chain: Tensor, answer: Tensor, opened: NDArray[np.integer], length: int) -> Tensor:
    """Advantages of tokens, where a chain and its answer are not worth the same.

    Args:
        chain: (rows,) advantage of the tokens of each chain.
        answer: (rows,) advantage of those of its answer.
        opened: (rows,) place of the answer's first token in each completion.
        length: Tokens of the longest completion.

    Returns:
        (rows, length), or (rows,) where both are the same.
    """
    if torch.equal(chain, answer):
        return chain
    return torch.where(torch.arange(length) >= torch.from_numpy(opened)[:, None], answer[:, None], chain[:, None])


def with_given(
    advantage: Tensor, given: NDArray[np.integer], opened: NDArray[np.integer], weight: float, length: int
) -> Tensor:
    """Advantages where the first codes of some answers were given instead of drawn: they are learned as supervised.

    The gradient of `weight` · ratio is that of a supervised loss of this weight, at the policy that rolled out.

    Args:
        advantage: (rows, length) of each token, or (rows,) where all of a row are worth the same.
        given: (rows,) codes that were given.
        opened: (rows,) place of the answer's first token in each completion.
        weight: Weight of their loss (HCGRec, arXiv 2608.11980: .001 to .01).
        length: Tokens of the longest completion.

    Returns:
        (rows, length).
    """
    place, first = torch.arange(length), torch.from_numpy(opened)[:, None]
    is_given = (place >= first) & (place < first + torch.from_numpy(given)[:, None])
    return torch.where(is_given, weight, advantage.reshape(len(advantage), -1))


def _groups(values: Tensor, group_size: int) -> Tensor:
    """Float64 (groups, group_size)."""
    if values.ndim != 1 or group_size < 2 or len(values) % group_size:
        raise UserError(
            f"{tuple(values.shape)} values in groups of {group_size}: pass one row per rollout, in whole groups of at "
            "least two (num_generations)"
        )
    return values.double().reshape(-1, group_size)


def _centred(groups: Tensor) -> tuple[Tensor, Tensor]:
    """What is scored minus its group's mean, 0 for the rest: (groups, n); and each group's deviation (groups, 1)."""
    scored = ~groups.isnan()
    count = scored.sum(1, keepdim=True).clamp(min=1)
    known = groups.nan_to_num(0.0)
    centred = torch.where(scored, known - known.sum(1, keepdim=True) / count, 0.0)
    return centred, (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()


def _constant(groups: Tensor) -> Tensor:
    low = groups.nan_to_num(torch.inf).amin(1)
    high = groups.nan_to_num(-torch.inf).amax(1)
    return ~(high - low > _EQUAL * torch.maximum(low.abs(), high.abs()).clamp(min=1.0))

"""Your own reward: recommend what fits, and rather the fresh items than the ones that everybody finds anyway.

A shop's bestsellers recommend themselves, and a model trained on clicks learns to recommend them once more. This
reward pays for *fresh* items, items with few purchases, under two conditions that keep it from being gamed:

* the item has to be of the target's kind, that is share its first codes; a rare item that fits nobody earns nothing;
* the item that really came next earns most, however popular it is.

A reward is a pure function of a batch. It takes keywords only, names those it wants, swallows the others with `**_`,
and returns one number per completion, or None where it has nothing to say. `python -m reasonrec.rewards list` shows
what it can ask for. Here `train_counts`, how often each item occurs in the train interactions, is made because
`requires` names it; nothing else of it needs to be configured.

1. Try it. Completions that are right, wrong, malformed or out to cheat, in any order and alone:

       python -m reasonrec.rewards check examples/custom_reward.py:fresh_items

2. Use it, in the YAML of `recipes/grpo.py`, beside the reward that pays for being right:

       rewards:
         rsvr: 1.0
         "examples/custom_reward.py:fresh_items": 0.2
         length: 0

   With weight 0 it is only logged: look at a run's curve before you let the run optimise it. Options of the function
   go beside the weight: `{weight: 0.2, relevance: 2}`.

Group statistics (is this rollout better than the others of its prompt?) have no place here: the trainer takes them
from all processes together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from reasonrec.rewards.prefix import common_prefix
from reasonrec.rewards.registry import reward


def freshness(train_counts: np.ndarray) -> np.ndarray:
    """How fresh each item is: 1 for the least bought, 0 for the most bought; equal counts, equal freshness.

    Ranks, because counts are skewed: on a scale of counts everything but a few bestsellers would be fresh.
    """
    distinct, place = np.unique(train_counts, return_inverse=True)
    return 1 - place / max(len(distinct) - 1, 1)


@reward(name="fresh_items", requires=("train_counts",))
def fresh_items(
    *,
    predicted_codes: Sequence[tuple[int, ...] | None],
    predicted_items: Sequence[int],
    target_codes: Sequence[tuple[int, ...]],
    history_items: Sequence[Sequence[int]],
    train_counts: np.ndarray,
    depth: int,
    relevance: int = 1,
    **_: Any,
) -> list[float]:
    """Freshness of an item that fits, times how well it fits; 1 for the exact hit.

    Args:
        predicted_codes: Codes of the recommended items; None without a valid answer, which earns 0.
        predicted_items: Their numbers.
        target_codes: Codes of the items that came next.
        history_items: Items that each user has already; recommending one of them is not fresh.
        train_counts: How often each item is a train target, by item number.
        depth: Codebook levels of an item.
        relevance: First codes that an item has to share with the target to count as fitting.

    Returns:
        One reward per completion, in [0, 1].
    """
    fresh = freshness(train_counts)
    rewards = []
    for codes, item, target, history in zip(
        predicted_codes, predicted_items, target_codes, history_items, strict=True
    ):
        shared = common_prefix(codes[:depth], target) if codes is not None else 0
        if codes == target:
            rewards.append(1.0)
        elif codes is None or shared < relevance or item in history:
            rewards.append(0.0)
        else:
            # Below 1 for every other item: shared is at most depth.
            rewards.append(float(fresh[item]) * shared / (depth + 1))
    return rewards

"""Where the target stands in the list that the rollout would have shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from reasonrec.rewards.metrics import ndcg, rank_of_target
from reasonrec.rewards.registry import reward
from reasonrec.tokenizers.errors import UserError


@reward(name="rank", requires=("beam_items",))
def rank(*, beam_items: Sequence[Sequence[int]], target_items: Sequence[int], k: int = 10, **_: Any) -> list[float]:
    """NDCG@k of the beam searched behind each chain: 1/log2(rank + 1), 0 where the target is not among the first k.

    Args:
        beam_items: Item numbers of each beam, best first, -1 for an empty place; lists may differ in length.
        target_items: Item numbers of the targets.
        k: Length of the list that counts.

    Returns:
        One reward per completion, in [0, 1].

    Raises:
        UserError: If k is no positive integer.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise UserError(f"k={k!r}: the list that counts has at least one place")
    ranking = np.full((len(beam_items), k), -1, dtype=np.int64)
    for row, beam in enumerate(beam_items):
        first = beam[:k]
        ranking[row, : len(first)] = first
    values: list[float] = ndcg(rank_of_target(ranking, np.asarray(target_items, dtype=np.int64)), k).tolist()
    return values

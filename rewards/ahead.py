"""Rewards that look ahead: what an answer is worth for the items that came later as well, not for the next one alone.

Any reward does with `horizon` and `decay` beside its weight. Source: the multi-step reward augmentation of REG4Rec
(arXiv 2508.15308, equations 15 and 16), which has horizon 3 and decay 0.8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reasonrec.rewards.calling import Reward, take


@dataclass(frozen=True)
class Later:
    """The targets that came so many places behind the next one, where the sequence is that long.

    Attributes:
        rows: Completions whose sequence has one.
        columns: For these, in this order, the keywords of a reward that are about a target.
    """

    rows: NDArray[np.int64]
    columns: Mapping[str, Any]


def look_ahead(reward: Reward, batch: Mapping[str, Any], later: Sequence[Later]) -> NDArray[np.float64]:
    """Score a batch against the next target and those behind it.

    g = Σ_j w^(j−1) g_j / Σ_j w^(j−1) over the targets j = 1 … horizon that there are and that the reward has something
    to say about; w is the reward's decay.

    Args:
        reward: The reward.
        batch: The keywords of `calling.KEYWORDS`, about the next target.
        later: The targets behind it, the first one first; those beyond the horizon are not looked at.

    Returns:
        (completions,), NaN where the reward said None about every target.

    Raises:
        UserError: As the reward.
    """
    values = np.full((reward.horizon, len(batch["completions"])), np.nan)
    values[0] = reward(**batch)
    for place, target in enumerate(later[: reward.horizon - 1], 1):
        if len(target.rows):
            values[place, target.rows] = reward(**{**take(batch, target.rows.tolist()), **target.columns})
    said = ~np.isnan(values)
    weights = np.where(said, reward.decay ** np.arange(reward.horizon)[:, None], 0.0)
    total = weights.sum(0)
    sums = (weights * np.where(said, values, 0.0)).sum(0)
    return np.divide(sums, total, out=np.full_like(total, np.nan), where=total > 0)

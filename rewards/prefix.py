"""Partial credit for codes: items that share their first codes are alike, coarse to fine.

What is no item of the catalogue never gets this far: the parser gives None for it, and so do answers that come before
their chain. The functions themselves only compare tuples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

from reasonrec.rewards.parse import Codes
from reasonrec.rewards.registry import reward
from reasonrec.tokenizers.errors import UserError

NEAR_MISS = 0.95


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many codes two items share from the first one on."""
    shared = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        shared += 1
    return shared


@cache
def rsvr_table(depth: int) -> tuple[float, ...]:
    """Reward of 0, 1, …, `depth` shared codes for items that are not the same.

    r(m) = √(m/H) for m < H = `depth`. With all H shared and only the disambiguation code wrong, missing or too many,
    it is 0.95; where √((H−1)/H) has reached that (H > 10), it is half-way between that and the 1 of an exact hit, so
    that the table rises strictly with any number of levels.

    Source: GREAM's residual-sensitive verifiable reward (arXiv 2510.20815), H = 4: 0, .5, .707, .866, .95.

    Args:
        depth: Codebook levels of an item.

    Raises:
        UserError: If there are none.
    """
    if depth < 1:
        raise UserError(f"depth={depth}: an item has at least one codebook level")
    steps = [math.sqrt(m / depth) for m in range(depth)]
    return (*steps, NEAR_MISS if steps[-1] < NEAR_MISS else (1 + steps[-1]) / 2)


@reward(name="prefix")
def prefix(*, predicted_codes: Sequence[Codes | None], target_codes: Sequence[Codes], **_: Any) -> list[float]:
    """Share of the codes that are right from the first one on; 1 for the exact hit only, 0 without a valid answer.

    The share is of the longer of the two items, so that a disambiguation code that is missing or too many costs.

    Args:
        predicted_codes: Codes of the recommended items, None without a valid answer.
        target_codes: Codes of the targets.

    Returns:
        One reward per completion, in [0, 1].
    """
    return [
        common_prefix(p, t) / max(len(p), len(t)) if p else 0.0
        for p, t in zip(predicted_codes, target_codes, strict=True)
    ]


@reward(name="rsvr")
def rsvr(
    *, predicted_codes: Sequence[Codes | None], target_codes: Sequence[Codes], depth: int, **_: Any
) -> list[float]:
    """GREAM's residual-sensitive verifiable reward: 1 for the exact hit, else by `rsvr_table`, 0 without an answer.

    Args:
        predicted_codes: Codes of the recommended items, None without a valid answer.
        target_codes: Codes of the targets.
        depth: Codebook levels of an item, the disambiguation code not counted.

    Returns:
        One reward per completion, in [0, 1].
    """
    table = rsvr_table(depth)
    result = []
    for p, t in zip(predicted_codes, target_codes, strict=True):
        if p is None:
            result.append(0.0)
        elif tuple(p) == tuple(t):
            result.append(1.0)
        else:
            result.append(table[common_prefix(p[:depth], t[:depth])])
    return result

"""The exact hit: the recommended item is the one that came next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reasonrec.rewards.registry import reward


@reward(name="exact")
def exact(*, predicted_items: Sequence[int], target_items: Sequence[int], **_: Any) -> list[float]:
    """1 for the target, 0 for anything else.

    Args:
        predicted_items: Numbers of the recommended items, -1 without a valid answer.
        target_items: Numbers of the targets.

    Returns:
        One reward per completion.
    """
    return [float(item == target) for item, target in zip(predicted_items, target_items, strict=True)]

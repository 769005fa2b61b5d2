"""The category: that of the recommended item, and what a category head says of it at each step.

Source: REG4Rec (arXiv 2508.15308, equations 11 to 13). The category of an item is the first that it lists; prepare the
data with the level that should count in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reasonrec.rewards.registry import reward


def jensen_shannon(left: ArrayLike, right: ArrayLike) -> NDArray[np.float64]:
    """Jensen-Shannon divergence, to base 2: 0 for equal distributions, 1 for those that share nothing.

    JS(p, q) = H((p + q) / 2) − (H(p) + H(q)) / 2. Source: https://doi.org/10.1109/18.61115.

    Args:
        left: Distributions (rows, outcomes); rows sum to 1.
        right: The same.

    Returns:
        (rows,), in [0, 1].
    """
    p, q = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    return np.clip(_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2, 0.0, 1.0)


@reward(name="category")
def category(
    *, predicted_items: Sequence[int], target_items: Sequence[int], categories: NDArray[np.int64], **_: Any
) -> list[float | None]:
    """1 where the recommended item is of the target's category, 0 for another or none.

    Args:
        predicted_items: Numbers of the recommended items, -1 without a valid answer.
        target_items: Numbers of the targets.
        categories: (items,) number of each item's category, -1 for none.

    Returns:
        One reward per completion, 0 or 1; None where the target has no category.
    """
    predicted, target = np.asarray(predicted_items, dtype=np.int64), np.asarray(target_items, dtype=np.int64)
    wanted = categories[target]
    hit = (predicted >= 0) & (categories[predicted] == wanted)
    return [float(h) if known else None for h, known in zip(hit, wanted >= 0, strict=True)]


@reward(name="category_steps")
def category_steps(
    *,
    predicted_items: Sequence[int],
    target_items: Sequence[int],
    categories: NDArray[np.int64],
    category_probs: Sequence[ArrayLike],
    **_: Any,
) -> list[float | None]:
    """Share of the steps at which the category head's first choice is the target's category; 0 without an item.

    Source: g_cate of REG4Rec (arXiv 2508.15308, equation 11).

    Args:
        predicted_items: Numbers of the recommended items, -1 without a valid answer.
        target_items: Numbers of the targets.
        categories: (items,) number of each item's category, -1 for none.
        category_probs: For each completion (steps, categories).

    Returns:
        One reward per completion, in [0, 1]; None where the target has no category.
    """
    result: list[float | None] = []
    for item, target, probs in zip(predicted_items, target_items, category_probs, strict=True):
        wanted = categories[target]
        if wanted < 0:
            result.append(None)
        else:
            result.append(float((np.asarray(probs).argmax(-1) == wanted).mean()) if item >= 0 else 0.0)
    return result


@reward(name="consistency")
def consistency(
    *, predicted_items: Sequence[int], category_probs: Sequence[Sequence[ArrayLike]], **_: Any
) -> list[float]:
    """1 less the mean Jensen-Shannon divergence (base 2) of what a category head says from step to step.

    It asks for a settled mind, not for the right one, and pays a miss as it pays a hit: never use it alone. An answer
    of one step is settled. Source: g_js of REG4Rec (arXiv 2508.15308, equations 12 and 13; it gives no base).

    Args:
        predicted_items: Numbers of the recommended items, -1 without a valid answer.
        category_probs: For each completion (steps, categories).

    Returns:
        One reward per completion, in [0, 1]; 0 without an item.
    """
    if not len(category_probs):
        return []
    rows = len(predicted_items)
    row = np.repeat(np.arange(rows), [len(probs) for probs in category_probs])
    steps = np.concatenate([np.asarray(probs, dtype=np.float64) for probs in category_probs])
    pair = np.flatnonzero(row[1:] == row[:-1])
    drift = np.bincount(row[pair], jensen_shannon(steps[pair], steps[pair + 1]), rows)
    mean = drift / np.maximum(np.bincount(row[pair], minlength=rows), 1)
    values: list[float] = np.where(np.asarray(predicted_items) >= 0, 1.0 - mean, 0.0).tolist()
    return values


def _entropy(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """In bits (rows,); what is impossible adds nothing."""
    return -np.where(p > 0, p * np.log2(np.where(p > 0, p, 1.0)), 0.0).sum(-1)

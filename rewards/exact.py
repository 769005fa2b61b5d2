"""The exact hit: the recommended item is the one that came next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reasonrec.rewards.parse import Codes
from reasonrec.rewards.registry import reward


def exact_hits(predicted_codes: Sequence[Codes | None], target_codes: Sequence[Codes]) -> NDArray[np.bool_]:
    """Which completions recommend the target.

    This is the flag that `advantages.pass_at_k_bonus` wants; a sum of weighted rewards cannot be compared with 1.

    Args:
        predicted_codes: Codes of the recommended items, None without a valid answer.
        target_codes: Codes of the targets.

    Returns:
        Booleans (completions,).
    """
    pairs = zip(predicted_codes, target_codes, strict=True)
    # A tuple that is not None equals its target only code by code, the disambiguation code included.
    return np.fromiter((p is not None and tuple(p) == tuple(t) for p, t in pairs), dtype=bool)


@reward(name="exact")
def exact(*, predicted_codes: Sequence[Codes | None], target_codes: Sequence[Codes], **_: Any) -> list[float]:
    """1 for the target, 0 for anything else.

    Args:
        predicted_codes: Codes of the recommended items, None without a valid answer.
        target_codes: Codes of the targets.

    Returns:
        One reward per completion.
    """
    return [float(hit) for hit in exact_hits(predicted_codes, target_codes)]

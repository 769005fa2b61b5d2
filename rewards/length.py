"""The length of the chain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from reasonrec.rewards.registry import reward
from reasonrec.tokenizers.errors import UserError


@reward(name="length")
def length(
    *,
    chains: Sequence[Sequence[int]],
    predicted_items: Sequence[int],
    reasoning: bool = True,
    shortest: int = 16,
    longest: int = 192,
    limit: int = 256,
    **_: Any,
) -> list[float | None]:
    """1 for a chain of `shortest` to `longest` tokens; falls to 0 at no token and at `limit`, in straight lines.

    The upper slope is the soft punishment of overlong answers of DAPO (arXiv 2503.14476), moved from [-1, 0] to [0,
    1]; the lower one keeps reasoning from being shortened away. Without a valid answer the length is worth nothing.

    Args:
        chains: Token ids of each chain.
        predicted_items: Numbers of the recommended items, -1 without a valid answer.
        reasoning: Whether completions start with a chain; if not, there is nothing to say.
        shortest: Fewest tokens of a chain that is long enough; 0 accepts none.
        longest: Most tokens of a chain that is short enough.
        limit: Tokens from which on a chain is worth nothing.

    Returns:
        One reward per completion, in [0, 1]; None in direct mode.

    Raises:
        UserError: Unless 0 ≤ shortest ≤ longest < limit.
    """
    if not 0 <= shortest <= longest < limit:
        raise UserError(f"shortest={shortest}, longest={longest}, limit={limit}: have to rise, limit above longest")
    if not reasoning:
        return [None] * len(chains)
    tokens = np.fromiter(map(len, chains), dtype=np.float64, count=len(chains))
    rise = tokens / shortest if shortest else np.ones_like(tokens)
    values = np.clip(np.minimum(rise, (limit - tokens) / (limit - longest)), 0, 1).tolist()
    return [value if item >= 0 else 0.0 for value, item in zip(values, predicted_items, strict=True)]

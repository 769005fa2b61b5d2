"""How likely the chain makes the item that came next, whatever item was sampled behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import repeat
from typing import Any

from reasonrec.rewards.parse import Codes
from reasonrec.rewards.registry import reward
from reasonrec.tokenizers.errors import UserError


@reward(name="likelihood", requires=("target_log_prob",))
def likelihood(
    *,
    target_log_prob: Sequence[float | None],
    target_codes: Sequence[Codes] | None = None,
    perplexity: bool = False,
    floor: float = -30.0,
    **_: Any,
) -> list[float | None]:
    """Log-probability of the target behind the chain: a signal for every chain, also where no rollout hits.

    It rewards the chain alone, so it is the same for two answers behind the same chain.

    Source: the gold-answer reward of LatentR3 (arXiv 2505.19092), which uses the negative perplexity.

    Args:
        target_log_prob: Summed log-probability of the target's codes; None where it was not computed.
        target_codes: Codes of the targets; their number is the length that the perplexity divides by, and nothing
            else is read of them.
        perplexity: Give −exp(−log p / codes) instead of log p.
        floor: Smallest log p that counts, as one impossible target must not outweigh a group.

    Returns:
        One reward per completion, in [floor, 0] (as perplexity below 0); None where there is no log-probability.

    Raises:
        UserError: If a log-probability is NaN or positive, `floor` is not negative, or there are no codes for a
            perplexity.
    """
    if not -math.inf < floor < 0:
        raise UserError(f"floor={floor}: has to be a negative number")
    if perplexity and target_codes is None:
        raise UserError("perplexity=True divides by the number of target_codes, and there are none here; leave it out")
    lengths = map(len, target_codes) if perplexity and target_codes is not None else repeat(1, len(target_log_prob))
    result: list[float | None] = []
    for value, length in zip(target_log_prob, lengths, strict=True):
        if value is None:
            result.append(None)
            continue
        if not value <= 1e-6:  # NaN too; rounding may leave a certain item a little above 0
            raise UserError(f"target_log_prob={value}: a log-probability is a number of at most 0")
        kept = min(max(float(value), floor), 0.0)
        result.append(-math.exp(-kept / length) if perplexity else kept)
    return result


@reward(name="probability", requires=("target_log_prob",))
def probability(*, target_log_prob: Sequence[float | None], **_: Any) -> list[float | None]:
    """Probability of the target behind the chain, among the whole catalogue.

    Source: the continuous reward of R2ec (arXiv 2505.16994, equation 5).

    Args:
        target_log_prob: Summed log-probability of the target; None where it was not computed.

    Returns:
        One reward per completion, in [0, 1]; None where there is no log-probability.

    Raises:
        UserError: If a log-probability is NaN or positive.
    """
    result: list[float | None] = []
    for value in target_log_prob:
        if value is not None and not value <= 1e-6:  # NaN too; rounding may leave a certain item a little above 0
            raise UserError(f"target_log_prob={value}: a log-probability is a number of at most 0")
        result.append(None if value is None else min(math.exp(value), 1.0))
    return result

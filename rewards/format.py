"""The form of a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reasonrec.rewards.parse import Flags
from reasonrec.rewards.registry import reward


@reward(name="format")
def strict_format(*, predicted_items: Sequence[int], flags: Sequence[Flags], reasoning: bool, **_: Any) -> list[float]:
    """1 for one finished chain, then one item of the catalogue, then nothing; else 0. In direct mode, no chain.

    Searching for the parts in any order, as GREAM's code does, rewards an answer that comes before its chain and any
    number of answers.

    Args:
        predicted_items: Numbers of the recommended items, -1 without a valid answer.
        flags: What the parser found.
        reasoning: Whether there has to be a chain.

    Returns:
        One reward per completion, 0 or 1.
    """
    result = []
    for item, flag in zip(predicted_items, flags, strict=True):
        wrong = flag.unfinished or flag.several_chains or flag.answer_before_think or flag.extra_after_answer
        result.append(float(item >= 0 and not wrong and flag.has_chain == reasoning))
    return result

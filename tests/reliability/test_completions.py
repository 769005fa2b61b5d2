"""Every reward of the kit on completions of any shape: a finite number or None for each, whatever the model wrote."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from reasonrec.rewards.cases import Case, cases, make_batch
from reasonrec.rewards.registry import load_reward, names
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.vocabulary import BEGIN, code_token

PIECES = [
    *(BEGIN, code_token(0, 0), code_token(1, 0), code_token(2, 0), code_token(3, 0), code_token(0, 99), "<|im_end|>"),
    *("wall plugs ", "🔩", "\x00", "\u202e", "{chain}", "%s", " ", "\n", "a" * 300, "So the next item is: "),
]
BATCH = 500


def drawn(rng: random.Random, reasoning: bool) -> Case:
    """A completion that is made of anything."""
    if rng.random() < 0.1:
        return rng.choice(cases(reasoning))
    before, after = ("".join(rng.choices(PIECES, k=rng.randrange(8))) for _ in range(2))
    codes = None if rng.random() < 0.2 else tuple(rng.randrange(4) for _ in range(rng.randrange(6)))
    return Case("drawn", "adversarial", before, codes, after if rng.random() < 0.5 else "", rng.randrange(12))


@pytest.mark.parametrize("mode", ["direct", "reasoning"])
def test_no_completion_breaks_a_reward(mode: str, large: bool, report: Callable[[str, int, list[str]], None]) -> None:
    reasoning = mode == "reasoning"
    rewards = [load_reward(name) for name in names()]
    faults = []
    batches = 50_000 // BATCH if large else 2  # two modes: a hundred thousand completions a reward
    for number in range(batches):
        rng = random.Random(number)
        batch = make_batch([drawn(rng, reasoning) for _ in range(BATCH)], reasoning)
        for reward in rewards:
            try:
                reward(**batch)  # which checks what it gives back
            except (UserError, ArithmeticError, LookupError, TypeError, ValueError) as error:
                faults.append(f"{reward.name}: {error!r}")
    report(f"completions of {len(rewards)} rewards, {mode} mode", batches * BATCH * len(rewards), faults)

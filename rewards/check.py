"""Tries a reward on completions of which it is known what they are worth (`cases`).

What is asked (`Question`) and what comes back (`Answer`) are plain values: the reward may run in another process, and
the verdict is not in its hands (`sandbox`).
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from reasonrec.rewards.calling import BEAM, Reward, take
from reasonrec.rewards.cases import GOLDEN, Case, cases, make_batch
from reasonrec.rewards.collaborative import CoVisits
from reasonrec.rewards.sets import Codewords
from reasonrec.tokenizers.errors import UserError

SPEED_ROWS, SPEED_CHAIN, SPEED_LIMIT = 10_000, 194, 2.0


@dataclass
class Finding:
    """What a check found.

    Attributes:
        values: Reward of each case of each mode.
        violations: What keeps the reward from being used.
        warnings: What its author should know.
        notes: What else was measured.
    """

    values: dict[str, list[tuple[Case, float | None]]] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Question:
    """A batch to be scored, by what it is made from.

    Attributes:
        mode: `reasoning` or `direct`.
        rows: Which of the cases of this mode, in this order; None is all of them.
        speed: Not the cases, but this many completions of 200 tokens, for the time they take.
    """

    mode: str
    rows: tuple[int, ...] | None = None
    speed: int = 0

    @property
    def size(self) -> int:
        """Completions in the batch."""
        return self.speed or len(cases(self.mode == "reasoning") if self.rows is None else self.rows)


@dataclass(frozen=True)
class Answer:
    """What a reward made of a batch.

    Attributes:
        values: Its values; None if it failed.
        error: How it failed, one line.
        changed: Whether it changed its arguments.
        seconds: How long it took.
    """

    values: list[float | None] | None
    error: str = ""
    changed: bool = False
    seconds: float = 0.0


class Ended(Exception):
    """The reward's process is gone, and can be asked no more; the text says how."""


Ask = Callable[[Question], Answer]


def answer(reward: Reward, question: Question, clock: Callable[[], float] = time.perf_counter) -> Answer:
    """Score a batch with a reward.

    Args:
        reward: The reward.
        question: The batch.
        clock: Seconds, for the speed.
    """
    if question.speed:
        began = clock()
        values, error = _try(reward, _speed_batch(question.speed, _width(reward)))
        return Answer(values, error, seconds=clock() - began)
    whole = _whole_batch(question.mode, _width(reward))
    before = whole if question.rows is None else take(whole, question.rows)
    batch = copy.deepcopy(before)
    values, error = _try(reward, batch)
    return Answer(values, error, changed=not _same_batch(batch, before))


def check(ask: Ask) -> Finding:
    """Try a reward on everything.

    Args:
        ask: Has the reward score a batch.

    Returns:
        What was found; no `violations` means it can be used.
    """
    found = Finding()
    with contextlib.suppress(Ended):  # it stands among the violations
        for mode, reasoning in (("reasoning", True), ("direct", False)):
            chosen = cases(reasoning)
            first = _call(ask, Question(mode), found, f"{mode} mode")
            if first.values is None:
                continue
            found.values[mode] = list(zip(chosen, first.values, strict=True))
            if first.changed:
                found.violations.append(f"{mode}: it changes its arguments; copy what you change")
            _check_purity(ask, [case.name for case in chosen], first.values, mode, found)
        if found.values:
            _check_values(found)
            _check_speed(ask, found)
            empty = _call(ask, Question("reasoning", ()), Finding(), "")
            if empty.error:
                found.warnings.append(f"a batch without completions: {empty.error}")
    return found


def _check_purity(ask: Ask, names: Sequence[str], values: Sequence[float | None], mode: str, found: Finding) -> None:
    """Same batch, other order, single rows: the same rewards."""
    rows = range(len(values))
    again = _call(ask, Question(mode), found, f"{mode}, the same batch again").values
    if again is not None and not _close(values, again):
        found.violations.append(
            f"{mode}: the same batch scores differently the second time; a reward is deterministic"
        )
        return
    shuffled = (*rows[::-1][1::2], *rows[::-1][::2])
    moved = _call(ask, Question(mode, shuffled), found, f"{mode}, another order").values
    if moved is not None and not _close([values[row] for row in shuffled], moved):
        found.violations.append(f"{mode}: rewards change with the order of the batch")
    for row in rows:
        alone = _call(ask, Question(mode, (row,)), found, f"{mode}, alone: {names[row]!r}").values
        if alone is not None and not _close([values[row]], alone):
            found.violations.append(
                f"{mode}: {names[row]!r} gets {values[row]} in a batch and {alone[0]} alone; a reward sees the "
                "rows of one process only, so none may depend on another"
            )
            break


def _check_values(found: Finding) -> None:
    numbers = [value for rows in found.values.values() for _, value in rows if value is not None]
    total = sum(map(len, found.values.values()))
    if not numbers:
        found.violations.append("it says None for everything: no completion can ever be rewarded")
        return
    found.notes.append(f"range {min(numbers):.4g} to {max(numbers):.4g}")
    found.notes.append(f"None for {total - len(numbers)} of {total} completions")
    if min(numbers) == max(numbers) and len(numbers) == total:
        found.violations.append(
            f"every completion gets {numbers[0]:.4g}, a malformed one as an exact hit: it tells nothing apart"
        )
        return
    if min(numbers) == max(numbers):
        found.warnings.append(f"every completion that gets anything gets {numbers[0]:.4g}: it tells nothing apart")
    for mode, rows in found.values.items():
        _check_ranks(rows, mode, found)


def _check_ranks(rows: Sequence[tuple[Case, float | None]], mode: str, found: Finding) -> None:
    """An exact hit earns most, and what is malformed less."""
    golden = next(value for case, value in rows if case.name == GOLDEN)
    others = [(case, value) for case, value in rows if value is not None and case.kind != "golden"]
    worth = golden or 0.0  # None counts as 0 beside other rewards
    # Where a hit is worth nothing either, the reward punishes something else, and takes nothing off the malformed.
    earns = [
        (case, value)
        for case, value in others
        if case.kind == "malformed" and (value > worth + 1e-9 or (worth and value >= worth - 1e-9))
    ]
    if earns:
        case, value = max(earns, key=lambda pair: pair[1])
        found.violations.append(
            f"{mode}: the malformed {case.name!r} gets {value:.4g}, an exact hit {worth:.4g}: it pays for answers "
            "that are no item; give those less (predicted_items is -1 there)"
        )
    if golden is None:
        if any(value is not None for _, value in rows):
            found.warnings.append(f"{mode}: None for an exact hit")
        return
    better = [(case, value) for case, value in others if case.kind != "malformed" and value > golden + 1e-9]
    misses = [value for case, value in others if case.kind == "miss"]
    if better:
        case, value = max(better, key=lambda pair: pair[1])
        found.warnings.append(
            f"{mode}: {case.name!r} gets {value:.4g}, an exact hit {golden:.4g}: alone, or with a large weight, it "
            "teaches that instead of hits"
        )
    elif earns:
        return
    elif misses and max(misses) >= golden - 1e-9:
        found.notes.append(f"{mode}: an exact hit scores highest, but some misses score the same")
    else:
        found.notes.append(f"{mode}: an exact hit scores highest")


def _check_speed(ask: Ask, found: Finding) -> None:
    seconds = _call(ask, Question("reasoning", speed=SPEED_ROWS), found, f"{SPEED_ROWS} completions").seconds
    found.notes.append(f"{SPEED_ROWS} completions of 200 tokens in {seconds:.3f} s")
    if seconds > SPEED_LIMIT:
        found.warnings.append(f"slow: more than {SPEED_LIMIT:g} s for {SPEED_ROWS} completions; training waits for it")


def _width(reward: Reward) -> int:
    return reward.width if "beam_items" in reward.requires else BEAM


@cache
def _whole_batch(mode: str, width: int) -> dict[str, Any]:
    """All cases of a mode; whoever scores them copies them first."""
    reasoning = mode == "reasoning"
    return make_batch(cases(reasoning), reasoning, width)


def _speed_batch(rows: int, width: int) -> dict[str, Any]:
    chain = " ".join(f"word{n}" for n in range(SPEED_CHAIN)) + " "
    few = [Case("", "", chain, (0, 0, 0, n % 3)) for n in range(100)]
    return take(make_batch(few, True, width), [n % 100 for n in range(rows)])


def _try(reward: Reward, batch: dict[str, Any]) -> tuple[list[float | None] | None, str]:
    try:
        return reward(**batch), ""
    except UserError as error:
        return None, str(error)


def _call(ask: Ask, question: Question, found: Finding, where: str) -> Answer:
    try:
        result = ask(question)
    except Ended as error:
        found.violations.append(f"{where}: {error}")
        raise
    if result.error:
        found.violations.append(f"{where}: {result.error}")
    return result


def _close(left: Sequence[float | None], right: Sequence[float | None]) -> bool:
    def key(values: Sequence[float | None]) -> np.ndarray:
        return np.array([np.nan if value is None else value for value in values])

    return np.allclose(key(left), key(right), rtol=1e-9, atol=1e-9, equal_nan=True)


def _same_batch(left: dict[str, Any], right: dict[str, Any]) -> bool:
    for name, value in left.items():
        other = right[name]
        if isinstance(value, CoVisits):
            same = (value.matrix != other.matrix).nnz == 0
        elif isinstance(value, Codewords):
            same = all(map(np.array_equal, (value.items, *value.books), (other.items, *other.books)))
        elif isinstance(value, np.ndarray):
            same = bool(np.array_equal(value, other))
        else:
            same = value == other
        if not same:
            return False
    return True

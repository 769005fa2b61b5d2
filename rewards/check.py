"""Tries a reward on completions of which it is known what they are worth.

A small catalogue, a target for each case and completions that recommend it, miss it, or are malformed: everything that
a rollout can produce and an author does not think of.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reasonrec.rewards.calling import Reward, take
from reasonrec.rewards.collaborative import CoVisits
from reasonrec.rewards.parse import Codes, Parser
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import ItemIndex, build_index
from reasonrec.tokenizers.vocabulary import BEGIN, Vocabulary, code_token

GOLDEN = "exact hit"
SPEED_ROWS, SPEED_CHAIN, SPEED_LIMIT = 10_000, 194, 2.0
_FIRST_ID = 1000
_END = 2
_TARGET = 0  # item (0, 0, 0, 0): it has a disambiguation code, as items 1 and 2 have
_CHAIN = "Bought a drill, then wood screws and a level; a shelf is going up, so wall plugs come next. "


@dataclass(frozen=True)
class Case:
    """A completion and what it is.

    Attributes:
        name: What it is.
        kind: `golden`, `miss` (a valid answer, not the target), `adversarial` or `malformed`.
        chain: Text before the answer.
        codes: Codes behind the begin marker; None leaves the answer away.
        after: Text behind the answer.
        target: Item that came next.
    """

    name: str
    kind: str
    chain: str
    codes: Codes | None
    after: str = ""
    target: int = _TARGET


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


def small_index() -> ItemIndex:
    """Twelve items on three levels: three share all codes, so that they have disambiguation codes."""
    codes = [[0, 0, 0]] * 3 + [[0, 0, 1], [0, 1, 0], [0, 2, 2], [1, 0, 0], [1, 1, 1], [1, 2, 3], [2, 0, 3]]
    return build_index(np.array([*codes, [3, 1, 2], [3, 3, 3]]), [4, 4, 4])


def cases(reasoning: bool) -> list[Case]:
    """All completions of a mode."""
    chain = _CHAIN if reasoning else ""
    hit, unique = (0, 0, 0, 0), (0, 0, 1)
    result = [
        Case(GOLDEN, "golden", chain, hit),
        Case("exact hit, item without disambiguation code", "golden", chain, unique, target=3),
        Case("exact hit, the same prompt again", "golden", chain, hit),
        Case("right levels, wrong disambiguation code", "miss", chain, (0, 0, 0, 1)),
        Case("two of three levels right", "miss", chain, (0, 0, 1)),
        Case("one of three levels right", "miss", chain, (0, 2, 2)),
        Case("another item", "miss", chain, (3, 3, 3)),
        Case("the same other item again", "miss", chain, (3, 3, 3)),
        Case("the last item of the history again", "miss", chain, (1, 1, 1)),
        Case("missing disambiguation code", "adversarial", chain, (0, 0, 0)),
        Case("extra disambiguation code", "adversarial", chain, (0, 0, 1, 0), target=3),
        Case("codes outside the catalogue", "adversarial", chain, (0, 0, 3)),
        Case("two items behind one marker", "adversarial", chain, (0, 0, 1), _text((0, 1, 0)), target=3),
        Case("text behind the answer", "adversarial", chain, hit, "I am sure of it."),
        Case("a second answer", "adversarial", chain, (3, 3, 3), BEGIN + _text(hit)),
        Case("very long", "adversarial", _CHAIN * 1000, hit),
        Case("one phrase over and over", "adversarial", "wall plugs " * 300, hit),
        Case("no answer", "malformed", _CHAIN, None),
        Case("empty", "malformed", "", None),
        Case("begin marker and nothing else", "malformed", chain, ()),
        Case("unfinished codes", "malformed", chain, (0, 0)),
        Case("the target's codes without a begin marker", "malformed", _CHAIN + _text(hit), None),
        Case("unicode", "malformed", "🔩 Dübel für die Wand — 壁のプラグ \u202e\u0000 ", None),
        Case("braces and control tokens as text", "malformed", "{chain} %s <|im_end|> \\n ", None),
    ]
    if reasoning:
        result += [
            Case("answer before think", "adversarial", "", hit, _CHAIN),
            Case("no chain", "adversarial", "", hit),
            Case("unicode before the answer", "golden", "🔩 Dübel für die Wand — 壁のプラグ ", hit),
        ]
    return result


def make_batch(chosen: Sequence[Case], reasoning: bool) -> dict[str, Any]:
    """All keywords that a reward can ask for, for some cases."""
    index = small_index()
    vocabulary = Vocabulary(index.level_sizes, _FIRST_ID)
    parser = Parser(vocabulary, index, reasoning=reasoning, end_ids=(_END,))
    texts = [
        case.chain + (BEGIN + _text(case.codes) if case.codes is not None else "") + case.after for case in chosen
    ]
    words: dict[str, int] = {}
    ids = [parser.ids_of_text(text, words) for text in texts]
    parsed = parser(ids)
    tuples = index.tuples()
    predicted = parsed.predicted_items
    hits = [item == case.target for item, case in zip(predicted, chosen, strict=True)]
    sequences = [[7, 6, 0, 1, 3], [7, 0, 4, 3], [5, 6, 0], [8, 9, 10, 11], [2, 3, 7, 0], [9, 8, 11]]
    return {
        "prompts": ["History:" + "".join(_text(tuples[item]) for item in (8, 6, 7))] * len(chosen),
        "completions": texts,
        "completion_ids": [[*row, _END] for row in ids],
        **parsed.columns(),
        "target_codes": [tuples[case.target] for case in chosen],
        "target_items": [case.target for case in chosen],
        "history_items": [[8, 6, 7] for _ in chosen],
        "depth": index.depth,
        "reasoning": reasoning,
        # A beam finds what was sampled first, and the target in the second place at best.
        "beam_items": [
            [item, case.target, 5, -1] if item >= 0 and not hit else [case.target, 5, 4, -1] if hit else [4, 5, -1, -1]
            for item, hit, case in zip(predicted, hits, chosen, strict=True)
        ],
        "target_log_prob": [
            -0.7 if hit else -2.5 if item >= 0 else -6.0 for item, hit in zip(predicted, hits, strict=True)
        ],
        "similarity": CoVisits(
            np.concatenate(sequences), np.repeat(np.arange(len(sequences)), list(map(len, sequences))), index.n_items
        ),
        "train_counts": np.bincount(np.concatenate(sequences), minlength=index.n_items),
    }


def check_reward(reward: Reward, clock: Callable[[], float] = time.perf_counter) -> Finding:
    """Try a reward on everything.

    Args:
        reward: The reward.
        clock: Seconds, for the speed.

    Returns:
        What was found; no `violations` means it can be used.
    """
    found = Finding()
    for mode, reasoning in (("reasoning", True), ("direct", False)):
        chosen = cases(reasoning)
        batch = make_batch(chosen, reasoning)
        before = copy.deepcopy(batch)
        values = _call(reward, batch, found, f"{mode} mode")
        if values is None:
            continue
        found.values[mode] = list(zip(chosen, values, strict=True))
        if not _same_batch(batch, before):
            found.violations.append(f"{mode}: it changes its arguments; copy what you change")
        _check_purity(reward, before, values, mode, found)
    if found.values:
        _check_values(found)
        _check_speed(reward, clock, found)
        _, empty = _try(reward, take(make_batch([], True), []))
        if empty:
            found.warnings.append(f"a batch without completions: {empty}")
    return found


def _check_purity(
    reward: Reward, batch: dict[str, Any], values: Sequence[float | None], mode: str, found: Finding
) -> None:
    """Same batch, other order, single rows: the same rewards."""
    rows = list(range(len(values)))
    names = batch["completions"]
    again = _call(reward, copy.deepcopy(batch), found, f"{mode}, the same batch again")
    if again is not None and not _close(values, again):
        found.violations.append(
            f"{mode}: the same batch scores differently the second time; a reward is deterministic"
        )
        return
    shuffled = rows[::-1][1::2] + rows[::-1][::2]
    moved = _call(reward, copy.deepcopy(take(batch, shuffled)), found, f"{mode}, another order")
    if moved is not None and not _close([values[row] for row in shuffled], moved):
        found.violations.append(f"{mode}: rewards change with the order of the batch")
    for row in rows:
        alone = _call(reward, copy.deepcopy(take(batch, [row])), found, f"{mode}, alone: {names[row][:40]!r}")
        if alone is not None and not _close([values[row]], alone):
            found.violations.append(
                f"{mode}: {names[row][:40]!r} gets {values[row]} in a batch and {alone[0]} alone; a reward sees the "
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
    if min(numbers) == max(numbers):
        found.warnings.append(f"every completion gets {numbers[0]:.4g}: it tells nothing apart")
        return
    for mode, rows in found.values.items():
        golden = next(value for case, value in rows if case.name == GOLDEN)
        if golden is None:
            if any(value is not None for _, value in rows):
                found.warnings.append(f"{mode}: None for an exact hit")
            continue
        others = [(case, value) for case, value in rows if value is not None and case.kind != "golden"]
        better = [(case, value) for case, value in others if value > golden + 1e-9]
        misses = [value for case, value in others if case.kind == "miss"]
        if better:
            case, value = max(better, key=lambda pair: pair[1])
            found.warnings.append(
                f"{mode}: {case.name!r} gets {value:.4g}, an exact hit {golden:.4g}: alone, or with a large weight, "
                "it teaches that instead of hits"
            )
        elif misses and max(misses) >= golden - 1e-9:
            found.notes.append(f"{mode}: an exact hit scores highest, but some misses score the same")
        else:
            found.notes.append(f"{mode}: an exact hit scores highest")


def _check_speed(reward: Reward, clock: Callable[[], float], found: Finding) -> None:
    chain = " ".join(f"word{n}" for n in range(SPEED_CHAIN)) + " "
    few = [Case("", "", chain, (0, 0, 0, n % 3)) for n in range(100)]
    batch = take(make_batch(few, True), [n % 100 for n in range(SPEED_ROWS)])
    began = clock()
    _, error = _try(reward, batch)
    seconds = clock() - began
    if error:
        found.violations.append(f"{SPEED_ROWS} completions: {error}")
    found.notes.append(f"{SPEED_ROWS} completions of 200 tokens in {seconds:.3f} s")
    if seconds > SPEED_LIMIT:
        found.warnings.append(f"slow: more than {SPEED_LIMIT:g} s for {SPEED_ROWS} completions; training waits for it")


def _try(reward: Reward, batch: dict[str, Any]) -> tuple[list[float | None] | None, str]:
    try:
        return reward(**batch), ""
    except UserError as error:
        return None, str(error)


def _call(reward: Reward, batch: dict[str, Any], found: Finding, where: str) -> list[float | None] | None:
    values, error = _try(reward, batch)
    if error:
        found.violations.append(f"{where}: {error}")
    return values


def _close(left: Sequence[float | None], right: Sequence[float | None]) -> bool:
    def key(values: Sequence[float | None]) -> np.ndarray:
        return np.array([np.nan if value is None else value for value in values])

    return np.allclose(key(left), key(right), rtol=1e-9, atol=1e-9, equal_nan=True)


def _same_batch(left: dict[str, Any], right: dict[str, Any]) -> bool:
    for name, value in left.items():
        other = right[name]
        if isinstance(value, CoVisits):
            same = (value.matrix != other.matrix).nnz == 0
        elif isinstance(value, np.ndarray):
            same = bool(np.array_equal(value, other))
        else:
            same = value == other
        if not same:
            return False
    return True


def _text(codes: Codes | None) -> str:
    return "".join(code_token(level, code) for level, code in enumerate(codes or ()))

"""Calling a reward: which keywords it may ask for, and what it has to give back.

A reward is a pure function of a batch, keyword-only, that returns one number for each completion, or None for a
completion that it has nothing to say about. It names the keywords it wants and swallows the others:

    def f(*, predicted_codes, target_codes, **_) -> list[float | None]: ...

It sees the completions of one process, so nothing in it may depend on which rows stand beside a row; statistics of a
group of rollouts belong to `recipes/trainers/advantages.py`.
"""

from __future__ import annotations

import inspect
import math
import numbers
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.registry import nearest
from reasonrec.tokenizers.terminal import one_line, shown
from reasonrec.tokenizers.whole import whole

RewardFunction = Callable[..., Sequence[float | None]]

# One entry per completion. Always there, but for `CODES`:
ROWS = {
    "prompts": "the prompt as text",
    "completions": "the completion as text",
    "completion_ids": "its token ids",
    "predicted_codes": "codes of the recommended item as a tuple, None without a valid answer",
    "predicted_items": "its item number, -1 without a valid answer",
    "chains": "token ids of the chain of thought",
    "flags": "what the parser found (reasonrec.rewards.parse.Flags)",
    "target_codes": "codes of the item that came next, as a tuple",
    "target_items": "its item number",
    "history_items": "item numbers of the history that the prompt shows, oldest first",
}
# The same for the whole batch. Always there, but for `CODES`:
CONTEXT = {
    "depth": "codebook levels of an item, the disambiguation code not counted",
    "reasoning": "whether completions start with a chain",
}
# Those of them that are there only under a policy that writes an item as codes:
CODES = ("predicted_codes", "target_codes", "depth")
# All that a policy may not have:
OF_POLICY = (*CODES, "category_probs")
BEAM = 20  # width of the list in `beam_items`, for a reward that has no `k`
# Made only for rewards that ask for it, one entry per completion:
ROWS_ON_REQUEST = {
    "beam_items": "item numbers of the beam searched behind the chain, best first, -1 where it is short; as many as "
    f"the reward's own keyword k says, {BEAM} without one (more if another reward asks for more)",
    "target_log_prob": "log-probability of the target's codes behind the chain",
    "target_rating": "what the user gave the target, None where nothing; only where the data have ratings",
    "category_probs": "what the policy's category head says at each step of the answer, (steps, categories), where it "
    "has one",
}
# Made only for rewards that ask for it, the same for the whole batch, from items and train interactions only:
CONTEXT_ON_REQUEST = {
    "similarity": "co-visitation of items (reasonrec.rewards.collaborative.CoVisits)",
    "train_counts": "how often each item is a train target, by item number",
    "categories": "number of each item's category, by item number, -1 for none; these number category_probs, too",
    "codewords": "vectors of the codes in the item index (reasonrec.rewards.sets.Codewords)",
}
REQUIRABLE = {**ROWS_ON_REQUEST, **CONTEXT_ON_REQUEST}
KEYWORDS = {**ROWS, **CONTEXT, **REQUIRABLE}
# Above it a reward says nothing any more: float32, in which advantages are computed, resolves 0.06 there, and its
# squares, with a weight of the same size, have to stay finite.
LARGEST = 1e6
AHEAD = ("horizon", "decay")  # options of every reward; one that has such a keyword of its own keeps it
_SHAPE = "it has to return a list with one float or None for each completion"


@dataclass(frozen=True)
class Reward:
    """A reward function with its name, called with the checks that keep a training run from going astray.

    Attributes:
        name: Name in logs and messages.
        function: The function.
        requires: Keywords that have to be computed for it.
        options: Values of its own keywords, from the configuration.
        horizon: How many targets it looks at, from the next one on (`rewards.ahead`).
        decay: Weight of each of them beside the one before.
    """

    name: str
    function: RewardFunction
    requires: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    horizon: int = 1
    decay: float = 0.8

    def __post_init__(self) -> None:
        """Check how far it looks.

        Raises:
            UserError: If the horizon is no whole number from 1 on, or the decay not above 0 and at most 1.
        """
        whole(f"reward {self.name!r}: horizon", self.horizon, at_least=1)
        decay = self.decay
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 < decay <= 1:
            raise UserError(f"reward {self.name!r}: decay={shown(decay)} has to be a number above 0 and at most 1")

    @property
    def of_policy(self) -> tuple[str, ...]:
        """Which of the keywords in `OF_POLICY` it cannot do without."""
        return tuple(name for name in OF_POLICY if name in {*_wanted(self.function), *self.requires})

    @property
    def width(self) -> int:
        """Length of the list that it wants in `beam_items`: its keyword `k`, `BEAM` without one.

        Raises:
            UserError: If that is no whole number from 1 on.
        """
        own = inspect.signature(self.function).parameters.get("k")
        k = self.options.get("k", own.default if own is not None else None)
        return BEAM if k is None else whole(f"reward {self.name!r}: k", k, at_least=1)

    def __call__(self, **batch: Any) -> list[float | None]:
        """Score a batch.

        Args:
            **batch: The keywords of `KEYWORDS`; `completions` has to be there.

        Returns:
            A float or None for each completion.

        Raises:
            UserError: If the function raises (`SystemExit` too, or a training would end as if it were done) or returns
                anything else than one number of at most `LARGEST` in size, or None, per completion; names the reward
                and the completion.
        """
        missing = [name for name in (*_wanted(self.function), *self.requires) if name not in {*batch, *self.options}]
        if missing:
            raise UserError(f"reward {self.name!r} needs {missing[0]}, which this caller does not provide")
        try:
            values: Any = self.function(**{**batch, **self.options})
            if hasattr(type(values), "tolist"):  # an array or a tensor
                values = values.tolist()
        except UserError as error:  # it knows what is wrong
            raise UserError(f"reward {self.name!r}: {one_line(error, 500)}") from error
        except (Exception, SystemExit) as error:
            row = self._culprit(batch)
            where = f"on the completion {_shown(batch, row)}" if row is not None else "on the batch as a whole"
            raise UserError(
                f"reward {self.name!r} raised {_type(error)}: {one_line(error)} {where}; {_SHAPE}, whatever the "
                "completion holds"
            ) from error
        return self._checked(values, batch)

    def _checked(self, values: Any, batch: Mapping[str, Any]) -> list[float | None]:
        completions = batch["completions"]
        if not isinstance(values, list | tuple):
            raise UserError(f"reward {self.name!r} returned {_type(values)}; {_SHAPE}")
        if len(values) != len(completions):
            first = f"; the first completion is {_shown(batch, 0)}" if len(completions) else ""
            raise UserError(
                f"reward {self.name!r} returned {len(values)} values for {len(completions)} completions{first}; "
                f"{_SHAPE}"
            )
        result: list[float | None] = []
        for row, value in enumerate(values):
            if type(value) is float or value is None:
                number = value
            elif isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
                raise UserError(
                    f"reward {self.name!r} returned {one_line(reprlib.repr(value), 160)} ({_type(value)}) for the "
                    f"completion {_shown(batch, row)}; {_SHAPE}"
                )
            else:
                number = _as_float(value)
            if number is not None and not abs(number) <= LARGEST:
                raise UserError(
                    f"reward {self.name!r} returned {number:g} for the completion {_shown(batch, row)}; a reward is "
                    f"finite and at most {LARGEST:g} in size, and {_SHAPE}, None where there is nothing to say"
                )
            result.append(number)
        return result

    def _culprit(self, batch: Mapping[str, Any]) -> int | None:
        """The first row that the function fails on alone."""
        for row in range(len(batch["completions"])):
            try:
                self.function(**{**take(batch, [row]), **self.options})
            except (Exception, SystemExit):
                return row
        return None


def take(batch: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The same keywords for some of the rows.

    Args:
        batch: Keywords of a reward.
        rows: Which rows, in the order wanted.
    """
    per_row = {*ROWS, *ROWS_ON_REQUEST}
    return {name: [value[r] for r in rows] if name in per_row else value for name, value in batch.items()}


def check_signature(name: str, function: Any) -> tuple[str, ...]:
    """Check that a function can be called as a reward.

    Args:
        name: Its name in messages.
        function: Anything.

    Returns:
        What its keywords require to be computed.

    Raises:
        UserError: If it is no function, takes positional arguments, does not swallow further keywords, or wants one
            that nobody provides.
    """
    form = "write `def f(*, predicted_codes, target_codes, completions, **_)`"
    if not callable(function) or inspect.isclass(function):
        raise UserError(f"reward {name!r} is a {type(function).__name__}, not a function; {form}")
    if inspect.iscoroutinefunction(function):
        raise UserError(f"reward {name!r} is asynchronous; {form}")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError) as error:  # written in C
        raise UserError(f"reward {name!r} does not say which keywords it takes; {form}") from error
    for parameter in parameters:
        if parameter.kind not in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD):
            raise UserError(f"reward {name!r} takes {parameter.name!r} by position; {form}, with the star in front")
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise UserError(f"reward {name!r} refuses the keywords it does not name; {form}, with **_ at the end")
    for wanted in _wanted(function):
        if wanted not in KEYWORDS:
            raise UserError(f"reward {name!r} wants {wanted!r}, which nobody provides{nearest(wanted, KEYWORDS)}")
    return tuple(p.name for p in parameters if p.name in REQUIRABLE)


def own_options(function: RewardFunction) -> list[str]:
    """The keywords of a function that are its own: they have a default, and no caller provides them."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.name not in KEYWORDS and p.kind is p.KEYWORD_ONLY]


def _wanted(function: RewardFunction) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind is p.KEYWORD_ONLY]


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number or a fraction that no float is large enough for
        return math.inf


def _type(value: object) -> str:
    return one_line(type(value).__name__, 60)


def _shown(batch: Mapping[str, Any], row: int) -> str:
    return f"{one_line(repr(batch['completions'][row]), 160)} (row {row})"

"""Consistency of paths: when the guesses of an answer's category along a path contradict each other, and what then.

CORP of REG4Rec (arXiv 2508.15308): in a beam search, every s-th step compares what the category head says with what it
said s steps before; where the Jensen-Shannon divergence (to base 2) is above θ, the path ends, goes back to an earlier
step, and is written anew. The paper gives θ = 0.06 and nothing else; the defaults of the other keys are ours.

These are the rules alone. Steps are counted by the codes written: in front of the first it is step 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reasonrec.rewards.consistency import jensen_shannon
from reasonrec.tokenizers.errors import UserError

Fallback = Literal["unchecked", "none"]


@dataclass(frozen=True)
class Consistency:
    """What paths have to keep to; keys of a stage."""

    theta: float | None = field(
        default=None,
        metadata={
            "help": "also rank with paths whose category guesses drift by more than this pruned (Jensen-Shannon "
            "divergence, base 2); REG4Rec has 0.06, unset leaves the row out",
            "at_least": 0,
            "at_most": 1,
        },
    )
    check_every: int = field(
        default=1, metadata={"help": "of theta: codes between two guesses that are compared", "at_least": 1}
    )
    rollback: int = field(default=1, metadata={"help": "of theta: codes that a pruned path takes back", "at_least": 1})
    retries: int = field(
        default=2, metadata={"help": "of theta: times that a path may go back before it is given up", "at_least": 0}
    )
    fallback: Fallback = field(
        default="unchecked",
        metadata={
            "help": "of theta: what fills places of a list that no path was left for: items of the unchecked list, "
            "or none"
        },
    )

    chain_theta: float | None = field(
        default=None,
        metadata={
            "help": "also rank without chains whose stated category is further than this from that of the first code "
            "behind them (the same divergence); unset leaves the row out",
            "at_least": 0,
            "at_most": 1,
        },
    )

    def check_asked(self, *, models: bool, reasoning_models: bool, exact: bool) -> None:
        """Check that an evaluation has what the thresholds are asked of.

        Args:
            models: Models are ranked directly.
            reasoning_models: Models are ranked behind chains.
            exact: Lists are proven, or the whole catalogue is scored.

        Raises:
            UserError: If there is no such model, or no path is pruned.
        """
        for name, value, there in (("theta", self.theta, models), ("chain_theta", self.chain_theta, reasoning_models)):
            if value is not None and not there:
                needed = "models" if name == "theta" else "reasoning_models"
                raise UserError(
                    f"{name}={value:g} is asked of {needed}, and there are none: name some, or leave it out"
                )
        if self.theta is not None and exact:
            raise UserError(
                f"theta={self.theta:g} prunes the paths of a beam search: set exact: false and exhaustive: false, or "
                "leave it out"
            )

    def compared(self, step: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Whether the guess at a step is compared with that of `check_every` steps before: at every such step."""
        return np.asarray((step >= self.check_every) & (step % self.check_every == 0))

    def back_to(self, step: NDArray[np.integer]) -> NDArray[np.integer]:
        """The step that a path which ended at a step goes on from; not before the first code."""
        return np.maximum(step - self.rollback, 0)

    def jumped(self, before: ArrayLike, now: ArrayLike) -> NDArray[np.bool_]:
        """Whether a path ends between two guesses.

        Args:
            before: Distributions (rows, categories).
            now: Those of `check_every` steps later.

        Returns:
            (rows,).
        """
        return np.asarray(jensen_shannon(before, now) > (1.0 if self.theta is None else self.theta))


@dataclass
class Checks:
    """What a check found and cost, summed up over users.

    Attributes:
        users: Users that lists were made for.
        compared: Pairs of guesses that were compared.
        pruned: Those that ended a path.
        back: Times that a path went back.
        read: Codes that the model read, all of them.
        again: Those of paths that had gone back.
        unchecked: Those of searches without a check, to fill lists.
        dead: Users of whom no path was left.
        short: Other users of whom some places of the list were left empty.
    """

    users: int = 0
    compared: int = 0
    pruned: int = 0
    back: int = 0
    read: int = 0
    again: int = 0
    unchecked: int = 0
    dead: int = 0
    short: int = 0

    def told(self, rules: Consistency) -> str:
        """All of it in words."""
        users = max(self.users, 1)
        lists = "keep the unchecked list; other lists that were filled up from it"
        if rules.fallback == "none":
            lists = "get no list; other lists that stay shorter"
        return (
            f"theta={rules.theta:g} pruned {self.pruned / max(self.compared, 1):.1%} of {self.compared:,} paths "
            f"compared (check_every={rules.check_every}, rollback={rules.rollback}, retries={rules.retries}), which "
            f"went back {self.back:,} times; all paths of {self.dead} of {self.users} users were pruned, who "
            f"{lists}: {self.short}; {self.read / users:.1f} codes read a user, {self.again / users:.1f} of "
            f"them behind paths that went back, {self.unchecked / users:.1f} for unchecked lists"
        )


@runtime_checkable
class Checkable(Protocol):
    """Answers whose paths can be checked.

    Attributes:
        longest: Tokens of the longest answer.
        n_categories: Categories that are guessed along a path; 0 without a category head.
    """

    longest: int
    n_categories: int

    def checked(self, rules: Consistency, checks: Checks) -> Self:
        """The same answers, whose search obeys rules and counts in `checks`."""

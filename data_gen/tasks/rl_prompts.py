"""Prompts of reinforcement learning: positions of the training sequences, each with the item that came next.

Targets come from the training sequences only, so a held-out interaction is neither a target nor part of a history.
Where an exposure-biased log shows promoted items, the target is what the user really chose (`clean_target`). Where the
log has ratings, each target comes with the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from reasonrec.tokenizers.errors import UserError


@dataclass(frozen=True)
class PromptWindow:
    """Which positions of a training sequence are prompts.

    Attributes:
        min_history: Fewest items in front of a target.
        last_targets: Only the last so many positions of each sequence; None for all.
        max_history: Longest history that is shown; older items are left out.
    """

    min_history: int = 1
    last_targets: int | None = None
    max_history: int = 20

    def __post_init__(self) -> None:
        for name in ("min_history", "last_targets", "max_history"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} has to be at least 1")


@dataclass(frozen=True)
class RlPrompts:
    """Histories with targets, rendered when they are needed.

    Attributes:
        sequences: Items of each training sequence.
        source: (prompts,) sequence of each prompt.
        position: (prompts,) place of its target in the sequence: the history is what stands before.
        target: (prompts,) item number of the target.
        max_history: Longest history that is shown.
        render: Turns a history into the token ids of a prompt.
        rating: (prompts,) float64 what the user gave the target, NaN where nothing; None if nothing was rated.
    """

    sequences: Sequence[np.ndarray]
    source: np.ndarray
    position: np.ndarray
    target: np.ndarray
    max_history: int
    render: Callable[[np.ndarray], list[int]] = field(repr=False)
    rating: np.ndarray | None = None

    @classmethod
    def from_train(
        cls,
        train: pl.DataFrame,
        window: PromptWindow,
        render: Callable[[np.ndarray], list[int]],
        *,
        set_order: bool = False,
        seed: int = 0,
    ) -> RlPrompts:
        """Collect the positions of the training table.

        Args:
            train: Training sequences (`items`, `first_target`, perhaps `clean_target` and `ratings`).
            window: Which positions.
            render: Turns a history into token ids.
            set_order: The sequences are sets: each is put into one random order.
            seed: Seed of these orders.

        Raises:
            UserError: If no position is left.
        """
        columns = {"items": np.int64} | ({"ratings": np.float64} if "ratings" in train.columns else {})
        lists = {
            name: [np.asarray(row, dtype=dtype) for row in train[name].to_list()] for name, dtype in columns.items()
        }
        if set_order:
            lists = {
                name: [np.random.default_rng([seed, i]).permutation(row) for i, row in enumerate(rows)]
                for name, rows in lists.items()
            }
        sequences = lists["items"]
        lengths = np.array([len(items) for items in sequences], dtype=np.int64)
        first = np.maximum(train["first_target"].to_numpy().astype(np.int64), window.min_history)
        if window.last_targets is not None:
            first = np.maximum(first, lengths - window.last_targets)
        counts = np.maximum(lengths - first, 0)
        if counts.sum() == 0:
            raise UserError(
                f"no training sequence has a target behind min_history={window.min_history} items: lower min_history"
            )
        source = np.repeat(np.arange(len(sequences)), counts)
        position = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts) + first[source]
        at = (np.cumsum(lengths) - lengths)[source] + position
        target = np.concatenate(sequences)[at]
        rating = np.concatenate(lists["ratings"])[at] if "ratings" in lists else None
        if "clean_target" in train.columns:
            clean = train["clean_target"].to_numpy().astype(np.int64)
            target = np.where(position == lengths[source] - 1, clean[source], target)
        return cls(sequences, source, position, target, window.max_history, render, rating)

    def __len__(self) -> int:
        return len(self.source)

    def history(self, prompt: int) -> np.ndarray:
        """Items that a prompt shows, oldest first."""
        stop = int(self.position[prompt])
        return self.sequences[self.source[prompt]][max(0, stop - self.max_history) : stop]

    def later(self, prompts: np.ndarray, places: int) -> np.ndarray:
        """The prompts whose targets came so many places behind those of others, in the same training sequence.

        Args:
            prompts: (n,) numbers of prompts.
            places: How many places behind.

        Returns:
            (n,) numbers of prompts, -1 where the sequence has ended.
        """
        there = np.minimum(prompts + places, len(self) - 1)
        same = (self.source[there] == self.source[prompts]) & (self.position[there] == self.position[prompts] + places)
        return np.where(same, there, -1)

    def token_ids(self, prompt: int) -> list[int]:
        """Token ids of a prompt."""
        return self.render(self.history(prompt))


def blocks_per_pass(n_prompts: int, size: int) -> int:
    """How many blocks of `size` different prompts a pass over all prompts has."""
    return n_prompts // size


def prompt_block(n_prompts: int, size: int, number: int, seed: int) -> np.ndarray:
    """The prompts of one generation step: a pure function, so resuming and other processes change nothing.

    Every pass is a new random order, cut into blocks; what is left over at its end waits for the next pass.

    Args:
        n_prompts: Number of prompts.
        size: Prompts per block.
        number: Number of the block since the beginning of the training.
        seed: Seed of the orders.

    Returns:
        (size,) different prompt numbers.

    Raises:
        UserError: If there are fewer prompts than a block needs.
    """
    per_pass = blocks_per_pass(n_prompts, size)
    if per_pass == 0:
        raise UserError(f"there are {n_prompts} prompts, but a generation step may need {size}")
    order = np.random.default_rng([seed, number // per_pass]).permutation(n_prompts)
    begin = number % per_pass * size
    return order[begin : begin + size]

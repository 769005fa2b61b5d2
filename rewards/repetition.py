"""Chains that repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain as concatenate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reasonrec.rewards.registry import reward
from reasonrec.tokenizers.errors import UserError

_MOST_KEY = 2**62
_CELLS = 4_000_000  # of the sorted matrix at a time: 32 MB


@reward(name="repetition")
def repetition(*, chains: Sequence[Sequence[int]], reasoning: bool = True, n: int = 3, **_: Any) -> list[float | None]:
    """Minus the share of a chain's n-grams that occurred in it before; 0 for a chain without repetition.

    The idea of punishing repeated n-grams is that of arXiv 2502.03373; -1 is the limit of one n-gram forever.

    Args:
        chains: Token ids of each chain; one with fewer than n tokens repeats nothing.
        reasoning: Whether completions start with a chain; if not, there is nothing to say.
        n: Tokens of an n-gram.

    Returns:
        One reward per completion, in (-1, 0]; None in direct mode.

    Raises:
        UserError: If n is no positive integer.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise UserError(f"n={n!r}: an n-gram has at least one token")
    if not reasoning:
        return [None] * len(chains)
    lengths = np.fromiter(map(len, chains), dtype=np.int64, count=len(chains))
    flat = np.fromiter(concatenate.from_iterable(chains), dtype=np.int64, count=int(lengths.sum()))
    grams = np.maximum(lengths - n + 1, 0)
    keys = _gram_keys(flat, n)
    start = np.cumsum(lengths) - lengths
    repeated = np.zeros(len(chains), dtype=np.int64)
    # Rows of like length together, so that one long chain does not widen the matrix of all.
    order = np.argsort(grams, kind="stable")
    order = order[grams[order] > 1]
    while len(order):
        width = int(grams[order[-1]])
        rows, order = order[-max(_CELLS // width, 1) :], order[: -max(_CELLS // width, 1)]
        place = np.arange(width)
        inside = place < grams[rows, None]
        # Empty places get keys that occur once.
        matrix = np.where(inside, keys[np.minimum(start[rows, None] + place, len(keys) - 1)], -1 - place)
        matrix.sort(axis=1)
        repeated[rows] = (matrix[:, 1:] == matrix[:, :-1]).sum(axis=1)
    values: list[float | None] = (0.0 - repeated / np.maximum(grams, 1)).tolist()
    return values


def _gram_keys(flat: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """A number for the n-gram that starts at each token: equal numbers, equal n-grams."""
    if len(flat) < n:
        return np.zeros(0, dtype=np.int64)
    tokens, base = _dense(flat)
    keys, size = tokens, base
    for offset in range(1, n):
        if size * base > _MOST_KEY:
            keys, size = _dense(keys)
        keys, size = keys[:-1] * base + tokens[offset:], size * base
    return keys


def _dense(values: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """The same values as numbers from 0 on, and how many there are."""
    low, high = int(values.min()), int(values.max())
    if high - low < 2**20:  # a vocabulary: no need to sort
        return values - low, high - low + 1
    known, dense = np.unique(values, return_inverse=True)
    return dense.reshape(-1).astype(np.int64), len(known)

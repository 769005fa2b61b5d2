"""Whose history, or whose chain, a case is given in a control: somebody else's, of similar length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from reasonrec.tokenizers.errors import UserError

_TRIED = 200  # neighbours looked at before a donor whose history shares an item is accepted
_WIDTHS = (1, 4, 10**9)  # differences in length allowed, one after the other


def other_histories(cases: pl.DataFrame, seed: int) -> list[list[int]]:
    """For each case the history of another user, of similar length where possible.

    Within each group of similarly long histories the users are shifted by one in a random order, so that nobody keeps
    their own (a group with one user takes the nearest group's).

    Args:
        cases: Held-out rows.
        seed: Seed of the order.
    """
    rng = np.random.default_rng(seed)
    lengths = cases["history"].list.len().to_numpy()
    users = cases["user"].to_numpy()
    histories = cases["history"].to_list()
    # Sorted by length with random ties: a neighbour in this order is another user with a history as long as can be.
    order = np.lexsort([rng.random(len(lengths)), lengths])
    result: list[list[int]] = [[] for _ in histories]
    for place, i in enumerate(order):
        for step in range(1, len(order)):
            j = order[(place + step) % len(order)] if place + step < len(order) else order[len(order) - 1 - step]
            if users[j] != users[i]:
                result[i] = histories[j]
                break
    return result


def donors(histories: Sequence[Sequence[int] | np.ndarray], seed: int) -> NDArray[np.int64]:
    """Whose chain each case gets: a permutation without fixed points, between histories of similar length.

    Two cases exchange only if their histories share no item, as far as that can be had; the lengths may then differ
    more.

    Args:
        histories: Item numbers of each case.
        seed: Seed of the order among equal lengths.

    Returns:
        (cases,) number of the case whose chain it is.

    Raises:
        UserError: If there is only one case.
    """
    n = len(histories)
    if n < 2:
        raise UserError("exchanging chains between users needs at least two cases")
    lengths = np.array([len(history) for history in histories])
    sets = [set(map(int, history)) for history in histories]
    order = np.lexsort([np.random.default_rng(seed).random(n), lengths])
    donor = np.empty(n, dtype=np.int64)
    # To start from: neighbours in length exchange with each other, and of an odd number the last three in a ring.
    around = np.arange(n) ^ 1
    if n % 2:
        around[-3:] = [n - 2, n - 1, n - 3]
    donor[order] = order[around]
    place = np.empty(n, dtype=np.int64)
    place[order] = np.arange(n)
    for i in order:
        if not sets[i] & sets[donor[i]]:
            continue
        near = order[np.argsort(np.abs(np.arange(n) - place[i]), kind="stable")[1 : _TRIED + 1]]

        def helps(j: int, width: int, i: int = i) -> bool:
            """Whether i and j had better exchange donors: i gains by it, and nobody is harmed."""
            a, b = donor[j], donor[i]
            apart = max(abs(lengths[i] - lengths[a]), abs(lengths[j] - lengths[b]))
            allowed = a != i and b != j and apart <= width
            return bool(allowed and not sets[i] & sets[a] and (not sets[j] & sets[b] or sets[j] & sets[a]))

        best = next((j for width in _WIDTHS for j in near if helps(j, width)), None)
        if best is not None:
            donor[i], donor[best] = donor[best], donor[i]
    return donor

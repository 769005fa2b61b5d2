"""Credit for codes whatever their order, and for what the right ones among them lead to.

Source: the step and path rewards of REG4Rec (arXiv 2508.15308, equations 10 and 14), for items that are one code from
each of M codebooks. Codes of one level are compared with each other alone, so in a residual index, where a later code
says something only behind the right first ones, `prefix` and `rsvr` are the stricter kin.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reasonrec.rewards.parse import Codes
from reasonrec.rewards.registry import reward
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.whole import whole

_CELLS = 2**24  # of a matrix of distances that exists at a time


class Codewords:
    """The vectors of the codes, and of the items that they add up to.

    Args:
        codes: Codes of all items (items, levels), the disambiguation code left out.
        books: For each level the vectors of its codes (codes, width), in the space in which they add up.

    Raises:
        UserError: If they do not fit.
    """

    def __init__(self, codes: ArrayLike, books: Iterable[ArrayLike]) -> None:
        codes = np.asarray(codes, dtype=np.int64)
        self.books = [np.asarray(book, dtype=np.float64) for book in books]
        sizes = [len(book) for book in self.books]
        if len(sizes) != codes.shape[1] or (codes.max(axis=0, initial=0) >= sizes).any():
            raise UserError(
                f"codes up to {codes.max(axis=0, initial=0).tolist()} do not fit codebooks of {sizes} vectors: pass "
                "those of one index"
            )
        self.items = self.add(codes, np.ones(codes.shape, dtype=bool))

    def add(self, codes: NDArray[np.int64], counted: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Sums of vectors (rows, width), of those codes (rows, levels) that are counted (rows, levels)."""
        total = np.zeros((len(codes), self.books[0].shape[1]))
        for level, book in enumerate(self.books):
            total += np.where(counted[:, level, None], book[codes[:, level]], 0.0)
        return total

    def nearer(self, points: NDArray[np.float64], items: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many items are nearer to a point than a given one; those that are as near are not.

        Args:
            points: (rows, width).
            items: (rows,) item numbers.

        Returns:
            (rows,).
        """
        size = np.einsum("ij,ij->i", self.items, self.items)
        counts = np.empty(len(points), dtype=np.int64)
        step = max(_CELLS // max(len(size), 1), 1)
        for begin in range(0, len(points), step):
            rows = slice(begin, begin + step)
            distance = size - 2 * points[rows] @ self.items.T  # the point's own length is the same for all items
            own = distance[np.arange(len(distance)), items[rows]][:, None]
            counts[rows] = (distance < own - 1e-9 * size.max()).sum(1)
        return counts


@reward(name="set_overlap")
def set_overlap(*, predicted_codes: Sequence[Codes | None], target_codes: Sequence[Codes], **_: Any) -> list[float]:
    """Share of the codes that are the target's on their level, in whatever order they were written; 0 without an item.

    Source: g_step of REG4Rec (arXiv 2508.15308, equation 10). The share is of the longer of the two items, so that a
    disambiguation code that is missing or too many costs.

    Args:
        predicted_codes: Codes of the recommended items, None without a valid answer.
        target_codes: Codes of the targets.

    Returns:
        One reward per completion, in [0, 1]; 1 for the exact hit only.
    """
    return [
        sum(a == b for a, b in zip(p, t, strict=False)) / max(len(p), len(t)) if p else 0.0
        for p, t in zip(predicted_codes, target_codes, strict=True)
    ]


@reward(name="path")
def path(
    *,
    predicted_codes: Sequence[Codes | None],
    target_codes: Sequence[Codes],
    target_items: Sequence[int],
    codewords: Codewords,
    n: int = 10,
    wrong: int | None = 1,
    **_: Any,
) -> list[float]:
    """1 where the target is among the n items nearest to the sum of the right codes' vectors, with few codes wrong.

    Source: g_path of REG4Rec (arXiv 2508.15308, equation 14), which gives neither n nor the number of wrong codes.
    Distances are Euclidean, to the sum of all vectors of an item; the paper names none.

    Args:
        predicted_codes: Codes of the recommended items, None without a valid answer.
        target_codes: Codes of the targets.
        target_items: Their item numbers.
        codewords: The vectors.
        n: How many items count as near; one that is as near as the target does not push it out.
        wrong: Most codes that may be wrong, and are left out of the sum; None takes the sum of all codes that were
            written, right or wrong (Algorithm 2 of the paper). Disambiguation codes have no vector and do not count.

    Returns:
        One reward per completion, 0 or 1.

    Raises:
        UserError: If n is no positive whole number, or `wrong` leaves no code to be right.
    """
    depth = len(codewords.books)
    n = whole("n", n, at_least=1)
    wrong = None if wrong is None else whole("wrong", wrong, at_least=0, at_most=depth - 1)
    cases: dict[
        tuple[int, ...], list[int]
    ] = {}  # codes that count, -1 for others, and the target: rollouts often agree
    for row, (p, t, item) in enumerate(zip(predicted_codes, target_codes, target_items, strict=True)):
        codes = tuple(a if wrong is None or a == b else -1 for a, b in zip(p or (), t[:depth], strict=False))
        if codes and (wrong is None or codes.count(-1) <= wrong):
            cases.setdefault((*codes, item), []).append(row)
    values = [0.0] * len(predicted_codes)
    if cases:
        found = np.array(list(cases), dtype=np.int64)
        points = codewords.add(np.maximum(found[:, :-1], 0), found[:, :-1] >= 0)
        near = codewords.nearer(points, found[:, -1]) < n
        for rows in (rows for rows, hit in zip(cases.values(), near, strict=True) if hit):
            for row in rows:
                values[row] = 1.0
    return values

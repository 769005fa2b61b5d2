"""Codes that tell all items apart without a disambiguation code: the last one is dealt out anew where items collide.

Items that share all codes but the last are a group. Where two of a group are equal, all of the group get different
last codes, by the matching of items and codes with the least squared error of what the codes rebuild (the assignment
problem, which `scipy.optimize.linear_sum_assignment` solves). Every item then has as many tokens as there are levels,
and the price is paid in error instead of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.quantizers.base import Quantizer
from reasonrec.tokenizers.quantizers.kmeans import float32, relative_distances


@dataclass
class Reassigned:
    """A quantizer whose codes are dealt out anew after it has learned; new rows are coded as it codes them.

    Attributes:
        quantizer: The quantizer.
        codebook_sizes: Number of codes of each of its levels.
        report: As `reassign`, after `fit_encode`.
    """

    quantizer: Quantizer
    codebook_sizes: Sequence[int]
    report: dict[str, Any] = field(default_factory=dict, init=False)

    @property
    def curves(self) -> dict[str, list[float]]:
        """As the quantizer's."""
        return self.quantizer.curves

    def fit_encode(self, embeddings: np.ndarray) -> np.ndarray:
        """Learn from rows, and return their int32 codes (n, depth), no two of which are equal.

        Raises:
            UserError: As the quantizer's, or as `reassign`.
        """
        codes = self.quantizer.fit_encode(embeddings)
        codes, self.report = reassign(codes, self.codebook_sizes[-1], embeddings, self.quantizer.reconstruct)
        return codes

    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        """As the quantizer's."""
        return self.quantizer.encode(embeddings)

    def reconstruct(self, codes: np.ndarray) -> np.ndarray:
        """As the quantizer's."""
        return self.quantizer.reconstruct(codes)

    def summands(self, embeddings: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """As the quantizer's."""
        return self.quantizer.summands(embeddings)

    def state(self) -> dict[str, np.ndarray]:
        """As the quantizer's."""
        return self.quantizer.state()

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """As the quantizer's."""
        self.quantizer.restore(state)


def reassign(
    codes: np.ndarray, last_size: int, embeddings: np.ndarray, reconstruct: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Deal out the last codes anew in groups where items collide.

    Args:
        codes: (n, depth).
        last_size: Number of codes of the last level.
        embeddings: (n, dim) what the codes stand for.
        reconstruct: Embeddings of codes, as a quantizer's.

    Returns:
        int32 (n, depth), no two rows equal; and `groups` that were dealt out anew, `items` whose last code is another
        now, and the `growth` of the summed squared error, a share of what it was (0 where it was none).

    Raises:
        UserError: If such a group is larger than the last level.
    """
    points, dealt = float32(embeddings), np.array(codes, dtype=np.int32)
    # A column of zeros stands before the codes, so that a single level has a prefix to be grouped by.
    prefixes = np.concatenate([np.zeros((len(codes), 1), dtype=np.int32), dealt[:, :-1]], axis=1)
    _, group, sizes = np.unique(prefixes, axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    distinct = np.bincount(group[np.unique(dealt, axis=0, return_index=True)[1]], minlength=len(sizes))
    colliding = np.flatnonzero(distinct < sizes)
    if len(colliding) and (most := int(sizes[colliding].max())) > last_size:
        raise UserError(
            f"unique=reassign, but {most} items share all codes before the last, which has {last_size}: make "
            f"codebook_sizes end with {most} or more, or set quantizer: balanced or unique: disambiguate"
        )
    order = np.argsort(group, kind="stable")
    begins = np.cumsum(sizes) - sizes
    with threadpool_limits(limits=1):
        for number in colliding:
            members = order[begins[number] : begins[number] + sizes[number]]
            candidates = np.repeat(dealt[members[:1]], last_size, axis=0)
            candidates[:, -1] = np.arange(last_size)
            costs = relative_distances(points[members], reconstruct(candidates))
            rows, chosen = linear_sum_assignment(costs)
            dealt[members[rows], -1] = chosen
    before, after = (np.square(points - reconstruct(c)).sum(dtype=np.float64) for c in (np.asarray(codes), dealt))
    moved = int((dealt[:, -1] != np.asarray(codes)[:, -1]).sum())
    growth = float(after / before - 1) if before else 0.0
    return dealt, {"groups": len(colliding), "items": moved, "growth": growth}

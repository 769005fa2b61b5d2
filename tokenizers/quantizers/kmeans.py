"""Vectors to codes by residual k-means: each level clusters what the levels before it left over.

`BalancedResidualKMeans` is the quantizer of GREAM (arXiv 2510.20815): on every level all clusters have the
same size, so no code is wasted and none is crowded. `ResidualKMeans` is the same without that constraint.

Balance is enforced by an auction rather than by the min-cost-flow solver of `k-means-constrained`. Measured
on one core with 256 clusters in 384 dimensions, a Lloyd iteration takes the solver 0.65 s for 3.7k items and
5.0 s (and 0.7 GB) for 20k; the auction takes 0.3-0.4 s, 0.5-3 s, and 5-15 s for 100k items, within about
0.01% of the optimal cost.

Everything is seeded and runs its linear algebra on one thread, so the thread count changes no code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from tqdm import tqdm

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.quantizers.base import QUANTIZERS, books_of
from reasonrec.tokenizers.whole import whole


def encode_residual(embeddings: np.ndarray, codebooks: Sequence[np.ndarray]) -> np.ndarray:
    """Nearest centroid of the residual, level by level.

    Args:
        embeddings: (n, dim).
        codebooks: One (K_l, dim) array per level.

    Returns:
        int32 (n, depth).

    Raises:
        UserError: As `check_embeddings`.
    """
    residual = checked_rows(embeddings)
    codes = np.empty((len(residual), len(codebooks)), dtype=np.int32)
    with threadpool_limits(limits=1):
        for level, centroids in enumerate(codebooks):
            codes[:, level] = nearest_codes(residual, centroids)
            residual -= centroids[codes[:, level]]
    return codes


@dataclass
class ResidualKMeans:
    """Plain residual k-means (scikit-learn's k-means on every level).

    Attributes:
        codebook_sizes: Number of codes of each level.
        seed: Seed; level `l` uses `seed + l`.
        n_init: Runs from different starting points on each level, of which the best is kept.
        max_iter: Lloyd iterations at most.
        progress: Show a bar over levels.
        codebooks: One float32 (K_l, dim) array per level, after `fit_encode`.
        curves: Empty: nothing here descends a gradient.

    Raises:
        UserError: If `n_init` or `max_iter` is no whole number from 1 on.
    """

    codebook_sizes: Sequence[int]
    seed: int = 0
    n_init: int = 3
    max_iter: int = 100
    progress: bool = False
    codebooks: list[np.ndarray] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for name in ("n_init", "max_iter"):
            whole(name, getattr(self, name), at_least=1)

    def fit_encode(self, embeddings: np.ndarray) -> np.ndarray:
        """Learn the codebooks and encode the rows they were learned from.

        Args:
            embeddings: (n, dim).

        Returns:
            int32 (n, depth).

        Raises:
            UserError: If a codebook is larger than the number of rows, or as `check_embeddings`.
        """
        residual = checked_rows(embeddings, self.codebook_sizes)
        codes = np.empty((len(residual), len(self.codebook_sizes)), dtype=np.int32)
        self.codebooks = []
        with threadpool_limits(limits=1):
            for level, size in enumerate(
                tqdm(self.codebook_sizes, desc="quantizing", unit="level", disable=None if self.progress else True)
            ):
                codes[:, level] = self._cluster(residual, int(size), self.seed + level)
                centroids = cluster_means(residual, codes[:, level], int(size))
                self.codebooks.append(centroids)
                residual -= centroids[codes[:, level]]
        return codes

    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        """Codes of new rows: the nearest centroid on every level.

        With balanced clusters a row the codebooks were learned from may get another code than `fit_encode`
        gave it, because its nearest cluster was full.

        Args:
            embeddings: (n, dim).

        Returns:
            int32 (n, depth).
        """
        if not self.codebooks:
            raise ValueError("encode needs the codebooks of fit_encode")
        return encode_residual(embeddings, self.codebooks)

    def reconstruct(self, codes: np.ndarray) -> np.ndarray:
        """The sum of the centroids that the first levels' codes (n, up to depth) name, float32 (n, dim)."""
        return np.sum([book[codes[:, level]] for level, book in enumerate(self.codebooks[: codes.shape[1]])], axis=0)

    def summands(self, embeddings: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Rows as they are, and the codebooks."""
        return checked_rows(embeddings), self.codebooks

    def state(self) -> dict[str, np.ndarray]:
        """The codebooks, as `codebook_0`, `codebook_1` and so on."""
        return {f"codebook_{level}": book for level, book in enumerate(self.codebooks)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over the codebooks that `state` gave."""
        self.codebooks = books_of(state, self.codebook_sizes)

    def _cluster(self, points: np.ndarray, size: int, seed: int) -> np.ndarray:
        labels: np.ndarray = k_means(points, size, seed, n_init=self.n_init, max_iter=self.max_iter).labels_
        return labels


@dataclass
class SampledResidualKMeans(ResidualKMeans):
    """Plain residual k-means that can learn its centroids from some of the rows, for catalogues of millions.

    Attributes:
        rows_per_code: Rows that a level learns from, for each of its codes, drawn by its seed; 0 for all. They only
            say where the centroids begin: each ends up as the mean of all rows that lie nearest to it.

    Raises:
        UserError: As `ResidualKMeans`, or if `rows_per_code` is no whole number from 0 on.
    """

    rows_per_code: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("rows_per_code", self.rows_per_code, at_least=0)

    def _cluster(self, points: np.ndarray, size: int, seed: int) -> np.ndarray:
        rows = self.rows_per_code * size
        if not 0 < rows < len(points):
            return super()._cluster(points, size, seed)
        drawn = np.sort(np.random.default_rng(seed).choice(len(points), rows, replace=False))
        found = k_means(points[drawn], size, seed, n_init=self.n_init, max_iter=self.max_iter)
        return nearest_codes(points, found.cluster_centers_)


@dataclass
class BalancedResidualKMeans(ResidualKMeans):
    """Residual k-means whose clusters all have ⌊n/K⌋ or ⌈n/K⌉ members (GREAM allows one more or less)."""

    # Prices of the auction, in standard deviations of the distances: coarse while the centroids still move.
    _ROUGH: ClassVar[tuple[float, ...]] = (0.3, 0.03)
    _FINE: ClassVar[tuple[float, ...]] = (1.0, 0.1, 0.01)

    def _cluster(self, points: np.ndarray, size: int, seed: int) -> np.ndarray:
        from sklearn.cluster import kmeans_plusplus

        random = np.random.RandomState(seed)  # scikit-learn takes no Generator
        norms = float(np.einsum("nd,nd->", points, points, dtype=np.float64))
        best: tuple[float, Any] | None = None
        for _ in range(self.n_init):
            centroids, _ = kmeans_plusplus(points, size, random_state=random)
            previous = np.inf
            for _ in range(self.max_iter):
                labels, cost = _assign(points, centroids, self._ROUGH)
                centroids = cluster_means(points, labels, size)
                # cost leaves out |x|², which no assignment changes
                if previous - cost <= 1e-4 * (norms + cost):
                    break
                previous = cost
            labels, cost = _assign(points, centroids, self._FINE)
            if best is None or cost < best[0]:
                best = cost, labels
        assert best is not None
        return best[1]


def check_sizes(codebook_sizes: Sequence[int], n_items: int) -> None:
    """Refuse codebooks that the catalogue cannot fill.

    Raises:
        UserError: If there is no level, or a size is below 2 or above the number of items.
    """
    if not codebook_sizes:
        raise UserError("codebook_sizes is empty: give one size per level, such as 64 64")
    for level, size in enumerate(codebook_sizes):
        if size < 2:
            raise UserError(f"codebook_sizes[{level}]={size} has to be at least 2")
        if size > n_items:
            raise UserError(
                f"codebook_sizes[{level}]={size} is larger than the catalogue of {n_items} items, so "
                f"codes would stay empty: use at most {n_items}; two levels of {max(2, round(n_items**0.5))} will do"
            )


def check_embeddings(embeddings: np.ndarray) -> None:
    """Refuse embeddings that no quantizer can compute distances with, wherever they come from.

    Args:
        embeddings: (n, dim).

    Raises:
        UserError: If a value is not finite, or so large that the squares of distances, or their variance, would not
            be; names the items.
    """
    lengths = np.sqrt(np.einsum("nd,nd->n", embeddings, embeddings, dtype=np.float64))
    # No two rows are further apart than twice the longest; the auction takes the variance of all squared distances.
    longest = float((np.finfo(np.float32).max / (16 * max(len(embeddings), 1) ** 2)) ** 0.25)
    for wrong, problem in ((~np.isfinite(lengths), "not finite"), (lengths > longest, "too long for float32")):
        if wrong.any():
            bad = np.flatnonzero(wrong)
            shown = ", ".join(map(str, bad[:10])) + (", …" if len(bad) > 10 else "")
            raise UserError(
                f"{len(bad)} embeddings are {problem} (items {shown}): that of item {bad[0]} has length "
                f"{lengths[bad[0]]:g}, at most {longest:.1g} can be compared; embed the items again, with another "
                "embedding_model or precision"
            )


def checked_rows(embeddings: np.ndarray, codebook_sizes: Sequence[int] | None = None) -> np.ndarray:
    """A float32 copy of embeddings (n, dim) that a quantizer can compute with.

    Args:
        embeddings: (n, dim).
        codebook_sizes: Where codebooks are learned: their sizes.

    Raises:
        UserError: As `check_sizes` and `check_embeddings`.
    """
    rows = float32(embeddings)
    if codebook_sizes is not None:
        check_sizes(codebook_sizes, len(rows))
    check_embeddings(rows)
    return rows


def k_means(points: np.ndarray, size: int, seed: int, *, n_init: int, max_iter: int, init: Any = "k-means++") -> Any:
    """scikit-learn's k-means, fitted to points (n, dim).

    Fewer distinct points than codes (identical texts) leave codes unused, which the health report shows.
    """
    import warnings

    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return KMeans(size, init=init, n_init=n_init, max_iter=max_iter, random_state=seed).fit(points)


def nearest_codes(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Codes int32 (n,) of the centroids (K, dim) nearest to points (n, dim), a block of points at a time."""
    codes = np.empty(len(points), dtype=np.int32)
    for begin in range(0, len(points), 16384):
        part = slice(begin, begin + 16384)
        codes[part] = relative_distances(points[part], centroids).argmin(1)
    return codes


def float32(embeddings: np.ndarray) -> np.ndarray:
    """A copy; what float32 cannot hold becomes infinite, which is refused."""
    with np.errstate(over="ignore"):
        return np.array(embeddings, dtype=np.float32)


def balanced_assignment(costs: np.ndarray, capacities: np.ndarray, steps: Sequence[float]) -> np.ndarray:
    """Give every row one column so that each column is filled exactly, at nearly the least total cost.

    Bertsekas' auction for many rows and few columns: an unassigned row bids for its cheapest column as much
    as makes the second cheapest equally good, plus a step; a full column keeps its highest bids and asks the
    lowest of them as its price. The total cost is at most `rows * steps[-1]` above the least; larger steps
    before it find the prices faster.

    Args:
        costs: (rows, columns).
        capacities: (columns,) integers that add up to the number of rows.
        steps: Bid increments, one pass each, in units of `costs`.

    Returns:
        int64 (rows,) the column of each row.
    """
    n_rows, n_columns = costs.shape
    if int(capacities.sum()) != n_rows:
        raise ValueError(f"capacities add up to {int(capacities.sum())}, not to the {n_rows} rows")
    if n_columns == 1:
        return np.zeros(n_rows, dtype=np.int64)
    width = int(capacities.max())
    prices = np.zeros(n_columns)
    block = max(64, 2_000_000 // n_columns)  # rows that bid at once: bounds the memory
    closed = np.arange(width)[None, :] >= capacities[:, None]
    holders = np.full((n_columns, width), -1, dtype=np.int64)
    for step in steps:
        holders = np.full((n_columns, width), -1, dtype=np.int64)  # by descending bid
        bids = np.where(closed, np.inf, -np.inf)
        todo = np.arange(n_rows)
        while len(todo):
            bidders, rest = todo[:block], todo[block:]
            value = -costs[bidders] - prices  # (bidders, columns)
            row = np.arange(len(bidders))
            choice = value.argmax(1)
            best = value[row, choice]
            value[row, choice] = -np.inf
            offer = prices[choice] + (best - value.max(1)) + step
            order = np.lexsort((-offer, choice))
            target, begin, count = np.unique(choice[order], return_index=True, return_counts=True)
            group = np.repeat(np.arange(len(target)), count)
            rank = np.arange(len(order)) - np.repeat(begin, count)
            fits = rank < width
            shape = (len(target), min(width, int(count.max())))
            new_bids, new_holders = np.full(shape, -np.inf), np.full(shape, -1, dtype=np.int64)
            new_bids[group[fits], rank[fits]] = offer[order[fits]]
            new_holders[group[fits], rank[fits]] = bidders[order[fits]]
            all_bids = np.concatenate([bids[target], new_bids], axis=1)
            all_holders = np.concatenate([holders[target], new_holders], axis=1)
            best_first = np.argsort(-all_bids, axis=1, kind="stable")
            all_bids = np.take_along_axis(all_bids, best_first, axis=1)
            all_holders = np.take_along_axis(all_holders, best_first, axis=1)
            bids[target], holders[target] = all_bids[:, :width], all_holders[:, :width]
            prices[target] = np.maximum(prices[target], all_bids[:, width - 1])  # -inf while there is room
            evicted = all_holders[:, width:]
            todo = np.concatenate([rest, bidders[order[~fits]], evicted[evicted >= 0]])
    columns, slots = np.nonzero(holders >= 0)
    assigned = np.empty(n_rows, dtype=np.int64)
    assigned[holders[columns, slots]] = columns
    return assigned


def _assign(points: np.ndarray, centroids: np.ndarray, steps: Sequence[float]) -> tuple[np.ndarray, float]:
    """Balanced labels, and their total squared distance less the points' own squared length."""
    costs = relative_distances(points, centroids)
    size = len(centroids)
    capacities = np.full(size, len(points) // size)
    # The places left over go to the clusters that most points lie nearest to.
    demand = np.bincount(costs.argmin(1), minlength=size)
    capacities[np.argsort(-demand, kind="stable")[: len(points) % size]] += 1
    scale = float(costs.std()) or 1.0
    labels = balanced_assignment(costs, capacities, [scale * step for step in steps])
    return labels, float(costs[np.arange(len(points)), labels].sum(dtype=np.float64))


def relative_distances(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared distances (n, K) less |x|², which is the same for all centroids."""
    lengths = np.einsum("kd,kd->k", centroids, centroids)
    return lengths - 2 * (points @ centroids.T)


def cluster_means(points: np.ndarray, labels: np.ndarray, size: int) -> np.ndarray:
    """Mean of each cluster, float32 (size, dim); zero for an empty one."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels, minlength=size)
    begin = np.concatenate([[0], np.cumsum(counts)[:-1]])
    filled = np.flatnonzero(counts)
    means = np.zeros((size, points.shape[1]), dtype=np.float32)
    means[filled] = np.add.reduceat(points[order], begin[filled], axis=0) / counts[filled, None]
    return means


QUANTIZERS.add("balanced", BalancedResidualKMeans, __name__)
QUANTIZERS.add("plain", SampledResidualKMeans, __name__)

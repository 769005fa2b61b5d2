"""Vectors to codes by optimised product quantization (Ge et al. 2013, "Optimized Product Quantization", CVPR).

Embeddings are rotated, cut into one part per level, and each part is clustered by k-means: no level's codes depend on
another's. That makes it the plain control of what codes residuals: as many codes, side by side. The rotation starts at
the principal axes, dealt out so that each part varies about as much (the paper's parametric solution), and is then
fitted to the clusters and they to it (its non-parametric one).

A part's centroids are kept turned back into the space of the embeddings. They stand at right angles to those of other
parts there, so encoding and rebuilding need no rotation.

Everything is seeded and runs its linear algebra on one thread, so the thread count changes no code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from tqdm import tqdm

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.quantizers.base import QUANTIZERS, books_of
from reasonrec.tokenizers.quantizers.kmeans import (
    checked_rows,
    cluster_means,
    k_means,
    nearest_codes,
    relative_distances,
)
from reasonrec.tokenizers.whole import whole


@dataclass
class ProductQuantizer:
    """Optimised product quantization.

    Attributes:
        codebook_sizes: Number of codes of each level.
        seed: Seed; level `l` uses `seed + l`.
        rotations: How often the rotation is fitted to the clusters.
        n_init: Runs of k-means from different starting points on each part, of which the best is kept.
        max_iter: Lloyd iterations at most.
        progress: Show a bar over rotations.
        codebooks: One float32 (K_l, dim) array per level, after `fit_encode`.
        mean: float32 (dim,), which is taken off the embeddings first.
        curves: Empty: nothing here descends a gradient.

    Raises:
        UserError: If a number is no whole number in its range.
    """

    codebook_sizes: Sequence[int]
    seed: int = 0
    rotations: int = 20
    n_init: int = 3
    max_iter: int = 100
    progress: bool = False
    codebooks: list[np.ndarray] = field(default_factory=list, init=False)
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32), init=False)
    curves: dict[str, list[float]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        whole("rotations", self.rotations, at_least=0)
        for name in ("n_init", "max_iter"):
            whole(name, getattr(self, name), at_least=1)

    def fit_encode(self, embeddings: np.ndarray) -> np.ndarray:
        """Learn rotation and codebooks, and encode the rows they were learned from.

        Args:
            embeddings: (n, dim).

        Returns:
            int32 (n, depth).

        Raises:
            UserError: If a codebook is larger than the number of rows, there are more levels than dimensions, or as
                `check_embeddings`.
        """
        points = checked_rows(embeddings, self.codebook_sizes)
        depth, dim = len(self.codebook_sizes), points.shape[1]
        if depth > dim:
            raise UserError(
                f"codebook_sizes has {depth} levels, but embeddings of {dim} dimensions can be cut into {dim} at most"
            )
        self.mean = points.mean(0)
        points -= self.mean
        edges = np.cumsum([len(part) for part in np.array_split(np.arange(dim), depth)])[:-1]
        with threadpool_limits(limits=1):
            rotation = _principal_axes(points, edges)
            centroids = [
                self._cluster(part, level) for level, part in enumerate(np.split(points @ rotation, edges, axis=1))
            ]
            for _ in tqdm(
                range(self.rotations), desc="quantizing", unit="rotation", disable=None if self.progress else True
            ):
                rebuilt = []
                for level, part in enumerate(np.split(points @ rotation, edges, axis=1)):
                    codes = relative_distances(part, centroids[level]).argmin(1)
                    used = np.bincount(codes, minlength=len(centroids[level]))[:, None] > 0
                    means = cluster_means(part, codes, len(centroids[level]))
                    centroids[level] = np.where(used, means, centroids[level])  # an empty one stays where it is
                    rebuilt.append(centroids[level][codes])
                left, _, right = np.linalg.svd(points.T @ np.concatenate(rebuilt, axis=1))
                rotation = left @ right
            turned = np.split(points @ rotation, edges, axis=1)
            centroids = [self._cluster(part, level, centroids[level]) for level, part in enumerate(turned)]
            axes = np.split(rotation, edges, axis=1)
            self.codebooks = [book @ part.T for book, part in zip(centroids, axes, strict=True)]
        return self.encode(embeddings)

    def _cluster(self, points: np.ndarray, level: int, start: np.ndarray | None = None) -> np.ndarray:
        """Centroids (K, width) of one part, from given ones on or from the best of several starts."""
        found = k_means(
            points,
            self.codebook_sizes[level],
            self.seed + level,
            n_init=self.n_init if start is None else 1,
            max_iter=self.max_iter,
            init="k-means++" if start is None else start,
        )
        return np.asarray(found.cluster_centers_, dtype=np.float32)

    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        """Codes of rows, new or learned from: on every level the nearest centroid.

        Args:
            embeddings: (n, dim).

        Returns:
            int32 (n, depth).

        Raises:
            UserError: As `check_embeddings`.
        """
        if not self.codebooks:
            raise ValueError("encode needs the codebooks of fit_encode")
        points = checked_rows(embeddings) - self.mean
        codes = np.empty((len(points), len(self.codebooks)), dtype=np.int32)
        with threadpool_limits(limits=1):
            for level, book in enumerate(self.codebooks):
                codes[:, level] = nearest_codes(points, book)
        return codes

    def reconstruct(self, codes: np.ndarray) -> np.ndarray:
        """Embeddings, float32 (n, dim), with the mean in parts of levels that have no code here (n, up to depth)."""
        books = self.codebooks[: codes.shape[1]]
        return np.sum([book[codes[:, level]] for level, book in enumerate(books)], axis=0) + self.mean

    def summands(self, embeddings: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Rows without the mean, and the codebooks, which stand at right angles to each other."""
        return checked_rows(embeddings) - self.mean, self.codebooks

    def state(self) -> dict[str, np.ndarray]:
        """The mean, and the codebooks as `codebook_0`, `codebook_1` and so on."""
        return {"mean": self.mean} | {f"codebook_{level}": book for level, book in enumerate(self.codebooks)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` gave."""
        self.codebooks, self.mean = books_of(state, self.codebook_sizes), state["mean"]


def _principal_axes(points: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The principal axes (dim, dim), dealt to the parts so that the products of their variances are about equal."""
    dim = points.shape[1]
    variances, axes = np.linalg.eigh((points.T @ points).astype(np.float64))
    # In units of the smallest that counts: a product then grows with each axis, as the rule below needs it.
    growth = np.log(np.maximum(variances, max(float(variances[-1]), 1e-30) * 1e-9))
    growth -= growth.min()
    room = np.diff([0, *edges, dim])
    products, dealt = np.zeros(len(room)), [list[int]() for _ in room]
    for axis in range(dim - 1, -1, -1):  # the largest first
        open_parts = [part for part in range(len(room)) if len(dealt[part]) < room[part]]
        part = min(open_parts, key=lambda part: products[part])
        dealt[part].append(axis)
        products[part] += growth[axis]
    return axes[:, np.concatenate(dealt).astype(np.int64)].astype(np.float32)


QUANTIZERS.add("product", ProductQuantizer, __name__)

"""What a quantizer is, and which there are: chosen by name, each with options of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from reasonrec.tokenizers.registry import Registry


class Quantizer(Protocol):
    """What the item index needs of a quantizer.

    Attributes:
        codebooks: One float32 (K_l, dim) array per level, filled by `fit_encode`.
    """

    codebooks: list[np.ndarray]

    def fit_encode(self, embeddings: np.ndarray) -> np.ndarray:
        """Learn the codebooks and return int32 codes (n, depth) of the same rows."""

    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        """Codes (n, depth) of rows that were not there when the codebooks were learned."""


# Dataclasses: `codebook_sizes`, `seed`, `progress`, and what else they can be told.
QUANTIZERS: Registry[Callable[..., Quantizer]] = Registry("quantizer", ["reasonrec.tokenizers.quantizers.kmeans"])


def build_quantizer(
    name: str, codebook_sizes: Sequence[int], seed: int, options: Mapping[str, Any], *, progress: bool = False
) -> Quantizer:
    """The quantizer of a name.

    Args:
        name: Its name.
        codebook_sizes: Number of codes of each level.
        seed: Its seed.
        options: Its own options.
        progress: Show a bar.

    Raises:
        UserError: If there is none of that name, it has no such option, or refuses a value.
    """
    built: Quantizer = QUANTIZERS.make(name, options, codebook_sizes=codebook_sizes, seed=seed, progress=progress)
    return built

"""What a quantizer is, and which there are: chosen by name, each with options of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from reasonrec.tokenizers.registry import Registry


class Quantizer(Protocol):
    """What the item index needs of a quantizer."""

    @property
    def curves(self) -> dict[str, list[float]]:
        """What training measured, by name, `step` among them; empty where nothing descends a gradient."""

    def fit_encode(self, embeddings: np.ndarray) -> np.ndarray:
        """Learn from rows, and return their int32 codes (n, depth)."""

    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        """Codes (n, depth) of rows that were not learned from."""

    def reconstruct(self, codes: np.ndarray) -> np.ndarray:
        """Embeddings, float32 (n, dim), as far as the codes of the first levels (n, up to depth) tell them."""

    def summands(self, embeddings: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Where codes are sums: rows as float32 (n, width), and the vectors of codes, (codes, width) a level.

        The nearer the vectors of a row's codes add up to it, the better the codes; what is nearest on one level after
        the other is what `encode` takes.
        """

    def state(self) -> dict[str, np.ndarray]:
        """All that `encode` and `reconstruct` need, by name."""

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over a `state`, of a quantizer with the same sizes and options.

        Raises:
            KeyError: If an array is missing.
            ValueError: If one has another shape.
        """


# Dataclasses: `codebook_sizes`, `seed`, `progress`, and what else they can be told.
QUANTIZERS: Registry[Callable[..., Quantizer]] = Registry(
    "quantizer",
    [
        "reasonrec.tokenizers.quantizers.kmeans",
        "reasonrec.tokenizers.quantizers.rq_vae",
        "reasonrec.tokenizers.quantizers.product",
        "reasonrec.tokenizers.quantizers.mixture",
    ],
)


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


def books_of(state: Mapping[str, np.ndarray], codebook_sizes: Sequence[int]) -> list[np.ndarray]:
    """The codebooks `codebook_0`, `codebook_1` … of a state.

    Raises:
        KeyError: If one is missing.
        ValueError: If one has another size.
    """
    books = [state[f"codebook_{level}"] for level in range(len(codebook_sizes))]
    if (found := [len(book) for book in books]) != list(codebook_sizes):
        raise ValueError(f"codebooks of {found} codes, not {list(codebook_sizes)}")
    return books


def codewords(state: Mapping[str, np.ndarray], depth: int) -> list[np.ndarray]:
    """The vector of every code in a state, (codes, width) a level, in the space in which its quantizer adds them up.

    Raises:
        KeyError: If the quantizer keeps no such vectors.
    """
    kept = "books.0.vectors" in state  # of a trained network
    return [state[f"books.{level}.vectors" if kept else f"codebook_{level}"] for level in range(depth)]

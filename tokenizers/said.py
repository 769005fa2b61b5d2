"""What an item's text says of the company it will keep, for items that nobody had yet (`collaborative.py`)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]


def unit(vectors: NDArray[np.floating]) -> Vectors:
    """Rows of unit length; those of zeros stay."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(length, 1e-12), dtype=np.float32)


class Said(NamedTuple):
    """Company as text says it: the ridge regression.

    Attributes:
        weight: (text, dimensions).
        bias: (dimensions,).
    """

    weight: Vectors
    bias: Vectors

    def __call__(self, text: Vectors) -> Vectors:
        """(items, dimensions) rows of unit length, of vectors of their text (items, dim)."""
        return unit(text @ self.weight + self.bias)

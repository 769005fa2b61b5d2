"""Item vectors of what is used together, for codes that group what people treat alike.

    z(v) = λ · c(v) + (1 − λ) · ridge(text(v))        λ = n / (n + k)

c(v) is a row of the singular vectors of PPMI, the positive part of log P(v, w) / (P(v) P(w)) over train pairs (Levy
and Goldberg, NeurIPS 2014); the ridge regression learns c from text on items that have pairs; n is how often v occurs
in train. An item that nobody had yet keeps the place that its text earns, and a popular one that of its company.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import svds

from reasonrec.tokenizers.errors import UserError

DIMENSIONS = 128
SMOOTHING = 0.75  # exponent of the context's probability, as in word2vec: rare companions say less than PMI believes
RIDGES = tuple(10.0**power for power in range(-2, 4))
Vectors = NDArray[np.float32]


def ppmi(pairs: sparse.csr_array) -> sparse.csr_array:
    """Positive pointwise mutual information.

    Args:
        pairs: (items, items) weights of pairs, symmetric, zero on the diagonal.

    Returns:
        (items, items), without zeros.
    """
    found = pairs.tocoo()
    total = float(found.data.sum())
    own = np.asarray(pairs.sum(axis=1)).ravel()
    context = own**SMOOTHING
    context = context / max(context.sum(), 1e-12)
    row, column = found.coords
    information = np.log(found.data / total / (own[row] / total * context[column]))
    result = sparse.coo_array((np.maximum(information, 0), (row, column)), shape=pairs.shape).tocsr()
    result.eliminate_zeros()
    return result


def company(pairs: sparse.csr_array, *, dimensions: int = DIMENSIONS, seed: int = 0) -> Vectors:
    """Vectors of items by what they stand beside: U √S of the decomposed PPMI.

    Args:
        pairs: (items, items) weights of pairs, symmetric, zero on the diagonal.
        dimensions: Singular vectors that are kept, at most.
        seed: Of where the decomposition starts.

    Returns:
        (items, dimensions) rows of unit length, or of zeros for items without a pair.
    """
    information = ppmi(pairs)
    kept = min(dimensions, min(information.shape) - 1)
    start = np.random.default_rng(seed).standard_normal(information.shape[0])
    left, sizes, _ = svds(information.astype(np.float64), k=kept, v0=start)
    order = np.argsort(-sizes)
    left, sizes = left[:, order], sizes[order]
    # The sign of a singular vector is arbitrary: its largest entry is positive.
    signs = np.sign(left[np.abs(left).argmax(axis=0), np.arange(kept)])
    return _unit(left * signs * np.sqrt(np.maximum(sizes, 0)))


class Blend:
    """What codes are made of: company, and what text says of it; only their shares depend on k.

    Args:
        pairs: (items, items) weights of pairs in train, symmetric; the diagonal does not count.
        counts: (items,) how often each item occurs in train.
        text: (items, dim) vectors of the items' text.
        seed: Of where the decomposition starts.

    Raises:
        UserError: If no two items stand together in train.
    """

    def __init__(self, pairs: sparse.csr_array, counts: NDArray[np.integer], text: Vectors, *, seed: int = 0) -> None:
        from sklearn.linear_model import RidgeCV

        pairs = pairs.tolil()
        pairs.setdiag(0)
        pairs = pairs.tocsr()
        pairs.eliminate_zeros()
        if not pairs.nnz:
            raise UserError(
                "collaboration: no two items stand together in train; set collaboration: 0 for codes from text"
            )
        self.counts = counts
        self.vectors = company(pairs, seed=seed)
        self.known = np.asarray(pairs.sum(axis=1)).ravel() > 0
        ridge = RidgeCV(alphas=RIDGES).fit(text[self.known], self.vectors[self.known])
        self.said = _unit(ridge.predict(text).astype(np.float32))

    def __call__(self, k: float) -> Vectors:
        """(items, dimensions) rows of unit length; company and text weigh alike at k occurrences."""
        share = np.where(self.known, self.counts / (self.counts + k), 0)[:, None]
        return _unit(share * self.vectors + (1 - share) * self.said)


def _unit(vectors: NDArray[np.floating]) -> Vectors:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(length, 1e-12), dtype=np.float32)

"""What is used together: pairs, and item vectors made of them, for codes that group what people treat alike.

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
from reasonrec.tokenizers.said import Said, Vectors, unit

DIMENSIONS = 128
SMOOTHING = 0.75  # exponent of the context's probability, as in word2vec: rare companions say less than PMI believes
RIDGES = tuple(10.0**power for power in range(-2, 4))


def near_pairs(
    items: NDArray[np.integer], sequence: NDArray[np.integer], n_items: int, window: int
) -> sparse.csr_array:
    """Weights of pairs in sequences: 1/|i − j| for all places i ≠ j at most `window` apart.

    Args:
        items: Items of all sequences, one after another (n,).
        sequence: Number of the sequence of each (n,).
        n_items: Size of the catalogue.
        window: Largest distance of a pair.

    Returns:
        (n_items, n_items), symmetric; an item that stands twice in a sequence is a pair with itself.
    """
    before, after, weights = [], [], []
    for gap in range(1, window + 1):
        same = sequence[gap:] == sequence[:-gap]
        before.append(items[:-gap][same])
        after.append(items[gap:][same])
        weights.append(np.full(len(before[-1]), 1.0 / gap))
    place = (np.concatenate(before), np.concatenate(after))
    forward = sparse.coo_array((np.concatenate(weights), place), shape=(n_items, n_items)).tocsr()
    pairs = (forward + forward.T).tocsr()
    pairs.eliminate_zeros()
    return pairs


def set_pairs(items: NDArray[np.integer], sequence: NDArray[np.integer], n_items: int) -> sparse.csr_array:
    """Weights of pairs in sets: an item shares one unit among its companions, whatever the set's size.

    Args:
        items: Items of all sets, one after another (n,).
        sequence: Number of the set of each (n,).
        n_items: Size of the catalogue.

    Returns:
        (n_items, n_items), zero on the diagonal.
    """
    size = np.bincount(sequence)
    share = 1.0 / np.maximum(size[sequence] - 1, 1)
    place, shape = (sequence, items), (len(size), n_items)
    once = sparse.coo_array((np.ones(len(share)), place), shape=shape).tocsr()
    shared = sparse.coo_array((share, place), shape=shape).tocsr()
    together = (shared.T @ once).tolil()
    together.setdiag(0)
    pairs = together.tocsr()
    pairs.eliminate_zeros()
    return pairs


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
    return unit(left * signs * np.sqrt(np.maximum(sizes, 0)))


class Blend:
    """What codes are made of: company, and what text says of it; only their shares depend on k.

    Args:
        pairs: (items, items) weights of pairs in train, symmetric; the diagonal does not count.
        counts: (items,) how often each item occurs in train.
        text: (items, dim) vectors of the items' text.
        seed: Of where the decomposition starts.

    Attributes:
        says: What text says of company, of these items and of any other.

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
        self.says = Said(ridge.coef_.T.astype(np.float32), ridge.intercept_.astype(np.float32))
        self.said = self.says(text)

    def __call__(self, k: float) -> Vectors:
        """(items, dimensions) rows of unit length; company and text weigh alike at k occurrences."""
        share = np.where(self.known, self.counts / (self.counts + k), 0)[:, None]
        return unit(share * self.vectors + (1 - share) * self.said)

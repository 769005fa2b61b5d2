"""Vectors of what is used together: by hand, and on items whose company is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from reasonrec.tokenizers.collaborative import SMOOTHING, Blend, company, ppmi
from reasonrec.tokenizers.errors import UserError


def groups(n_groups: int = 4, size: int = 8, seed: int = 0) -> sparse.csr_array:
    """Items of a group stand together ten times as often as others."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(n_groups), size)
    weights = np.where(group[:, None] == group, 10.0, 1.0) * rng.uniform(0.8, 1.2, (len(group), len(group)))
    weights = np.triu(weights, 1)
    return sparse.csr_array(weights + weights.T)


def purity(vectors: np.ndarray, group: np.ndarray) -> float:
    """How often the nearest other item is of the same group."""
    alike = vectors @ vectors.T
    np.fill_diagonal(alike, -np.inf)
    return float((group[alike.argmax(1)] == group).mean())


def test_ppmi_by_hand() -> None:
    pairs = sparse.csr_array(np.array([[0.0, 2, 0], [2, 0, 1], [0, 1, 0]]))
    own = np.array([2, 3, 1])
    context = own**SMOOTHING / (own**SMOOTHING).sum()
    found = ppmi(pairs).toarray()
    assert found[0, 1] == pytest.approx(np.log((2 / 6) / (2 / 6 * context[1])))
    assert found[1, 2] == pytest.approx(np.log((1 / 6) / (3 / 6 * context[2])))
    assert found[0, 2] == found[0, 0] == 0
    assert (found >= 0).all()


def test_company_tells_groups_apart_and_repeats_itself() -> None:
    vectors = company(groups(), dimensions=8)
    assert purity(vectors, np.repeat(np.arange(4), 8)) == 1
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(vectors, company(groups(), dimensions=8))


def test_cold_items_stand_where_text_says_and_popular_ones_with_their_company() -> None:
    group = np.repeat(np.arange(4), 8)
    rng = np.random.default_rng(1)
    text = (np.eye(4)[group] + 0.05 * rng.standard_normal((32, 4))).astype(np.float32)
    pairs = groups().tolil()
    cold = [0, 9]
    pairs[cold, :], pairs[:, cold] = 0, 0
    text[5] = text[20]  # its text is of another group than its company
    counts = np.where(np.isin(np.arange(32), cold), 0, 50)
    vectors = Blend(pairs.tocsr(), counts, text)(5.0)
    near = vectors @ vectors.T
    np.fill_diagonal(near, -np.inf)
    assert [int(group[near[item].argmax()]) for item in (0, 9, 5)] == [0, 1, 0]
    by_text = Blend(pairs.tocsr(), counts, text)(1e9)
    near = by_text @ by_text.T
    np.fill_diagonal(near, -np.inf)
    assert int(group[near[5].argmax()]) == 2, "without a share of company, text alone decides"
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_what_stands_alone_says_nothing() -> None:
    with pytest.raises(UserError, match="no two items stand together"):
        Blend(sparse.csr_array(np.eye(3)), np.ones(3, dtype=int), np.eye(3, dtype=np.float32))

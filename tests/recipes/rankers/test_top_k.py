"""Ranked lists: ties, masks, items without a score."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrec.recipes.rankers import top_k as ranking
from reasonrec.recipes.rankers.top_k import top_k
from reasonrec.tokenizers.errors import UserError

POPULARITY = np.array([1, 5, 5, 0])


def test_ties_by_popularity_then_item_number() -> None:
    assert top_k(np.zeros((1, 4)), 4, POPULARITY).tolist() == [[1, 2, 0, 3]]
    assert top_k(np.array([[0.0, 0.0, 0.0, 2.0]]), 3, POPULARITY).tolist() == [[3, 1, 2]]


def test_an_item_without_a_score_is_not_tied_with_a_score_of_zero() -> None:
    scores = np.array([[0.0, -np.inf, -np.inf, 3.0]])
    assert top_k(scores, 4, POPULARITY).tolist() == [[3, 0, -1, -1]]
    assert top_k(scores, 4, POPULARITY, fill=True).tolist() == [[3, 0, 1, 2]]
    assert top_k(np.full((1, 4), -np.inf), 2, POPULARITY, fill=True).tolist() == [[1, 2]]


def test_masked_items_never_appear_and_lists_grow_short() -> None:
    masked = pl.Series([[3, 1], []], dtype=pl.List(pl.Int32))
    scores = np.array([[0.0, 9.0, 1.0, 3.0], [0.0, 9.0, 1.0, 3.0]])
    assert top_k(scores, 3, POPULARITY, masked).tolist() == [[2, 0, -1], [1, 3, 2]]
    assert top_k(scores, 3, POPULARITY, masked, fill=True).tolist() == [[2, 0, -1], [1, 3, 2]]


def test_lists_longer_than_the_catalogue_are_padded() -> None:
    assert top_k(np.zeros((1, 2)), 4, np.array([0, 1])).tolist() == [[1, 0, -1, -1]]


def test_nan_and_wrong_shapes_are_refused() -> None:
    with pytest.raises(UserError, match="NaN"):
        top_k(np.array([[np.nan, 0.0, 0.0, 0.0]]), 1, POPULARITY)
    with pytest.raises(UserError, match="one column per item"):
        top_k(np.zeros((1, 3)), 1, POPULARITY)
    with pytest.raises(UserError, match="excluded"):
        top_k(np.zeros((2, 4)), 1, POPULARITY, [[0]])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.lists(st.lists(st.sampled_from([-np.inf, 0.0, 1.0, 2.0]), min_size=9, max_size=9), min_size=1, max_size=7),
    st.lists(st.integers(0, 3), min_size=9, max_size=9),
    st.booleans(),
)
def test_agrees_with_sorting_everything(k: int, scores: list[list[float]], popularity: list[int], fill: bool) -> None:
    masked = [[i % 9, (i * 5) % 9] for i in range(len(scores))]
    found = top_k(np.array(scores), k, np.array(popularity), masked, fill=fill)
    for row, values in enumerate(scores):
        allowed = [i for i in range(9) if i not in masked[row] and (fill or values[i] > -np.inf)]
        expected = sorted(allowed, key=lambda i: (-values[i], -popularity[i], i))[:k]
        assert found[row].tolist() == expected + [-1] * (k - len(expected))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    scores, popularity = rng.integers(0, 5, (50, 20)).astype(float), rng.integers(0, 5, 20)
    masked = [rng.choice(20, size=rng.integers(0, 6), replace=False) for _ in range(50)]
    whole = top_k(scores, 10, popularity, masked)
    monkeypatch.setattr(ranking, "_CHUNK_CELLS", 60)  # three rows at a time
    assert (top_k(scores, 10, popularity, masked) == whole).all()

"""Rewards of categories, against numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from reasonrec.rewards.consistency import category, category_steps, consistency, jensen_shannon

CATEGORIES = np.array([0, 0, 1, -1])


def test_category() -> None:
    values = category(
        predicted_items=[0, 1, 2, -1, 3, 0, 3], target_items=[0, 0, 0, 2, 2, 3, 3], categories=CATEGORIES
    )
    assert values == [1, 1, 0, 0, 0, None, None]


def test_category_steps() -> None:
    probs = [[0.6, 0.4], [0.3, 0.7], [0.9, 0.1], [0.8, 0.2]]
    values = category_steps(
        predicted_items=[1, 2, -1, 0, 0], target_items=[0, 2, 0, 3, 0], categories=CATEGORIES,
        category_probs=[probs, probs, probs, probs, probs[:1]],
    )  # fmt: skip
    assert values == [0.75, 0.25, 0, None, 1]


def test_jensen_shannon_in_bits() -> None:
    left, right = [[1, 0], [1, 0], [0.5, 0.5], [1, 0]], [[0, 1], [1, 0], [0.5, 0.5], [0.5, 0.5]]
    # The last: H(3/4, 1/4) − H(1/2, 1/2) / 2 = 0.811278 − 0.5.
    np.testing.assert_allclose(jensen_shannon(left, right), [1, 0, 0, 0.311278], atol=1e-6)


@given(arrays.arrays(np.float64, (2, 3, 4), elements=st.floats(0, 1)))
def test_jensen_shannon_is_symmetric_and_between_0_and_1(drawn: np.ndarray) -> None:
    p, q = (drawn + 1e-6) / (drawn + 1e-6).sum(-1, keepdims=True)
    there, back = jensen_shannon(p, q), jensen_shannon(q, p)
    np.testing.assert_allclose(there, back, atol=1e-12)
    assert ((there >= 0) & (there <= 1)).all()


def test_consistency() -> None:
    apart, half, settled = [[1, 0], [0, 1], [0, 1]], [[1, 0], [0.5, 0.5]], [[0.3, 0.7]] * 4
    values = consistency(predicted_items=[5, 5, 5, 5, -1], category_probs=[apart, half, settled, settled[:1], settled])
    assert values == pytest.approx([0.5, 1 - 0.311278, 1, 1, 0], abs=1e-6)
    assert consistency(predicted_items=[], category_probs=[]) == []

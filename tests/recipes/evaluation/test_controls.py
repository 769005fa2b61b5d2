"""Whose chain a case gets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrec.recipes.evaluation.controls import donors
from reasonrec.tokenizers.errors import UserError


@given(
    histories=st.lists(st.lists(st.integers(0, 30), min_size=0, max_size=6), min_size=2, max_size=30),
    seed=st.integers(0, 5),
)
@settings(max_examples=300, deadline=None)
def test_a_permutation_without_fixed_points(histories, seed):
    donor = donors(histories, seed)
    assert sorted(donor.tolist()) == list(range(len(histories)))
    assert (donor != np.arange(len(histories))).all()
    assert (donor == donors(histories, seed)).all()


def test_the_histories_share_no_item_and_are_about_as_long():
    rng = np.random.default_rng(0)
    histories = [rng.choice(400, size=rng.integers(3, 16), replace=False) for _ in range(300)]
    donor = donors(histories, 0)
    shared = [bool(set(history) & set(histories[other])) for history, other in zip(histories, donor, strict=True)]
    assert not any(shared)
    order = np.argsort([len(h) for h in histories], kind="stable")
    neighbours = zip(order[::2], order[1::2], strict=True)
    assert any(set(histories[i]) & set(histories[j]) for i, j in neighbours), "it had to exchange some"
    assert max(abs(len(history) - len(histories[j])) for history, j in zip(histories, donor, strict=True)) <= 4


def test_one_case_has_nobody_to_exchange_with():
    with pytest.raises(UserError, match="at least two cases"):
        donors([[1, 2]], 0)

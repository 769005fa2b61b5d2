"""Intervals: what is resampled, what is paired, and what Holm makes of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrec.recipes.evaluation import intervals
from reasonrec.tokenizers.errors import UserError


def test_rows_of_one_user_are_drawn_together() -> None:
    # Two users, whose rows are all equal: any draw is a mixture of whole users, 0, 2/3 (by rows) or 1.
    draws = intervals.bootstrap_means([7, 7, 9, 9, 9, 9], [0, 0, 1, 1, 1, 1], draws=300)
    assert draws.shape == (300, 1)
    assert {round(float(v), 6) for v in np.unique(draws)} == {0.0, round(2 / 3, 6), 1.0}


def test_user_interval_is_wider_than_the_row_interval() -> None:
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(200), 5)
    values = (rng.random(200)[users] + 0.2 * rng.random(1000)) > 0.6
    by_user = intervals.bootstrap_means(users, values).std()
    by_row = intervals.bootstrap_means(np.arange(1000), values).std()
    assert by_user > 1.5 * by_row


def test_bootstrap_spread_agrees_with_the_standard_error() -> None:
    values = np.random.default_rng(1).random(400)
    draws = intervals.bootstrap_means(np.arange(400), values)
    assert draws.std() == pytest.approx(values.std() / 20, rel=0.06)
    assert draws.mean() == pytest.approx(values.mean(), abs=0.003)


def test_same_seed_draws_the_same_users_in_separate_calls_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    users, values = np.arange(50), np.random.default_rng(2).random((50, 2))
    both = intervals.bootstrap_means(users, values, draws=64, seed=3)
    assert (intervals.bootstrap_means(users, values[:, 1], draws=64, seed=3)[:, 0] == both[:, 1]).all()
    assert (intervals.bootstrap_means(users, values, draws=64, seed=4) != both).any()
    monkeypatch.setattr(intervals, "_CHUNK_CELLS", 500)  # ten draws a chunk
    assert np.allclose(intervals.bootstrap_means(users, values, draws=64, seed=3), both, rtol=0, atol=1e-12)


def test_slices_count_only_their_rows() -> None:
    where = np.array([True, True, False, False])
    draws = intervals.bootstrap_means([0, 1, 2, 3], [1, 1, 0, 0], where=where, draws=200)
    assert np.isnan(draws).any()  # draws that hold none of the slice's users
    assert np.nanmin(draws) == 1.0
    assert intervals.percentile_interval(draws[:, 0]) == (1.0, 1.0)


def test_paired_difference_of_equal_columns_claims_nothing() -> None:
    draws = intervals.bootstrap_means(np.arange(30), np.random.default_rng(0).random(30))[:, 0]
    difference = intervals.paired_difference(draws, draws, 0.0)
    assert (difference.low, difference.high, difference.p, difference.mde) == (0.0, 0.0, 1.0, 0.0)


def test_pairing_removes_what_the_columns_share() -> None:
    rng = np.random.default_rng(0)
    shared = rng.random(500)
    values = np.stack([shared + 0.02 + 0.01 * rng.standard_normal(500), shared], axis=1)
    draws = intervals.bootstrap_means(np.arange(500), values)
    difference = intervals.paired_difference(draws[:, 0], draws[:, 1], float(values[:, 0].mean() - shared.mean()))
    assert 0 < difference.low < difference.value < difference.high
    assert difference.p == pytest.approx(2 / 2001)
    assert difference.mde == pytest.approx(2.8 * 0.01 / np.sqrt(500), rel=0.15)


def test_holm_by_hand() -> None:
    assert intervals.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert intervals.holm([0.5, 0.9]) == [1.0, 1.0]
    assert intervals.holm([]) == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_the_raw_value_and_bonferroni(p_values: list[float]) -> None:
    adjusted = intervals.holm(p_values)
    smallest = min(p_values)
    assert min(adjusted) == pytest.approx(min(1.0, smallest * len(p_values)))
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


def test_seed_interval_by_hand() -> None:
    found = intervals.seed_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * np.sqrt(2.5) / np.sqrt(5)  # t(.975, 4)
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3 - half, 3 + half), rel=1e-6)
    assert not found.descriptive
    assert intervals.seed_interval([1.0, 2.0]).descriptive
    assert np.isnan(intervals.seed_interval([1.0]).low)


def test_nothing_to_resample_is_refused() -> None:
    with pytest.raises(UserError, match="at least one row"):
        intervals.bootstrap_means([], [])
    with pytest.raises(UserError, match="seeds"):
        intervals.seed_interval([])

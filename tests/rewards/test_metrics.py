"""Metrics against numbers counted by hand."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrec.rewards import metrics
from reasonrec.tokenizers.errors import UserError

RANKING = np.array([[3, 1, 2, 0], [0, 1, -1, -1], [2, 2, 3, 1], [-1, -1, -1, -1]])
TARGET = np.array([2, 3, 3, 0])


def test_rank_counts_places_from_one_and_misses_as_zero() -> None:
    assert metrics.rank_of_target(RANKING, TARGET).tolist() == [3, 0, 3, 0]


def test_an_empty_place_never_hits_an_unknown_target() -> None:
    assert metrics.rank_of_target([[-1, -1]], [-1]).tolist() == [0]


def test_a_list_without_places_misses() -> None:
    assert metrics.rank_of_target(np.empty((2, 0), dtype=int), [0, 1]).tolist() == [0, 0]


def test_hand_computed_metrics() -> None:
    found = metrics.per_row(RANKING, TARGET, ks=(2, 3))
    assert found["hr@2"].tolist() == [0, 0, 0, 0]
    assert found["hr@3"].tolist() == [1, 0, 1, 0]
    assert found["ndcg@3"].tolist() == [0.5, 0, 0.5, 0]  # 1/log2(3+1)
    assert found["mrr"].tolist() == pytest.approx([1 / 3, 0, 1 / 3, 0])


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="shape"):
        metrics.rank_of_target(RANKING, TARGET[:2])


def test_concordance_of_pairs_counted_by_hand() -> None:
    liked, disliked = [[3.0, 1.0], [1.0], [-np.inf, 2.0], [5.0], []], [[2.0, 0.0, 1.0], [1.0], [-np.inf], [], [1.0]]
    found = metrics.concordance(liked, disliked)  # 3 beats all three; 1 beats one, ties with one, loses to one
    assert found[:3].tolist() == pytest.approx([4.5 / 6, 0.5, 0.75])
    assert np.isnan(found[3:]).all()


def test_concordance_refuses_rows_that_do_not_pair_and_scores_that_are_none() -> None:
    with pytest.raises(UserError, match="1 rows of liked items and 2"):
        metrics.concordance([[1.0]], [[1.0], [2.0]])
    with pytest.raises(UserError, match="row 1 has a score that is NaN"):
        metrics.concordance([[1.0], [np.nan]], [[1.0], [2.0]])


SCORES = st.lists(st.integers(-5, 5), min_size=1, max_size=8)


@given(SCORES, SCORES)
def test_concordance_reads_the_order_only_and_turns_round_with_it(liked: list[int], disliked: list[int]) -> None:
    found = metrics.concordance([liked], [disliked])[0]
    assert found + metrics.concordance([disliked], [liked])[0] == pytest.approx(1.0)
    assert metrics.concordance([np.exp(liked)], [np.exp(disliked)])[0] == found
    assert found == pytest.approx(np.mean([(a > b) + (a == b) / 2 for a in liked for b in disliked]))


def test_coverage_counts_distinct_items_in_the_first_k() -> None:
    assert metrics.coverage(RANKING, 4, 1) == 0.75  # 3, 0, 2
    assert metrics.coverage(RANKING, 8, 4) == 0.5


def test_valid_ratio_counts_strangers_duplicates_and_masked_items() -> None:
    assert metrics.valid_ratio([[0, 1], [1, -1]], 2) == 1.0
    assert metrics.valid_ratio([[0, 5]], 2) == 0.5
    assert metrics.valid_ratio([[0, -7]], 2) == 0.5
    assert metrics.valid_ratio([[1, 1, 0]], 2) == pytest.approx(2 / 3)
    masked = pl.Series([[], [1]], dtype=pl.List(pl.Int32))
    assert metrics.valid_ratio([[1, 0], [1, 0]], 2, masked) == 0.75
    assert metrics.valid_ratio([[-1]], 2, [[0]]) == 1.0


def test_sid_level_merges_items_that_share_an_id() -> None:
    sid_of_item = np.array([0, 1, 1, 2])
    ranking, target = metrics.to_sid_level([[0, 2, 1, 3], [1, -1, 2, -1]], [3, 2], sid_of_item)
    assert ranking.tolist() == [[0, 1, 2, -1], [1, -1, -1, -1]]
    assert target.tolist() == [2, 1]
    assert metrics.rank_of_target(ranking, target).tolist() == [3, 1]


def test_flatten_keeps_empty_rows() -> None:
    for lists in (pl.Series([[1, 2], [], [3]], dtype=pl.List(pl.Int32)), [[1, 2], [], [3]]):
        values, row, lengths = metrics.flatten(lists)
        assert (values.tolist(), row.tolist(), lengths.tolist()) == ([1, 2, 3], [0, 0, 2], [2, 0, 1])
    values, row, lengths = metrics.flatten(pl.Series([[]], dtype=pl.List(pl.Int32)))
    assert (values.tolist(), row.tolist(), lengths.tolist()) == ([], [], [0])


@settings(max_examples=50, deadline=None)
@given(st.permutations(list(range(8))), st.integers(0, 7), st.integers(1, 8))
def test_metrics_are_ordered_and_bounded(items: list[int], target: int, k: int) -> None:
    found = metrics.per_row([items], [target], ks=(k, 8))
    assert 0 <= found[f"ndcg@{k}"][0] <= found[f"hr@{k}"][0] <= found["hr@8"][0] == 1
    assert found["mrr"][0] == 1 / (items.index(target) + 1)

from collections import Counter

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonrec.data_gen.coded_log import CodedLog
from reasonrec.data_gen.filters import (
    check_not_empty,
    check_unique_items,
    count_log,
    drop_duplicates,
    filter_fact,
    have_text,
    k_core,
    note_alike,
)
from reasonrec.data_gen.frames import Frames
from reasonrec.tokenizers.errors import UserError


def log_of(*pairs: tuple[str, str]) -> pl.DataFrame:
    return pl.DataFrame(pairs, schema=["user_id", "item_id"], orient="row")


def buckets_of(pairs: list[tuple[int, int]], n: int) -> list[Frames]:
    """Sorted by user, each user in one of some buckets."""
    schema = {"user": pl.UInt32, "item": pl.UInt32}
    dealt = [sorted((pair for pair in pairs if pair[0] % n == at), key=lambda pair: pair[0]) for at in range(n)]
    return [Frames.of(pl.DataFrame(part, schema=schema, orient="row")) for part in dealt]


def rows_of(buckets: list[Frames]) -> list[tuple[int, int]]:
    return [row for bucket in buckets for row in bucket.frame().rows()]


def naive_core(pairs: list[tuple[int, int]], user_k: int, item_k: int) -> list[tuple[int, int]]:
    while True:
        users, items = Counter(u for u, _ in pairs), Counter(i for _, i in pairs)
        kept = [(u, i) for u, i in pairs if users[u] >= user_k and items[i] >= item_k]
        if kept == pairs:
            return kept
        pairs = kept


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=40),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_k_core_is_the_fixed_point(pairs: list[tuple[int, int]], user_k: int, item_k: int) -> None:
    for n in (1, 3):
        kept = rows_of(k_core(buckets_of(pairs, n), 6, user_k, item_k))
        assert sorted(kept) == sorted(naive_core(pairs, user_k, item_k))


def test_k_core_needs_several_rounds() -> None:
    # Item 2 falls first, then user 3, then item 1, then user 2.
    pairs = [(1, 0), (1, 3), (2, 0), (2, 1), (3, 1), (3, 2), (4, 0), (4, 3)]
    assert rows_of(k_core(buckets_of(pairs, 1), 4, 2, 2)) == [(1, 0), (1, 3), (4, 0), (4, 3)]


def test_consecutive_duplicates_that_the_core_creates_go_too() -> None:
    pairs = [(1, 0), (1, 9), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert rows_of(k_core(buckets_of(pairs, 1), 10, 2, 2, "drop_consecutive")) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert len(rows_of(k_core(buckets_of(pairs, 1), 10, 2, 2, "keep"))) == 5


@pytest.mark.parametrize(("policy", "items"), [("keep", "aabab"), ("drop_consecutive", "abab"), ("keep_first", "ab")])
def test_duplicate_policies(policy: str, items: str) -> None:
    log = buckets_of([*[(1, "ab".index(item)) for item in "aabab"], (2, 1)], 1)[0].frame()
    kept = drop_duplicates(log, policy)  # type: ignore[arg-type]
    assert kept.rows() == [(1, "ab".index(item)) for item in items] + [(2, 1)]


def test_duplicate_item_ids_are_refused() -> None:
    items = pl.DataFrame({"item_id": ["7", "8", "7"]})
    with pytest.raises(UserError, match=r"items.csv: 1 item ids .* '7' \(2 times\)"):
        check_unique_items(items, "items.csv")


def test_interactions_without_text_are_refused_or_dropped() -> None:
    log = CodedLog.of(log_of(("1", "a"), ("1", "b"), ("2", "c"), ("3", "a")))
    items = pl.DataFrame({"item_id": ["a", "b"], "title": ["A", ""]})
    with pytest.raises(UserError, match=r"2 interactions are with 2 items .*'b', 'c'.*drop_items_without_text: true"):
        have_text(log, items, drop=False, where="items.csv")
    assert have_text(log, items, drop=True, where="items.csv").tolist() == [True, False, False]


def test_nothing_left_says_what_each_filter_removed() -> None:
    log = log_of(("1", "a"), ("1", "b"))
    facts = [filter_fact("k_core", count_log(log), count_log(log.head(0)), user_k=9)]
    assert facts[0] == {
        "step": "k_core", "user_k": 9, "rows_before": 2, "users_before": 1, "items_before": 2, 
        "rows_after": 0, "users_after": 0, "items_after": 0,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"k_core removed 2 of 2 interactions; lower user_k"):
        check_not_empty(0, facts, "lower user_k")


def test_slips_are_noted_and_nothing_is_said_of_clean_data() -> None:
    items = pl.DataFrame(
        {"item_id": ["a1", "A1", "b", "c", "d", "x"], "title": ["lamp", "pan", "cup", "cup", "", "pan"]}
    )
    assert note_alike(["ann", "Ann ", "bob"], ["a1", "A1", "b", "c", "d"], items) == [
        "1 groups of user_ids differ only in case or white space",
        "1 groups of item_ids differ only in case or white space, e.g. 'A1' and 'a1'",
        "2 items read like another one in all their text, e.g. item_id 'b' and 'c'",
    ]
    assert note_alike(["ann", "bob"], ["a1", "b"], items) == []

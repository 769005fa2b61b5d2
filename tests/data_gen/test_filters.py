from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonrec.data_gen.filters import (
    check_not_empty,
    check_unique_items,
    drop_duplicates,
    filter_fact,
    k_core,
    k_core_mask,
    note_alike,
    require_text,
)
from reasonrec.tokenizers.errors import UserError


def log_of(*pairs: tuple[str, str]) -> pl.DataFrame:
    return pl.DataFrame(pairs, schema=["user_id", "item_id"], orient="row")


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
    users, items = (np.array([pair[side] for pair in pairs], dtype=np.int64) for side in (0, 1))
    kept = k_core_mask(users, items, user_k, item_k)
    assert [pair for pair, keep in zip(pairs, kept, strict=True) if keep] == naive_core(pairs, user_k, item_k)


def test_k_core_needs_several_rounds() -> None:
    # c falls first, then user 3, then b, then user 2.
    log = log_of(("1", "a"), ("1", "d"), ("4", "a"), ("4", "d"), ("2", "a"), ("2", "b"), ("3", "b"), ("3", "c"))
    assert k_core(log, 2, 2).rows() == [("1", "a"), ("1", "d"), ("4", "a"), ("4", "d")]


def test_consecutive_duplicates_that_the_core_creates_go_too() -> None:
    log = log_of(("1", "a"), ("1", "rare"), ("1", "a"), ("1", "b"), ("2", "a"), ("2", "b"))
    assert k_core(log, 2, 2, "drop_consecutive").rows() == [("1", "a"), ("1", "b"), ("2", "a"), ("2", "b")]
    assert k_core(log, 2, 2, "keep").height == 5


@pytest.mark.parametrize(("policy", "items"), [("keep", "aabab"), ("drop_consecutive", "abab"), ("keep_first", "ab")])
def test_duplicate_policies(policy: str, items: str) -> None:
    log = log_of(*[("1", item) for item in "aabab"], ("2", "b"))
    kept = drop_duplicates(log, policy)  # type: ignore[arg-type]
    assert kept.rows() == [("1", item) for item in items] + [("2", "b")]


def test_duplicate_item_ids_are_refused() -> None:
    items = pl.DataFrame({"item_id": ["7", "8", "7"]})
    with pytest.raises(UserError, match=r"items.csv: 1 item ids .* '7' \(2 times\)"):
        check_unique_items(items, "items.csv")


def test_interactions_without_text_are_refused_or_dropped() -> None:
    log = log_of(("1", "a"), ("1", "b"), ("2", "c"), ("3", "a"))
    items = pl.DataFrame({"item_id": ["a", "b"], "title": ["A", ""]})
    with pytest.raises(UserError, match=r"2 interactions are with 2 items .*'b', 'c'.*drop_items_without_text: true"):
        require_text(log, items, drop=False, where="items.csv")
    assert require_text(log, items, drop=True, where="items.csv").rows() == [("1", "a"), ("3", "a")]


def test_nothing_left_says_what_each_filter_removed() -> None:
    log = log_of(("1", "a"), ("1", "b"))
    facts = [filter_fact("k_core", log, log.head(0), user_k=9)]
    assert facts[0] == {
        "step": "k_core", "user_k": 9, "rows_before": 2, "users_before": 1, "items_before": 2, 
        "rows_after": 0, "users_after": 0, "items_after": 0,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"k_core removed 2 of 2 interactions; lower user_k"):
        check_not_empty(log.head(0), facts, "lower user_k")


def test_slips_are_noted_and_nothing_is_said_of_clean_data() -> None:
    log = log_of(("ann", "a1"), ("Ann ", "A1"), ("bob", "b"), ("bob", "c"), ("bob", "d"))
    items = pl.DataFrame(
        {"item_id": ["a1", "A1", "b", "c", "d", "x"], "title": ["lamp", "pan", "cup", "cup", "", "pan"]}
    )
    assert note_alike(log, items) == [
        "1 groups of user_ids differ only in case or white space",
        "1 groups of item_ids differ only in case or white space, e.g. 'A1' and 'a1'",
        "2 items read like another one in all their text, e.g. item_id 'b' and 'c'",
    ]
    assert note_alike(log_of(("ann", "a1"), ("bob", "b")), items) == []

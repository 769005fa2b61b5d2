import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonrec.data_gen.splits import (
    TEST,
    TRAIN,
    VALID,
    by_time,
    date_cuts,
    held_out_rows,
    leave_one_out,
    ratio_cuts,
    train_sequences,
)
from reasonrec.tokenizers.errors import UserError

LOGS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12), st.integers(0, 6)), min_size=3, max_size=50).map(
    lambda rows: sorted(rows, key=lambda row: (row[0], row[1]))
)


def frame(rows: list[tuple[int, int, int]]) -> pl.DataFrame:
    """A sorted log from (user, timestamp, item)."""
    schema = {"user": pl.Int32, "timestamp": pl.Int64, "item": pl.Int32}
    return pl.DataFrame(rows, schema=schema, orient="row")


def test_leave_one_out_by_hand() -> None:
    labels = leave_one_out(np.array([0, 0, 0, 0, 1, 1, 2, 2, 2]))
    assert labels.tolist() == [TRAIN, TRAIN, VALID, TEST, TRAIN, TRAIN, TRAIN, VALID, TEST]


@given(LOGS)
def test_leave_one_out_holds_out_one_case_each(rows: list[tuple[int, int, int]]) -> None:
    users = frame(rows)["user"].to_numpy()
    labels = leave_one_out(users)
    for user in set(users.tolist()):
        own = labels[users == user].tolist()
        assert own == ([TRAIN] * len(own) if len(own) < 3 else [TRAIN] * (len(own) - 2) + [VALID, TEST])


def test_ratio_cuts_by_hand() -> None:
    # Ten rows; the nearest cut to 8 that divides no timestamp lies after 7 rows.
    times = np.array([1, 2, 3, 4, 5, 6, 7, 8, 8, 9])
    assert ratio_cuts(times, [0.8, 0.1, 0.1]) == (8, 9)
    assert by_time(times, (8, 9)).tolist() == [0] * 7 + [1, 1, 2]


@given(LOGS)
def test_time_split_divides_no_timestamp_and_keeps_the_order(rows: list[tuple[int, int, int]]) -> None:
    times = frame(rows)["timestamp"].to_numpy()
    if len(set(times.tolist())) < 3:
        with pytest.raises(UserError, match="at least 3 distinct timestamps"):
            ratio_cuts(times, [0.8, 0.1, 0.1])
        return
    labels = by_time(times, ratio_cuts(times, [0.8, 0.1, 0.1]))
    parts = [set(times[labels == part].tolist()) for part in (TRAIN, VALID, TEST)]
    assert all(parts)
    assert max(parts[TRAIN]) < min(parts[VALID])
    assert max(parts[VALID]) < min(parts[TEST])


@pytest.mark.parametrize("ratios", [[0.8, 0.2], [0.9, 0.1, 0.0], [0.8, 0.1, 0.2]], ids=str)
def test_bad_ratios_are_refused(ratios: list[float]) -> None:
    with pytest.raises(UserError, match="three positive shares"):
        ratio_cuts(np.arange(10), ratios)


def test_date_cuts() -> None:
    assert date_cuts("1970-01-02", "1970-01-03T00:00:01+01:00") == (86_400_000, 2 * 86_400_000 - 3_599_000)
    with pytest.raises(UserError, match="valid_from='yesterday'"):
        date_cuts("yesterday", "2020-01-01")
    with pytest.raises(UserError, match="has to be before"):
        date_cuts("2020-01-01", "2020-01-01")


def test_ratings_and_reviews_stand_beside_the_items() -> None:
    log = pl.DataFrame(
        {
            "user": [0, 0, 1],
            "item": [3, 4, 3],
            "timestamp": [1, 2, 3],
            "rating": [4.0, None, 1.0],
            "review": list("abc"),
        }
    )
    train = train_sequences(log, np.zeros(3, dtype=np.int8))
    assert train.select("items", "ratings", "reviews").rows() == [
        ([3, 4], [4.0, None], ["a", "b"]),
        ([3], [1.0], ["c"]),
    ]


def test_rows_by_hand() -> None:
    log = frame([(0, 1, 5), (0, 1, 6), (0, 2, 7), (0, 2, 8), (1, 3, 9)])
    labels = np.array([TRAIN, TRAIN, VALID, TEST, TEST])
    test = held_out_rows(log, labels, TEST, mask_history=True, max_history=2)
    # User 1's only interaction has no history, so it makes no case.
    assert test.to_dicts() == [
        {"row": 0, "user": 0, "history": [6, 7], "target": 8, "masked": [5, 6, 7], "same_time": True}
    ]
    valid = held_out_rows(log, labels, VALID, mask_history=False)
    assert valid.to_dicts() == [
        {"row": 0, "user": 0, "history": [5, 6], "target": 7, "masked": [], "same_time": False}
    ]
    train = train_sequences(log, labels)
    assert train.to_dicts() == [{"user": 0, "items": [5, 6], "times": [1, 1], "first_target": 0}]


@given(LOGS, st.booleans(), st.integers(1, 5))
def test_every_interaction_is_in_one_split_and_histories_are_the_past(
    rows: list[tuple[int, int, int]], timed: bool, max_history: int
) -> None:
    log = frame(rows)
    times = log["timestamp"].to_numpy()
    if timed and len(set(times.tolist())) < 3:
        return
    labels = by_time(times, ratio_cuts(times, [0.6, 0.2, 0.2])) if timed else leave_one_out(log["user"].to_numpy())
    train = train_sequences(log, labels)
    cases = [held_out_rows(log, labels, part, mask_history=True, max_history=max_history) for part in (VALID, TEST)]
    first = log.with_columns(n=pl.int_range(pl.len()).over("user"), label=labels).filter(pl.col("n") == 0)
    without_history = first.filter(pl.col("label") > 0).height
    held_out = sum(case.height for case in cases) + without_history
    assert train["items"].list.len().sum() + held_out == log.height
    for part, case in zip((VALID, TEST), cases, strict=True):
        own = log.filter(pl.Series(labels) == part).select("user", "item")
        assert case.height <= own.height
        for user, history, target, masked in case.select("user", "history", "target", "masked").iter_rows():
            past = log.filter(pl.col("user") == user)["item"].to_list()
            assert any(
                past[max(0, at - max_history) : at] == history
                and past[at] == target
                and sorted({*past[:at]}) == masked
                for at in range(1, len(past))
            )

import datetime as dt

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonrec.data_gen.timestamps import parse_timestamps

DAY = 86_400_000


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["881250949", "881250950"], [881250949000, 881250950000]),
        (["881250949.5"], [881250949500]),
        ([" 1704067200000 "], [1704067200000]),
        ([1704067200000000], [1704067200000]),
        ([1704067200000000001], [1704067200000]),
        (["1704067200000000001"], [1704067200000]),
        ([881250949.25], [881250949250]),
        (["1970-01-02"], [DAY]),
        (["1970-01-02 00:00", "1970-01-02T00:00:01"], [DAY, DAY + 1000]),
        (["1970-01-02T00:00:00.123456Z", "1970-01-02T02:30:00,5+02:30"], [DAY + 123, DAY + 500]),
        (["1969-12-31T23:59:59-0100"], [3_599_000]),
        ([dt.date(1970, 1, 2)], [DAY]),
        ([dt.datetime(1970, 1, 2, 0, 0, 1)], [DAY + 1000]),
    ],
    ids=str,
)
def test_known_spellings(values: list[object], expected: list[int]) -> None:
    parsed = parse_timestamps(pl.Series(values))
    assert parsed.values.to_list() == expected
    assert parsed.values.dtype == pl.Int64
    assert parsed.wrong is None


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        (["2024-01-01", "yesterday"], 1),
        (["2024-13-01"], 0),
        (["2024-01-01 25:00"], 0),
        (["1", "2", "x"], 2),
        (["1", None], 1),
        (["01/02/2024"], 0),
        ([1.0, float("nan")], 1),
        ([""], 0),
    ],
    ids=str,
)
def test_the_first_wrong_value_is_named(values: list[object], wrong: int) -> None:
    assert parse_timestamps(pl.Series(values)).wrong == wrong


@given(st.datetimes(min_value=dt.datetime(1900, 1, 1), timezones=st.just(dt.UTC)))
def test_iso_round_trip(moment: dt.datetime) -> None:
    parsed = parse_timestamps(pl.Series([moment.isoformat()]))
    exact = (moment - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(milliseconds=1)
    assert (parsed.values.to_list(), parsed.wrong) == ([exact], None)

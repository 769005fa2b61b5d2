import datetime as dt

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrec.data_gen.readers.timestamps import TimesSeen, Timestamps

DAY = 86_400_000
NOVEMBER = 1_699_920_000_000  # 2023-11-14


def parse_timestamps(values: pl.Series) -> Timestamps:
    """A column in one block."""
    seen = TimesSeen()
    seen.add(values)
    return seen.read(values)


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
        (["1970-01-02 00:00:00+00", "1970-01-02 00:00:00.5 -03"], [DAY, DAY + 3 * 3_600_000 + 500]),
        (["1970-01-02T05:30:00+0530", "1970-01-02T05:30+05:30", "19700102T000000Z"], [DAY, DAY, DAY]),
        (["1970-01-02 00:00:00 UTC", "1970-01-02t00:00:00z"], [DAY, DAY]),
        ([20231114, 20231115], [NOVEMBER, NOVEMBER + DAY]),
        (["20231114.0"], [NOVEMBER]),
        ([20231114221320.0], [1_700_000_000_000]),
        (["202311142213"], [1_699_999_980_000]),
        (["202311"], [NOVEMBER - 13 * DAY]),
        ([2024, 2025], [1704067200000, 1735689600000]),
        (["45244", "45244.5"], [NOVEMBER, NOVEMBER + DAY // 2]),
        ([45244.925925925927], [1_700_000_000_000]),
        ([45244, 45245], [NOVEMBER, NOVEMBER + DAY]),
        ([0, 1, 2], [0, 1000, 2000]),
        ([1700000000, -1 + 1700000000], [1_700_000_000_000, 1_699_999_999_000]),
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
        (["2024-01-01 10:00:00+24"], 0),
        (["2024-01-01 10:00:00+0060"], 0),
        (["20231114", "20231332", "20231201"], 1),
        (["20231114", "1700000000", "20231201"], 1),
        (["2024-01-01", "1700000000", "2024-01-02"], 1),
        (["1.7E+12", "1.7E+12"], 0),
        ([True], 0),
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


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "America/New_York"])
def test_dates_of_parquet_in_any_unit_and_zone(unit: str, zone: str | None) -> None:
    moment = pl.Series([dt.datetime(2023, 11, 14, 22, 13, 20)]).cast(pl.Datetime(unit))  # type: ignore[arg-type]
    if zone:
        moment = moment.dt.replace_time_zone("UTC").dt.convert_time_zone(zone)
    assert parse_timestamps(moment).values.to_list() == [1_700_000_000_000]


def _is_minute(number: int) -> bool:
    try:
        dt.datetime.strptime(str(number), "%Y%m%d%H%M")
    except ValueError:
        return False
    return True


def test_milliseconds_of_1976_among_which_one_reads_as_a_date() -> None:
    parsed = parse_timestamps(pl.Series([200_000_000_000, 200_001_070_000]))
    assert (parsed.kind, parsed.wrong) == ("epoch milliseconds", None)
    assert parse_timestamps(pl.Series([200_001_070_000, 202_311_142_213])).kind == "dates written as YYYYMMDDHHMM"


@given(st.integers(200_000_000, 4_000_000_000), st.lists(st.integers(0, 10**6), max_size=5), st.booleans())
def test_one_unit_is_read_whatever_it_is(start: int, steps: list[int], text: bool) -> None:
    seconds = [start, *(start + step for step in steps)]
    for size in (1, 10**3, 10**6, 10**9):
        values = pl.Series([second * size for second in seconds])
        if size == 10**3 and all(map(_is_minute, values)):
            continue  # milliseconds of 1976 that are all dates of our time as well: written dates
        parsed = parse_timestamps(values.cast(pl.String) if text else values)
        assert (parsed.values.to_list(), parsed.wrong) == ([second * 1000 for second in seconds], None)


@given(st.permutations([10**3, 1, 1, 1]), st.integers(0, 2))
def test_two_units_are_told_with_an_example_of_each(sizes: list[int], coarse: int) -> None:
    values = [1_700_000_000 * 10 ** (3 * coarse) * size for size in sizes]
    parsed = parse_timestamps(pl.Series(values))
    assert parsed.wrong == sizes.index(10**3)
    assert parsed.other == sizes.index(1)
    assert parsed.why == f"reads as epoch {['milliseconds', 'microseconds', 'nanoseconds'][coarse]}"
    assert parsed.kind == f"epoch {['seconds', 'milliseconds', 'microseconds'][coarse]}"


@pytest.mark.parametrize("absent", [0, -1, 20231114, -62135596800, 10**11 - 1])
def test_what_stands_for_no_time_is_no_time(absent: int) -> None:
    parsed = parse_timestamps(pl.Series([1700000000, 1700000060, 1700000120, absent]))
    assert (parsed.wrong, parsed.other, parsed.why) == (3, 0, "is no time between 1973 and 2103 in epoch seconds")


SECOND = 1_700_000_000
FAR = [1e300, -1e300, float("inf"), float("-inf"), float("nan"), 9.3e18]


@pytest.mark.parametrize("far", FAR)
def test_a_number_that_64_bits_do_not_hold_is_no_time(far: float) -> None:
    for values in ([SECOND + 0.5, far], [float(SECOND), float(SECOND), far], [20231114.0, 20231115.0, far]):
        times = parse_timestamps(pl.Series(values))
        assert times.wrong == len(values) - 1
        assert times.values.to_list()[-1] is None
        assert times.values.null_count() == 1
    assert parse_timestamps(pl.Series([far])).wrong == 0


@pytest.mark.parametrize(
    "values",
    [
        pl.Series([SECOND, 2**64 - 1], dtype=pl.UInt64), pl.Series([SECOND, 10**30], dtype=pl.Int128),
        pl.Series([str(SECOND), "9" * 30]), pl.Series([str(SECOND), "-" + "9" * 400]),
    ],
)  # fmt: skip
def test_an_integer_that_64_bits_do_not_hold_is_no_time(values: pl.Series) -> None:
    times = parse_timestamps(values)
    assert (times.values.to_list(), times.wrong) == ([SECOND * 1000, None], 1)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.none() | st.integers(-(2**63), 2**63 - 1), min_size=1)
    | st.lists(st.none() | st.floats(), min_size=1)
    | st.lists(st.none() | st.sampled_from([2**63, 2**64 - 1, SECOND]), min_size=1)
    | st.lists(st.none() | st.text("0123456789.eE+-", max_size=40), min_size=1)
)
def test_any_column_is_times_or_names_one_that_is_none(values: list[object]) -> None:
    column = pl.Series(values, dtype=pl.UInt64 if {2**63, 2**64 - 1} & {v for v in values if v == v} else None)
    times = parse_timestamps(column)
    assert times.values.dtype == pl.Int64
    assert len(times.values) == len(values)
    assert times.wrong is not None or times.values.null_count() == 0

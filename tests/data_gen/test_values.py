import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonrec.data_gen.values import EXACT, MISSING, as_ids, as_text, is_nothing


def test_words_for_nothing_are_nothing_in_any_column() -> None:
    assert as_text(pl.Series([f" {word}\t" for word in MISSING] + [None])).null_count() == len(MISSING) + 1
    assert all(is_nothing(word) for word in MISSING)
    assert as_text(pl.Series([1.0, float("nan"), None, 2.5])).to_list() == ["1", None, None, "2.5"]


def test_longer_words_and_other_spellings_are_text() -> None:
    words = ["None of us", "Nan", "NaN bread", "Na", "nullable", "0", "-", "NA1"]
    assert as_text(pl.Series(words)).to_list() == words


@given(st.integers(-EXACT, EXACT), st.sampled_from(["{}", "{}.0", " {}.00 "]))
def test_integers_come_back_from_floats(number: int, spelling: str) -> None:
    assert as_ids(pl.Series([spelling.format(number)]))[0].to_list() == [str(number)]
    ids, lost = as_ids(pl.Series([float(number)]))
    assert (ids.to_list(), lost) == ([str(number)], None)


@given(st.text(alphabet="0123456789abcdefE_-/", min_size=1, max_size=8))
def test_other_ids_are_kept_as_written(word: str) -> None:
    assert as_ids(pl.Series([word]))[0].to_list() == [word]


@pytest.mark.parametrize("word", ["007", "007.0", "7.10", "7.5", "1_000", "1e5", "8E2", "v7.0", "1.2.0", "+7"])
def test_what_no_program_makes_of_an_integer_is_kept(word: str) -> None:
    assert as_ids(pl.Series([word])) [0].to_list() == [word]  # fmt: skip


@pytest.mark.parametrize(
    ("word", "expected"),
    [("1e+05", "100000"), ("1.2e+06", "1200000"), ("1.2345678E7", "12345678"), ("-0.0", "0"), ("1.25e+01",) * 2],
)
def test_powers_of_ten(word: str, expected: str) -> None:
    assert as_ids(pl.Series(["a", word]))[0].to_list() == ["a", expected]


@pytest.mark.parametrize(
    "values",
    [
        pl.Series(["1", "1.23457E+11"]),
        pl.Series(["1", "1.23457e+11"]),
        pl.Series(["1", "1.2E+15"]),
        pl.Series(["1", "12345678901234567.0"]),
        pl.Series(["1", "1.2345678901234568e+17"]),
        pl.Series([1.0, 1e17]),
        pl.Series([1.0, 3e7], dtype=pl.Float32),
    ],
    ids=str,
)
def test_ids_that_lost_digits_are_found(values: pl.Series) -> None:
    assert as_ids(values)[1] == 1


def test_types_of_parquet() -> None:
    for column in (
        pl.Series(["7", None]).cast(pl.Categorical),
        pl.Series([7, None]).cast(pl.UInt8),
        pl.Series(["7.00", None]).str.to_decimal(scale=2),
        pl.Series([7.0, None], dtype=pl.Float32),
    ):
        assert as_ids(column)[0].to_list() == ["7", None]

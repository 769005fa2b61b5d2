"""What a cell of a table says: nothing, a text, or an id. One rule for every column, CSV and Parquet alike.

Programs write "nothing" as one of `MISSING`, spelled exactly like that; such a word standing alone is nothing in every
column, a title or a brand too (a longer text may hold it: "None of us" is a title). Ids are text and kept as written,
but for one thing: a program that once held integers as floats writes 7 as 7.0, and that is 7 again.
"""

from __future__ import annotations

from decimal import Decimal

import polars as pl

MISSING = (
    "", "nan", "NaN", "NAN", "-nan", "-NaN", "nat", "NaT", "NA", "N/A", "n/a", "<NA>", "<N/A>", "null", "NULL", "Null",
    "<null>", "<NULL>", "(null)", "(NULL)", "[null]", "none", "None", "NONE", "nil", r"\N", "1.#QNAN", "-1.#IND",
    "1.#IND", "-1.#QNAN", "#N/A", "#N/A N/A", "#NA", "#NULL!", "#VALUE!", "#REF!", "#DIV/0!", "#NAME?", "#NUM!",
)  # fmt: skip
_MISSING = frozenset(MISSING)
EXACT = 1 << 53  # integers up to here are exact in a float of 64 bits
_EXACT_32 = 1 << 24
# 7.0 and 7.00, but neither 007.0 nor 7.10; up to 15 digits, which a float surely holds.
_WHOLE = r"^(-?(?:0|[1-9]\d{0,14}))\.0+$"
# The same with more digits, and what R, Python, Java and spreadsheets write: 1e+05, 1.0E5. (1e5 may be a hash.)
_LARGE = r"^-?(?:[1-9]\d{15,}\.0+|\d(?:\.\d+)?[eE]\+\d{2,3}|\d\.\d+E\d{1,3})$"


def is_nothing(value: object) -> bool:
    """Whether a value says that there is nothing; a list never does."""
    return value is None or (isinstance(value, str) and value.strip() in _MISSING)


def as_text(values: pl.Series) -> pl.Series:
    """A column as stripped text, null where it says nothing; whole numbers among floats are written as integers."""
    if values.dtype.is_float():
        limit = EXACT if values.dtype == pl.Float64 else _EXACT_32
        whole = values.is_finite() & (values == values.floor()) & (values.abs() <= limit)
        integers = pl.select(pl.when(whole).then(values)).to_series().cast(pl.Int64).cast(pl.String)
        written = values.fill_nan(None).cast(pl.String)
        text = pl.select(pl.coalesce(integers, written).alias(values.name)).to_series()
    else:
        text = values.cast(pl.String)
    text = text.str.strip_chars()
    return pl.select(pl.when(~text.is_in(MISSING)).then(text).alias(values.name)).to_series()


def as_ids(values: pl.Series) -> tuple[pl.Series, int | None]:
    """A column of ids: as text, and integers that went through floats as integers.

    Returns:
        The ids, null where there is none; and the position of the first that lost digits on its way through a float,
        so that several ids may have become this one (None if all are whole).
    """
    text = as_text(values)
    if values.dtype.is_float():
        lost = values.is_finite() & (values.abs() > (EXACT if values.dtype == pl.Float64 else _EXACT_32))
        return text, _first(lost)
    if text.str.contains(".0", literal=True).any():  # most columns hold none, and this is five times as fast
        text = text.str.replace(r"^-0\.0+$", "0").str.replace(_WHOLE, "$1")
    large = text.str.contains(_LARGE)
    if not large.any():
        return text, None
    words = text.filter(large).unique().to_list()
    integers = {word: _integer(word) for word in words}
    lost = text.is_in([word for word, integer in integers.items() if integer is None])
    return text.replace({word: integer or word for word, integer in integers.items()}), _first(lost)


def _first(marked: pl.Series) -> int | None:
    return marked.fill_null(False).arg_max() if marked.any() else None


def _integer(word: str) -> str | None:
    """The integer that a float's spelling stands for, the word itself if it is none, None if digits are lost."""
    number = Decimal(word)
    mantissa, _, exponent = word.lower().partition("e")
    if number != number.to_integral_value():
        return word
    decimals = len(mantissa.partition(".")[2])
    # 1.23457E+11 is what a spreadsheet shows of 123456789012, and what "%g" leaves of 1234567: six digits.
    rounded = exponent and ((decimals == 5 and int(exponent) > 5) or ("E+" in word and int(exponent) >= 11))
    return None if rounded or abs(number) > EXACT else str(int(number))


def respelled(values: pl.Series, ids: pl.Series) -> int:
    """How many ids are written as floats in the file."""
    if values.dtype.is_float():
        return 0
    return int((values.cast(pl.String).str.strip_chars() != ids).sum() or 0)

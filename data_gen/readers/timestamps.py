"""Timestamps as people write them: epoch numbers of any unit, ISO dates, dates of Parquet files.

A column has one unit. Numbers that are written dates (20231114), years or a spreadsheet's days are read as such and
never as seconds; a column in which two units stand, or a zero among this year's seconds, is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from reasonrec.data_gen.values import as_text

_NUMBER = r"^[+-]?\d+(\.\d*)?([eE]\+?\d+)?$"
_ROUNDED = r"^\d(\.\d{1,7})?[eE]\+?\d+$"  # too few digits for a second
_ISO = (
    r"^(?<date>\d{4}-\d{2}-\d{2}|\d{8}[Tt])"
    r"(?:[Tt ]?(?<hour>\d{2}):?(?<minute>\d{2})(?::?(?<second>\d{2})(?:[.,](?<fraction>\d{1,9}))?)?"
    r"\s*(?:(?<zone>Z|z|UTC|GMT)|(?<sign>[+-])(?<east>\d{2})(?::?(?<minutes>\d{2}))?)?)?$"
)
_DAY = 86_400_000
# Units by size: an epoch number this large would lie beyond the year 5000 in the next coarser unit.
_UNITS = ((1e17, "nanoseconds", 10**6), (1e14, "microseconds", 10**3), (1e11, "milliseconds", 1))
# Times at which people have used computers, 1973 to 2103, in each unit; the windows lie far apart.
_PER_SECOND = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
_FIRST, _LAST = 10**8, 42 * 10**8
_BEYOND = 2.0**63
# Dates written as one number: digits, format, range.
_WRITTEN = {
    "YYYYMMDD": ("%Y%m%d", "", 19000101, 21001231),
    "YYYYMMDDHHMMSS": ("%Y%m%d%H%M%S", "", 19000101000000, 21001231235959),
    "YYYYMMDDHHMM": ("%Y%m%d%H%M", "", 190001010000, 210012312359),
    "YYYYMM": ("%Y%m%d", "01", 190001, 210012),
    "YYYY": ("%Y%m%d", "0101", 1900, 2100),
}
_EXCEL_ZERO = 25_569  # 1970-01-01 in a spreadsheet's days
_EXCEL = (_EXCEL_ZERO, 73_415)  # to 2100
_EXCEL_WHOLE = (32_874, 55_153)  # 1990 to 2050: whole numbers may be days since 1970 or just a count


@dataclass(frozen=True)
class Timestamps:
    """A column of times.

    Attributes:
        values: Epoch milliseconds, int64; null where a value is no time.
        kind: How the column was read, for people.
        wrong: Position of the first value that is no time; None if all are.
        why: What is wrong with it, if it is more than that it does not parse.
        other: Position of a value that it contradicts, if any.
    """

    values: pl.Series
    kind: str
    wrong: int | None = None
    why: str = ""
    other: int | None = None


def parse_timestamps(values: pl.Series) -> Timestamps:
    """Turn a column into epoch milliseconds.

    Args:
        values: Numbers, dates or text. Epoch units are told apart by size, for the whole column. ISO text
            without a zone counts as UTC.
    """
    if values.dtype == pl.Date or isinstance(values.dtype, pl.Datetime):
        moments = values.cast(pl.Datetime("ms")) if values.dtype == pl.Date else values.dt.cast_time_unit("ms")
        return _complete(moments.dt.epoch("ms"), "dates of the file")
    if values.dtype.is_nested() or values.dtype in (pl.Time, pl.Duration, pl.Boolean, pl.Binary):
        nothing = pl.Series("timestamp", [None] * len(values), dtype=pl.Int64)
        return Timestamps(nothing, "", 0 if len(values) else None, f"the column holds {values.dtype}")
    if values.dtype.is_integer():
        return _from_numbers(values)
    if values.dtype.is_float():
        return _from_numbers(pl.select(pl.when(values.is_finite()).then(values)).to_series())
    text = as_text(values)
    numeric = text.str.contains(_NUMBER)
    count, there = int(numeric.sum() or 0), len(text) - text.null_count()
    if not count or 2 * count < there:
        return _complete(_from_iso(text), "ISO dates")
    # Mostly numbers: what is none is the mistake.
    rounded = text.str.contains(_ROUNDED)
    if 2 * int(rounded.sum() or 0) > there:
        nothing = pl.Series("timestamp", [None] * len(text), dtype=pl.Int64)
        why = "a spreadsheet rounded it, and its digits are lost: export the column as a whole number or as text"
        return Timestamps(nothing, "", rounded.fill_null(False).arg_max(), why)
    whole = text.cast(pl.Int64, strict=False)
    # Nanoseconds exceed what a float keeps exactly, so whole numbers stay whole.
    return _from_numbers(whole if whole.null_count() == len(text) - count else text.cast(pl.Float64, strict=False))


def _complete(parsed: pl.Series, kind: str) -> Timestamps:
    wrong = parsed.is_null().arg_max() if parsed.null_count() else None
    return Timestamps(parsed.alias("timestamp"), kind, wrong)


def _from_numbers(values: pl.Series) -> Timestamps:
    """What numbers say; those that 64 bits do not hold are no times."""
    if values.dtype.is_float():
        values = pl.select(pl.when(values.abs() < _BEYOND).then(values)).to_series()
    elif values.dtype.is_integer():
        values = values.cast(pl.Int64, strict=False)
    there = len(values) - values.null_count()
    if not there:
        return _complete(values.cast(pl.Int64), "")
    whole = values
    if values.dtype.is_float():
        whole = pl.select(pl.when(values == values.floor()).then(values)).to_series()
    for kind, (form, tail, first, last) in _WRITTEN.items():
        if 2 * int(whole.is_between(first, last).sum()) >= there:
            digits = whole.cast(pl.Int64).cast(pl.String) + tail
            if len(form) <= 6:
                moments = digits.str.to_date(form, strict=False).cast(pl.Datetime("ms"))
            else:
                moments = digits.str.to_datetime(form, strict=False, time_unit="ms")
            inside = pl.select(pl.when(whole.is_between(first, last)).then(moments)).to_series()
            dates = len(inside) - inside.null_count()
            # 200001070000 is a minute of 2000 and, in milliseconds, of 1976: the latter beside what is no date.
            if dates == there or (2 * dates >= there and there not in _counts(_windows(values)).values()):
                return _complete(inside.dt.epoch("ms"), f"dates written as {kind}")
    return _from_spreadsheet(values, there) or _from_epochs(values)


def _from_spreadsheet(values: pl.Series, there: int) -> Timestamps | None:
    """A spreadsheet's days since 1899-12-30, if the numbers are such."""
    fractions = values.dtype.is_float() and bool((values != values.floor()).any())
    days = pl.select(pl.when(values.is_between(*(_EXCEL if fractions else _EXCEL_WHOLE))).then(values)).to_series()
    found = len(days) - days.null_count()
    if not (2 * found >= there if fractions else found == there):
        return None
    milliseconds = ((days.cast(pl.Float64) - _EXCEL_ZERO) * _DAY).round()
    # The fraction of a day has no exact binary form; nobody's spreadsheet holds parts of 10 ms.
    return _complete(((milliseconds / 10).round() * 10).cast(pl.Int64), "days of a spreadsheet (1 is 1900-01-01)")


def _windows(values: pl.Series) -> dict[str, pl.Series]:
    """Which numbers are times of ours in each epoch unit."""
    return {unit: values.is_between(_FIRST * size, _LAST * size) for unit, size in _PER_SECOND.items()}


def _counts(windows: dict[str, pl.Series]) -> dict[str, int]:
    """How many numbers are times of ours in each epoch unit."""
    return {unit: int(inside.sum()) for unit, inside in windows.items()}


def _from_epochs(values: pl.Series) -> Timestamps:
    """Epoch numbers of one unit; small numbers that are no times count as seconds, so that their order stays."""
    windows = _windows(values)
    counts = _counts(windows)
    found = sorted((unit for unit in counts if counts[unit]), key=counts.__getitem__)
    if found:
        unit = found[-1]
        other = windows[unit].fill_null(False).arg_max()
        outside = ~windows[unit]
        if outside.any():
            wrong = outside.fill_null(False).arg_max()
            assert wrong is not None
            mixed = next((name for name in found[:-1] if windows[name][wrong]), None)
            why = f"reads as epoch {mixed}" if mixed else f"is no time between 1973 and 2103 in epoch {unit}"
            return Timestamps(_milliseconds(values, unit), f"epoch {unit}", wrong, why, other)
        return _complete(_milliseconds(values, unit), f"epoch {unit}")
    largest = float(values.cast(pl.Float64).abs().max() or 0)  # type: ignore[arg-type]
    unit = next((name for bound, name, _ in _UNITS if largest >= bound), "seconds")
    kind = "numbers that are no dates of our time: only their order counts"
    return _complete(_milliseconds(values, unit), kind)


def _milliseconds(values: pl.Series, unit: str) -> pl.Series:
    for _, name, divisor in _UNITS:
        if unit == name:
            return values.cast(pl.Int64) // divisor
    if values.dtype.is_integer():
        # Seconds of the far future would not fit; they are refused as no time.
        return values.cast(pl.Int64) * 1000
    # Round, do not cut: 0.001 s has no exact binary form. What lies beyond 64 bits now is no time either.
    return (values.cast(pl.Float64) * 1000).round().cast(pl.Int64, strict=False)


def _from_iso(values: pl.Series) -> pl.Series:
    parts = values.str.extract_groups(_ISO).struct.unnest()

    def number(name: str, limit: int) -> pl.Expr:
        """A part of the time; null where it is out of range, 0 where it is not written."""
        part = pl.col(name).cast(pl.Int64, strict=False).fill_null(0)
        return pl.when(part <= limit).then(part)

    east = number("east", 23) * 60 + number("minutes", 59)
    offset = pl.when(pl.col("sign") == "-").then(-east).otherwise(east)
    date = pl.col("date").str.replace_all(r"[-Tt]", "").str.to_date("%Y%m%d", strict=False)
    day = date.cast(pl.Int32).cast(pl.Int64)
    milliseconds = pl.col("fraction").str.pad_end(3, "0").str.slice(0, 3).cast(pl.Int64, strict=False).fill_null(0)
    seconds = (number("hour", 23) * 60 + number("minute", 59) - offset) * 60 + number("second", 60)
    return parts.select((day * _DAY + seconds * 1000 + milliseconds).alias("timestamp"))["timestamp"]

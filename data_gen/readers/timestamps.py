"""Timestamps as people write them: epoch numbers of any unit, ISO dates, dates of Parquet files.

A column has one unit. Numbers that are written dates (20231114), years or a spreadsheet's days are read as such and
never as seconds; a column in which two units stand, or a zero among this year's seconds, is refused. A large column
comes in blocks: `TimesSeen` looks at each before any is read.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

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
_NO_TIMES = (pl.Time, pl.Duration, pl.Boolean, pl.Binary)
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


@dataclass
class TimesSeen:
    """What a column of times holds, from which follows how each of its blocks is read.

    Attributes:
        counts: How many values are texts, numbers, numbers of one kind or another.
        largest: The largest number without its sign.
        fractions: Whether a number is not whole.
        floats: Whether a text is a number that 64 bits do not hold as a whole one.
    """

    counts: Counter[str] = field(default_factory=Counter)
    largest: float = 0.0
    fractions: bool = False
    floats: bool = False

    def add(self, values: pl.Series) -> None:
        """Look at a block."""
        if _holds_numbers(values):
            self._add_numbers(_numbers(values))
        elif not (values.dtype.is_nested() or values.dtype.is_temporal() or values.dtype in _NO_TIMES):
            text = as_text(values)
            numeric = int(text.str.contains(_NUMBER).sum() or 0)
            self.counts["texts"] += len(text) - text.null_count()
            self.counts["numeric"] += numeric
            if numeric:
                self.counts["rounded"] += int(text.str.contains(_ROUNDED).sum() or 0)
                whole = text.cast(pl.Int64, strict=False)
                # Nanoseconds exceed what a float keeps exactly, so whole numbers stay whole.
                floats = whole.null_count() > len(text) - numeric
                self.floats |= floats
                self._add_numbers(_numbers(text.cast(pl.Float64, strict=False) if floats else whole))

    def _add_numbers(self, values: pl.Series) -> None:
        there = len(values) - values.null_count()
        if not there:
            return
        self.counts["numbers"] += there
        self.largest = max(self.largest, float(values.cast(pl.Float64).abs().max() or 0))  # type: ignore[arg-type]
        self.fractions |= bool(values.dtype.is_float() and (values != values.floor()).any())
        for kind, (_, _, first, last) in _WRITTEN.items():
            if _whole(values).is_between(first, last).any():
                dates = _from_written(values, kind)
                self.counts[f"{kind} dates"] += len(dates) - dates.null_count()
        for name, days in (("days", _EXCEL), ("whole days", _EXCEL_WHOLE)):
            self.counts[name] += int(values.is_between(*days).sum())
        for unit, inside in _windows(values).items():
            self.counts[unit] += int(inside.sum())

    def read(self, values: pl.Series) -> Timestamps:
        """Turn a block into epoch milliseconds; positions are those in the block."""
        if values.dtype == pl.Date or isinstance(values.dtype, pl.Datetime):
            moments = values.cast(pl.Datetime("ms")) if values.dtype == pl.Date else values.dt.cast_time_unit("ms")
            return _complete(moments.dt.epoch("ms"), "dates of the file")
        if values.dtype.is_nested() or values.dtype in _NO_TIMES:
            return Timestamps(_nothing(values), "", 0 if len(values) else None, f"the column holds {values.dtype}")
        if _holds_numbers(values):
            return self._read_numbers(_numbers(values))
        text = as_text(values)
        if not self.counts["numeric"] or 2 * self.counts["numeric"] < self.counts["texts"]:
            return _complete(_from_iso(text), "ISO dates")
        # Mostly numbers: what is none is the mistake.
        if 2 * self.counts["rounded"] > self.counts["texts"]:
            rounded = text.str.contains(_ROUNDED).fill_null(False)
            why = "a spreadsheet rounded it, and its digits are lost: export the column as a whole number or as text"
            return Timestamps(_nothing(values), "", rounded.arg_max() if rounded.any() else None, why)
        return self._read_numbers(_numbers(text.cast(pl.Float64 if self.floats else pl.Int64, strict=False)))

    def _read_numbers(self, values: pl.Series) -> Timestamps:
        there = self.counts["numbers"]
        if not there:
            return _complete(values.cast(pl.Int64), "")
        units = {unit: self.counts[unit] for unit in _PER_SECOND}
        for kind in _WRITTEN:
            dates = self.counts[f"{kind} dates"]
            # 200001070000 is a minute of 2000 and, in milliseconds, of 1976: the latter beside what is no date.
            if dates == there or (2 * dates >= there and there not in units.values()):
                return _complete(_from_written(values, kind).dt.epoch("ms"), f"dates written as {kind}")
        if 2 * self.counts["days"] >= there if self.fractions else self.counts["whole days"] == there:
            return _from_spreadsheet(values, _EXCEL if self.fractions else _EXCEL_WHOLE)
        return self._from_epochs(values, units)

    def _from_epochs(self, values: pl.Series, counts: dict[str, int]) -> Timestamps:
        """Epoch numbers of one unit; small numbers that are no times count as seconds, so that their order stays."""
        found = sorted((unit for unit in counts if counts[unit]), key=counts.__getitem__)
        if not found:
            unit = next((name for bound, name, _ in _UNITS if self.largest >= bound), "seconds")
            kind = "numbers that are no dates of our time: only their order counts"
            return _complete(_milliseconds(values, unit), kind)
        unit, windows = found[-1], _windows(values)
        outside = (~windows[unit]).fill_null(False)
        if not outside.any():
            return _complete(_milliseconds(values, unit), f"epoch {unit}")
        wrong = outside.arg_max()
        assert wrong is not None
        mixed = next((name for name in found[:-1] if windows[name][wrong]), None)
        why = f"reads as epoch {mixed}" if mixed else f"is no time between 1973 and 2103 in epoch {unit}"
        inside = windows[unit].fill_null(False)
        other = inside.arg_max() if inside.any() else None
        return Timestamps(_milliseconds(values, unit), f"epoch {unit}", wrong, why, other)


def _holds_numbers(values: pl.Series) -> bool:
    return values.dtype.is_integer() or values.dtype.is_float()


def _nothing(values: pl.Series) -> pl.Series:
    return pl.Series("timestamp", [None] * len(values), dtype=pl.Int64)


def _complete(parsed: pl.Series, kind: str) -> Timestamps:
    wrong = parsed.is_null().arg_max() if parsed.null_count() else None
    return Timestamps(parsed.alias("timestamp"), kind, wrong)


def _numbers(values: pl.Series) -> pl.Series:
    """Numbers as floats or as integers of 64 bits; those that these do not hold are no times."""
    if values.dtype.is_float():
        return pl.select(pl.when(values.is_finite() & (values.abs() < _BEYOND)).then(values)).to_series()
    return values.cast(pl.Int64, strict=False)


def _whole(values: pl.Series) -> pl.Series:
    if not values.dtype.is_float():
        return values
    return pl.select(pl.when(values == values.floor()).then(values)).to_series()


def _from_written(values: pl.Series, kind: str) -> pl.Series:
    """Dates written as one number."""
    (form, tail, first, last), whole = _WRITTEN[kind], _whole(values)
    digits = whole.cast(pl.Int64).cast(pl.String) + tail
    if len(form) <= 6:
        moments = digits.str.to_date(form, strict=False).cast(pl.Datetime("ms"))
    else:
        moments = digits.str.to_datetime(form, strict=False, time_unit="ms")
    return pl.select(pl.when(whole.is_between(first, last)).then(moments)).to_series()


def _from_spreadsheet(values: pl.Series, bounds: tuple[int, int]) -> Timestamps:
    """A spreadsheet's days since 1899-12-30."""
    days = pl.select(pl.when(values.is_between(*bounds)).then(values)).to_series()
    milliseconds = ((days.cast(pl.Float64) - _EXCEL_ZERO) * _DAY).round()
    # The fraction of a day has no exact binary form; nobody's spreadsheet holds parts of 10 ms.
    return _complete(((milliseconds / 10).round() * 10).cast(pl.Int64), "days of a spreadsheet (1 is 1900-01-01)")


def _windows(values: pl.Series) -> dict[str, pl.Series]:
    """Which numbers are times of ours in each epoch unit."""
    return {unit: values.is_between(_FIRST * size, _LAST * size) for unit, size in _PER_SECOND.items()}


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

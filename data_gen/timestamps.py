"""Timestamps as people write them: epoch numbers of any unit, ISO dates, dates of Parquet files."""

from __future__ import annotations

import polars as pl

_NUMBER = r"^[+-]?\d+(\.\d*)?([eE]\+?\d+)?$"
_ISO = (
    r"^(?<date>\d{4}-\d{2}-\d{2})"
    r"(?:[T ](?<hour>\d{2}):(?<minute>\d{2})(?::(?<second>\d{2})(?:[.,](?<fraction>\d{1,9}))?)?"
    r"\s*(?<zone>Z|z|UTC|[+-]\d{2}:?\d{2})?)?$"
)
_DAY = 86_400_000
# An epoch number this large would lie beyond the year 5000 in the next coarser unit.
_UNITS = ((1e17, 1e-6), (1e14, 1e-3), (1e11, 1.0))


def _from_numbers(values: pl.Series) -> pl.Series:
    """Epoch seconds, milliseconds, microseconds or nanoseconds: the unit that fits the column's largest "
    "number.
    """
    largest = values.abs().max()
    if largest is None:
        return values.cast(pl.Int64)
    for bound, factor in _UNITS:
        if float(largest) >= bound:  # type: ignore[arg-type]
            if factor == 1.0:
                return values.cast(pl.Int64)
            return values.cast(pl.Int64) // round(1 / factor)
    # Round, do not cut: 0.001 s has no exact binary form.
    return (values.cast(pl.Float64) * 1000).round().cast(pl.Int64)


def _from_iso(values: pl.Series) -> pl.Series:
    parts = values.str.extract_groups(_ISO).struct.unnest()

    def number(name: str, limit: int) -> pl.Expr:
        """A part of the time of day; null where it is out of range, 0 where it is not written."""
        part = pl.col(name).cast(pl.Int64, strict=False).fill_null(0)
        return pl.when(part <= limit).then(part)

    zone = pl.col("zone").str.replace(":", "", literal=True)
    minutes = zone.str.slice(1, 2).cast(pl.Int64, strict=False) * 60 + zone.str.slice(3, 2).cast(
        pl.Int64, strict=False
    )
    minutes = pl.when(zone.str.starts_with("-")).then(-minutes).otherwise(minutes).fill_null(0)
    day = pl.col("date").str.to_date("%Y-%m-%d", strict=False).cast(pl.Int32).cast(pl.Int64)
    milliseconds = pl.col("fraction").str.pad_end(3, "0").str.slice(0, 3).cast(pl.Int64, strict=False).fill_null(0)
    seconds = (number("hour", 23) * 60 + number("minute", 59) - minutes) * 60 + number("second", 60)
    return parts.select((day * _DAY + seconds * 1000 + milliseconds).alias("timestamp"))["timestamp"]


def parse_timestamps(values: pl.Series) -> tuple[pl.Series, int | None]:
    """Turn a column into epoch milliseconds.

    Args:
        values: Numbers, dates or text. Epoch units are told apart by size, for the whole column. ISO text
            without a zone counts as UTC.

    Returns:
        int64 series with null where a value does not parse, and the position of the first such value (None if
        all do).
    """
    if values.dtype == pl.Date or isinstance(values.dtype, pl.Datetime):
        parsed = values.cast(pl.Datetime("ms")) if values.dtype == pl.Date else values.dt.cast_time_unit("ms")
        parsed = parsed.dt.epoch("ms")
    elif values.dtype.is_integer():
        parsed = _from_numbers(values)
    elif values.dtype.is_float():
        parsed = _from_numbers(pl.select(pl.when(values.is_finite()).then(values)).to_series())
    else:
        text = values.cast(pl.String).str.strip_chars()
        numeric = text.str.contains(_NUMBER).fill_null(False)
        if bool(numeric.all()) and len(text):
            whole = text.cast(pl.Int64, strict=False)
            # Nanoseconds exceed what a float keeps exactly, so whole numbers stay whole.
            parsed = _from_numbers(text.cast(pl.Float64, strict=False) if whole.null_count() else whole)
        elif bool(numeric.any()) and 2 * numeric.sum() >= len(text) - text.null_count():
            # Mostly numbers: what is none is the mistake.
            parsed = _from_numbers(text.cast(pl.Float64, strict=False))
        else:
            parsed = _from_iso(text)
    wrong = parsed.is_null().arg_max() if parsed.null_count() else None
    return parsed.alias("timestamp"), wrong

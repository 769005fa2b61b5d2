"""Tables of Parquet files that are read when they are asked for, whole or in parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

PART = 1 << 18  # rows that are read at once where a table need not be in memory


class LazyTable:
    """An attribute that is a table, or the file that it is read from when it is first asked for.

    Args:
        name: Name of the attribute.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, owner: Any, kind: type) -> pl.DataFrame:
        found: pl.DataFrame | Path = vars(owner)[self._name]
        if isinstance(found, Path):
            found = vars(owner)[self._name] = pl.read_parquet(found)
        return found

    def __set__(self, owner: Any, table: pl.DataFrame | Path) -> None:
        vars(owner)[self._name] = table


def read_parts(table: pl.DataFrame | Path, columns: Sequence[str], rows: int = PART) -> Iterator[pl.DataFrame]:
    """Some columns of a table, so many rows at a time; of a file, the others are not in memory."""
    lazy = pl.scan_parquet(table) if isinstance(table, Path) else table.lazy()
    chosen = lazy.select(columns)
    for start in range(0, chosen.select(pl.len()).collect().item(), rows):
        yield chosen.slice(start, rows).collect()


def sample_rows(table: pl.DataFrame | Path, columns: Sequence[str], n: int, seed: int) -> pl.DataFrame:
    """Some columns of `table.sample(n, seed=seed)`, or of all rows in a random order where there are no more than n.

    Args:
        table: A table, or its file, of which a part is in memory at a time.
        columns: Names of its columns.
        n: How many rows.
        seed: Seed of the sample.
    """
    lazy = pl.scan_parquet(table) if isinstance(table, Path) else table.lazy()
    height = lazy.select(pl.len()).collect().item()
    chosen = pl.select(pl.int_range(height)).sample(min(n, height), seed=seed).to_series().to_numpy()
    order = np.argsort(chosen)
    found, begin = [lazy.select(columns).head(0).collect()], 0
    for part in read_parts(table, columns) if len(chosen) else ():
        here = chosen[order]
        found.append(part[here[(here >= begin) & (here < begin + part.height)] - begin])
        begin += part.height
    return pl.concat(found)[np.argsort(order)]

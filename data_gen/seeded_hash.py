"""Seeded hashes of table rows: an arbitrary order that depends on the seed and the ids only.

Where data leave an order open (several interactions in one second) a random generator would make the result
depend on the order of the input file; a hash does not. The hash is our own, so it stays the same over
versions of the libraries.
"""

from __future__ import annotations

import hashlib

import numpy as np
import polars as pl


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), elementwise on uint64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def digests(words: pl.Series) -> np.ndarray:
    """One number for each word, uint64."""
    found = [
        int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        for word in words.to_list()
    ]
    return np.array(found, dtype=np.uint64)


def _column_keys(column: pl.Series | np.ndarray) -> np.ndarray:
    if isinstance(column, np.ndarray):
        return column
    if column.dtype.is_integer():
        return column.cast(pl.Int64).to_numpy().astype(np.uint64)
    words = column.cast(pl.String)
    # One digest per distinct id, not per row: a log has far fewer ids than rows.
    distinct = words.unique()
    table = pl.DataFrame({"word": distinct, "digest": digests(distinct)})
    joined = pl.DataFrame({"word": words}).join(table, on="word", how="left", maintain_order="left")
    return joined["digest"].to_numpy()


def seeded_hash(seed: int, *columns: pl.Series | np.ndarray) -> np.ndarray:
    """Hash each row of some columns.

    Args:
        seed: The seed; another one gives an unrelated order.
        *columns: String or integer columns of one length, without nulls, or the `digests` of strings.

    Returns:
        uint64 array of shape (rows,).
    """
    state = np.full(len(columns[0]), np.uint64(seed % (1 << 64)), dtype=np.uint64)
    state = _mix(state + np.uint64(0x9E3779B97F4A7C15))
    for column in columns:
        state = _mix((state ^ _column_keys(column)) + np.uint64(0x9E3779B97F4A7C15))
    return state

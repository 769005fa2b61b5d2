"""Processes of one launch that read batches together: each reads its own, and all have the results of all."""

from __future__ import annotations

from collections.abc import Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from accelerate import PartialState

_PLACE: ContextVar[tuple[int, int]] = ContextVar("place", default=(0, 1))  # this process, and how many there are
Batch = TypeVar("Batch")
Column = MutableSequence[Any] | NDArray[Any]


def this_launch() -> PartialState:
    """The processes of this launch; left alone, accelerate sees those on CPUs in trainings only."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


@contextmanager
def sharing() -> Iterator[None]:
    """Share what is read inside among the processes of this launch.

    Batches are those that one process would read, so the results are the same to the last bit. Every process has to
    come by the same reads in the same order.
    """
    state = this_launch()
    token = _PLACE.set((state.process_index, state.num_processes))
    try:
        yield
    finally:
        _PLACE.reset(token)


def mine(batches: Sequence[Batch]) -> Sequence[Batch]:
    """The batches that this process is to read: all of them, unless they are shared."""
    process, processes = _PLACE.get()
    return batches[process::processes]


def exchange(batches: Sequence[NDArray[np.integer]], *columns: Column) -> None:
    """Fill in what the other processes found; does nothing unless batches are shared.

    Args:
        batches: All batches, each the numbers of its rows.
        *columns: What was found by row, an array or a list each; filled in place.
    """
    if _PLACE.get()[1] == 1:
        return
    from accelerate.utils import gather_object

    rows = [int(row) for batch in mine(batches) for row in batch]
    for theirs, *values in gather_object([(rows, *([column[row] for row in rows] for column in columns))]):
        for column, found in zip(columns, values, strict=True):
            for row, value in zip(theirs, found, strict=True):
                column[row] = value

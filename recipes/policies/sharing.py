"""Processes of one launch that read batches together: each reads its own, and all have the results of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from accelerate import PartialState

_PLACE: ContextVar[tuple[int, int]] = ContextVar("place", default=(0, 1))  # this process, and how many there are
Batch = TypeVar("Batch")
Found = TypeVar("Found")
Column = MutableSequence[Any] | NDArray[Any]


def this_launch(patience: timedelta | None = None) -> PartialState:
    """The processes of this launch; left alone, accelerate sees those on CPUs in trainings only.

    Args:
        patience: How long they wait for each other, PyTorch's minutes by default; the first call decides.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    options = {} if patience is None else {"timeout": patience}
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), **options)


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


def each(
    read: Callable[[Batch], Found], batches: Iterable[Batch], place: tuple[int, int] | None = None
) -> Iterator[tuple[Batch, Found]]:
    """Read as many batches at a time as there are processes, each its own: for what is used or kept as it comes.

    Every process has to go through all of it.

    Args:
        read: Reads a batch; what it finds is on the CPU.
        batches: All batches, the same in every process.
        place: The number of this process, and how many there are; as `sharing` says by default.

    Yields:
        Each batch and what was found in it, in order.
    """
    process, processes = place or _PLACE.get()
    left = iter(batches)
    while group := list(islice(left, processes)):
        found = [read(batch) for batch in group[process : process + 1]]
        if processes > 1:
            from accelerate.utils import gather_object

            found = gather_object(found)
        yield from zip(group, found, strict=True)

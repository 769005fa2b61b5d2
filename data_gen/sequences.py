"""Training sequences in one flat array that a file holds, so that a training need not hold the log in memory.

The file stands beside the dataset, is made from it once, and is named by its content: `<dataset>.sequences-<hash>.npy`
holds the length of each sequence and then the items of all of them, 4 bytes each. It is mapped, not read: what is in
memory of it is what the system has to spare, and processes on one machine share that.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import polars as pl
from numpy.lib import format as npy
from numpy.typing import NDArray

from reasonrec.tokenizers.output import disk_full_is_clear

BLOCK = 1 << 16  # examples that are counted at once


class Sequences(Sequence[NDArray[np.int64]]):
    """The items of each training sequence.

    Args:
        items: (interactions,) item numbers, sequence after sequence.
        lengths: (sequences,) items of each.
        file: The file that both were mapped from.

    Attributes:
        lengths: (sequences,) int64.
    """

    def __init__(self, items: NDArray[Any], lengths: NDArray[Any], file: Path | None = None) -> None:
        self.lengths = lengths.astype(np.int64)
        self._items, self._file = items, file
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])

    @classmethod
    def of(cls, train: Sequence[NDArray[np.int64]] | pl.DataFrame) -> Sequences:
        """Those of a table of training sequences (`items`) or of a list, in memory; mapped ones stay mapped."""
        if isinstance(train, Sequences):
            return train
        if isinstance(train, pl.DataFrame):
            return cls(*_flat(train["items"]))
        items = np.concatenate(train) if train else np.zeros(0, dtype=np.int64)
        return cls(items, np.array([len(one) for one in train], dtype=np.int64))

    @classmethod
    def mapped(cls, file: Path, n_sequences: int) -> Sequences:
        """Those of a file.

        Args:
            file: What `write` wrote.
            n_sequences: How many there are.

        Raises:
            ValueError: If the file is no whole one of so many sequences.
            OSError: If it cannot be read.
        """
        flat = np.load(file, mmap_mode="r", allow_pickle=False)
        lengths, items = flat[:n_sequences], flat[n_sequences:]
        if len(lengths) != n_sequences or len(items) != lengths.sum(dtype=np.int64):
            raise ValueError(f"{file} does not hold {n_sequences} sequences")
        return cls(items, lengths, file)

    @classmethod
    def beside(cls, dataset: Path, content: str, n_sequences: int, parts: Iterable[pl.DataFrame]) -> Sequences:
        """Those of a dataset, mapped from the file beside it, which is written anew where it is missing or damaged.

        Where that place cannot be written, the file is a temporary one of this process.

        Args:
            dataset: Folder of the dataset.
            content: Hash of the dataset.
            n_sequences: Its training sequences.
            parts: Their `items`, piece by piece; read only if the file has to be written.

        Raises:
            UserError: If the disk is full.
        """
        dataset = Path(os.path.abspath(dataset))  # noqa: PTH100 - the name, not what it links to
        stem = f"{dataset.name}.sequences-"
        file = dataset.with_name(f"{stem}{content[:16]}.npy")
        try:
            return cls.mapped(file, n_sequences)
        except (OSError, ValueError, EOFError):
            pass
        with disk_full_is_clear(dataset):
            if os.access(dataset.parent, os.W_OK):
                write(file, n_sequences, parts)
                for old in dataset.parent.glob(f"{stem}*.npy"):  # of what the dataset was before
                    if old != file:
                        old.unlink(missing_ok=True)
                return cls.mapped(file, n_sequences)
            folder = Path(tempfile.mkdtemp(prefix="sequences-"))
            write(folder / file.name, n_sequences, parts)
            found = cls.mapped(folder / file.name, n_sequences)
            weakref.finalize(found, shutil.rmtree, folder, ignore_errors=True)
            return found

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, number: int) -> NDArray[np.int64]: ...

    @overload
    def __getitem__(self, number: slice) -> list[NDArray[np.int64]]: ...

    def __getitem__(self, number: int | slice) -> NDArray[np.int64] | list[NDArray[np.int64]]:
        """The items of a sequence, a copy."""
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        return self.items(number, number + 1)

    def items(self, first: int, end: int) -> NDArray[np.int64]:
        """The items of neighbouring sequences behind one another, a copy."""
        return np.array(self._items[self._starts[first] : self._starts[end]], dtype=np.int64)

    def sums(
        self, sizes: NDArray[Any], source: NDArray[Any], start: NDArray[Any], stop: NDArray[Any]
    ) -> NDArray[np.int64]:
        """What the items of parts of sequences add up to, with a block of parts in memory.

        Args:
            sizes: (items,) whole number of each item.
            source: (parts,) number of each part's sequence, in ascending order.
            start: (parts,) its first item.
            stop: (parts,) the one behind its last.

        Returns:
            int64 (parts,).
        """
        found = np.empty(len(source), dtype=np.int64)
        for begin in range(0, len(source), BLOCK):
            here = slice(begin, begin + BLOCK)
            which = source[here]
            first, end = int(which[0]), int(which[-1]) + 1
            total = np.concatenate([[0], np.cumsum(sizes[self.items(first, end)])])
            base = self._starts[which] - self._starts[first]
            found[here] = total[base + stop[here]] - total[base + start[here]]
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the file, too; `datasets` hashes what is pickled."""
        if self._file is not None:
            return Sequences.mapped, (self._file, len(self))
        return Sequences, (self._items, self.lengths)


def _flat(lists: pl.Series) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """All items of lists, and how many each list has."""
    return lists.explode().drop_nulls().to_numpy().astype(np.int32), lists.list.len().to_numpy().astype(np.int32)


def write(file: Path, n_sequences: int, parts: Iterable[pl.DataFrame]) -> None:
    """Write the file of sequences, whole or not at all.

    Args:
        file: Where to.
        n_sequences: How many there are.
        parts: Their `items`, piece by piece.
    """
    handle, name = tempfile.mkstemp(prefix=f"{file.name}.", suffix=".partial", dir=file.parent)
    partial = Path(name)
    try:
        # Items come with their lengths and stand behind all of these, and the header says how many there are: it is
        # written last, in the space that a header of any number takes.
        with open(handle, "wb") as stream:  # noqa: PTH123 - a handle
            _header(stream, 0)
            begin = stream.tell()
            stream.seek(begin + 4 * n_sequences)
            lengths: list[NDArray[np.int32]] = []
            n_items = 0
            for part in parts:
                items, sizes = _flat(part["items"])
                stream.write(items.data)
                lengths.append(sizes)
                n_items += len(items)
            stream.seek(begin)
            stream.write(np.concatenate(lengths or [np.zeros(0, np.int32)]).data)
            stream.seek(0)
            _header(stream, n_sequences + n_items)
        partial.chmod(0o644)  # the temporary name's is private
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _header(stream: Any, count: int) -> None:
    """NumPy's header of so many int32; it is padded to leave room for a number that grows."""
    npy.write_array_header_1_0(stream, {"descr": "<i4", "fortran_order": False, "shape": (count,)})

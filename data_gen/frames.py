"""Frames that wait on disk, so that memory need not hold what a file holds."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import polars as pl

from reasonrec.tokenizers.output import clear, disk_full_is_clear, start_folder

_place: ContextVar[Path | None] = ContextVar("place", default=None)


@contextmanager
def spilling(out: Path) -> Iterator[None]:
    """Keep frames in `<out>.spill`, on the disk that the artefact is for, and remove them in the end.

    Outside of it they are kept where the system has its temporary files (`TMPDIR`).

    Args:
        out: Folder of the finished artefact, claimed by this process.

    Raises:
        UserError: If something else has the name, or the disk is full.
    """
    folder = out.with_name(out.name + ".spill")
    with disk_full_is_clear(out):
        start_folder(folder)
        token = _place.set(folder)
        try:
            yield
        finally:
            _place.reset(token)
            clear(folder)


class Frames:
    """Frames of the same columns in their order, each in a file that goes with this object.

    Attributes:
        height: Rows of all of them.
    """

    def __init__(self) -> None:
        self.height = 0
        self._files: list[Path] = []
        self._folder: Path | None = None

    @classmethod
    def of(cls, frame: pl.DataFrame) -> Frames:
        """One frame."""
        frames = cls()
        frames.append(frame)
        return frames

    def append(self, frame: pl.DataFrame) -> None:
        """Put a frame behind the others; the first one says what the columns are, even if it has no row."""
        if not frame.height and self._files:
            return
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="frames-", dir=_place.get()))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        file = self._folder / f"{len(self._files)}.arrow"
        frame.write_ipc(file)
        self._files.append(file)
        self.height += frame.height

    def __iter__(self) -> Iterator[pl.DataFrame]:
        return map(pl.read_ipc, self._files)

    def parts(self, rows: int) -> Iterator[pl.DataFrame]:
        """All rows, so many at a time; the last part may be smaller, and there is always one."""
        held: list[pl.DataFrame] = []
        for frame in self:
            held.append(frame)
            while (have := sum(part.height for part in held)) > rows:
                joined = pl.concat(held)
                yield joined.head(rows).rechunk()
                held = [joined.tail(have - rows)]
        yield pl.concat(held).rechunk()

    def lazy(self) -> pl.LazyFrame:
        """All of it, unread."""
        return pl.concat([pl.scan_ipc(file) for file in self._files])

    def frame(self) -> pl.DataFrame:
        """All of it in memory."""
        return pl.concat(list(self)).rechunk()

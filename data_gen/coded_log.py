"""A log in numbers, on disk: ids become codes while it is read, and users are worked on a bucket at a time.

What is in memory grows with the users and the items, not with the interactions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from reasonrec.data_gen.frames import Frames

BUCKET = 1 << 21  # rows that are worked on at once
_MOST = 1000  # buckets


class Ids:
    """Words and their codes, which count from 0.

    Attributes:
        counts: Rows of the log with each code.
    """

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._type = pl.Categorical(pl.Categories.random())
        self._known = pl.Series([], dtype=self._type)  # polars forgets the words with the last column of the type

    def encode(self, words: pl.Series) -> pl.Series:
        """Codes of words, new ones for new words (UInt32)."""
        codes = words.cast(self._type).to_physical()
        self._reserve(codes)
        return codes

    def words(self, codes: NDArray[np.int64] | None = None) -> pl.Series:
        """The words of some codes, or of all in their order."""
        chosen = np.arange(len(self.counts)) if codes is None else codes
        return pl.Series(chosen, dtype=pl.UInt32).cat.to(self._type).cast(pl.String)

    def present(self) -> NDArray[np.int64]:
        """Codes that stand in the log."""
        return np.flatnonzero(self.counts)

    def count(self, codes: pl.Series) -> None:
        """Count rows."""
        self.counts += np.bincount(codes.to_numpy(), minlength=len(self.counts))

    def _reserve(self, codes: pl.Series) -> None:
        need = int(codes.max()) + 1 if len(codes) else 0  # type: ignore[arg-type]
        if need > len(self.counts):
            self.counts = np.r_[self.counts, np.zeros(need - len(self.counts), dtype=np.int64)]


class CodedLog:
    """Interactions in the order of their file, with codes for ids.

    Attributes:
        users: The users' ids.
        items: The items' ids.
        frames: `user` and `item` (codes), `timestamp` (epoch milliseconds), possibly `rating` and `review`.
    """

    def __init__(self, users: Ids | None = None, items: Ids | None = None) -> None:
        self.users, self.items = users or Ids(), items or Ids()
        self.frames = Frames()

    @classmethod
    def of(cls, interactions: pl.DataFrame) -> CodedLog:
        """The log of a frame with `user_id` and `item_id`."""
        log = cls()
        log.append(log.encode(interactions))
        return log

    def encode(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The same with codes."""
        codes = self.users.encode(frame["user_id"]).alias("user"), self.items.encode(frame["item_id"]).alias("item")
        return frame.drop("user_id", "item_id").with_columns(codes)

    def append(self, frame: pl.DataFrame) -> None:
        """Put interactions with codes behind the others."""
        self.users.count(frame["user"])
        self.items.count(frame["item"])
        self.frames.append(frame)

    def counts(self) -> dict[str, int]:
        """Rows, users and items."""
        return {"rows": self.frames.height, "users": len(self.users.present()), "items": len(self.items.present())}

    def frame(self) -> pl.DataFrame:
        """All of it in memory, with ids."""
        frame = self.frames.frame()
        ids = {
            "user_id": self.users.words(frame["user"].to_numpy()),
            "item_id": self.items.words(frame["item"].to_numpy()),
        }
        return frame.select(**ids).with_columns(frame.drop("user", "item"))


def buckets_of(frames: Sequence[Frames], order: NDArray[np.int64], counts: NDArray[np.int64]) -> list[Frames]:
    """Deal interactions out to buckets of whole users.

    Args:
        frames: Interactions with `user`; those of a user keep their order.
        order: Codes of all users that occur; the first ones go to the first bucket.
        counts: Rows of each code, at least.

    Returns:
        The buckets, each of about `BUCKET` rows unless a user alone has more.
    """
    before = np.cumsum(counts[order]) - counts[order]
    rows = max(BUCKET, int(counts.sum()) // _MOST)
    place = np.zeros(len(counts), dtype=np.int32)
    place[order] = before // rows
    buckets = [Frames() for _ in range(int(place.max(initial=0)) + 1)]
    for whole in frames:
        for part in whole.parts(2 * rows):
            if len(buckets) == 1:
                buckets[0].append(part)
                continue
            dealt = part.with_columns(place=place[part["user"].to_numpy()]).partition_by("place", as_dict=True)
            for (number,), frame in dealt.items():
                buckets[number].append(frame.drop("place"))
    return [bucket for bucket in buckets if bucket.height]

"""New items in an index that models were trained on: codebooks stay as they are, no item and no token is renumbered.

A new item takes the tuple of codes that lies nearest to it among those that are still free, by what the index's
quantizer adds up (`Quantizer.summands`). Where the nearest is taken, and equals can be told apart by a last code that
exists, it joins them; a model has rows for every code, so every checkpoint of the index can read and recommend it. Two
tuples are closed: that of a single item without a last code, which would become the beginning of another, and that of
a group that has used up the last codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import ADDED_FILE, ItemIndex, added_embeddings, row_keys

WIDTH = 64  # tuples that are looked at for an item, the nearest first; doubled for one that finds none of them free
BLOCK = 128  # items at a time


@dataclass(frozen=True)
class Placed:
    """Where new items went.

    Attributes:
        codes: int32 (new, depth + 1) their codes, -1 for no last code.
        distance: (new,) squared distance of each embedding to the sum of its codes' vectors.
        nearest: (new,) the same of the nearest tuple, free or not.
    """

    codes: NDArray[np.int32]
    distance: NDArray[np.float32]
    nearest: NDArray[np.float32]

    @classmethod
    def nothing(cls, depth: int) -> Placed:
        """Of no items, in an index of so many levels."""
        none = np.empty(0, dtype=np.float32)
        return cls(np.empty((0, depth + 1), dtype=np.int32), none, none)

    @property
    def displaced(self) -> NDArray[np.bool_]:
        """(new,) whose nearest tuple was closed."""
        return self.distance > self.nearest

    def __str__(self) -> str:
        """How many were displaced and how far, for people."""
        moved = self.displaced
        if not moved.any():
            return "all have the codes nearest to them"
        taken, nearest = (float(np.sqrt(far[moved]).mean()) for far in (self.distance, self.nearest))
        return (
            f"the nearest codes of {moved.sum():,} were taken: theirs are {taken:.3f} away on average, instead of "
            f"{nearest:.3f}"
        )


def nearest_tuples(
    embeddings: NDArray[np.float32], codebooks: Sequence[NDArray[np.float32]], width: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The tuples whose vectors add up to almost an embedding, by a beam over the levels.

    Args:
        embeddings: (n, dim).
        codebooks: One (K_l, dim) array per level.
        width: Prefixes that are kept at each level. As many as the first codebook has make two levels exact.

    Returns:
        Codes (n, m, depth) with m at most `width`, nearest first, and their squared distances (n, m).
    """
    n = len(embeddings)
    left = embeddings[:, None, :].astype(np.float32)  # (n, m, dim): what is left over behind each prefix
    codes = np.empty((n, 1, 0), dtype=np.int32)
    for book in codebooks:
        lengths = np.einsum("kd,kd->k", book, book)
        far = np.einsum("nmd,nmd->nm", left, left)[..., None] - 2 * (left @ book.T) + lengths  # (n, m, K)
        flat = far.reshape(n, -1)
        kept = min(width, flat.shape[1])
        best = np.argpartition(flat, kept - 1, axis=1)[:, :kept]
        best = np.take_along_axis(best, np.take_along_axis(flat, best, 1).argsort(1, kind="stable"), 1)  # (n, kept)
        prefix, code = np.divmod(best, len(book))
        codes = np.concatenate(
            [np.take_along_axis(codes, prefix[..., None], 1), code[..., None].astype(np.int32)], axis=2
        )
        left = np.take_along_axis(left, prefix[..., None], 1) - book[code]
    return codes, np.maximum(np.einsum("nmd,nmd->nm", left, left), 0)


@dataclass
class _Places:
    """Which tuples are free.

    Attributes:
        last: Last codes that there are.
        taken: Items of each tuple without its last code, by its bytes.
        closed: Tuples that are one item's, which has no last code.
    """

    last: int
    taken: dict[bytes, int]
    closed: set[bytes]

    @classmethod
    def of(cls, index: ItemIndex) -> _Places:
        tuples = np.ascontiguousarray(index.codes[:, :-1])
        # A group's last codes are 0 to its size less one; what was retired keeps its own.
        _, first, counts = np.unique(row_keys(tuples), return_index=True, return_counts=True)
        names = tuples.view(np.dtype((np.void, tuples.itemsize * index.depth)))[:, 0]
        taken = dict(zip(names[first].tolist(), counts.tolist(), strict=True))
        return cls(index.level_sizes[-1], taken, set(names[index.codes[:, -1] < 0].tolist()))

    def take(self, codes: NDArray[np.int32]) -> int | None:
        """The last code of one more item of a tuple, -1 for none; None if the tuple is closed."""
        key = codes.tobytes()
        taken = self.taken.get(key, 0)
        if key in self.closed or taken >= max(self.last, 1):
            return None
        self.taken[key] = taken + 1
        return taken if self.last else -1  # the first one gets a last code as well, so that others can join it


def _first_free(places: _Places, tuples: NDArray[np.int32]) -> tuple[int, int] | None:
    """The first of some tuples (m, depth) that is free, and the last code there."""
    for at, codes in enumerate(tuples):
        if (last := places.take(codes)) is not None:
            return at, last
    return None


def place_items(index: ItemIndex, codebooks: Sequence[NDArray[np.float32]], embeddings: NDArray[np.float32]) -> Placed:
    """Give new items codes, one after another in their order.

    Args:
        index: The index they join.
        codebooks: Its codebooks, one float32 (K_l, width) array per level, whose vectors add up.
        embeddings: (new, width) of the new items in that space, see `Quantizer.summands`.

    Raises:
        UserError: If no tuple is free.
    """
    places, most = _Places.of(index), math.prod(index.level_sizes[:-1])
    rows, found, nearest = [], [], []
    for block in (embeddings[start : start + BLOCK] for start in range(0, len(embeddings), BLOCK)):
        tuples, distances = nearest_tuples(block, codebooks, WIDTH)
        for item, vector in enumerate(block):
            mine, far, width = tuples[item], distances[item], WIDTH
            while (place := _first_free(places, mine)) is None:
                if width >= most:
                    raise UserError(
                        f"none of the {most:,} tuples of codes is free for a new item: index the whole catalogue "
                        "again, with larger codebook_sizes, and train on it"
                    )
                width *= 2
                (mine,), (far,) = nearest_tuples(vector[None], codebooks, width)
            at, last = place
            rows.append([*mine[at].tolist(), last])
            found.append(far[at])
            nearest.append(distances[item, 0])
    codes = np.array(rows, dtype=np.int32).reshape(len(rows), index.depth + 1)
    return Placed(codes, np.array(found, dtype=np.float32), np.array(nearest, dtype=np.float32))


def grown_index(index: ItemIndex, codes: NDArray[np.int32]) -> ItemIndex:
    """An index with more items behind those it has.

    Raises:
        UserError: If their codes break a promise of the index.
    """
    grown = ItemIndex(np.concatenate([index.codes, codes]), index.level_sizes)
    grown.validate()
    return grown


def add_embeddings(parent: Path, folder: Path, new: NDArray[np.float32]) -> None:
    """Write the embeddings of the items behind those of the index, whose own file a grown catalogue shares.

    Args:
        parent: Folder of the index, or of a catalogue that grew from one.
        folder: The new artefact's (partial) folder.
        new: (new, dim) of the items that come.
    """
    before = added_embeddings(parent)
    added = new if before is None else np.concatenate([before, new])
    if len(added):
        save_file({"embeddings": np.ascontiguousarray(added, dtype=np.float32)}, folder / ADDED_FILE)


def check_grown(old: ItemIndex, new: ItemIndex, what: str) -> None:
    """Check that an index is another one with more items.

    Args:
        old: The index of a model.
        new: What is to take its place.
        what: How to call that in a message.

    Raises:
        UserError: If a level has another size, or an item other codes.
    """
    if old.level_sizes != new.level_sizes:
        raise UserError(f"{what} has levels of {list(new.level_sizes)} codes, the model of {list(old.level_sizes)}")
    if new.n_items < old.n_items:
        raise UserError(f"{what} has {new.n_items:,} items, fewer than the model's {old.n_items:,}")
    other = (new.codes[: old.n_items] != old.codes).any(axis=1)
    if other.any():
        item = int(other.argmax())
        raise UserError(
            f"{what}: item {item} has the codes {new.codes[item].tolist()}, in the model {old.codes[item].tolist()}: "
            "grow the index that the model was trained on"
        )

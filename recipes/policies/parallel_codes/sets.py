"""The set index: which codes of the codebooks left some item still has together with those chosen.

An item is a set of M codes, one of each codebook, and no two items have the same set. Unlike in a trie, codes may be
chosen in any order, so what is legal is read from posting lists: the items of each code. The shortest list of a
prefix is gone through, and each further code thins it out; that is exact, and for 10^6 items a few thousand look-ups.
Behind one code, where lists are still long, a table of all pairs of codes says the same at once.

Codes are *columns*, as in the trie: codebook 0 owns the columns `0 … size_0 - 1`, codebook 1 the next `size_1` …
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reasonrec.recipes.decoding.search import Exclude
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import ItemIndex
from reasonrec.tokenizers.whole import item_numbers

_SAMPLE = 2000  # items of a sample
_PAIRED = 4096  # most columns for a table of their pairs: 128 MiB


class Barred(NamedTuple):
    """Excluded items of each user.

    Attributes:
        mask: (users, items) bool.
        items: (users, most) int64 the same as numbers, padded with -1.
    """

    mask: Tensor
    items: Tensor

    def repeat(self, times: int) -> Barred:
        """Of each user so many times, one after the other."""
        return Barred(self.mask.repeat_interleave(times, 0), self.items.repeat_interleave(times, 0))


class After(NamedTuple):
    """What is left behind each code of the codebooks that were asked for.

    Attributes:
        fits: (n, books, widest) int64 how many items have the code together with those chosen; 0 where it is illegal.
        left: (n, books, widest) how many of them are not excluded.
        item: (n, books, widest) one of these items, the only one where `fits` is 1; -1 where it is 0.
    """

    fits: Tensor
    left: Tensor
    item: Tensor


@dataclass(frozen=True)
class SetIndex:
    """All items as sets of columns.

    Attributes:
        columns: (items, M) int64 column of each item in each codebook.
        held: (M * items,) int32 the same, codebook by codebook: a posting list then goes through memory in order.
        postings: (items * M,) items, by their columns.
        offsets: (columns + 1,) where the items of each column begin.
        first: (M,) first column of each codebook.
        sizes: (M,) codes of each codebook.
        paired: (columns, columns) int32 items that have both, or (0, 0) for too many columns.
        pair_item: (columns, columns) int32 one of these items; as `paired`.
    """

    columns: Tensor
    held: Tensor
    postings: Tensor
    offsets: Tensor
    first: Tensor
    sizes: Tensor
    paired: Tensor
    pair_item: Tensor

    @classmethod
    def from_index(cls, index: ItemIndex) -> SetIndex:
        """Build it from an item index whose items have a set of their own each.

        Raises:
            UserError: If some items need a disambiguation code, which only means something behind all others.
        """
        extra = int((index.codes[:, -1] >= 0).sum())
        if extra:
            raise UserError(
                f"{extra} items have a disambiguation code, which means nothing in a set: index the items again with "
                "unique: reassign"
            )
        return cls.from_codes(index.codes[:, :-1], index.level_sizes[:-1])

    @classmethod
    def from_codes(cls, codes: np.ndarray, sizes: Sequence[int]) -> SetIndex:
        """Build it.

        Args:
            codes: (items, M) integer codes, no two rows equal.
            sizes: Codes of each codebook.

        Raises:
            ValueError: If a code is out of range, or two items have the same set.
        """
        codes = np.asarray(codes, dtype=np.int64)
        if len(codes) == 0 or (codes < 0).any() or (codes >= np.asarray(sizes)).any():
            raise ValueError("every item needs a code of each codebook")
        if len(np.unique(codes, axis=0)) < len(codes):
            raise ValueError("two items have the same codes")
        first = np.cumsum([0, *sizes])
        columns = codes + first[:-1]
        order = np.argsort(columns.T.ravel(), kind="stable")  # by column, of each in the order of items
        counts = np.bincount(columns.ravel(), minlength=first[-1])
        tensors = (columns, order % len(codes), np.concatenate([[0], counts.cumsum()]), first[:-1], np.asarray(sizes))
        long = [torch.from_numpy(np.ascontiguousarray(tensor, dtype=np.int64)) for tensor in tensors]
        held = torch.from_numpy(columns.T.ravel().astype(np.int32))
        return cls(long[0], held, *long[1:], *(torch.from_numpy(table) for table in _pairs(codes, sizes)))

    def to(self, device: torch.device | str) -> SetIndex:
        """The same with its tensors on a device."""
        return SetIndex(**{name: value.to(device) for name, value in vars(self).items()})

    @property
    def n_items(self) -> int:
        """Number of items."""
        return len(self.columns)

    @property
    def depth(self) -> int:
        """Codes of an item, M."""
        return self.columns.shape[1]

    @property
    def n_columns(self) -> int:
        """Codes of all codebooks together."""
        return len(self.offsets) - 1

    @property
    def widest(self) -> int:
        """Codes of the largest codebook."""
        return int(self.sizes.max())

    def table(self, books: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of codebooks, side by side.

        Args:
            books: (..., books) numbers of codebooks, -1 for none.

        Returns:
            (..., books, widest) columns, 0 where there is none; and where there are some.
        """
        place = torch.arange(self.widest, device=books.device)
        known = books.clamp(min=0)
        real = (place < self.sizes[known][..., None]) & (books >= 0)[..., None]
        return torch.where(real, self.first[known][..., None] + place, 0), real

    def book_of(self, column: Tensor) -> Tensor:
        """The codebook of each column."""
        return torch.searchsorted(self.first, column, right=True) - 1

    def candidates(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The items that have all codes chosen.

        Args:
            chosen: (n, M) the column chosen in each codebook, -1 where none is; one at least.

        Returns:
            Prefix and item of each pair that fits, (pairs,) each.
        """
        begin, end = self.offsets[chosen.clamp(min=0)], self.offsets[chosen.clamp(min=0) + 1]
        length = torch.where(chosen >= 0, end - begin, self.n_items + 1)
        length, order = length.sort(dim=1, stable=True)
        begin, chosen = begin.gather(1, order), chosen.gather(1, order)
        counts = length[:, 0]
        prefix = torch.arange(len(chosen), device=chosen.device).repeat_interleave(counts)
        place = torch.arange(len(prefix), device=chosen.device) - (counts.cumsum(0) - counts)[prefix]
        item = self.postings[begin[prefix, 0] + place]
        for nth in range(1, int((chosen >= 0).sum(1).amax()) if len(chosen) else 0):
            column, begins = chosen[:, nth].int(), order[:, nth] * self.n_items
            if nth == 1:  # long lists: what belongs to a prefix is repeated, not looked up
                column, begins = (values.repeat_interleave(counts) for values in (column, begins))
            else:
                column, begins = column[prefix], begins[prefix]
            fits = ((column < 0) | (self.held[begins + item] == column)).nonzero()[:, 0]
            prefix, item = prefix[fits], item[fits]
        return prefix, item

    def after(self, chosen: Tensor, books: Tensor, barred: Barred | None = None, user: Tensor | None = None) -> After:
        """What is left behind each further code.

        Args:
            chosen: (n, M) the column chosen in each codebook, -1 where none is.
            books: (n, books) codebooks to choose from, of which nothing was chosen; -1 for none.
            barred: What `barred` returned.
            user: (n,) whose prefix each is; needed with `barred`.
        """
        n, width = books.shape
        shape = (n, width, self.widest)
        fits, item = torch.zeros(shape, dtype=torch.int64, device=chosen.device), chosen.new_full(shape, -1)
        gone = torch.zeros_like(fits)
        length = (chosen >= 0).sum(1)
        looked_up = length <= (1 if len(self.paired) else 0)
        if len(rows := looked_up.nonzero()[:, 0]):
            fits[rows], item[rows] = self._looked_up(chosen[rows], books[rows])
            if barred is not None and user is not None:
                excluded = barred.items[user[rows]]  # (rows, most)
                have = self.columns[excluded.clamp(min=0)]
                had = ((chosen[rows, None] < 0) | (have == chosen[rows, None])).all(2) & (excluded >= 0)
                which, place = had.nonzero(as_tuple=True)
                gone += (
                    self._keys(rows[which], excluded[which, place], books)[0]
                    .bincount(minlength=fits.numel())
                    .view(shape)
                )
        if len(rows := (~looked_up).nonzero()[:, 0]):
            prefix, found = self.candidates(chosen[rows])
            prefix = rows[prefix]
            key, whose = self._keys(prefix, found, books)
            fits += key.bincount(minlength=fits.numel()).view(shape)
            item.view(-1)[key] = found[whose]
            if barred is not None and user is not None:
                out = barred.mask[user[prefix], found]
                gone += self._keys(prefix[out], found[out], books)[0].bincount(minlength=fits.numel()).view(shape)
        return After(fits, fits - gone, item)

    def _looked_up(self, chosen: Tensor, books: Tensor) -> tuple[Tensor, Tensor]:
        """`fits` and `item` behind no code or one."""
        column, real = self.table(books)
        last = chosen.amax(1)[:, None, None]
        fits = self.offsets[column + 1] - self.offsets[column]
        item = self.postings[self.offsets[column].clamp(max=len(self.postings) - 1)]
        if len(self.paired):
            fits = torch.where(last >= 0, self.paired[last.clamp(min=0), column].long(), fits)
            item = torch.where(last >= 0, self.pair_item[last.clamp(min=0), column].long(), item)
        fits = torch.where(real, fits, 0)
        return fits, torch.where(fits > 0, item, -1)

    def _keys(self, prefix: Tensor, item: Tensor, books: Tensor) -> tuple[Tensor, Tensor]:
        """Where pairs of prefix and item count in (n, books, widest), flattened; and which pair each place is of."""
        book = books[prefix]  # (pairs, books)
        known = book.clamp(min=0)
        slot = prefix[:, None] * books.shape[1] + torch.arange(books.shape[1], device=books.device)
        key = slot * self.widest + self.columns[item].gather(1, known) - self.first[known]
        pair = torch.arange(len(prefix), device=books.device)[:, None].expand_as(book)
        return key[book >= 0], pair[book >= 0]

    def barred(self, exclude: Exclude | None) -> Barred | None:
        """Excluded items of each user, or None if there are none.

        Raises:
            UserError: If an item is not in the catalogue.
        """
        if exclude is None or not any(len(items) for items in exclude):
            return None
        rows = [np.unique(item_numbers("exclude", items)) for items in exclude]
        mask = np.zeros((len(rows), self.n_items), dtype=bool)
        numbers = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
        for user, items in enumerate(rows):
            unknown = items[(items < 0) | (items >= self.n_items)]
            if len(unknown):
                raise UserError(f"excluded item {unknown[0]} is not in the catalogue, which has 0..{self.n_items - 1}")
            mask[user, items], numbers[user, : len(items)] = True, items
        return Barred(*(torch.from_numpy(values).to(self.columns.device) for values in (mask, numbers)))

    def unforced(self, seed: int = 0) -> float:
        """Steps of an item that leave a choice, on average over a sample of items, each in an order drawn for it."""
        rng = np.random.default_rng(seed)
        items = torch.from_numpy(rng.permutation(self.n_items)[:_SAMPLE])
        order = torch.from_numpy(rng.permuted(np.tile(np.arange(self.depth), (len(items), 1)), axis=1))
        sets = self.to("cpu")
        chosen = torch.full_like(order, -1)
        steps = 0
        for place in range(self.depth):
            book = order[:, place : place + 1]
            steps += int(((sets.after(chosen, book).fits > 0).sum((1, 2)) > 1).sum())
            chosen = chosen.scatter(1, book, sets.columns[items].gather(1, book))
        return steps / len(items)


def _pairs(codes: np.ndarray, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """How many items have each two columns, and one of them: (columns, columns) each, (0, 0) for too many columns."""
    first = np.cumsum([0, *sizes])
    n = int(first[-1]) if first[-1] <= _PAIRED else 0
    paired, item = np.zeros((n, n), dtype=np.int32), np.full((n, n), -1, dtype=np.int32)
    for a in range(len(sizes) if n else 0):
        for b in range(a):
            key = codes[:, a] * sizes[b] + codes[:, b]
            some = np.full(sizes[a] * sizes[b], -1, dtype=np.int32)
            some[key] = np.arange(len(codes))
            here = slice(first[a], first[a + 1]), slice(first[b], first[b + 1])
            paired[here] = np.bincount(key, minlength=len(some)).reshape(sizes[a], sizes[b])
            item[here] = some.reshape(sizes[a], sizes[b])
            paired[here[::-1]], item[here[::-1]] = paired[here].T, item[here].T
    return paired, item

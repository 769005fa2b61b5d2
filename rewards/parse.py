"""What a completion says: its chain, the item it recommends, and what is wrong with it.

Every completion is parsed once, here, and all rewards read the result. A completion is a chain of thought (in
reasoning mode), the begin marker, and the codes of one item. A *valid answer* is what follows the first begin marker
if it is an item of the catalogue as a whole: a code too many or too few is no item, and neither are codes in the
wrong order. An answer that the chain only follows is not valid either, because the chain cannot have led to it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain as concatenate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import ItemIndex
from reasonrec.tokenizers.vocabulary import BEGIN, Vocabulary, code_token

Codes = tuple[int, ...]
IntArray = NDArray[np.int64]
_CODE = r"<\|[a-z]_\d+\|>"


class Flags(NamedTuple):
    """What a completion has and what is wrong with it.

    Attributes:
        has_chain: Something stands before the answer (or before the end, where there is no answer).
        unfinished: There is no answer, the chain was never closed, or the rollout had to cut it.
        several_chains: The chain is closed more than once before the answer.
        answer_before_think: Reasoning mode, and the answer comes before the chain.
        extra_after_answer: Something other than an end token follows the answer.
        out_of_catalogue: The answer was opened, and what follows is no item.
    """

    has_chain: bool
    unfinished: bool
    several_chains: bool
    answer_before_think: bool
    extra_after_answer: bool
    out_of_catalogue: bool


@dataclass(frozen=True)
class Parsed:
    """The completions of a batch, taken apart; all lists have one entry per completion.

    Attributes:
        predicted_codes: Codes of the item, the disambiguation code included; None without a valid answer. None for
            all where items have no codes.
        predicted_items: Its number, -1 without a valid answer.
        chains: Token ids of the chain, without the marker that closes it.
        flags: What was found.
    """

    predicted_codes: list[Codes | None] | None
    predicted_items: list[int]
    chains: list[list[int]]
    flags: list[Flags]

    def columns(self) -> dict[str, list[Any]]:
        """The keywords that rewards get from a parser."""
        found: dict[str, list[Any]] = {
            "predicted_items": self.predicted_items,
            "chains": self.chains,
            "flags": self.flags,
        }
        return found if self.predicted_codes is None else {"predicted_codes": self.predicted_codes} | found


class Catalogue:
    """Finds items by their codes, a whole batch at once.

    Args:
        index: The item index.
    """

    def __init__(self, index: ItemIndex) -> None:
        self._bases = np.asarray(index.level_sizes, dtype=np.int64) + 1  # one more: -1 stands for "no code"
        self._keys: list[IntArray] = []
        node = np.zeros(index.n_items, dtype=np.int64)
        for level, base in enumerate(self._bases):
            # Numbering the prefixes that exist keeps the keys small, however many levels there are.
            known, node = np.unique(node * base + index.codes[:, level] + 1, return_inverse=True)
            node = node.reshape(-1)
            self._keys.append(known)
        self._item = np.empty(index.n_items, dtype=np.int64)
        self._item[node] = np.arange(index.n_items)

    def find(self, codes: ArrayLike) -> IntArray:
        """Item number of each row of codes.

        Args:
            codes: Integers (rows, depth + 1), -1 where there is no code.

        Returns:
            Item numbers (rows,), -1 where the codes are no item.
        """
        codes = np.asarray(codes, dtype=np.int64)
        node = np.zeros(len(codes), dtype=np.int64)
        good = ((codes >= -1) & (codes < self._bases - 1)).all(axis=1)
        for level, (base, known) in enumerate(zip(self._bases, self._keys, strict=True)):
            key = node * base + codes[:, level] + 1
            node = np.minimum(np.searchsorted(known, key), max(len(known) - 1, 0))
            good &= known[node] == key if len(known) else False
        return np.where(good, self._item[np.where(good, node, 0)] if len(self._item) else -1, -1)


class Parser:
    """Takes completions apart.

    Example:
        >>> from reasonrec.tokenizers.index import build_index
        >>> index = build_index(np.array([[1, 0], [0, 2]]), [2, 3])
        >>> parser = Parser(Vocabulary(index.level_sizes, begin_id=10), index, reasoning=True)
        >>> parsed = parser([[5, 6, 10, 12, 13], [5, 6, 10, 11, 13]])
        >>> parsed.predicted_codes, parsed.chains[0]
        ([(1, 0), None], [5, 6])

    Args:
        vocabulary: The code tokens.
        index: The item index.
        reasoning: Completions start with a chain.
        opened: The prompt ends with the begin marker already, so completions start with the codes (direct mode).
        close_ids: Token ids of the marker that closes a chain, such as those of `</think>`; empty if the begin marker
            does that.
        end_ids: Token ids that may follow the answer: end of sequence and padding.

    Raises:
        UserError: If vocabulary and index do not belong together, or `opened` is used in reasoning mode.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        index: ItemIndex,
        *,
        reasoning: bool,
        opened: bool = False,
        close_ids: Sequence[int] = (),
        end_ids: Collection[int] = (),
    ) -> None:
        if vocabulary.level_sizes != index.level_sizes:
            raise UserError(
                f"the vocabulary has levels of {vocabulary.level_sizes} codes, the index of {index.level_sizes}: "
                "load both from the same model"
            )
        if reasoning and opened:
            raise UserError("opened=true with reasoning=true: a chain cannot stand behind the begin marker")
        self.vocabulary, self.depth, self.catalogue = vocabulary, index.depth, Catalogue(index)
        self.reasoning, self.opened = reasoning, opened
        self.close_ids, self._end_ids = tuple(close_ids), np.array(sorted(end_ids), dtype=np.int64)
        sizes = np.asarray(vocabulary.level_sizes, dtype=np.int64)
        self._sizes, self._first = sizes, vocabulary.first_id + np.cumsum(sizes) - sizes
        # Words get numbers behind the vocabulary, and never those of an end token.
        self._word_floor = max([vocabulary.size, *end_ids, *close_ids]) + 1
        self._code_ids = {
            code_token(level, code): int(self._first[level]) + code
            for level, size in enumerate(vocabulary.level_sizes)
            for code in range(size)
        }

    def __call__(self, completion_ids: Sequence[Sequence[int]], cut: Sequence[bool] | None = None) -> Parsed:
        """Parse token ids.

        Args:
            completion_ids: Token ids of each completion; any length, empty ones too.
            cut: Which chains the rollout cut, if it did so; those are unfinished.

        Returns:
            One entry per completion, in order.
        """
        rows = len(completion_ids)
        lists = [ids if isinstance(ids, list) else list(ids) for ids in completion_ids]
        if self.opened:
            lists = [[self.vocabulary.begin_id, *ids] for ids in lists]
        lengths = np.fromiter(map(len, lists), dtype=np.int64, count=rows)
        total = int(lengths.sum())
        flat = np.fromiter(concatenate.from_iterable(lists), dtype=np.int64, count=total)
        row, start = np.repeat(np.arange(rows), lengths), np.cumsum(lengths) - lengths

        content = np.flatnonzero(~np.isin(flat, self._end_ids))
        stop = start.copy()  # behind the last token that is not an end token
        stop[row[content]] = content + 1  # of several places of a row, the last stays
        begin = _first_place(np.flatnonzero(flat == self.vocabulary.begin_id), row, rows)
        has_answer = begin >= 0
        codes, answer_stop = self._read_codes(flat, np.where(has_answer, begin + 1, stop), stop)
        item = np.where(has_answer, self.catalogue.find(codes), -1)

        before = np.where(has_answer, begin, stop)
        close = _places(flat, row, self.close_ids)
        early = close[close < before[row[close]]]
        closed = np.bincount(row[early], minlength=rows)
        late = np.bincount(row[close], minlength=rows) > closed
        first_close = _first_place(early, row, rows)
        chain_length = np.where(closed > 0, first_close, before) - start

        extra = has_answer & (stop > answer_stop)
        unfinished = ~has_answer
        reversed_order = np.zeros(rows, dtype=bool)
        if self.reasoning:
            reversed_order = has_answer & (((closed == 0) & late) | ((chain_length == 0) & (closed == 0) & extra))
            if self.close_ids:
                unfinished |= (closed == 0) & ~reversed_order
        if cut is not None:
            unfinished |= np.asarray(cut, dtype=bool)
        no_item = has_answer & (item < 0)
        item = np.where(reversed_order, -1, item)
        flags = zip(
            (chain_length > 0).tolist(),
            unfinished.tolist(),
            (closed > 1).tolist(),
            reversed_order.tolist(),
            extra.tolist(),
            no_item.tolist(),
            strict=True,
        )
        return Parsed(
            predicted_codes=[
                (c if c[-1] >= 0 else c[:-1]) if i >= 0 else None
                for c, i in zip(zip(*codes.T.tolist(), strict=True), item.tolist(), strict=True)
            ],
            predicted_items=item.tolist(),
            chains=[ids[:n] for ids, n in zip(lists, chain_length.tolist(), strict=True)],
            flags=list(map(Flags._make, flags)),
        )

    def _read_codes(self, flat: IntArray, first: IntArray, stop: IntArray) -> tuple[IntArray, IntArray]:
        """Codes (rows, depth + 1) of the run of code tokens from `first` on, and where that run ends (rows,).

        A run that is too long, or has a code on the wrong level, comes back as codes that are no item.
        """
        levels = len(self._sizes)
        place = first[:, None] + np.arange(levels + 1)
        token = flat[np.minimum(place, max(len(flat) - 1, 0))] if len(flat) else np.zeros_like(place)
        low, high = self.vocabulary.first_id, self.vocabulary.size
        run = np.logical_and.accumulate((place < stop[:, None]) & (token >= low) & (token < high), axis=1)
        codes = np.where(run[:, :levels], token[:, :levels] - self._first, -1)
        wrong = (run[:, :levels] & ((codes < 0) | (codes >= self._sizes))).any(axis=1) | run[:, levels]
        codes[wrong] = -1
        return codes, first + np.minimum(run.sum(axis=1), levels)

    def ids_of_text(self, text: str, words: dict[str, int]) -> list[int]:
        """Token ids that stand for a text: real ones for codes and markers, others for words.

        Args:
            text: A completion.
            words: Numbers of the words met so far; new ones are added.
        """
        ids: list[int] = []
        for piece in re.split(f"({re.escape(BEGIN)}|{_CODE})", text):
            if piece == BEGIN:
                ids.append(self.vocabulary.begin_id)
            elif piece in self._code_ids:
                ids.append(self._code_ids[piece])
            else:
                ids.extend(words.setdefault(word, self._word_floor + len(words)) for word in piece.split())
        return ids


def _first_place(places: IntArray, row: IntArray, rows: int) -> IntArray:
    """The first place of each row, -1 where it has none (rows,)."""
    first = np.full(rows, -1, dtype=np.int64)
    first[row[places[::-1]]] = places[::-1]  # of several places of a row, the last written stays
    return first


def _places(flat: IntArray, row: IntArray, marker: Sequence[int]) -> IntArray:
    """Where a marker of one or more tokens starts, inside one row."""
    n = len(flat) - len(marker) + 1
    if not marker or n <= 0:
        return np.zeros(0, dtype=np.int64)
    here = row[:n] == row[len(marker) - 1 :]
    for offset, token in enumerate(marker):
        here &= flat[offset : offset + n] == token
    return np.flatnonzero(here)

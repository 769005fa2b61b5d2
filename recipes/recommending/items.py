"""Items as a caller names them: text is a raw id, an integer is an item number (its row in the item table)."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reasonrec.data_gen.histories import UserHistory
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.terminal import shown

UNKNOWN = -1
Items = Sequence[int] | Sequence[str] | NDArray[Any]  # all raw ids, or all item numbers
History = UserHistory | Items


def named(item: Any) -> str:
    """How an item that a caller gave is called in a message."""
    return item if isinstance(item, str) else shown(item)


class ItemIds:
    """Raw ids and numbers of a catalogue.

    Example:
        >>> recommender.items.numbers(["10", "42"])  # doctest: +SKIP
        array([ 9, 41])
        >>> recommender.items.ids([9, 41])  # doctest: +SKIP
        ['10', '42']

    Args:
        ids: Raw id of each item, in item order.
    """

    def __init__(self, ids: Sequence[str]) -> None:
        self._ids = list(ids)
        self._numbers = {item_id: number for number, item_id in enumerate(self._ids)}

    def __len__(self) -> int:
        return len(self._ids)

    def number(self, item_id: str) -> int:
        """The number of a raw id.

        Raises:
            UserError: If there is no such item.
        """
        return int(self.numbers([item_id])[0])

    def numbers(self, ids: Iterable[str]) -> NDArray[np.int64]:
        """The numbers of raw ids.

        Raises:
            UserError: If one of them is no text, or not in the catalogue.
        """
        words = self.listed(ids, "item ids")
        found = self.find(words)
        for word, number in zip(words, found, strict=True):
            if not isinstance(word, str):
                raise UserError(f"{shown(word)} is no raw item id: these are text, such as {self._ids[0]!r}")
            if number == UNKNOWN:
                raise UserError(f"item {shown(word)} is not in the catalogue; some ids are {', '.join(self._ids[:5])}")
        return found

    def ids(self, items: Items) -> list[Any]:
        """The raw ids of item numbers, in lists of the same shape; None stands for -1, where a list ended early.

        Raises:
            UserError: If a number is no integer, or not in the catalogue.
        """
        try:
            array = np.asarray(items)
        except ValueError:  # lists of several lengths
            array = np.array([items], dtype=object)
        if array.size and not np.issubdtype(array.dtype, np.integer):
            raise UserError(f"{shown(array.flat[0])} is no item number: these are integers from 0 to {len(self) - 1}")
        if array.size and not (array.min() >= UNKNOWN and array.max() < len(self)):
            wrong = array[(array < UNKNOWN) | (array >= len(self))][0]
            raise UserError(f"item {wrong} is not in the catalogue, which has 0..{len(self) - 1}")
        names: list[Any] = np.array([*self._ids, None], dtype=object)[array.astype(np.int64)].tolist()
        return names

    def find(self, items: Iterable[Any]) -> NDArray[np.int64]:
        """Numbers of raw ids or of numbers; -1 for an unknown id, numbers as they are.

        Args:
            items: Raw ids as text, or item numbers as integers, of any library; not both.

        Raises:
            UserError: If an item is something else, or text and numbers are mixed.
        """
        values = self.listed(items, "a history")
        words = sum(isinstance(value, str) for value in values)
        if 0 < words < len(values):
            raise UserError(
                f"{shown(values[:5])} mixes text and numbers: text is a raw item id and an integer an item number, so "
                "a history has to be all of one kind"
            )
        if words:
            return np.array([self._numbers.get(value, UNKNOWN) for value in values], dtype=np.int64)
        for value in values:
            if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
                raise UserError(
                    f"{shown(value)} ({type(value).__name__}) is no item: give raw item ids as text, or item numbers "
                    "as integers"
                )
        return np.array([value if abs(value) < 2**62 else UNKNOWN for value in map(int, values)], dtype=np.int64)

    def history(self, items: History) -> UserHistory:
        """A history from raw ids or numbers; one that is one already stays as it is.

        Raises:
            UserError: If an item is neither text nor an integer, or text and numbers are mixed.
        """
        return items if isinstance(items, UserHistory) else UserHistory.of(self.find(items))

    @staticmethod
    def listed(items: Any, what: str) -> list[Any]:
        """The elements of a list of any library.

        Raises:
            UserError: If it is none; `what` says what it has to be.
        """
        if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
            raise UserError(f"{shown(items)} is no list: {what} has to be a list, and histories a list of lists")
        convert = getattr(items, "tolist", None) or getattr(items, "to_pylist", None)  # NumPy and others; Arrow
        values = list(items) if convert is None else convert()
        return values if isinstance(values, list) else [values]

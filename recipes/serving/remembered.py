"""Lists that were made before, for users who come back with the same history."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

OVERHEAD = 500  # bytes of an entry beside its arrays and its key: two arrays' headers, a tuple, a place in the table

Question = tuple[bytes | int | None, ...]
List = tuple[NDArray[np.int64], NDArray[np.float32]]  # item numbers and scores, best first


class Remembered:
    """The lists that were asked for last, as many as fit into memory; safe to be used by several threads.

    Args:
        max_bytes: Memory that they may take.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lists: OrderedDict[Question, List] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0  #: taken now
        self.found = 0  #: lists that needed no model

    def get(self, question: Question, k: int) -> List | None:
        """The list of a question, if it is known and has `k` items or more.

        Args:
            question: What was asked, all but the length of the list.
            k: Items wanted.
        """
        with self._lock:
            known = self._lists.get(question)
            if known is None or len(known[0]) < k:
                return None
            self._lists.move_to_end(question)
            self.found += 1
            return known[0][:k], known[1][:k]

    def put(self, question: Question, items: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        """Remember a list, and forget those that nobody has asked for longest.

        Args:
            question: What was asked.
            items: (k,) item numbers.
            scores: (k,) their scores.
        """
        size = self._size(question, (items, scores))
        if size > self._max_bytes:
            return
        with self._lock:
            self._forget(question)
            self._lists[question] = (items.copy(), scores.copy())  # not a view that keeps a whole batch
            self.bytes += size
            while self.bytes > self._max_bytes:
                self._forget(next(iter(self._lists)))

    def _forget(self, question: Question) -> None:
        known = self._lists.pop(question, None)
        if known is not None:
            self.bytes -= self._size(question, known)

    @staticmethod
    def _size(question: Question, known: List) -> int:
        keys = sum(len(part) for part in question if isinstance(part, bytes))
        return OVERHEAD + keys + known[0].nbytes + known[1].nbytes

"""A user whose history grows: the model reads each item once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from reasonrec.recipes.decoding.prefix import Prefix, check_searchable, extend, read
from reasonrec.recipes.decoding.prior import Prior
from reasonrec.recipes.decoding.search import MAX_BEAMS, Exclude, Found, check_width
from reasonrec.tokenizers.whole import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from reasonrec.recipes.decoding.answers import Answers


class UserState:
    """One user's history in the model's cache.

    A prompt is a head, the items, and a tail that is the same for every history (the template's end and the begin
    marker). The cache keeps head and items; each search reads what was appended since the last one together with the
    tail, and forgets the tail again. When the window of `max_history` items is full the oldest item leaves, all
    others move, and the next search reads the window anew: the result is that of a fresh prompt in either case.

    Args:
        model: Causal LM, in evaluation mode.
        answers: The policy's answers, on the model's device.
        head: Token ids in front of the items.
        tail: Token ids behind them, the begin marker last.
        max_history: Items that a prompt may hold.
        longest_item: Tokens of the longest item in a prompt.
        num_beams: Width of the widest search.

    Raises:
        UserError: If `max_history` or `num_beams` is no whole number from 1 on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        answers: Answers,
        *,
        head: Sequence[int],
        tail: Sequence[int],
        max_history: int,
        longest_item: int,
        num_beams: int,
    ) -> None:
        self._model, self._answers, self._longest_item = model, answers, longest_item
        self._head, self._tail = list(head), list(tail)
        self._max_history = whole("max_history", max_history, at_least=1)
        self._num_beams = whole("num_beams", num_beams, at_least=1, at_most=MAX_BEAMS)
        self._items: list[list[int]] = []
        self._stem: Prefix | None = None
        self._pending: list[int] = []
        self.tokens_read = 0  #: tokens of prompts that the model has read for this user

    @property
    def n_items(self) -> int:
        """Items in the window."""
        return len(self._items)

    def append(self, token_ids: Sequence[int]) -> None:
        """Append an item; it is read at the next search.

        Args:
            token_ids: Its tokens.
        """
        self._items.append(list(token_ids))
        if len(self._items) > self._max_history:
            del self._items[0]
            self._stem = None
        else:
            self._pending.extend(token_ids)

    def search(
        self,
        *,
        k: int,
        num_beams: int | None = None,
        exclude: Exclude | None = None,
        exact: bool = True,
        prior: Prior | None = None,
    ) -> Found:
        """Items for the history so far.

        Args:
            k: Items to return.
            num_beams: Width of the search, at most the state's.
            exclude: One list of items that must not appear.
            exact: See `Answers.rank`.
            prior: See `Answers.rank`.

        Returns:
            Items and scores (1, k), as for the whole prompt.

        Raises:
            UserError: If `k` or `num_beams` is no whole number from 1 on, the search is narrower than the list, or an
                excluded item is not in the catalogue.
        """
        beams = self._num_beams
        if num_beams is not None:
            beams = min(beams, whole("num_beams", num_beams, at_least=1, at_most=MAX_BEAMS))
        k, beams = check_width(k, beams)  # before the history is read
        ahead = self._answers.longest
        if self._stem is None:
            stem = [*self._head, *(token for item in self._items for token in item)]
            most = len(self._head) + self._max_history * self._longest_item  # the cache never grows
            room = most - len(stem) + self._answers.room(self._num_beams)
            new = self._ids([*stem, *self._tail])
            prefix = read(self._model, new, torch.ones_like(new), room=room, ahead=ahead)
        else:
            new = self._ids([*self._pending, *self._tail])
            check_searchable(self._model, self._stem.length + new.shape[1] + ahead)
            prefix = extend(self._model, self._stem, new)
        self.tokens_read += new.shape[1]
        self._pending = []
        keep = prefix.length - len(self._tail)
        self._stem = Prefix(prefix.cache, prefix.seen[:, :keep], prefix.position - len(self._tail), prefix.hidden)
        return self._answers.rank(self._model, prefix, k=k, width=beams, exclude=exclude, exact=exact, prior=prior)

    def _ids(self, tokens: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(tokens)], device=self._model.device)

"""A user whose history grows, and is not read again from its beginning at every search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from reasonrec.data_gen.histories import UserHistory
from reasonrec.recipes.decoding.search import Found
from reasonrec.recipes.decoding.session import UserState
from reasonrec.recipes.recommending.answered import Answered, Recommendation
from reasonrec.recipes.recommending.items import Items, named
from reasonrec.tokenizers.errors import UserError

if TYPE_CHECKING:
    from reasonrec.recipes.recommender import Recommender


class FollowedUser:
    """See `Recommender.session`.

    Args:
        recommender: Who recommends.
        history: What the user had so far.
        num_beams: Width of the widest search.
        masks: Whether what the user had is never recommended.

    Attributes:
        history: What the user had, and what of it is shown.

    Raises:
        UserError: If an item is not in the catalogue.
    """

    def __init__(self, recommender: Recommender, history: UserHistory, *, num_beams: int, masks: bool) -> None:
        self._recommender, self._masks = recommender, masks
        prompts = recommender.policy.prompts
        head, tail = prompts.direct_parts()
        self._state = UserState(
            recommender.model,
            recommender.policy.answers,
            head=head,
            tail=tail,
            max_history=recommender.setting.max_history,
            longest_item=max(map(len, prompts.item_token_ids)),
            num_beams=num_beams,
        )
        self.history = UserHistory(history.shown[:0], history.masked)
        for item in history.shown:
            self.append(int(item))

    @property
    def tokens_read(self) -> int:
        """Tokens of prompts that the model has read for this user."""
        return self._state.tokens_read

    def append(self, item: int | str) -> None:
        """Append an item (its number, or its raw id) to the history; it is read at the next search.

        Raises:
            UserError: If it is not in the catalogue.
        """
        policy, given = self._recommender.policy, item
        n_items = policy.catalogue.n_items
        item = int(self._recommender.items.find([given])[0])
        if not 0 <= item < n_items:
            raise UserError(f"item {named(given)} is not in the catalogue, which has 0..{n_items - 1}")
        self._state.append(policy.prompts.item_token_ids[item])
        self.history = self.history.then(item)

    def search(
        self, *, k: int, num_beams: int | None = None, exclude: Sequence[Items] | None = None, exact: bool = True
    ) -> Found:
        """Items for the history so far.

        Args:
            k: Items to return.
            num_beams: Width of the search, at most the session's.
            exclude: One list of further items that must not appear.
            exact: See `Recommender.rank`.

        Returns:
            Items and scores (1, k).
        """
        recommender = self._recommender
        excluded = recommender.excluded([self.history], not self._masks, exclude)
        priors = recommender.priors([self.history], excluded)
        prior = None if priors is None else priors(np.zeros(1, dtype=np.int64))
        return self._state.search(k=k, num_beams=num_beams, exclude=excluded, exact=exact, prior=prior)

    def recommend(self, *, k: int = 10, num_beams: int | None = None) -> list[Recommendation]:
        """Items for the history so far, by raw id and title.

        Args:
            k: Items to return.
            num_beams: Width of the search, at most the session's.
        """
        found = self.search(k=k, num_beams=num_beams)
        answered = Answered(found.items.cpu().numpy(), found.scores.float().cpu().numpy())
        return answered.lists(self._recommender.policy.catalogue)[0]

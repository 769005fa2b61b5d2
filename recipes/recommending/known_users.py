"""What callers say of users, checked: what each of them had, and what must not be recommended to them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reasonrec.data_gen.histories import UserHistory
from reasonrec.recipes.models.checkpoint import Setting
from reasonrec.recipes.policies.base import Policy
from reasonrec.recipes.recommending.items import History, ItemIds, Items, named
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.terminal import shown


class KnownUsers:
    """Histories and lists of items as a checkpoint reads them.

    Attributes:
        policy: How the model reads and answers, and the catalogue.
        setting: What it was trained with.
        items: Raw ids to item numbers, and back.
    """

    def __init__(self, policy: Policy, setting: Setting) -> None:
        self.policy, self.setting = policy, setting
        self.items = ItemIds(policy.catalogue.item_ids)

    def prompts(self, histories: Sequence[History]) -> list[list[int]]:
        """Token ids of the prompt of each history, in direct mode."""
        return [self.policy.prompts.direct(items) for items in self.shown(histories)]

    def shown(self, histories: Sequence[History]) -> list[NDArray[np.int64]]:
        """Item numbers that the prompt of each history shows."""
        return [self.items.history(history).last(self.setting.max_history).shown for history in histories]

    def known(self, histories: Sequence[History], *, strict: bool = False) -> list[UserHistory]:
        """Histories without items that are not in the catalogue.

        Args:
            histories: Histories, or item numbers.
            strict: Refuse unknown items and empty histories instead of warning about them.

        Raises:
            UserError: In strict mode; it counts them.
        """
        given = [self.items.history(history) for history in self._each(histories, "histories")]
        known = [history.among(self.policy.catalogue.n_items) for history in given]
        lost = [len(a.shown) - len(b.shown) for a, b in zip(given, known, strict=True)]
        empty = sum(len(history.shown) == 0 for history in known)
        problems = []
        if any(lost):
            problems.append(
                f"{sum(lost)} items in {sum(map(bool, lost))} histories are not in the catalogue "
                f"(0..{self.policy.catalogue.n_items - 1})"
            )
        if empty:
            problems.append(f"{empty} of {len(known)} histories are empty")
        if problems and strict:
            raise UserError(f"{' and '.join(problems)}: correct them, or turn strict off to go on without them")
        if problems:
            warnings.warn(
                f"{' and '.join(problems)}: unknown items are skipped, an empty history is ranked by the prompt alone",
                stacklevel=3,
            )
        return known

    def excluded(
        self, histories: Sequence[UserHistory], repeats: bool | None, exclude: Sequence[Items] | None
    ) -> list[np.ndarray] | None:
        """What must not be recommended to each user; None for nothing.

        Args:
            histories: Their histories.
            repeats: Whether they may be recommended what they had; as the data set says if None.
            exclude: For each of them further items that must not appear.

        Raises:
            UserError: If `exclude` does not have one list for each.
        """
        exclude = None if exclude is None else self._each(exclude, "exclude")
        if exclude is not None and len(exclude) != len(histories):
            raise UserError(f"exclude has {len(exclude)} lists for {len(histories)} histories: give one for each")
        more = None if exclude is None else [self._numbers(items, "excluded item") for items in exclude]
        if len(retired := self.policy.catalogue.retired):
            more = [np.union1d(items, retired) for items in more or [retired] * len(histories)]
        if not self.masks(repeats):
            return more
        if more is None:
            return [history.masked for history in histories]
        return [np.union1d(history.masked, items) for history, items in zip(histories, more, strict=True)]

    def masks(self, repeats: bool | None) -> bool:
        """Whether what a user had is masked: by what the caller says, else by what the data set says."""
        return self.policy.catalogue.mask_history if repeats is None else not repeats

    def _numbers(self, items: Items, what: str) -> np.ndarray:
        given = self.items.listed(items, f"{what}s")
        found, n_items = self.items.find(given), self.policy.catalogue.n_items
        for item, number in zip(given, found, strict=True):  # what was to be hidden would appear
            if not 0 <= number < n_items:
                raise UserError(f"{what} {named(item)} is not in the catalogue, whose numbers are 0..{n_items - 1}")
        return found

    @staticmethod
    def _each(lists: Any, name: str) -> list[Any]:
        """One list for each user; rows of arrays and tensors stay what they are."""
        if isinstance(lists, str | bytes | Mapping | UserHistory) or not isinstance(lists, Iterable):
            raise UserError(f"{name}={shown(lists)} has to be a list with one list of items for each user")
        return lists.to_pylist() if hasattr(lists, "to_pylist") else list(lists)  # Arrow's own scalars are no items

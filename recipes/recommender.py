"""Load a trained recommender once and recommend many times.

A history is everything the user had, oldest first: raw item ids as text, or item numbers as integers, or a
`UserHistory`. What comes back are item numbers; `Recommender.items` turns them into raw ids.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from reasonrec.data_gen.histories import UserHistory
from reasonrec.recipes.decoding.prior import Prior, Priors
from reasonrec.recipes.decoding.search import check_width
from reasonrec.recipes.followed_user import FollowedUser
from reasonrec.recipes.items import History, ItemIds, Items, named
from reasonrec.recipes.keys import PrecisionName
from reasonrec.recipes.models.checkpoint import Setting
from reasonrec.recipes.models.precision import Precision, choose, load_finite
from reasonrec.recipes.policies.base import Policy
from reasonrec.recipes.policies.context import check_context
from reasonrec.recipes.policies.inference import Ranking, rank, score
from reasonrec.recipes.policies.loading import causal_lm, load_trained
from reasonrec.recipes.verdict import Verdict
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.manifest import Manifest
from reasonrec.tokenizers.terminal import shown
from reasonrec.tokenizers.whole import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from reasonrec.recipes.rankers.pool import Pool


def load_pool(path: Path, manifest: Manifest, policy: Policy, without: Sequence[str] = ()) -> Pool | None:
    """The experts of a checkpoint, if it has some; only then is what they need imported.

    Args:
        path: Its folder.
        manifest: Its manifest.
        policy: Its policy.
        without: Experts that are not to be heard.
    """
    if "pool" not in manifest.facts and not without:
        return None
    from reasonrec.recipes.rankers.pool import Pool

    popularity = policy.catalogue.items["train_count"].to_numpy().astype(np.int64)
    return Pool.load(path, manifest.facts, popularity, policy.answers.longest, without)


class Recommender:
    """A trained model with its index: histories in, ranked items out.

    Attributes:
        policy: How the model reads and answers, and the catalogue.
        model: The causal LM, adapter included.
        setting: What it was trained with.
        precision: What it computes in, and why; None if the model was not loaded here.
        items: Raw ids to item numbers, and back.
        pool: Experts that are heard beside the model (`recipes/fuse.py`), if the checkpoint has some.
        verdict: Whether thinking pays (`recipes/judge_reasoning.py`), if the checkpoint was judged.

    Raises:
        UserError: If the model does not see a prompt of `max_history` items.
    """

    def __init__(
        self,
        policy: Policy,
        model: PreTrainedModel,
        setting: Setting,
        precision: Precision | None = None,
        pool: Pool | None = None,
        verdict: Verdict | None = None,
    ) -> None:
        self.policy = policy
        self.pool = pool
        self.verdict = verdict
        self.setting = setting
        self.precision = precision
        self.model = causal_lm(model)
        self.model.eval()
        check_context(self.model, policy, setting.max_history, trained=True)
        policy.answers.to(self.model.device)
        self.items = ItemIds(policy.catalogue.item_ids)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        base_model: str | None = None,
        dtype: torch.dtype | PrecisionName | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        without: Sequence[str] = (),
    ) -> Recommender:
        """Load what `recipes/sft.py`, `recipes/grpo.py` or `recipes/fuse.py` wrote.

        Args:
            path: Folder of the adapter or model.
            base_model: Where an adapter's base model is now; where the training found it by default. A fully trained
                model needs none.
            dtype: A dtype or its name (bf16, fp16, fp32); what the hardware is fast in if unset.
            device: Overrides the device (the accelerator if there is one).
            trust_remote_code: Run code that comes with the model or its base; nothing in the folder turns this on.
            without: Experts of the checkpoint that are not to be heard.

        Raises:
            UserError: If the base model is not that of the training (the message names the hashes and the command that
                mends it), or there is no such expert.
        """
        (policy, model, setting, manifest), precision = load_finite(
            lambda chosen: load_trained(
                path,
                base_model=base_model,
                precision=chosen,
                trust_remote_code=trust_remote_code,
            ),
            choose(dtype, device or ("cuda" if torch.cuda.is_available() else "cpu")),
            itemgetter(1),
        )
        if setting.method != "qlora" or manifest.kind == "model":
            model = model.to(precision.device)
        pool = load_pool(Path(path), manifest, policy, without)
        return cls(policy, model, setting, precision, pool, Verdict.stored(manifest))

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
        return list(lists)

    def rank(
        self,
        histories: Sequence[History],
        *,
        k: int = 10,
        num_beams: int = 50,
        exact: bool = True,
        exhaustive: bool = False,
        repeats: bool | None = None,
        exclude: Sequence[Items] | None = None,
        batch_size: int = 16,
        strict: bool = False,
        progress: bool = False,
        pooled: bool = True,
        heard: Sequence[History] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rank items for each history.

        Args:
            histories: Everything each user had, oldest first, of which the last `max_history` items are read: raw item
                ids as text, item numbers as integers, or a `UserHistory`.
            k: Items to return.
            num_beams: Width of the search.
            exact: Search on until each list is proven to be the best of the catalogue. Off, it is a beam search: a
                little faster, and what other kits do.
            exhaustive: Score the whole catalogue instead (a beam as wide as it is), for small ones: the reference.
            repeats: Whether a user may be recommended what they had already. As the data set says if None: one that
                was prepared with `mask_history` masks everything in the history, what is not read included.
            exclude: For each history further items that must not appear.
            batch_size: Histories read at a time; it does not change the result.
            strict: Refuse unknown items and empty histories instead of warning about them.
            progress: Show a progress bar.
            pooled: Hear the experts of the checkpoint, if it has some. Log-probabilities are then those among the
                items that may be recommended; the model alone gives some of its probability to the others, too.
            heard: Histories that the experts are told instead, for a control.

        Returns:
            Item numbers (users, k), -1 where fewer are allowed, and their log-probabilities (users, k).
            `items.ids` turns the numbers into raw ids.

        Raises:
            UserError: If `k`, `num_beams` or `batch_size` is no whole number from 1 on, `num_beams` is smaller than
                `k`, a prompt is longer than the model's context, an excluded item is unknown, or (strict) a history is
                empty or holds an unknown item.
        """
        batch_size = whole("batch_size", batch_size, at_least=1)
        if exhaustive:
            num_beams, exact = max(self.policy.catalogue.n_items, whole("k", k, at_least=1)), False
        k, num_beams = check_width(k, num_beams)
        known = self.known(histories, strict=strict)
        excluded = self.excluded(known, repeats, exclude)
        how = Ranking(k, num_beams, exact, batch_size, "recommending" if progress else None)
        priors = self.priors(known if heard is None else self.known(heard), excluded) if pooled else None
        found = rank(self.policy, self.model, self.prompts(known), how, exclude=excluded, priors=priors)
        unproven = int((~found.proven).sum())
        if exact and unproven:
            warnings.warn(
                f"{unproven} of {len(known)} lists may lack an item about as probable as their last one: the "
                f"search lost patience; raise num_beams={num_beams} to have them proven",
                stacklevel=2,
            )
        return found.items, found.scores

    def priors(self, histories: Sequence[UserHistory], exclude: Sequence[np.ndarray] | None) -> Priors | None:
        """What the checkpoint's experts say to users, by their numbers; None if it has none.

        Args:
            histories: The users' histories.
            exclude: For each the items that must not appear.
        """
        if (pool := self.pool) is None:
            return None
        tree, device = self.policy.answers.tree, self.model.device

        def of(users: NDArray[np.int64]) -> Prior:
            excluded = None if exclude is None else [exclude[user] for user in users]
            return pool.prior(tree, UserHistory.to_rows([histories[user] for user in users]), excluded, device)

        return of

    def score(
        self,
        histories: Sequence[History],
        items: Sequence[Items] | NDArray[Any],
        *,
        repeats: bool | None = None,
        batch_size: int = 16,
        pooled: bool = True,
    ) -> NDArray[np.float32]:
        """Log-probabilities of given items without a search.

        Args:
            histories: Everything each user had, as for `rank`.
            items: For each history equally many items, raw ids or numbers.
            repeats: As for `rank`; of no matter to the model alone, which scores what is masked as well.
            batch_size: Histories read at a time; it does not change the result.
            pooled: As for `rank`.

        Returns:
            (users, n) log-probabilities; those of the whole catalogue would sum to one. With experts, what is masked
            has none (-inf).

        Raises:
            UserError: If an item is not in the catalogue, stands twice in a list, or lists and histories do not fit.
        """
        batch_size = whole("batch_size", batch_size, at_least=1)
        known = self.known(histories)
        given = [self._numbers(listed, "item") for listed in self._each(items, "items")]
        sizes = {len(listed) for listed in given} or {0}
        if len(given) != len(known) or len(sizes) > 1 or any(len(np.unique(row)) < len(row) for row in given):
            raise UserError(
                f"items has {len(given)} lists for {len(known)} histories: give one for each, all of them equally "
                "long, with different items"
            )
        wanted = np.array(given, dtype=np.int64).reshape(len(known), sizes.pop())
        priors = self.priors(known, self.excluded(known, repeats, None)) if pooled else None
        return score(self.policy, self.model, self.prompts(known), wanted, batch_size=batch_size, priors=priors)

    def session(self, history: History = (), *, num_beams: int = 50, repeats: bool | None = None) -> FollowedUser:
        """Follow one user: items can be appended without reading the history again.

        Example:
            >>> session = recommender.session([50, 181])
            >>> session.search(k=10)
            >>> session.append(172)
            >>> session.search(k=10)

        Args:
            history: What the user had so far, oldest first.
            num_beams: Width of the widest search.
            repeats: Whether the user may be recommended what they had already; as the data set says if None.

        Raises:
            UserError: If an item is not in the catalogue.
        """
        return FollowedUser(self, self.items.history(history), num_beams=num_beams, masks=self.masks(repeats))

"""Load a trained recommender once, from a folder or the Hub, and recommend many times.

A history is everything the user had, oldest first: raw item ids as text, or item numbers as integers, or a
`UserHistory`. `recommend` and `explain` return items with their raw ids and titles; `rank` and `score` are the same
for those who work with item numbers and arrays (`Recommender.items` leads from one to the other).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray

from reasonrec.data_gen.histories import UserHistory
from reasonrec.recipes.decoding.prior import Prior, Priors
from reasonrec.recipes.decoding.search import check_width
from reasonrec.recipes.keys import PrecisionName
from reasonrec.recipes.models.checkpoint import Setting, trained_manifest
from reasonrec.recipes.models.hub import local_folder
from reasonrec.recipes.models.precision import Precision, choose, load_finite
from reasonrec.recipes.models.verdict import Verdict
from reasonrec.recipes.policies.base import Policy, build_policy
from reasonrec.recipes.policies.context import check_context
from reasonrec.recipes.policies.inference import Ranking, rank, score
from reasonrec.recipes.policies.loading import (
    Quantization,
    causal_lm,
    grown_catalogue,
    load_pool,
    load_trained,
    loading_method,
)
from reasonrec.recipes.recommending.answered import (
    Answered,
    Arrays,
    Explanation,
    How,
    Mode,
    Recommendation,
    answer,
    users_of,
)
from reasonrec.recipes.recommending.followed_user import FollowedUser
from reasonrec.recipes.recommending.items import History, Items
from reasonrec.recipes.recommending.known_users import KnownUsers
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.whole import whole

# Beams at a time where the whole catalogue is scored: each has places in the cache, and a million would fill a laptop.
EXHAUSTIVE_BEAMS = 16_384

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from reasonrec.recipes.rankers.pool import Pool


class Recommender(KnownUsers):
    """A trained model with its index: histories in, ranked items out.

    Example:
        >>> recommender = Recommender.from_pretrained("you/my-recommender")  # doctest: +SKIP
        >>> recommender.recommend(["bk-0010", "bk-0042"], k=3)  # doctest: +SKIP

    Attributes:
        model: The causal LM, adapter included.
        precision: What it computes in, and why; None if the model was not loaded here.
        path: The folder it was loaded from, if it was.
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
        path: Path | None = None,
    ) -> None:
        super().__init__(policy, setting)
        self.precision, self.pool, self.verdict, self.path = precision, pool, verdict, path
        self.model = causal_lm(model)
        self.model.eval()
        check_context(self.model, policy, setting.max_history, trained=True)
        policy.answers.to(self.model.device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        quantization: Quantization = "auto",
        base_model: str | None = None,
        dtype: torch.dtype | PrecisionName | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        without: Sequence[str] = (),
        catalogue: str | Path | None = None,
    ) -> Recommender:
        """Load what a training, `recipes/fuse.py` or `recipes/publish.py` wrote.

        Args:
            path: Folder of the adapter or model, or its repository on the Hub (`user/name`).
            revision: Branch, tag or commit of the repository.
            quantization: `auto` loads the base as it was in the training, `4bit` in NF4, None in whole weights.
            base_model: Where an adapter's base model is now; where the training found it by default. A fully trained
                model needs none.
            dtype: A dtype or its name (bf16, fp16, fp32); what the hardware is fast in if unset.
            device: Overrides the device (the accelerator if there is one).
            trust_remote_code: Run code that comes with the model or its base; nothing in the folder turns this on.
            without: Experts of the checkpoint that are not to be heard.
            catalogue: Folder of a later version of its catalogue (`recipes/grow_catalogue.py`).

        Raises:
            UserError: If a file is missing or was changed, the Hub does not give the repository, the base model is not
                that of the training (the message names the hashes and what mends it), or there is no such expert.
        """
        folder = local_folder(path, revision)
        manifest = trained_manifest(folder)
        method = loading_method(manifest, quantization)
        (policy, model, setting, _), precision = load_finite(
            lambda chosen: load_trained(
                folder,
                manifest,
                base_model=base_model,
                precision=chosen,
                method=method,
                trust_remote_code=trust_remote_code,
                grown=catalogue,
            ),
            choose(dtype, device or ("cuda" if torch.cuda.is_available() else "cpu")),
            itemgetter(1),
        )
        if method != "qlora":
            model = model.to(precision.device)
        pool = load_pool(folder, manifest, policy, without)
        return cls(policy, model, setting, precision, pool, Verdict.stored(manifest), folder)

    def with_catalogue(self, catalogue: str | Path, without: Sequence[str] = ()) -> Recommender:
        """The same model with a later version of its catalogue (`recipes/grow_catalogue.py`); nothing is loaded twice.

        Args:
            catalogue: Its folder.
            without: Experts of the checkpoint that are not to be heard.

        Raises:
            UserError: If this was not loaded from a folder, or the catalogue is none of this model.
        """
        if self.path is None:
            raise UserError("this recommender was not loaded from a folder: save it, and load that")
        later = grown_catalogue(self.policy.catalogue, catalogue, self.setting)
        policy = build_policy(later, self.setting, self.policy.tokenizer)
        pool = load_pool(self.path, trained_manifest(self.path), policy, without)
        other = copy.copy(self)
        KnownUsers.__init__(other, policy, self.setting)
        other.pool = pool
        policy.answers.to(self.model.device)
        return other

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Publish the checkpoint this was loaded from, as `recipes/publish.py` does.

        Args:
            repository: `user/name`; log in with `hf auth login`.
            **options: Keys of that stage: `report`, `merge`, `titles`, `license`, `private`.

        Returns:
            Where it stands.

        Raises:
            UserError: If it was not loaded from a folder, something must not be published, or the Hub refuses.
        """
        from reasonrec.recipes.publish import publish_again

        return publish_again(self.path, self.setting.base_model, repository, **options)

    @overload
    def recommend(
        self, histories: list[str] | list[int] | UserHistory, *, k: int = ..., mode: Mode = ..., **how: Unpack[How]
    ) -> list[Recommendation]: ...

    @overload
    def recommend(
        self, histories: list[list[str]] | list[list[int]], *, k: int = ..., mode: Mode = ..., **how: Unpack[How]
    ) -> list[list[Recommendation]]: ...

    @overload
    def recommend(
        self, histories: Any, *, k: int = ..., mode: Mode = ..., arrays: Literal[True], **how: Unpack[How]
    ) -> Arrays: ...

    @overload
    def recommend(self, histories: Any, *, k: int = ..., mode: Mode = ..., **how: Unpack[How]) -> list[Any]: ...

    def recommend(
        self, histories: Any, *, k: int = 10, mode: Mode = "direct", arrays: bool = False, **how: Unpack[How]
    ) -> Any:
        """Recommend items to a user, or to each of several.

        Example:
            >>> first = recommender.recommend(["bk-0010", "bk-0042"])[0]  # doctest: +SKIP
            >>> first.id, first.title, first.score  # doctest: +SKIP

        Args:
            histories: Everything a user had, oldest first, as a flat list (an empty one is a new user's), or a list of
                such lists: raw ids or item numbers, in lists or in NumPy, Arrow or other arrays.
            k: Items to return.
            mode: Items at once (`direct`), or behind chains of thought (`reasoning`), where they were shown to help.
            arrays: Return arrays instead of lists.
            **how: See `How`.

        Returns:
            `Recommendation`s, best first: a list for a flat history, a list of lists for a list of them; fewer than
            `k` where fewer items are allowed.

        Raises:
            UserError: As `rank`.
        """
        users, single = users_of(histories)
        found = self._answer(users, k=k, mode=mode, **how)
        if arrays:
            made = found.arrays(self.policy.catalogue)
            return Arrays(*(array[0] for array in made)) if single else made
        lists = found.lists(self.policy.catalogue)
        return lists[0] if single else lists

    def explain(self, history: History, *, k: int = 10, **how: Unpack[How]) -> Explanation:
        """Recommend to one user in reasoning mode, and show the chain.

        Args:
            history: Everything the user had, oldest first.
            k: Items to return.
            **how: See `How`.

        Raises:
            UserError: As `rank`.
        """
        found = self._answer([history], k=k, mode="reasoning", **how)
        (recommendations,) = found.lists(self.policy.catalogue)
        return Explanation(found.thoughts[0] if found.thoughts else [], recommendations, found.note)

    def _answer(self, users: Sequence[History], **how: Any) -> Answered:
        found = answer(self, users, **how)
        if found.note:
            warnings.warn(f"{found.note}; unproven=True thinks all the same", stacklevel=3)
        return found

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
            batch_size = max(1, min(batch_size, EXHAUSTIVE_BEAMS // num_beams))
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

"""What a recommender answers: items by raw id and title, and what was thought before them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from reasonrec.data_gen.histories import UserHistory
from reasonrec.recipes.models.verdict import UNMEASURED
from reasonrec.recipes.recommending.items import History, ItemIds, Items
from reasonrec.tokenizers.catalogue import Catalogue
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.terminal import shown
from reasonrec.tokenizers.whole import whole

if TYPE_CHECKING:
    from reasonrec.recipes.policies.inference import Stream
    from reasonrec.recipes.recommender import Recommender

Mode = Literal["direct", "reasoning"]


@dataclass(frozen=True)
class Recommendation:
    """One recommended item.

    Attributes:
        id: Its raw id.
        title: Its title.
        score: Its log-probability.
    """

    id: str
    title: str
    score: float


class Arrays(NamedTuple):
    """Recommendations as arrays, one row a user; of a single history the rows themselves.

    Attributes:
        ids: (users, k) raw ids, None where fewer items are allowed.
        titles: (users, k) titles, None there.
        scores: (users, k) float32 log-probabilities, -inf there.
    """

    ids: NDArray[np.object_]
    titles: NDArray[np.object_]
    scores: NDArray[np.float32]


@dataclass(frozen=True)
class Explanation:
    """What was thought about a user, and what is recommended behind it.

    Attributes:
        thoughts: The chains as text, with titles for items; none if the checkpoint did not think.
        recommendations: The items, best first.
        note: Why it did not think, if so.
    """

    thoughts: list[str]
    recommendations: list[Recommendation]
    note: str = ""


@dataclass(frozen=True)
class Answered:
    """Lists for several users.

    Attributes:
        items: (users, k) item numbers, -1 where fewer are allowed.
        scores: (users, k) log-probabilities, -inf there.
        thoughts: The chains of each user as text; nothing if it did not think.
        note: Why it did not think although it was asked to.
    """

    items: NDArray[np.int64]
    scores: NDArray[np.float32]
    thoughts: list[list[str]] = field(default_factory=list)
    note: str = ""

    def lists(self, catalogue: Catalogue) -> list[list[Recommendation]]:
        """The items of each user, best first."""
        ids, titles = catalogue.item_ids, catalogue.titles
        return [
            [Recommendation(ids[i], titles[i], float(score)) for i, score in zip(*row, strict=True) if i >= 0]
            for row in zip(self.items.tolist(), self.scores, strict=True)
        ]

    def arrays(self, catalogue: Catalogue) -> Arrays:
        """The same as arrays."""
        ids, titles = (np.array([*names, None], dtype=object) for names in (catalogue.item_ids, catalogue.titles))
        return Arrays(ids[self.items], titles[self.items], self.scores)


class How(TypedDict, total=False):
    """How lists are made; every key may be left out.

    Attributes:
        num_beams: Width of the search (50, or `k` if that is more).
        exhaustive: Score the whole catalogue instead; for small ones, in direct mode.
        repeats: Whether a user may be recommended what they had; as the data set says if None.
        exclude: For each user further items that must not appear.
        batch_size: Histories read at a time; it does not change the result.
        strict: Refuse unknown items and empty histories instead of warning about them.
        progress: Show progress bars.
        chains: Chains in reasoning mode: one greedy, or several sampled.
        max_chain: Longest chain in tokens.
        seed: Seed of sampled chains.
        unproven: Think even where it was not shown to help (`recipes/judge_reasoning.py`).
        stream: Told every step of the chains, and may end them (`inference.reason`).
    """

    num_beams: int
    exhaustive: bool
    repeats: bool | None
    exclude: Sequence[Items] | None
    batch_size: int
    strict: bool
    progress: bool
    chains: int
    max_chain: int
    seed: int
    unproven: bool
    stream: Stream | None


def users_of(histories: Any) -> tuple[list[History], bool]:
    """The histories of a call, and whether it was one user's: a flat list of items.

    Args:
        histories: A history, or a list of them, from any library of arrays; an empty list is an empty history.

    Raises:
        UserError: If it is neither.
    """
    if isinstance(histories, UserHistory):
        return [histories], True
    rows = ItemIds.listed(histories, "a history")
    nested = [
        isinstance(row, UserHistory) or (isinstance(row, Iterable) and not isinstance(row, str | bytes | Mapping))
        for row in rows
    ]
    if any(nested) and not all(nested):
        raise UserError(
            f"{shown(histories)} mixes items and lists: give one user's items, or one list of items for each user"
        )
    return (rows, False) if any(nested) else ([rows], True)


def answer(
    recommender: Recommender,
    histories: Sequence[History],
    *,
    k: int = 10,
    mode: Mode = "direct",
    num_beams: int = 50,
    exhaustive: bool = False,
    repeats: bool | None = None,
    exclude: Sequence[Items] | None = None,
    batch_size: int = 16,
    strict: bool = False,
    progress: bool = False,
    chains: int = 1,
    max_chain: int = 128,
    seed: int = 0,
    unproven: bool = False,
    stream: Stream | None = None,
) -> Answered:
    """Rank items for each history, at once or behind chains; a checkpoint thinks only where that was shown to help.

    Args:
        recommender: Who recommends.
        histories: Everything each user had, oldest first.
        k: Items to return.
        mode: `direct` or `reasoning`.
        num_beams: See `How`, as for all that follow.
        exhaustive: See `How`.
        repeats: See `How`.
        exclude: See `How`.
        batch_size: See `How`.
        strict: See `How`.
        progress: See `How`.
        chains: See `How`.
        max_chain: See `How`.
        seed: See `How`.
        unproven: See `How`.
        stream: See `How`.

    Raises:
        UserError: If there is no such mode, or as `Recommender.rank`.
    """
    if mode not in ("direct", "reasoning"):
        raise UserError(f"mode={shown(mode)} has to be direct or reasoning")
    if mode == "reasoning" and exhaustive:
        raise UserError("exhaustive is for mode=direct; with chains, raise num_beams instead")
    k, verdict, note = whole("k", k, at_least=1), recommender.verdict, ""
    num_beams = max(whole("num_beams", num_beams, at_least=1), k)
    if mode == "reasoning" and not unproven and not (verdict and verdict.offered):
        mode, note = "direct", f"{verdict or UNMEASURED}: items at once instead"
    if mode == "direct":
        items, scores = recommender.rank(
            histories,
            k=k,
            num_beams=num_beams,
            exhaustive=exhaustive,
            repeats=repeats,
            exclude=exclude,
            batch_size=batch_size,
            strict=strict,
            progress=progress,
        )
        return Answered(items, scores, note=note)
    from reasonrec.recipes.rankers.reasoning import Reasoner, Thinking

    reasoner = Reasoner(recommender, k, num_beams, batch_size, progress)
    thinking = Thinking(chains, max_chain, seed=seed, stream=stream)
    found = reasoner(histories, thinking, repeats=repeats, exclude=exclude, strict=strict)
    thoughts = [[reasoner.readable(chain) for chain in own] for own in found.chains]
    return Answered(found.items, found.scores, thoughts)

"""Reasoning mode: the model writes chains of thought, and items are searched behind them.

One greedy chain, or several sampled ones: every chain proposes items from its own cache, each proposal is scored under
all of them, and an item's score is the log of its mean probability.

Whether a chain helps shows beside chains that cannot (`CONTROLS`): an empty one, another user's, a filler of equal
length, and the model's own without the items it names.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from reasonrec.data_gen.histories import UserHistory
from reasonrec.recipes.decoding.merge_chains import log_mean_exp
from reasonrec.recipes.decoding.sample import Sampler
from reasonrec.recipes.decoding.search import MAX_BEAMS, MAX_K
from reasonrec.recipes.evaluation.controls import donors
from reasonrec.recipes.policies.context import check_context
from reasonrec.recipes.policies.inference import Ranked, Ranking, Stream, rank, reason, score
from reasonrec.recipes.rankers.base import Ranker
from reasonrec.recipes.rankers.model import may_repeat
from reasonrec.recipes.recommender import Recommender
from reasonrec.recipes.recommending.items import History, Items
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.terminal import shown
from reasonrec.tokenizers.whole import INT64, whole

CONTROLS = ("empty chain", "another user's chain", "filler chain", "chain without items")
FILLER = " …"


@dataclass(frozen=True)
class Thinking:
    """How chains are written.

    Attributes:
        chains: Chains per user; one is greedy, several are sampled.
        max_chain: Longest chain in tokens; it is cut and closed there.
        temperature: Temperature of sampled chains.
        seed: Seed of sampled chains.
        stream: Told every step of the chains, and may end them (`inference.reason`).
    """

    chains: int = 1
    max_chain: int = 128
    temperature: float = 1.0
    seed: int = 0
    stream: Stream | None = None

    def __post_init__(self) -> None:
        for name, least in (("chains", 1), ("max_chain", 1), ("seed", 0)):
            whole(name, getattr(self, name), at_least=least)
        if not (isinstance(self.temperature, numbers.Real) and 0 < self.temperature < math.inf):
            raise UserError(f"temperature={shown(self.temperature)} has to be a finite number above 0")

    def sampler(self, close_ids: tuple[int, ...]) -> Sampler:
        """The same for `write_chains`."""
        return Sampler(self.chains, self.temperature, self.max_chain, close_ids, greedy=self.chains == 1)


@dataclass(frozen=True)
class Reasoner:
    """Ranks items behind chains.

    Attributes:
        recommender: The trained model.
        k: Items to return.
        num_beams: Items that each chain proposes.
        batch_size: Histories read at a time; it does not change the result.
        progress: Show progress bars.

    Raises:
        UserError: If a number is no whole number from 1 on.
    """

    recommender: Recommender
    k: int = 10
    num_beams: int = 50
    batch_size: int = 16
    progress: bool = False

    def __post_init__(self) -> None:
        for name, most in (("k", MAX_K), ("num_beams", MAX_BEAMS), ("batch_size", INT64)):
            whole(name, getattr(self, name), at_least=1, at_most=most)

    @property
    def close_ids(self) -> tuple[int, ...]:
        """Token ids of the closing delimiter."""
        return self.recommender.policy.prompts.close_ids

    def __call__(
        self,
        histories: Sequence[History],
        thinking: Thinking,
        *,
        repeats: bool | None = None,
        exclude: Sequence[Items] | None = None,
        strict: bool = False,
    ) -> Ranked:
        """Think, then recommend.

        Args:
            histories: Everything each user had, oldest first; the last `max_history` items are read.
            thinking: How chains are written.
            repeats: Whether a user may be recommended what they had already; as the data set says if None.
            exclude: For each history further items that must not appear.
            strict: Refuse unknown items and empty histories instead of warning about them.

        Raises:
            UserError: If prompt, chain and item are longer than the model's context, or as `Recommender.rank`.
        """
        recommender, policy = self.recommender, self.recommender.policy
        users = recommender.known(histories, strict=strict)
        excluded = recommender.excluded(users, repeats, exclude)
        check_context(
            recommender.model, policy, recommender.setting.max_history, trained=True, max_chain=thinking.max_chain
        )
        prompts = [policy.prompts.reasoning(shown) for shown in recommender.shown(users)]
        sampler = thinking.sampler(self.close_ids)
        return reason(
            policy,
            recommender.model,
            prompts,
            self._how,
            sampler,
            exclude=excluded,
            seed=thinking.seed,
            stream=thinking.stream,
        )

    def behind(
        self,
        histories: Sequence[History],
        chains: Sequence[Sequence[Sequence[int]]],
        *,
        repeats: bool | None = None,
        exclude: Sequence[Items] | None = None,
    ) -> NDArray[np.int64]:
        """Recommend behind given chains.

        Args:
            histories: Everything each user had, oldest first.
            chains: Token ids of the chains of each history, equally many for all, the closing delimiter included.
            repeats: Whether a user may be recommended what they had already; as the data set says if None.
            exclude: For each history further items that must not appear.

        Returns:
            Items (users, k).
        """
        behind = self.recommender.policy.prompts.behind

        def ended(shown: NDArray[np.int64], own: Sequence[Sequence[int]]) -> list[list[int]]:
            return [behind(shown, chain) for chain in own]

        return self._rank(histories, chains, ended, repeats, exclude)

    def variants(
        self,
        histories: Sequence[History],
        n: int,
        *,
        repeats: bool | None = None,
        exclude: Sequence[Items] | None = None,
    ) -> NDArray[np.int64]:
        """Recommend directly from `n` variants of each history, merged like chains.

        The variants leave out the oldest item, the two oldest, and so on: what merging alone buys, without a thought.
        """
        direct = self.recommender.policy.prompts.direct

        def shortened(shown: NDArray[np.int64], own: Sequence[int]) -> list[list[int]]:
            return [direct(shown[min(v, max(len(shown) - 1, 0)) :]) for v in own]

        return self._rank(histories, [range(n)] * len(histories), shortened, repeats, exclude)

    def readable(self, chain: Sequence[int]) -> str:
        """A chain as text, with titles in place of codes."""
        return self.recommender.policy.readable(self.body(chain))

    def body(self, chain: Sequence[int]) -> list[int]:
        """A chain without its closing delimiter."""
        ids, close = list(chain), list(self.close_ids)
        return ids[: len(ids) - len(close)] if ids[-len(close) :] == close else ids

    @property
    def _how(self) -> Ranking:
        progress = "reasoning" if self.progress else None
        return Ranking(self.k, self.num_beams, batch_size=self.batch_size, progress=progress)

    def _rank(
        self,
        histories: Sequence[History],
        given: Sequence[Any],
        prompts: Callable[[NDArray[np.int64], Any], list[list[int]]],
        repeats: bool | None,
        exclude: Sequence[Items] | None,
    ) -> NDArray[np.int64]:
        """Rank behind the prompts that are made of each history and what is given to it, equally many for all."""
        recommender = self.recommender
        users = recommender.known(histories)
        excluded = recommender.excluded(users, repeats, exclude)
        rows = [prompts(shown, own) for shown, own in zip(recommender.shown(users), given, strict=True)]
        flat = [row for one in rows for row in one]
        chains = len(rows[0]) if rows else 1
        return rank(recommender.policy, recommender.model, flat, self._how, exclude=excluded, chains=chains).items


@dataclass
class ReasoningRanker:
    """A model that thinks first, as a ranker.

    Attributes:
        reasoner: The model.
        thinking: How chains are written.
        name: Name in the table.
    """

    reasoner: Reasoner
    thinking: Thinking
    name: str
    last: Ranked | None = None

    def rank(self, rows: pl.DataFrame, k: int) -> NDArray[np.int64]:
        """See `Ranker`."""
        reasoner = replace(self.reasoner, k=k)
        self.last = reasoner(UserHistory.of_rows(rows), self.thinking, repeats=may_repeat(rows))
        return self.last.items

    def score(self, rows: pl.DataFrame, items: NDArray[np.integer]) -> NDArray[np.float32]:
        """See `Ranker`: log of the mean probability behind the chains."""
        recommender, policy = self.reasoner.recommender, self.reasoner.recommender.policy
        self.rank(rows, self.reasoner.k)
        assert self.last is not None
        shown = recommender.shown(UserHistory.of_rows(rows))
        prompts = [
            policy.prompts.behind(history, chain)
            for history, own in zip(shown, self.last.chains, strict=True)
            for chain in own
        ]
        n = self.thinking.chains
        scores = score(policy, recommender.model, prompts, np.repeat(items, n, axis=0))
        grouped = torch.from_numpy(scores).view(len(items), n, -1)
        return log_mean_exp(grouped).numpy()

    @property
    def tokens_per_user(self) -> float:
        """Tokens of the chains written last, for a case."""
        return 0.0 if self.last is None else float(self.last.tokens.mean())

    @property
    def cut(self) -> float:
        """Share of the chains that had to be cut."""
        return 0.0 if self.last is None else float(self.last.cut.mean())

    @property
    def thoughts(self) -> list[str]:
        """The first chain of each case, as text."""
        return [] if self.last is None else [self.reasoner.readable(chains[0]) for chains in self.last.chains]

    def controls(self, rows: pl.DataFrame, seed: int) -> Iterable[tuple[Ranker, str]]:
        """The same model behind chains that cannot help; for several chains, prompts merged without a chain."""
        assert self.last is not None
        histories, name, n = UserHistory.of_rows(rows), self.name.partition(",")[0], self.thinking.chains
        for control, chains in control_chains(self.reasoner, histories, self.last.chains, seed).items():
            behind = partial(Reasoner.behind, chains=chains)
            yield _Control(self.reasoner, behind, f"{name}, {control}"), "the same beam behind a chain put there"
        if n > 1:
            variants = partial(Reasoner.variants, n=n)
            yield _Control(self.reasoner, variants, f"{name}, {n} prompts merged"), "what merging alone buys"


@dataclass
class _Control:
    """A model behind what was put there, for the cases it was put there for."""

    reasoner: Reasoner
    rank_behind: Callable[..., NDArray[np.int64]]
    name: str

    def rank(self, rows: pl.DataFrame, k: int) -> NDArray[np.int64]:
        """See `Ranker`."""
        reasoner = replace(self.reasoner, k=k)
        return self.rank_behind(reasoner, UserHistory.of_rows(rows), repeats=may_repeat(rows))

    def score(self, rows: pl.DataFrame, items: NDArray[np.integer]) -> NDArray[np.floating]:
        """Controls are lists, not scores.

        Raises:
            UserError: Always.
        """
        raise UserError(f"{self.name} is a control: it ranks, and scores nothing")


def control_chains(
    reasoner: Reasoner, histories: Sequence[History], chains: Sequence[Sequence[Sequence[int]]], seed: int
) -> dict[str, list[list[list[int]]]]:
    """The chains of `CONTROLS`, made from the model's own; those without items only where items are codes.

    Args:
        reasoner: Whose tokenizer and codes they are.
        histories: History of each case.
        chains: Its own chains.
        seed: Seed of the exchange.
    """
    policy = reasoner.recommender.policy
    filler = list(policy.prompts.prompter.syntax(FILLER))
    donor = donors(reasoner.recommender.shown(reasoner.recommender.known(histories)), seed)

    def filled(length: int) -> list[int]:
        return [*(filler * (length // len(filler) + 1))[:length], *reasoner.close_ids]

    made = {
        "empty chain": [[list(reasoner.close_ids) for _ in own] for own in chains],
        "another user's chain": [[list(chain) for chain in chains[i]] for i in donor],
        "filler chain": [[filled(len(reasoner.body(chain))) for chain in own] for own in chains],
    }
    if policy.with_codes:  # titles are words like others
        made["chain without items"] = [[policy.without_items(chain) for chain in own] for own in chains]
    return made

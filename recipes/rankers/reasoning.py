"""Reasoning mode: the model writes chains of thought, and items are searched behind them.

One greedy chain, or several sampled ones: every chain proposes items from its own cache, each proposal is scored under
all of them, and an item's score is the log of its mean probability.

Whether a chain helps shows beside chains that cannot (`CONTROLS`): an empty one, another user's, a filler of equal
length, and the model's own without the items it names.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from reasonrec.data_gen.histories import UserHistory
from reasonrec.recipes.decoding.merge_chains import chains_room, search_chains
from reasonrec.recipes.decoding.prefix import Prefix, read
from reasonrec.recipes.decoding.sample import Sampler, noise, write_chains
from reasonrec.recipes.decoding.search import MAX_BEAMS, MAX_K
from reasonrec.recipes.evaluation.controls import donors
from reasonrec.recipes.items import History, Items
from reasonrec.recipes.models.context import check_context
from reasonrec.recipes.recommender import Recommender
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
    """

    chains: int = 1
    max_chain: int = 128
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("chains", 1), ("max_chain", 1), ("seed", 0)):
            whole(name, getattr(self, name), at_least=least)
        if not (isinstance(self.temperature, numbers.Real) and 0 < self.temperature < math.inf):
            raise UserError(f"temperature={shown(self.temperature)} has to be a finite number above 0")

    def sampler(self, close_ids: tuple[int, ...]) -> Sampler:
        """The same for `write_chains`."""
        return Sampler(self.chains, self.temperature, self.max_chain, close_ids, greedy=self.chains == 1)


@dataclass(frozen=True)
class Reasoned:
    """Items with what was thought before.

    Attributes:
        items: (users, k) item numbers, best first, -1 where fewer are allowed.
        scores: (users, k) log-probabilities.
        chains: Token ids of each user's chains; the closing delimiter is part of them, where they have one.
        tokens: (users,) tokens that were generated for the chains.
        cut: (users,) share of the chains that had to be cut.
    """

    items: NDArray[np.int64]
    scores: NDArray[np.float32]
    chains: list[list[list[int]]]
    tokens: NDArray[np.int64]
    cut: NDArray[np.float64]


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
        return self.recommender.bundle.prompts.close_ids

    def __call__(
        self,
        histories: Sequence[History],
        thinking: Thinking,
        *,
        repeats: bool | None = None,
        exclude: Sequence[Items] | None = None,
        strict: bool = False,
    ) -> Reasoned:
        """Think, then recommend.

        Args:
            histories: Everything each user had, oldest first; the last `max_history` items are read.
            thinking: How chains are written.
            repeats: Whether a user may be recommended what they had already; as the data set says if None.
            exclude: For each history further items that must not appear.
            strict: Refuse unknown items and empty histories instead of warning about them.

        Raises:
            UserError: If prompt, chain and item are longer than the model's context, or as `Recommender.recommend`.
        """
        recommender, bundle = self.recommender, self.recommender.bundle
        users = recommender.known(histories, strict=strict)
        known, excluded = self._shown(users), recommender.excluded(users, repeats, exclude)
        check_context(
            recommender.model, bundle, recommender.setting.max_history, trained=True, max_chain=thinking.max_chain
        )
        sampler, n = thinking.sampler(self.close_ids), thinking.chains
        room = chains_room(recommender.trie, self.num_beams, n)
        chains: list[list[list[int]]] = [[] for _ in known]
        tokens, cut = np.zeros(len(known), dtype=np.int64), np.zeros(len(known))

        def think(chunk: NDArray[np.int64]) -> Prefix:
            prompts = [bundle.prompts.reasoning(known[i]) for i in chunk]
            drawn = None if sampler.greedy else noise(thinking.seed, 0, chunk, n, thinking.max_chain)
            written = write_chains(
                recommender.model,
                bundle.vocabulary,
                prompts,
                sampler,
                eos_ids=[bundle.tokenizer.eos_token_id],
                pad_id=bundle.tokenizer.pad_token_id,
                room=room,
                noise=drawn,
            )
            for place, i in enumerate(chunk):
                mine = slice(place * n, (place + 1) * n)
                chains[i] = written.token_ids[mine]
                tokens[i], cut[i] = written.chain[mine].sum(), written.cut[mine].mean()
            return written.prefix

        items, scores = self._ranked(known, n, think, excluded)
        return Reasoned(items, scores, chains, tokens, cut)

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
        bundle = self.recommender.bundle
        users = self.recommender.known(histories)
        known, excluded = self._shown(users), self.recommender.excluded(users, repeats, exclude)
        begin = bundle.vocabulary.begin_id

        def prompts(i: int) -> list[list[int]]:
            opening = bundle.prompts.reasoning(known[i])
            return [[*opening, *chain, begin] for chain in chains[i]]

        return self._read_and_rank(known, len(chains[0]), prompts, excluded)

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
        direct = self.recommender.bundle.prompts.direct
        users = self.recommender.known(histories)
        known, excluded = self._shown(users), self.recommender.excluded(users, repeats, exclude)

        def prompts(i: int) -> list[list[int]]:
            longest = len(known[i])
            return [direct(known[i][min(v, max(longest - 1, 0)) :]) for v in range(n)]

        return self._read_and_rank(known, n, prompts, excluded)

    def readable(self, chain: Sequence[int]) -> str:
        """A chain as text, with titles in place of codes."""
        bundle = self.recommender.bundle
        titles = bundle.catalogue.titles
        names = {tuple(ids): titles[item] for item, ids in enumerate(bundle.prompts.item_token_ids)}
        parts: list[str] = []
        words: list[int] = []
        chain, place = self.body(chain), 0
        while place < len(chain):
            lengths = (n for n in range(bundle.trie.depth, 0, -1) if tuple(chain[place : place + n]) in names)
            if n := next(lengths, 0):
                parts += [bundle.tokenizer.decode(words), f" [{names[tuple(chain[place : place + n])]}]"]
                words = []
            else:
                words.append(chain[place])
            place += max(n, 1)
        return "".join([*parts, bundle.tokenizer.decode(words)]).strip()

    def _shown(self, histories: Sequence[UserHistory]) -> list[NDArray[np.int64]]:
        return [history.last(self.recommender.setting.max_history).shown for history in histories]

    def body(self, chain: Sequence[int]) -> list[int]:
        """A chain without its closing delimiter."""
        ids, close = list(chain), list(self.close_ids)
        return ids[: len(ids) - len(close)] if ids[-len(close) :] == close else ids

    def _read_and_rank(
        self,
        known: Sequence[np.ndarray],
        n: int,
        prompts: Callable[[int], list[list[int]]],
        excluded: Sequence[NDArray[np.int64]] | None,
    ) -> NDArray[np.int64]:
        recommender = self.recommender
        room = chains_room(recommender.trie, self.num_beams, n)

        def prefix(chunk: NDArray[np.int64]) -> Prefix:
            input_ids, mask = recommender.padded([row for i in chunk for row in prompts(int(i))])
            return read(recommender.model, input_ids, mask, room=room, ahead=recommender.trie.depth)

        return self._ranked(known, n, prefix, excluded)[0]

    def _ranked(
        self,
        known: Sequence[np.ndarray],
        n: int,
        prefix: Callable[[NDArray[np.int64]], Prefix],
        excluded: Sequence[NDArray[np.int64]] | None,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Search behind the prefixes of each batch of histories; similar lengths stand together."""
        order = np.argsort([len(history) for history in known], kind="stable")
        items = np.full((len(known), self.k), -1, dtype=np.int64)
        scores = np.full((len(known), self.k), -np.inf, dtype=np.float32)
        starts = range(0, len(order), self.batch_size)
        for start in tqdm(starts, desc="reasoning", unit="batch", disable=None if self.progress else True):
            chunk = order[start : start + self.batch_size]
            with torch.no_grad():
                found = search_chains(
                    self.recommender.model,
                    self.recommender.trie,
                    self.recommender.bundle.vocabulary,
                    prefix(chunk),
                    chains=n,
                    k=self.k,
                    num_beams=self.num_beams,
                    exclude=None if excluded is None else [excluded[i] for i in chunk],
                )
            items[chunk] = found.items.cpu().numpy()
            scores[chunk] = found.scores.float().cpu().numpy()
        return items, scores


def control_chains(
    reasoner: Reasoner, histories: Sequence[History], chains: Sequence[Sequence[Sequence[int]]], seed: int
) -> dict[str, list[list[list[int]]]]:
    """The chains of `CONTROLS`, made from the model's own.

    Args:
        reasoner: Whose tokenizer and codes they are.
        histories: History of each case.
        chains: Its own chains.
        seed: Seed of the exchange.
    """
    bundle = reasoner.recommender.bundle
    filler = list(bundle.prompts.prompter.syntax(FILLER))
    donor = donors(reasoner._shown(reasoner.recommender.known(histories)), seed)

    def filled(length: int) -> list[int]:
        return [*(filler * (length // len(filler) + 1))[:length], *reasoner.close_ids]

    return {
        "empty chain": [[list(reasoner.close_ids) for _ in own] for own in chains],
        "another user's chain": [[list(chain) for chain in chains[i]] for i in donor],
        "filler chain": [[filled(len(reasoner.body(chain))) for chain in own] for own in chains],
        "chain without items": [
            [[token for token in chain if token < bundle.vocabulary.first_id] for chain in own] for own in chains
        ],
    }

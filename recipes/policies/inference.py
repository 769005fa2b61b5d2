"""Ranking and scoring behind prompts, batch by batch: the one loop of serving, evaluation, rewards and validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from reasonrec.recipes.decoding.answers import Choices
from reasonrec.recipes.decoding.prefix import Prefix
from reasonrec.recipes.decoding.prior import Priors
from reasonrec.recipes.decoding.sample import Sampler, noise, write_chains
from reasonrec.recipes.decoding.search import Exclude
from reasonrec.recipes.policies.base import Policy
from reasonrec.recipes.policies.sharing import each, exchange, mine
from reasonrec.tokenizers.environment import is_first_process

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Prompt = Sequence[int]
Counted = TypeVar("Counted")
# As `decoding.sample.Stream`, with the numbers of the users whose prompts they are in front.
Stream = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]]


@dataclass
class Ranked:
    """Items for each user, best first, and what was thought before.

    Attributes:
        items: (users, k) item numbers, -1 where fewer are allowed.
        scores: (users, k) log-probabilities, -inf there.
        proven: (users,) whether it is known that no other item belongs to the list.
        chains: Token ids of each user's chains; the closing delimiter is part of them, where they have one.
        tokens: (users,) tokens that were generated for the chains.
        cut: (users,) share of the chains that had to be cut.
    """

    items: NDArray[np.int64]
    scores: NDArray[np.float32]
    proven: NDArray[np.bool_]
    chains: list[list[list[int]]] = field(default_factory=list)
    tokens: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    cut: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True)
class Ranking:
    """How lists are made.

    Attributes:
        k: Items to return.
        width: Width of the search, where the policy searches.
        exact: Search on until each list is proven; behind a single prompt only.
        batch_size: Users read at a time; it does not change the result.
        progress: What a progress bar says; none without it.
    """

    k: int
    width: int
    exact: bool = False
    batch_size: int = 16
    progress: str | None = None


def rank(
    policy: Policy,
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    how: Ranking,
    *,
    exclude: Exclude | None = None,
    chains: int = 1,
    priors: Priors | None = None,
) -> Ranked:
    """Rank the catalogue behind prompts that end with the begin marker.

    Args:
        policy: How the model reads and answers.
        model: Causal LM below PEFT's wrapper, in evaluation mode.
        prompts: Token ids, those of a user together.
        how: How lists are made.
        exclude: For each user the items that must not appear.
        chains: Prompts of each user, whose judgements are averaged.
        priors: What the model is pooled with, for the users with given numbers; of one prompt each.
    """

    def read(users: NDArray[np.int64]) -> Prefix:
        rows = [prompts[user * chains + n] for user in users for n in range(chains)]
        return policy.answers.read(model, rows, policy.pad_id, policy.answers.room(how.width, chains))

    lengths = [len(prompts[i]) for i in range(0, len(prompts), chains)]
    return _ranked(policy, model, lengths, read, how, exclude, chains, priors)


def reason(
    policy: Policy,
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    how: Ranking,
    sampler: Sampler,
    *,
    exclude: Exclude | None = None,
    seed: int = 0,
    stream: Stream | None = None,
) -> Ranked:
    """Write chains behind prompts that end with the opening delimiter, and rank the catalogue behind them.

    Args:
        policy: How the model reads and answers.
        model: Causal LM below PEFT's wrapper, in evaluation mode.
        prompts: Token ids, one for each user.
        how: How lists are made.
        sampler: How chains are drawn.
        exclude: For each user the items that must not appear.
        seed: Seed of sampled chains.
        stream: Told every step of the chains, and may end them.
    """
    n, users = sampler.generations, len(prompts)
    chains: list[list[list[int]]] = [[] for _ in prompts]
    tokens, cut = np.zeros(users, dtype=np.int64), np.zeros(users)

    def think(chunk: NDArray[np.int64]) -> Prefix:
        written = write_chains(
            model,
            policy.answers,
            [prompts[user] for user in chunk],
            replace(sampler, stream=None if stream is None else partial(stream, chunk)),
            eos_ids=[policy.eos_id],
            pad_id=policy.pad_id,
            room=policy.answers.room(how.width, n),
            noise=None if sampler.greedy else noise(seed, 0, chunk, n, sampler.max_chain),
        )
        for place, user in enumerate(chunk):
            mine = slice(place * n, (place + 1) * n)
            chains[user] = written.token_ids[mine]
            tokens[user], cut[user] = written.chain[mine].sum(), written.cut[mine].mean()
        return written.prefix

    lengths = list(map(len, prompts))
    found = _ranked(policy, model, lengths, think, how, exclude, n)
    exchange(_batches(lengths, how.batch_size), chains, tokens, cut)
    found.chains, found.tokens, found.cut = chains, tokens, cut
    return found


@torch.no_grad()
def _ranked(
    policy: Policy,
    model: PreTrainedModel,
    lengths: Sequence[int],
    prefix: Callable[[NDArray[np.int64]], Prefix],
    how: Ranking,
    exclude: Exclude | None,
    chains: int,
    priors: Priors | None = None,
) -> Ranked:
    users = len(lengths)
    found = Ranked(
        np.full((users, how.k), -1, dtype=np.int64),
        np.full((users, how.k), -np.inf, dtype=np.float32),
        np.ones(users, dtype=np.bool_),
    )
    batches = _batches(lengths, how.batch_size)
    for chunk in _counted(mine(batches), how.progress):
        best = policy.answers.rank(
            model,
            prefix(chunk),
            k=how.k,
            width=how.width,
            exclude=None if exclude is None else [exclude[user] for user in chunk],
            exact=how.exact,
            chains=chains,
            prior=None if priors is None else priors(chunk),
        )
        found.items[chunk] = best.items.cpu().numpy()
        found.scores[chunk] = best.scores.float().cpu().numpy()
        found.proven[chunk] = best.proven.cpu().numpy()
    exchange(batches, found.items, found.scores, found.proven)
    return found


@torch.no_grad()
def score(
    policy: Policy,
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    items: NDArray[np.integer],
    *,
    batch_size: int = 16,
    progress: str | None = None,
    priors: Priors | None = None,
) -> NDArray[np.float32]:
    """Log-probabilities of given items behind prompts that end with the begin marker.

    Args:
        policy: How the model reads and answers.
        model: Causal LM below PEFT's wrapper, in evaluation mode.
        prompts: Token ids.
        items: (prompts, n) item numbers, each at most once per row.
        batch_size: Prompts read at a time; it does not change the result.
        progress: What a progress bar says; none without it.
        priors: What the model is pooled with, for the prompts with given numbers.

    Returns:
        (prompts, n).
    """
    scores = np.full(items.shape, -np.inf, dtype=np.float32)
    room = policy.answers.scored_room(items.shape[1])
    batches = _batches(list(map(len, prompts)), batch_size)
    for chunk in _counted(mine(batches), progress):
        prefix = policy.answers.read(model, [prompts[row] for row in chunk], policy.pad_id, room)
        wanted = torch.as_tensor(items[chunk].astype(np.int64), device=model.device)
        prior = None if priors is None else priors(chunk)
        scores[chunk] = policy.answers.score(model, prefix, wanted, prior).float().cpu().numpy()
    exchange(batches, scores)
    return scores


@torch.no_grad()
def choices(
    policy: Policy,
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    items: NDArray[np.integer],
    *,
    batch_size: int = 16,
    progress: str | None = None,
) -> Iterator[tuple[NDArray[np.int64], Choices]]:
    """What each token of an item was chosen from, batch by batch.

    Args:
        policy: How the model reads and answers.
        model: Causal LM below PEFT's wrapper, in evaluation mode.
        prompts: Token ids, which end with the begin marker.
        items: (prompts,) item behind each.
        batch_size: Prompts read at a time.
        progress: What a progress bar says; none without it.

    Yields:
        Numbers of prompts, and their choices.
    """
    room = policy.answers.scored_room(1)
    batches = _batches(list(map(len, prompts)), batch_size)

    def read(chunk: NDArray[np.int64]) -> list[torch.Tensor]:
        prefix = policy.answers.read(model, [prompts[row] for row in chunk], policy.pad_id, room)
        wanted = torch.as_tensor(items[chunk], device=model.device).long()
        return [part.cpu() for part in policy.answers.choices(model, prefix, wanted)]

    for chunk, found in _counted(each(read, batches), progress, len(batches)):
        yield chunk, Choices(*(part.to(model.device) for part in found))


def _batches(lengths: Sequence[int], size: int) -> list[NDArray[np.int64]]:
    """Similar lengths together, so that little is padding; whoever uses them puts results back to their places."""
    order = np.argsort(lengths, kind="stable")
    return [order[i : i + size] for i in range(0, len(order), size)]


def _counted(batches: Iterable[Counted], progress: str | None, total: int | None = None) -> tqdm[Counted]:
    shown = progress is not None and is_first_process()
    return tqdm(batches, desc=progress, total=total, unit="batch", disable=None if shown else True)

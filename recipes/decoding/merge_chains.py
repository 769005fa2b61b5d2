"""Items behind several chains: each user's chains propose items, all of them judge, and the judgements are averaged.

A chain is a sample of what a model thinks before it recommends. The probability of an item is its mean over chains, so
the merged score is the log of the mean of exp(log-probability): a proposal also counts under the chains that did not
make it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reasonrec.recipes.decoding.prefix import Prefix
from reasonrec.recipes.decoding.score import score_items
from reasonrec.recipes.decoding.search import Exclude, Found, ranked, search, search_room
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.trie import Trie
from reasonrec.tokenizers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def chains_room(trie: Trie, num_beams: int, chains: int) -> int:
    """Slots that `search_chains` needs behind the chains: those of rescoring the union."""
    union = num_beams * chains
    return max(search_room(trie, num_beams), sum(min(union, nodes) for nodes in trie.branching))


@torch.no_grad()
def search_chains(
    model: PreTrainedModel,
    trie: Trie,
    vocabulary: Vocabulary,
    prefix: Prefix,
    *,
    chains: int,
    k: int,
    num_beams: int,
    exclude: Exclude | None = None,
) -> Found:
    """Rank items behind several chains of each user.

    Args:
        model: The model that wrote the chains.
        trie: Trie of the items.
        vocabulary: Where the codes stand.
        prefix: (users * chains) rows, those of a user together, each prompt, chain and begin marker: what
            `prefix.adopt` made of the cache of `generate`, or `prefix.read` of the texts, with `chains_room` slots.
        chains: Chains per user.
        k: Items to return.
        num_beams: Items that each chain proposes.
        exclude: For each user the items that must not appear.

    Returns:
        Items of each user (users, k) by the log of their mean probability; exact for what any chain proposed.

    Raises:
        UserError: If the rows are no multiple of `chains`.
    """
    rows = len(prefix.position)
    if rows % chains:
        raise UserError(f"{rows} rows cannot be {chains} chains per user")
    excluded = trie.excluded_ranks(exclude) if exclude is not None else None
    if excluded is not None:
        excluded = excluded.repeat_interleave(chains, 0)
    found = search(model, trie, vocabulary, prefix, k=num_beams, num_beams=num_beams, excluded=excluded)
    # Each proposal once: sort, and blank what equals its neighbour.
    union = found.items.reshape(rows // chains, -1).sort(1).values
    union[:, 1:] = torch.where(union[:, 1:] == union[:, :-1], -1, union[:, 1:])
    widest = int((union >= 0).sum(1).max())
    union = union.sort(1, descending=True).values[:, : max(widest, 1)]
    scores = score_items(model, trie, vocabulary, prefix, union.repeat_interleave(chains, 0))
    merged = log_mean_exp(scores.view(rows // chains, chains, -1))
    return ranked(union, merged, k)


def log_mean_exp(log_probs: Tensor) -> Tensor:
    """Log of the mean probability over chains (users, chains, n) -> (users, n)."""
    return log_probs.logsumexp(1) - math.log(log_probs.shape[1])

"""Search over items: trie-constrained beam search after one prefill, exact on request.

The prompt is read once per user (`prefix.py`). The beams of a step are positions of *one* sequence: a 4-D attention
mask lets each see the prompt, its own ancestors and itself, so the cache is appended to and never reordered.

An item's score is the sum of the log-probabilities of its codes, each normalised over the legal children of its
prefix, so the probabilities of all items of the catalogue sum to 1. Excluded items are masked inside the trie (a
prefix with no item left is illegal); the others keep their probabilities, hence the ranking is that of the conditional
distribution given "not excluded".

Two things save forward passes and change no result. A prefix with a single item below is that item: its remaining
codes have probability 1. And of `n` items below a prefix of probability p the best has p/n at least and none has more
than p, so a prefix is dropped as soon as `k` others promise more than it can hold. The latter also shows when nothing
outside the beam can reach the list any more; an exact search goes on until that is so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from reasonrec.recipes.decoding.backbone import all_done
from reasonrec.recipes.decoding.beams import Beams, choose
from reasonrec.recipes.decoding.prefix import Prefix, forward, read
from reasonrec.recipes.decoding.prior import Prior
from reasonrec.tokenizers.constrain import check_vocabulary
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.rows import code_logits, log_normaliser
from reasonrec.tokenizers.trie import Trie
from reasonrec.tokenizers.vocabulary import Vocabulary
from reasonrec.tokenizers.whole import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Exclude = Sequence[Sequence[int] | np.ndarray]

# An exact search keeps this many times `num_beams` prefixes, and reads as many times what a beam search does at most.
PATIENCE = 8
MAX_K, MAX_BEAMS = 10**6, 2**31 - 1  # a list far beyond any reader, and what index arithmetic holds


@dataclass(frozen=True)
class Found:
    """Items found, best first.

    Attributes:
        items: (users, k) int64 item numbers, -1 where fewer than k items are allowed.
        scores: (users, k) float32 log-probabilities, -inf there.
        proven: (users,) bool, whether it is known that no other item belongs to the list.
    """

    items: Tensor
    scores: Tensor
    proven: Tensor


@torch.no_grad()
def beam_search(
    model: PreTrainedModel,
    trie: Trie,
    vocabulary: Vocabulary,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    k: int,
    num_beams: int,
    exclude: Exclude | None = None,
    exact: bool = False,
    full_vocabulary: bool = False,
) -> Found:
    """The `k` most probable items of a beam search `num_beams` wide.

    Args:
        model: Causal LM, or its PEFT wrapper's base model, in evaluation mode.
        trie: Trie of the items, on the model's device.
        vocabulary: Where the codes stand in the LLM's vocabulary.
        input_ids: (users, length) padded prompts that end with the begin marker.
        attention_mask: (users, length), 0 on the padding.
        k: Items to return.
        num_beams: Beams kept at every level, at least `k`.
        exclude: For each user the items that must not appear.
        exact: Read on, `num_beams` prefixes at a time, until the list is proven to be the best `k` of the catalogue
            (or patience ends: see `Found.proven`). Costs little where the model is sure of itself, and much where
            all items are about equally probable.
        full_vocabulary: Normalise over the whole vocabulary instead of the legal codes, as an unconstrained model
            would: slower, and what other kits report.

    Raises:
        UserError: If `num_beams` is smaller than `k`, a prompt is empty or too long, trie and vocabulary do not belong
            together, or the model cannot be searched (`prefix.check_searchable`).
        FloatingPointError: If the model returns NaN; the message names the step.
    """
    k, num_beams = check_width(k, num_beams)
    room = search_room(trie, num_beams, full_vocabulary=full_vocabulary)
    prefix = read(model, input_ids, attention_mask, room=room, ahead=trie.depth)
    excluded = trie.excluded_ranks(exclude) if exclude is not None else None
    return search(
        model,
        trie,
        vocabulary,
        prefix,
        k=k,
        num_beams=num_beams,
        excluded=excluded,
        exact=exact,
        full_vocabulary=full_vocabulary,
    )


def check_width(k: int, num_beams: int) -> tuple[int, int]:
    """The length of a list and the width of its search, as integers.

    Raises:
        UserError: If one of them is no whole number from 1 on, or the search is narrower than the list.
    """
    k = whole("k", k, at_least=1, at_most=MAX_K)
    num_beams = whole("num_beams", num_beams, at_least=1, at_most=MAX_BEAMS)
    if k > num_beams:
        raise UserError(f"num_beams={num_beams} has to be at least k={k}, the length of the list")
    return k, num_beams


def search_room(trie: Trie, num_beams: int, *, full_vocabulary: bool = False) -> int:
    """Slots that a beam search needs behind the prompt; an exact one makes more room as it needs it."""
    if full_vocabulary:
        return min(num_beams, trie.n_items) * (trie.depth - 1)
    return sum(min(num_beams, nodes) for nodes in trie.branching)


@torch.no_grad()
def search(
    model: PreTrainedModel,
    trie: Trie,
    vocabulary: Vocabulary,
    prefix: Prefix,
    *,
    k: int,
    num_beams: int,
    excluded: Tensor | None = None,
    exact: bool = False,
    full_vocabulary: bool = False,
    prior: Prior | None = None,
) -> Found:
    """`beam_search` behind what was read before; the prefix can be searched, scored or extended again afterwards.

    Args:
        model: The model that read the prefix.
        trie: Trie of the items.
        vocabulary: Where the codes stand.
        prefix: Prompts that end with the begin marker, with `search_room` slots left.
        k: Items to return.
        num_beams: Beams kept at every level.
        excluded: What `trie.excluded_ranks` returned.
        exact: See `beam_search`.
        full_vocabulary: See `beam_search`.
        prior: What the model is pooled with; probabilities are then those of the pool, given "not excluded".
    """
    check_vocabulary(trie, vocabulary)
    k, num_beams = check_width(k, num_beams)
    rows, device = len(prefix.position), prefix.position.device
    prefix.cache.rewind(prefix.length)
    # The prefixes read last, at first that of no code, and what each prefix read so far sees: (rows, read, slots).
    read, waiting = Beams.root(rows, device), Beams.none(rows, device)
    hidden, tree = prefix.hidden[:, None], prefix.seen[:, None]
    lost = torch.full((rows,), -torch.inf, device=device)
    patience = PATIENCE if exact else 1
    left = [search_room(trie, num_beams, full_vocabulary=full_vocabulary) * patience] * rows
    for step in count():
        # Exact searches read prefixes of several lengths at a time.
        widest = max(trie.widths[1 : step + 1]) if exact and step else trie.widths[step]
        best = choose(
            trie,
            code_logits(model, hidden, vocabulary),
            read,
            waiting,
            first=tree.shape[1] - read.node.shape[1],
            width=widest,
            k=k,
            keep=num_beams * patience,
            normaliser=log_normaliser(model, hidden) if full_vocabulary else None,
            excluded=excluded,
            prior=prior,
        )
        lost = lost.maximum(best.lost)
        # The only time a step waits for the device.
        *counts, is_nan = torch.cat([best.is_open.sum(1), best.is_nan[None]]).tolist()
        if is_nan:
            raise FloatingPointError(f"the model returned NaN logits at step {step} of the item search")
        counts = [min(count, num_beams, most) for count, most in zip(counts, left, strict=True)]
        left = [most - count for most, count in zip(left, counts, strict=True)]
        width = max(counts)
        if all_done(width):
            break
        if exact and prefix.cache.length + width > prefix.cache.capacity:
            prefix.cache.reserve(prefix.cache.length + 2 * width)
        # Open beams first; what stands behind them is not read.
        order = (~best.is_open).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
        is_read = best.is_open & (best.is_open.cumsum(1) <= torch.tensor(counts, device=device)[:, None])
        read, waiting = best.beams.take(order), best.beams.without(is_read)
        read = read.without(~is_read.gather(1, order))
        ancestors = tree.gather(1, read.parent[..., None].expand(-1, -1, tree.shape[2]))
        seen = torch.cat([ancestors, torch.eye(width, dtype=torch.bool, device=device).expand(rows, -1, -1)], 2)
        tree = torch.cat([torch.nn.functional.pad(tree, (0, width)), seen], 1)
        positions = prefix.position[:, None] + read.level - 1
        tokens = vocabulary.first_id + read.column
        hidden = forward(model, prefix.cache, tokens, positions, seen, counts=counts)
    prefix.cache.rewind(prefix.length)
    found = ranked(best.beams.item, best.beams.score.masked_fill(best.beams.item < 0, -torch.inf), k)
    lost = lost.maximum(best.beams.score.masked_fill(~best.is_open, -torch.inf).amax(1))
    return replace(found, proven=lost <= found.scores[:, -1])


def ranked(items: Tensor, scores: Tensor, k: int) -> Found:
    """The best `k` of (rows, n) items, filled up with nothing; whether others are better is not known."""
    best, order = scores.sort(dim=1, descending=True, stable=True)
    missing = max(k - items.shape[1], 0)
    items = torch.nn.functional.pad(items.gather(1, order), (0, missing), value=-1)
    best = torch.nn.functional.pad(best, (0, missing), value=-torch.inf)
    return Found(items[:, :k], best[:, :k], torch.zeros(len(items), dtype=torch.bool, device=items.device))

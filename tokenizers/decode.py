"""Search over items: exact trie-constrained beam search after one prefill, and scorers of given items.

The prompt is read once per user (`prefix.py`). The K beams of a step are K positions of *one* sequence: a 4-D
attention mask lets each see the prompt, its own ancestors and itself, so the cache is appended to and never copied or
reordered.

An item's score is the sum of the log-probabilities of its codes, each normalised over the legal children of its
prefix, so the probabilities of all items of the catalogue sum to 1. Excluded items are masked inside the trie (a
prefix with no item left is illegal); the others keep their probabilities, hence the ranking is that of the conditional
distribution given "not excluded".

Two things save forward passes and change no result. A prefix with a single item below is that item: its remaining
codes have probability 1. And a beam that is less probable than `k` items already found cannot lead into the list of
`k`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from reasonrec.tokenizers.constrain import check_vocabulary, legal_log_probs
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.prefix import Prefix, forward, read
from reasonrec.tokenizers.rows import code_logits, log_normaliser
from reasonrec.tokenizers.trie import Trie
from reasonrec.tokenizers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Exclude = Sequence[Sequence[int] | np.ndarray]


@dataclass(frozen=True)
class Found:
    """Items found, best first.

    Attributes:
        items: (users, k) int64 item numbers, -1 where fewer than k items are allowed.
        scores: (users, k) float32 log-probabilities, -inf there.
    """

    items: Tensor
    scores: Tensor


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
    full_vocabulary: bool = False,
) -> Found:
    """The `k` most probable items of a beam search `num_beams` wide; exact if that is the catalogue's size.

    Args:
        model: Causal LM, or its PEFT wrapper's base model, in evaluation mode.
        trie: Trie of the items, on the model's device.
        vocabulary: Where the codes stand in the LLM's vocabulary.
        input_ids: (users, length) padded prompts that end with the begin marker.
        attention_mask: (users, length), 0 on the padding.
        k: Items to return.
        num_beams: Beams kept at every level, at least `k`.
        exclude: For each user the items that must not appear.
        full_vocabulary: Normalise over the whole vocabulary instead of the legal codes, as an unconstrained model
            would: slower, and what other kits report.

    Raises:
        UserError: If `num_beams` is smaller than `k`, a prompt is empty or too long, trie and vocabulary do not belong
            together, or the model cannot be searched (`prefix.check_searchable`).
        FloatingPointError: If the model returns NaN; the message names the step.
    """
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
        full_vocabulary=full_vocabulary,
    )


def search_room(trie: Trie, num_beams: int, *, full_vocabulary: bool = False) -> int:
    """Slots that a search needs behind the prompt."""
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
    full_vocabulary: bool = False,
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
        full_vocabulary: See `beam_search`.
    """
    check_vocabulary(trie, vocabulary)
    if not 1 <= k <= num_beams:
        raise UserError(f"num_beams={num_beams} has to be at least k={k}, the length of the list, and k at least 1")
    rows, device = len(prefix.position), prefix.position.device
    prefix.cache.rewind(prefix.length)
    # Open beams, and the finished ones beside them.
    node, score = torch.zeros(rows, 1, dtype=torch.int64, device=device), torch.zeros(rows, 1, device=device)
    done_item, done_score = node[:, :0], score[:, :0]
    hidden, seen = prefix.hidden[:, None], prefix.seen[:, None]  # (rows, beams, width), (rows, beams, slots)
    for step in range(trie.depth):
        logits = code_logits(model, hidden, vocabulary)
        normaliser = log_normaliser(model, hidden) if full_vocabulary else None
        best = choose(
            trie, step, logits, node, score, done_item, done_score, normaliser, excluded, k=k, num_beams=num_beams
        )
        done_item, done_score = best.item, best.score.masked_fill(best.item < 0, -torch.inf)
        # The only time a step waits for the device.
        width, is_nan = torch.stack([best.is_open.sum(1).max(), best.is_nan]).tolist()
        if is_nan:
            raise FloatingPointError(f"the model returned NaN logits at step {step} of the item search")
        if width == 0:
            break
        # Open beams first, so that a step is only as wide as the row with most of them.
        order = (~best.is_open).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
        node = torch.where(best.is_open, best.node, -1).gather(1, order)
        score, parent = best.score.gather(1, order), best.parent.gather(1, order)
        tokens = vocabulary.first_id + best.column.gather(1, order)
        ancestors = seen.expand(rows, -1, -1).gather(1, parent[..., None].expand(-1, -1, seen.shape[2]))
        itself = torch.eye(width, dtype=torch.bool, device=device).expand(rows, -1, -1)
        seen = torch.cat([ancestors, itself], 2)
        hidden = forward(model, prefix.cache, tokens, (prefix.position + step)[:, None].expand(-1, width), seen)
    prefix.cache.rewind(prefix.length)
    return ranked(done_item, done_score, k)


@dataclass(frozen=True)
class Choice:
    """The best beams of a step, best first.

    Attributes:
        node: (rows, beams) where they stand; -1 for items that were finished before.
        score: (rows, beams) log-probabilities, -inf where there are fewer.
        parent: (rows, beams) the open beam each comes from.
        column: (rows, beams) the code that was added.
        item: (rows, beams) the item of a finished beam, else -1.
        is_open: (rows, beams) whether the beam has to go on.
        is_nan: () whether the model returned NaN.
    """

    node: Tensor
    score: Tensor
    parent: Tensor
    column: Tensor
    item: Tensor
    is_open: Tensor
    is_nan: Tensor


def choose(
    trie: Trie,
    step: int,
    logits: Tensor,
    node: Tensor,
    score: Tensor,
    done_item: Tensor,
    done_score: Tensor,
    normaliser: Tensor | None = None,
    excluded: Tensor | None = None,
    *,
    k: int,
    num_beams: int,
) -> Choice:
    """Keep the best among the legal continuations of all beams and the items finished before.

    Args:
        trie: Trie of the items.
        step: Level of the codes that are added.
        logits: (rows, beams, columns) of the open beams.
        node: (rows, beams) where they stand, -1 for none.
        score: (rows, beams) their log-probabilities.
        done_item: (rows, finished) items found before, -1 for none.
        done_score: (rows, finished) their log-probabilities.
        normaliser: (rows, beams) what to subtract from logits; None normalises over the legal codes.
        excluded: What `trie.excluded_ranks` returned.
        k: Length of the list: a beam behind `k` finished ones cannot reach it any more.
        num_beams: Beams to keep.
    """
    child, column = trie.children(node, trie.widths[step])  # (rows, beams, width)
    if normaliser is None:
        gain = legal_log_probs(logits, child, column)
    else:
        gain = (logits.gather(-1, column) - normaliser[..., None]).masked_fill(child < 0, -torch.inf)
    total = (score[..., None] + gain).masked_fill(~trie.allowed(child, excluded), -torch.inf).flatten(1)
    n_new = total.shape[1]
    kept, index = torch.cat([total, done_score], 1).topk(min(num_beams, n_new + done_score.shape[1]), dim=1)
    place = index.clamp(max=n_new - 1)
    real = kept > -torch.inf
    new_node = torch.where(real & (index < n_new), child.flatten(1).gather(1, place), -1)
    # Under full normalisation even a certain code has a probability below 1: only a leaf is the end.
    item = trie.only_item(new_node) if normaliser is None else trie.leaf_item(new_node)
    if done_item.shape[1]:
        item = torch.where(index < n_new, item, done_item.gather(1, (index - n_new).clamp(min=0)))
    item = torch.where(real, item, -1)
    return Choice(
        node=new_node,
        score=kept,
        parent=place // child.shape[2],
        column=column.flatten(1).gather(1, place),
        item=item,
        is_open=real & (item < 0) & ((item >= 0).cumsum(1) < k),
        is_nan=gain.isnan().any(),
    )


def ranked(items: Tensor, scores: Tensor, k: int) -> Found:
    """The best `k` of (rows, n) items, filled up with nothing."""
    best, order = scores.sort(dim=1, descending=True, stable=True)
    missing = max(k - items.shape[1], 0)
    items = torch.nn.functional.pad(items.gather(1, order), (0, missing), value=-1)
    best = torch.nn.functional.pad(best, (0, missing), value=-torch.inf)
    return Found(items[:, :k], best[:, :k])


@torch.no_grad()
def score_items(
    model: PreTrainedModel,
    trie: Trie,
    vocabulary: Vocabulary,
    prefix: Prefix,
    items: Tensor,
    *,
    full_vocabulary: bool = False,
) -> Tensor:
    """Log-probabilities of given items, each row's in one forward pass: their prefixes stand side by side as a tree.

    Args:
        model: The model that read the prefix.
        trie: Trie of the items.
        vocabulary: Where the codes stand.
        prefix: Prompts that end with the begin marker, with a slot left for each prefix of the items that more than
            one item begins with.
        items: (rows, n) item numbers, each at most once per row; -1 is no item.
        full_vocabulary: See `beam_search`.

    Returns:
        (rows, n) float32, -inf for no item.
    """
    rows, device = len(items), items.device
    # In leaf order, items with a common prefix stand together.
    rank = torch.where(items >= 0, trie.leaf_rank[items.clamp(min=0)].long(), trie.n_items)
    order = rank.argsort(1)
    node = trie.paths(items.gather(1, order)).transpose(1, 2)  # (rows, depth, n)
    is_open = (node >= 0) & ~trie.is_leaf(node)
    if not full_vocabulary:
        is_open &= trie.only_item(node) < 0
    first = is_open.clone()
    first[..., 1:] &= node[..., 1:] != node[..., :-1]
    # Each distinct open prefix of a row gets a place, shorter ones first; place 0 is the root.
    place = first.flatten(1).cumsum(1).view_as(node) * is_open
    width = int(place.amax())
    row, level, at = first.nonzero(as_tuple=True)
    here = place[row, level, at]
    nodes = torch.full((rows, width + 1), -1, dtype=torch.int64, device=device)
    nodes[:, 0] = 0
    nodes[row, here] = node[row, level, at]
    hidden = prefix.hidden[:, None]
    if width:
        tokens = vocabulary.first_id + trie.edge_keys[nodes[:, 1:].clamp(min=1) - 1] % trie.n_columns
        positions = prefix.position[:, None].expand(-1, width).clone()
        positions[row, here - 1] += level
        among = torch.eye(width, dtype=torch.bool, device=device).repeat(rows, 1, 1)
        for above in range(trie.depth - 1):
            below = level > above
            among[row[below], here[below] - 1, place[row[below], above, at[below]] - 1] = True
        seen = torch.cat([prefix.seen[:, None].expand(-1, width, -1), among], 2)
        prefix.cache.rewind(prefix.length)
        hidden = torch.cat([hidden, forward(model, prefix.cache, tokens, positions, seen)], 1)
        prefix.cache.rewind(prefix.length)
    child, column = trie.children(nodes)
    logits = code_logits(model, hidden, vocabulary)
    if full_vocabulary:
        gain = logits.gather(-1, column) - log_normaliser(model, hidden)[..., None]
    else:
        gain = legal_log_probs(logits, child, column)  # (rows, places, width)
    if bool(gain.isnan().any()):
        raise FloatingPointError("the model returned NaN logits while it scored items")
    # Level by level: from the place of the parent to the item's own child.
    parent = torch.cat([torch.zeros_like(place[:, :1]), place[:, :-1]], 1)
    from_open = torch.cat([torch.ones_like(is_open[:, :1]), is_open[:, :-1]], 1) & (node >= 0)
    first_child = child[..., 0].gather(1, parent.flatten(1)).view_as(node)
    number = torch.where(from_open, node - first_child, 0)  # children are consecutive
    flat = parent * gain.shape[2] + number
    steps = gain.flatten(1).gather(1, flat.flatten(1)).view_as(node)
    total = torch.where(from_open, steps, 0).sum(1)  # (rows, n) in leaf order
    total = torch.where(node[:, 0] >= 0, total, -torch.inf)
    return torch.empty_like(total).scatter_(1, order, total)


@torch.no_grad()
def score_all_items(
    model: PreTrainedModel,
    trie: Trie,
    vocabulary: Vocabulary,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    item_token_ids: Sequence[Sequence[int]],
    batch_size: int = 256,
) -> Tensor:
    """Log-probability of every item by reading prompt and item together, without cache or beams: slow and plain.

    The reference that the search is tested against. A beam as wide as the catalogue gives the same in a fraction of
    the time.

    Args:
        model: Causal LM in evaluation mode.
        trie: Trie of the items.
        vocabulary: Where the codes stand.
        input_ids: (users, length) left-padded prompts that end with the begin marker.
        attention_mask: (users, length).
        item_token_ids: Token ids of each item.
        batch_size: Sequences per forward pass.

    Returns:
        (users, items) float32 log-probabilities.
    """
    n_items, depth = len(item_token_ids), trie.depth
    device = input_ids.device
    codes = torch.full((n_items, depth), -1, dtype=torch.int64)
    for i, tokens in enumerate(item_token_ids):
        codes[i, : len(tokens)] = torch.tensor(tokens)
    codes = codes.to(device)
    scores = torch.empty(len(input_ids), n_items)
    for user, (prompt, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
        prompt = prompt[mask.bool()]
        for begin in range(0, n_items, batch_size):
            tail = codes[begin : begin + batch_size]  # (batch, depth)
            ids = torch.cat([prompt.expand(len(tail), -1), tail.clamp(min=vocabulary.first_id)], 1)
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            hidden = hidden[:, len(prompt) - 1 : -1]  # (batch, depth, width): what predicts each code
            logits = code_logits(model, hidden, vocabulary)
            node = torch.zeros(len(tail), dtype=torch.int64, device=device)
            total = torch.zeros(len(tail), device=device)
            for level in range(depth):
                real = tail[:, level] >= 0
                child, column = trie.children(torch.where(real, node, -1))
                target = trie.child(node, tail[:, level] - vocabulary.first_id)
                gain = legal_log_probs(logits[:, level], child, column)
                picked = torch.where(child == target[:, None], gain, 0).masked_fill(child < 0, 0).sum(1)
                total = torch.where(real, total + picked, total)
                node = torch.where(real, target, node)
            scores[user, begin : begin + batch_size] = total.cpu()
    return scores

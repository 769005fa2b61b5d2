"""Log-probabilities of given items: a few per prompt in one forward pass, or all of them the slow and plain way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from reasonrec.recipes.decoding.backbone import last_hidden
from reasonrec.recipes.decoding.prefix import Prefix, forward
from reasonrec.recipes.decoding.prior import Prior
from reasonrec.tokenizers.constrain import legal_log_probs
from reasonrec.tokenizers.rows import code_logits, log_normaliser
from reasonrec.tokenizers.trie import Trie
from reasonrec.tokenizers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Read(NamedTuple):
    """The prefixes of given items that more than one item begins with, the root first, and what follows them.

    Attributes:
        hidden: (rows, places, width) hidden states behind them.
        level: (rows, places) codes they have.
        child: (rows, places, children) nodes that follow, -1 where there is none.
        column: (rows, places, children) their codes.
        order: (rows, n) the items in the order of their leaves.
        node: (rows, depth, n) nodes on the way to these, -1 behind a leaf.
        is_open: (rows, depth, n) which of them stand among the prefixes.
        place: (rows, depth, n) and where.
    """

    hidden: Tensor
    level: Tensor
    child: Tensor
    column: Tensor
    order: Tensor
    node: Tensor
    is_open: Tensor
    place: Tensor


@torch.no_grad()
def score_items(
    model: PreTrainedModel,
    trie: Trie,
    vocabulary: Vocabulary,
    prefix: Prefix,
    items: Tensor,
    *,
    full_vocabulary: bool = False,
    prior: Prior | None = None,
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
        prior: What the model is pooled with; not with the full vocabulary.

    Returns:
        (rows, n) float32, -inf for no item.
    """
    read = read_prefixes(model, trie, vocabulary, prefix, items, everything=full_vocabulary)
    child, node, place = read.child, read.node, read.place
    logits = code_logits(model, read.hidden, vocabulary)
    if full_vocabulary:
        gain = logits.gather(-1, read.column) - log_normaliser(model, read.hidden)[..., None]
    else:
        gain = legal_log_probs(logits, child, read.column)  # (rows, places, width)
    if bool(gain.isnan().any()):
        raise FloatingPointError("the model returned NaN logits while it scored items")
    if prior is not None:
        gain = prior.pooled(gain, child, read.level)
    # Level by level: from the place of the parent to the item's own child.
    parent = torch.cat([torch.zeros_like(place[:, :1]), place[:, :-1]], 1)
    from_open = torch.cat([torch.ones_like(read.is_open[:, :1]), read.is_open[:, :-1]], 1) & (node >= 0)
    first_child = child[..., 0].gather(1, parent.flatten(1)).view_as(node)
    number = torch.where(from_open, node - first_child, 0)  # children are consecutive
    flat = parent * gain.shape[2] + number
    steps = gain.flatten(1).gather(1, flat.flatten(1)).view_as(node)
    total = torch.where(from_open, steps, 0).sum(1)  # (rows, n) in leaf order
    total = torch.where(node[:, 0] >= 0, total, -torch.inf)
    return torch.empty_like(total).scatter_(1, read.order, total)


@torch.no_grad()
def read_prefixes(
    model: PreTrainedModel,
    trie: Trie,
    vocabulary: Vocabulary,
    prefix: Prefix,
    items: Tensor,
    *,
    everything: bool = False,
) -> Read:
    """Read the prefixes of given items in one forward pass.

    Args:
        model: As for `score_items`.
        trie: As for `score_items`.
        vocabulary: As for `score_items`.
        prefix: As for `score_items`.
        items: As for `score_items`.
        everything: Also those that only one item begins with, but for whole items.
    """
    rows, device = len(items), items.device
    # In leaf order, items with a common prefix stand together.
    rank = torch.where(items >= 0, trie.leaf_rank[items.clamp(min=0)].long(), trie.n_items)
    order = rank.argsort(1)
    node = trie.paths(items.gather(1, order)).transpose(1, 2)  # (rows, depth, n)
    is_open = (node >= 0) & ~trie.is_leaf(node)
    if not everything:
        is_open &= trie.only_item(node) < 0
    first = is_open.clone()
    first[..., 1:] &= node[..., 1:] != node[..., :-1]
    # Each distinct open prefix of a row gets a place, shorter ones first; place 0 is the root.
    place = first.flatten(1).cumsum(1).view_as(node) * is_open
    counts = place.flatten(1).amax(1).tolist()
    width = max(counts)
    row, level, at = first.nonzero(as_tuple=True)
    here = place[row, level, at]
    nodes = torch.full((rows, width + 1), -1, dtype=torch.int64, device=device)
    nodes[:, 0] = 0
    nodes[row, here] = node[row, level, at]
    levels = torch.zeros_like(nodes)
    levels[row, here] = level + 1
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
        hidden = torch.cat([hidden, forward(model, prefix.cache, tokens, positions, seen, counts=counts)], 1)
        prefix.cache.rewind(prefix.length)
    child, column = trie.children(nodes)
    return Read(hidden, levels, child, column, order, node, is_open, place)


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
            hidden = last_hidden(model, input_ids=ids, use_cache=False)
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

"""Search over items: exact trie-constrained beam search after one prefill, and a brute-force scorer as the reference.

The prompt is read once per user. The K beams of a step are K positions of *one* sequence: a 4-D attention mask lets
each see the prompt, its own ancestors and itself, so the cache is appended to and never copied or reordered.

An item's score is the sum of the log-probabilities of its codes, each normalised over the legal children of its
prefix, so the probabilities of all items of the catalogue sum to 1. Excluded items are masked inside the trie (a
prefix with no item left is illegal); the others keep their probabilities, hence the ranking is that of the conditional
distribution given "not excluded".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.rows import code_logits
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
) -> Found:
    """The `k` most probable items of a beam search `num_beams` wide; exact if that is the catalogue's size.

    Args:
        model: Causal LM, or its PEFT wrapper's base model, in evaluation mode.
        trie: Trie of the items, on the model's device.
        vocabulary: Where the codes stand in the LLM's vocabulary.
        input_ids: (users, length) left-padded prompts that end with the begin marker.
        attention_mask: (users, length), 0 on the padding.
        k: Items to return.
        num_beams: Beams kept at every level, at least `k`.
        exclude: For each user the items that must not appear.

    Raises:
        UserError: If `num_beams` is smaller than `k`, or the model cannot be searched (`check_searchable`).
        FloatingPointError: If the model returns NaN; the message names the step.
    """
    if num_beams < k:
        raise UserError(f"num_beams={num_beams} has to be at least k={k}, the length of the list")
    users = len(input_ids)
    device = input_ids.device
    excluded = trie.excluded_ranks(exclude) if exclude is not None else None
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    check_searchable(model, int(positions.max()) + 1 + trie.depth)
    output = model.base_model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        past_key_values=DynamicCache(),  # without the config: a sliding layer's cache would drop what beams still see
        use_cache=True,
    )
    cache, hidden = output.past_key_values, output.last_hidden_state[:, -1:]  # (users, 1, width)
    next_position = positions[:, -1] + 1
    seen = attention_mask.bool()[:, None]  # (users, 1, cached): what each beam sees of the cache

    node = torch.zeros(users, 1, dtype=torch.int64, device=device)
    score = torch.zeros(users, 1, device=device)
    done_node = node[:, :0]
    done_score = score[:, :0]
    for step in range(trie.depth):
        # `node`, `score`, `hidden` hold the open beams; finished ones wait in `done_*`.
        logits = code_logits(model, hidden, vocabulary)
        if torch.isnan(logits).any():
            raise FloatingPointError(f"the model returned NaN logits at step {step} of the item search")
        child, column = trie.children(node)  # (users, beams, width)
        gain = legal_log_probs(logits, child, column)
        total = (score[..., None] + gain).masked_fill(~trie.allowed(child, excluded), -torch.inf)
        flat = torch.cat([total.flatten(1), done_score], 1)
        kept, index = flat.topk(min(num_beams, flat.shape[1]), dim=1)  # (users, beams)
        new_node = torch.cat([child.flatten(1), done_node], 1).gather(1, index)
        new_node = torch.where(kept > -torch.inf, new_node, -1)
        finished = (new_node < 0) | (trie.leaf_item[new_node.clamp(min=0)] >= 0)
        done_node, done_score = torch.where(finished, new_node, -1), kept.masked_fill(~finished, -torch.inf)
        if bool(finished.all()):
            break
        # Open beams first, so that a step is only as wide as the user with most of them.
        order = finished.to(torch.int8).argsort(dim=1, stable=True)[:, : int((~finished).sum(1).max())]
        is_open = ~finished.gather(1, order)  # (users, open)
        node = torch.where(is_open, new_node.gather(1, order), -1)
        score = kept.gather(1, order)
        chosen = index.gather(1, order).clamp(max=child[0].numel() - 1)
        tokens = vocabulary.first_id + column.flatten(1).gather(1, chosen)
        parent = chosen // child.shape[2]  # the open beam of the step before
        width = node.shape[1]
        ancestors = seen.expand(users, -1, -1).gather(1, parent[..., None].expand(-1, -1, seen.shape[2]))
        itself = torch.eye(width, dtype=torch.bool, device=device).expand(users, -1, -1)
        seen = torch.cat([ancestors, itself], 2)  # (users, open, cached + open)
        mask = torch.zeros(seen.shape, dtype=hidden.dtype, device=device)
        mask.masked_fill_(~seen, torch.finfo(hidden.dtype).min)
        output = model.base_model(
            input_ids=tokens,
            attention_mask=mask[:, None],
            position_ids=(next_position + step)[:, None].expand(-1, width),
            past_key_values=cache,
            use_cache=True,
        )
        cache, hidden = output.past_key_values, output.last_hidden_state
    items = torch.where(done_node >= 0, trie.leaf_item[done_node.clamp(min=0)], -1)
    best, order = done_score.sort(dim=1, descending=True, stable=True)
    items = items.gather(1, order)
    if items.shape[1] < k:
        items = torch.nn.functional.pad(items, (0, k - items.shape[1]), value=-1)
        best = torch.nn.functional.pad(best, (0, k - best.shape[1]), value=-torch.inf)
    return Found(items[:, :k], best[:, :k])


def check_searchable(model: PreTrainedModel, length: int) -> None:
    """The beams of a step stand side by side in one sequence: only plain attention can keep them apart.

    Args:
        model: Causal LM.
        length: Tokens of the longest prompt and an item.

    Raises:
        UserError: If the model has a recurrent state, or attends less far back than `length`.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if getattr(model, "_is_stateful", False) or not kinds <= {"full_attention", "sliding_attention"}:
        raise UserError(
            f"{config.model_type} models keep a recurrent state, which the item search cannot share between beams: "
            "take a model whose layers are all attention"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and "sliding_attention" in kinds and length > window:
        raise UserError(
            f"the longest prompt and an item have {length} tokens, but {config.model_type} attends over {window} in "
            "some layers: lower max_history"
        )


def legal_log_probs(logits: Tensor, child: Tensor, column: Tensor) -> Tensor:
    """Log-softmax over the legal children.

    Args:
        logits: (..., columns) logits of all code columns.
        child: (..., width) child nodes, -1 where there is none.
        column: (..., width) their columns.

    Returns:
        (..., width) log-probabilities; -inf where there is no child.
    """
    legal = logits.gather(-1, column).masked_fill(child < 0, -torch.inf)
    # A position without any child (padding) would be NaN; it gets -inf.
    return torch.nan_to_num(legal.log_softmax(-1), nan=-torch.inf, neginf=-torch.inf)


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

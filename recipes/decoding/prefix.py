"""What a model has read of each user, kept in a cache that the item search writes behind and rewinds again."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reasonrec.recipes.decoding.attention import TAKE_MASKS, additive, branches
from reasonrec.recipes.decoding.backbone import last_hidden
from reasonrec.recipes.decoding.cache import SearchCache
from reasonrec.recipes.decoding.pack import Packing
from reasonrec.tokenizers.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.cache_utils import Cache


@dataclass(frozen=True)
class Prefix:
    """Prompts (and chains) that have been read.

    Attributes:
        cache: Keys and values; slots behind `length` may be overwritten.
        seen: (rows, length) which slots hold a row's own tokens.
        position: (rows,) position of the next token.
        hidden: (rows, width) last hidden state: what predicts the next token.
    """

    cache: SearchCache
    seen: Tensor
    position: Tensor
    hidden: Tensor

    @property
    def length(self) -> int:
        """Slots filled."""
        return self.seen.shape[1]


def forward(
    model: PreTrainedModel,
    cache: SearchCache,
    tokens: Tensor,
    positions: Tensor,
    seen: Tensor,
    *,
    counts: Sequence[int] | None = None,
    shared: int = 0,
) -> Tensor:
    """Read tokens behind what the cache holds.

    Args:
        model: Causal LM.
        cache: Where they go.
        tokens: (rows, new) token ids.
        positions: (rows, new) their positions.
        seen: (rows, new, slots) what each of them attends to, itself included.
        counts: How many tokens of each row are real, the first ones; the rest is padding, and as little of it is read
            as possible (`pack.py`).
        shared: How many tokens all rows begin with, if nothing stands before them.

    Returns:
        (rows, new, width) last hidden states; 0 on padding that was not read.
    """
    (rows, new), before = tokens.shape, cache.length
    packing = None if counts is None else Packing.of(counts, tokens.device, shared=shared, before=before)
    if packing is not None:
        tokens, positions, seen = packing.put(tokens), packing.put(positions), packing.mask(seen, before)
    cache.grow(new)
    cache.packing = packing
    try:
        with branches(model) as takes_booleans:
            mask = seen[:, None]
            if not takes_booleans:
                mask = additive(mask, model.get_input_embeddings().weight.dtype)
            hidden = last_hidden(
                model,
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
    finally:
        cache.packing = None
    return hidden if packing is None else packing.take(hidden, new, rows)


def padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Left-padded rows of token ids: input_ids and attention_mask, each (rows, length)."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (length - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


@torch.no_grad()
def read(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, *, room: int, ahead: int = 0) -> Prefix:
    """Read prompts once, without spending much on padding, or on what all of them begin with.

    Args:
        model: Causal LM, in evaluation mode.
        input_ids: (users, length) prompts, padded on either side.
        attention_mask: (users, length), 0 on the padding.
        room: Slots to keep behind the prompts.
        ahead: Tokens that will follow a prompt, for the check against the model's context.

    Raises:
        UserError: If a prompt is empty or too long, or the model cannot be searched (`check_searchable`).
    """
    users, device = len(input_ids), input_ids.device
    lengths = attention_mask.sum(1)
    sizes: list[int] = lengths.tolist()
    shortest, longest = min(sizes), max(sizes)
    if shortest == 0:
        raise UserError("a prompt is empty: it has to hold the begin marker at least")
    check_searchable(model, longest + ahead)
    slot = torch.arange(longest, device=device)
    real = slot < lengths[:, None]
    ids = input_ids.new_zeros(users, longest).masked_scatter_(real, input_ids[attention_mask.bool()])
    same = (ids[:, : shortest - 1] == ids[:1, : shortest - 1]).all(0)
    cache = SearchCache(users, longest + room)
    hidden = forward(
        model,
        cache,
        ids,
        slot.expand(users, -1),
        (slot[:, None] >= slot).expand(users, -1, -1),
        counts=sizes,
        shared=int(same.cummin(0).values.sum()) if shortest > 1 else 0,
    )
    return Prefix(cache, real, lengths, hidden[torch.arange(users, device=device), lengths - 1])


@torch.no_grad()
def extend(model: PreTrainedModel, prefix: Prefix, input_ids: Tensor, attention_mask: Tensor | None = None) -> Prefix:
    """Read more tokens behind a prefix.

    Args:
        model: The model that read the prefix.
        prefix: What it has read; its cache is written to, so what was read behind it before is forgotten.
        input_ids: (rows, new) at least one token for each row.
        attention_mask: (rows, new), 0 on padding.

    Returns:
        The longer prefix; the shorter one stays valid until its cache is written to again.
    """
    return extend_all(model, prefix, input_ids, attention_mask)[0]


@torch.no_grad()
def extend_all(
    model: PreTrainedModel, prefix: Prefix, input_ids: Tensor, attention_mask: Tensor | None = None
) -> tuple[Prefix, Tensor]:
    """As `extend`, and the last hidden states of all that was read: (rows, new, width)."""
    new, device = input_ids.shape[1], input_ids.device
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    positions = (prefix.position[:, None] + mask.cumsum(1) - 1).clamp(min=0)
    itself = torch.eye(new, dtype=torch.bool, device=device)
    among = (mask.bool()[:, None] & torch.ones_like(itself).tril()) | itself
    seen = torch.cat([prefix.seen[:, None].expand(-1, new, -1), among], 2)
    prefix.cache.rewind(prefix.length)
    hidden = forward(model, prefix.cache, input_ids, positions, seen)
    last = (mask * torch.arange(1, new + 1, device=device)).amax(1) - 1
    longer = Prefix(
        prefix.cache,
        torch.cat([prefix.seen, mask.bool()], 1),
        prefix.position + mask.sum(1),
        hidden[torch.arange(len(hidden), device=device), last],
    )
    return longer, hidden


@torch.no_grad()
def adopt(
    model: PreTrainedModel,
    past: Cache,
    attention_mask: Tensor,
    input_ids: Tensor,
    new_mask: Tensor | None = None,
    *,
    room: int,
) -> Prefix:
    """Go on from the cache that `generate` left, for instance behind sampled chains.

    Args:
        model: The model that filled it.
        past: What `generate(..., return_dict_in_generate=True)` returned as `past_key_values`: the last token
            sampled is not in it.
        attention_mask: (rows, slots) which of its slots count: 0 on left padding and behind the end of a chain.
        input_ids: (rows, new) tokens that follow, the begin marker last.
        new_mask: (rows, new), 0 on padding.
        room: Slots to keep behind them.
    """
    rows, slots = attention_mask.shape
    cache = SearchCache(rows, slots + input_ids.shape[1] + room)
    cache.copy_from(past, slots)
    hidden = torch.empty(rows, 0, device=attention_mask.device)
    return extend(model, Prefix(cache, attention_mask.bool(), attention_mask.sum(1), hidden), input_ids, new_mask)


def check_architecture(model: PreTrainedModel) -> None:
    """The beams of a step stand side by side in one sequence: only plain attention can keep them apart.

    Args:
        model: Causal LM.

    Raises:
        UserError: If the model has a recurrent state, counts positions by itself (ALiBi), or uses an attention kernel
            that takes no masks.
    """
    config = model.config.get_text_config()
    if getattr(model, "_is_stateful", False) or not _layer_kinds(config) <= {"full_attention", "sliding_attention"}:
        raise UserError(
            f"{config.model_type} models keep a recurrent state, which the item search cannot share between beams: "
            "take a model whose layers are all attention"
        )
    takes = inspect.signature(type(model.base_model).forward).parameters
    if getattr(config, "alibi", False) or "position_ids" not in takes:
        raise UserError(
            f"{config.model_type} models take positions from the place in the sequence, where the item search puts "
            "beams side by side: take a model with rotary or learned positions"
        )
    if config._attn_implementation not in TAKE_MASKS:
        raise UserError(
            f"attn_implementation={config._attn_implementation} takes no attention masks, which the item search needs "
            "to keep beams apart: load the model with attn_implementation=sdpa"
        )


def _layer_kinds(config: PreTrainedConfig) -> set[str]:
    return set(getattr(config, "layer_types", None) or ["sliding_attention"])


def context_limit(model: PreTrainedModel) -> tuple[int | None, str]:
    """The longest sequence that every layer of a model sees as a whole.

    Args:
        model: Causal LM.

    Returns:
        Tokens, None if the configuration names no limit; and what it says in words.
    """
    config = model.config.get_text_config()
    limits = [(getattr(config, "max_position_embeddings", None), "sees at most")]
    if "sliding_attention" in _layer_kinds(config):
        limits.append((getattr(config, "sliding_window", None), "in some layers sees only"))
    known = [(limit, words) for limit, words in limits if limit is not None]
    return min(known, key=lambda found: found[0]) if known else (None, "")


def check_searchable(model: PreTrainedModel, length: int) -> None:
    """Check that a model can be searched behind prompts of some length.

    Args:
        model: Causal LM.
        length: Tokens of the longest prompt and an item.

    Raises:
        UserError: As `check_architecture`; or if the model attends less far back than `length`, or has no positions
            for it.
    """
    check_architecture(model)
    limit, words = context_limit(model)
    if limit is not None and length > limit:
        raise UserError(
            f"the longest prompt and an item have {length} tokens, but {model.config.get_text_config().model_type} "
            f"{words} {limit}: lower max_history (whole items are dropped, the oldest first) or shorten the prompt"
        )

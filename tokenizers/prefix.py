"""What a model has read of each user, kept in a cache that the item search writes behind and rewinds again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reasonrec.tokenizers.cache import SearchCache
from reasonrec.tokenizers.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
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


def forward(model: PreTrainedModel, cache: SearchCache, tokens: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
    """Read tokens behind what the cache holds.

    Args:
        model: Causal LM.
        cache: Where they go.
        tokens: (rows, new) token ids.
        positions: (rows, new) their positions.
        seen: (rows, new, slots) what each of them attends to, itself included.

    Returns:
        (rows, new, width) last hidden states.
    """
    cache.grow(tokens.shape[1])
    mask = seen[:, None]
    if model.config._attn_implementation != "sdpa":  # which alone takes booleans
        dtype = model.get_input_embeddings().weight.dtype
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
    output = model.base_model(
        input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    )
    return output.last_hidden_state


def padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Left-padded rows of token ids: input_ids and attention_mask, each (rows, length)."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (length - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


@torch.no_grad()
def read(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, *, room: int, ahead: int = 0) -> Prefix:
    """Read prompts once, without spending anything on padding.

    Short prompts share a row of the input (each sees itself only), so a batch costs about as much as it has tokens;
    in the cache every user has a row.

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
    if min(sizes) == 0:
        raise UserError("a prompt is empty: it has to hold the begin marker at least")
    longest = max(sizes)
    check_searchable(model, longest + ahead)
    places, n_rows = pack(sizes)
    row_of, column_of = torch.tensor(places, device=device).T
    user = torch.arange(users, device=device).repeat_interleave(lengths)
    slot = torch.arange(len(user), device=device) - (lengths.cumsum(0) - lengths)[user]
    row, column = row_of[user], column_of[user] + slot
    ids, owner, positions = (input_ids.new_full((n_rows, longest), fill) for fill in (0, -1, 0))
    ids[row, column] = input_ids[attention_mask.bool()]
    owner[row, column] = user
    positions[row, column] = slot
    causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    cache = SearchCache(users, longest + room)
    cache.packed = (row, column, user, slot)
    hidden = forward(model, cache, ids, positions, (owner[:, :, None] == owner[:, None]) & causal)
    cache.packed = None
    cache.rewind(longest)
    seen = torch.arange(longest, device=device) < lengths[:, None]
    return Prefix(cache, seen, lengths, hidden[row_of, column_of + lengths - 1])


def pack(lengths: list[int]) -> tuple[list[tuple[int, int]], int]:
    """Put prompts into rows as long as the longest: each, longest first, into the first row with room for it.

    Args:
        lengths: Tokens of each prompt.

    Returns:
        Row and first column of each prompt, and the number of rows.
    """
    places = [(0, 0)] * len(lengths)
    filled: list[int] = []
    longest = max(lengths)
    for prompt in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        size = lengths[prompt]
        row = next((r for r, used in enumerate(filled) if used + size <= longest), len(filled))
        if row == len(filled):
            filled.append(0)
        places[prompt] = (row, filled[row])
        filled[row] += size
    return places, len(filled)


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
    new, device = input_ids.shape[1], input_ids.device
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    positions = (prefix.position[:, None] + mask.cumsum(1) - 1).clamp(min=0)
    itself = torch.eye(new, dtype=torch.bool, device=device)
    among = (mask.bool()[:, None] & torch.ones_like(itself).tril()) | itself
    seen = torch.cat([prefix.seen[:, None].expand(-1, new, -1), among], 2)
    prefix.cache.rewind(prefix.length)
    hidden = forward(model, prefix.cache, input_ids, positions, seen)
    last = (mask * torch.arange(1, new + 1, device=device)).amax(1) - 1
    return Prefix(
        prefix.cache,
        torch.cat([prefix.seen, mask.bool()], 1),
        prefix.position + mask.sum(1),
        hidden[torch.arange(len(hidden), device=device), last],
    )


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


def check_searchable(model: PreTrainedModel, length: int) -> None:
    """The beams of a step stand side by side in one sequence: only plain attention can keep them apart.

    Args:
        model: Causal LM.
        length: Tokens of the longest prompt and an item.

    Raises:
        UserError: If the model has a recurrent state, attends less far back than `length`, has no positions for it,
            or uses an attention kernel that takes no masks.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if getattr(model, "_is_stateful", False) or not kinds <= {"full_attention", "sliding_attention"}:
        raise UserError(
            f"{config.model_type} models keep a recurrent state, which the item search cannot share between beams: "
            "take a model whose layers are all attention"
        )
    if config._attn_implementation not in ("sdpa", "eager"):
        raise UserError(
            f"attn_implementation={config._attn_implementation} takes no attention masks, which the item search needs "
            "to keep beams apart: load the model with attn_implementation=sdpa"
        )
    limits = {"sees at most": getattr(config, "max_position_embeddings", None)}
    if "sliding_attention" in kinds:
        limits["in some layers sees only"] = getattr(config, "sliding_window", None)
    for what, limit in limits.items():
        if limit is not None and length > limit:
            raise UserError(
                f"the longest prompt and an item have {length} tokens, but {config.model_type} {what} {limit}: lower "
                "max_history (whole items are dropped, the oldest first) or shorten the prompt"
            )

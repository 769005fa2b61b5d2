"""Reading a prompt once for all completions that are scored behind it.

The completions of a group share their prompt, and in direct mode the prompt is ten times as long as what follows. So
they are laid out as branches of one sequence: the prompt, then each completion, under an attention mask that shows a
branch the prompt and itself only. The hidden states, and through them losses and gradients, are those of reading every
row by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reasonrec.recipes.decoding.attention import TAKE_MASKS, as_taken
from reasonrec.recipes.decoding.backbone import last_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORTH = 0.7  # share of the tokens at which it pays: masks are slower than plain causal attention


def can_share(model: PreTrainedModel) -> bool:
    """Whether every layer takes an attention mask of our own."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    plain = kinds == {"full_attention"} and getattr(config, "sliding_window", None) is None
    return plain and config._attn_implementation in TAKE_MASKS and not getattr(model, "_is_stateful", False)


def shared_hidden(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, first: int) -> Tensor | None:
    """Hidden states that predict the tokens from place `first` on.

    Args:
        model: Causal LM.
        input_ids: (batch, length) prompts, padded on the left to `first` tokens, and completions.
        attention_mask: (batch, length), 0 on padding.
        first: Where completions begin.

    Returns:
        (batch, length - first, width), or None where too little is shared, or the model cannot do it.
    """
    batch, length = input_ids.shape
    if not can_share(model) or first < 1:
        return None
    head, device = attention_mask[:, :first], input_ids.device
    unique, owner = torch.cat([input_ids[:, :first] * head, head], 1).unique(dim=0, return_inverse=True)
    count = owner.bincount()
    tail = length - first - 1  # the last token of a completion predicts nothing
    slots = first + int(count.max()) * tail
    if len(unique) * slots > WORTH * batch * (length - 1):
        return None
    order = owner.argsort(stable=True)
    branch = torch.empty_like(owner)  # number of each row among those of its prompt
    branch[order] = torch.arange(batch, device=device) - (count.cumsum(0) - count)[owner[order]]
    step = torch.arange(tail, device=device)
    place, of = first + branch[:, None] * tail + step, owner[:, None]  # (batch, tail)

    ids, positions, lane = (input_ids.new_full((len(unique), slots), fill) for fill in (0, 0, -1))
    real = torch.zeros_like(ids, dtype=torch.bool)
    prompt = unique[:, first:].bool()
    ids[:, :first], real[:, :first], lane[:, :first] = unique[:, :first], prompt, 0
    positions[:, :first] = (prompt.cumsum(1) - 1).clamp(min=0)
    ids[of, place], real[of, place] = input_ids[:, first:-1], attention_mask[:, first:-1].bool()
    lane[of, place] = branch[:, None] + 1
    positions[of, place] = prompt.sum(1)[of] + step
    slot = torch.arange(slots, device=device)
    same = (lane[:, None] == 0) | (lane[:, None] == lane[:, :, None])
    sees = (same & real[:, None] & (slot[:, None] >= slot)) | torch.eye(slots, dtype=torch.bool, device=device)
    mask = as_taken(model, sees)
    hidden = last_hidden(model, input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    before = torch.full((batch, 1), first - 1, device=device)
    return hidden[of, torch.cat([before, place], 1)]

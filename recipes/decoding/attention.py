"""Attention on a CPU, for the item search and for training: short sequences, or short branches that share their keys.

PyTorch's fused attention is made for long sequences of one history each. In the search a row has a few dozen new
tokens and not many more keys, and on a CPU the fused kernel then costs several times its matrix products, after keys
and values were repeated for the query heads that share them. Two batched products over the heads as they are stored
are faster; `tests/benchmarks/decoding.py` measures both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BRANCHES = "reasonrec_branches"  # the name it has in transformers
TAKE_MASKS = ("sdpa", "eager", BRANCHES)  # what takes attention masks of one's own
# Attention weights of a layer, all heads together, for which it is worth it: below, calls cost more than products;
# above, the weights no longer fit into the caches, and the fused kernel never stores them.
_FEWEST, _MOST = 2**15, 2**22
_OTHER = ("softcap", "position_bias", "s_aux", "cache")  # what some architectures add


def branch_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers asks its `AttentionInterface` for it; what it is no good at, the fused kernel does.

    Args:
        module: The attention layer.
        query: (rows, heads, new, width).
        key: (rows, key heads, slots, width).
        value: (rows, key heads, slots, value width).
        attention_mask: (rows, 1, new, slots), added to the attention logits.
        dropout: Must be 0 for the products.
        scaling: Of the attention logits.
        **kwargs: What else the architecture passes.

    Returns:
        (rows, new, heads, value width), and no weights.
    """
    rows, heads, new, width = query.shape
    shared, slots = key.shape[1:3]
    special = dropout > 0 or any(kwargs.get(name) is not None for name in _OTHER)
    mask = None if attention_mask is None else attention_mask.to(query.dtype)
    if mask is None or special or not _FEWEST <= rows * heads * new * slots <= _MOST:
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)
    each = heads // shared * new  # queries of the heads that share keys stand below each other
    logits = torch.bmm(query.reshape(-1, each, width), key.reshape(-1, slots, width).transpose(1, 2))
    scale = width**-0.5 if scaling is None else scaling
    logits = torch.add(mask, logits.view(rows, heads, new, slots), alpha=scale)
    weights = logits.softmax(-1, dtype=torch.float32).to(query.dtype)
    mixed = torch.bmm(weights.view(-1, each, slots), value.reshape(rows * shared, slots, -1))
    return mixed.view(rows, heads, new, -1).transpose(1, 2).contiguous(), None


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as what is added to attention logits."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def as_taken(model: PreTrainedModel, seen: Tensor) -> Tensor:
    """A boolean mask (rows, new, slots) in the form that a model's own attention takes, (rows, 1, new, slots)."""
    if model.config._attn_implementation == "sdpa":  # which alone takes booleans
        return seen[:, None]
    return additive(seen[:, None], model.get_input_embeddings().weight.dtype)


AttentionInterface.register(BRANCHES, branch_attention)
AttentionMaskInterface.register(BRANCHES, eager_mask)  # where no mask of one's own is given


@contextmanager
def branches(model: PreTrainedModel) -> Iterator[bool]:
    """Let a model attend this way for a while, if it runs on a CPU and uses the fused kernel otherwise.

    Yields:
        Whether it takes boolean masks meanwhile.
    """
    config = model.config
    before = config._attn_implementation
    if before != "sdpa" or model.device.type != "cpu":
        yield before == "sdpa"
        return
    config._attn_implementation = BRANCHES
    try:
        yield False
    finally:
        config._attn_implementation = before

"""The embedding rows of the code tokens: how they start, and how to read them wherever PEFT keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from reasonrec.tokenizers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def text_rows(
    embedding: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    codes: np.ndarray,
    texts: Sequence[str],
) -> Tensor:
    """Start every row from the text of the items that carry the code.

    An item's vector is the mean of its text's token embeddings; a code's vector is the mean over its items, less the
    mean of its level (else all codes of a level start almost equal), scaled to the length of an ordinary token's
    deviation from the vocabulary mean, and moved to that mean. The begin marker starts at the mean.

    Args:
        embedding: (vocabulary, width) the pre-trained input embedding.
        tokenizer: The tokenizer that belongs to it.
        vocabulary: Where the new rows go.
        codes: (items, levels) codes, -1 where an item has none.
        texts: Text of each item.

    Returns:
        (1 + columns, width) float32 rows: the begin marker, then the columns.
    """
    known = embedding[: vocabulary.begin_id].detach().float().cpu()
    mean = known.mean(0)
    spread = (known - mean).norm(dim=1).mean()
    ids = tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=64)["input_ids"]
    items = torch.stack([known[row].mean(0) if row else mean for row in ids])  # (items, width)
    levels = []
    for level, size in enumerate(vocabulary.level_sizes):
        code = torch.as_tensor(codes[:, level].astype(np.int64))
        carries = code >= 0
        total = torch.zeros(size, known.shape[1]).index_add_(0, code[carries], items[carries])
        count = torch.bincount(code[carries], minlength=size)[:, None]
        centre = items[carries].mean(0) if carries.any() else mean
        deviation = torch.where(count > 0, total / count.clamp(min=1) - centre, 0)
        deviation = deviation / deviation.norm(dim=1, keepdim=True).clamp(min=1e-6) * spread
        levels.append(mean + deviation)
    return torch.cat([mean[None], *levels])


def new_rows(module: nn.Module, vocabulary: Vocabulary) -> Tensor:
    """The code rows of an embedding or LM head, in or out of PEFT's hands, with gradient.

    Args:
        module: What `get_input_embeddings()` or `get_output_embeddings()` returned.
        vocabulary: Which rows.

    Returns:
        (1 + columns, width), the begin marker first.
    """
    adapter: Any = getattr(module, "token_adapter", module)
    delta = getattr(adapter, "trainable_tokens_delta", None)
    if delta is not None and not adapter.merged and not adapter.disable_adapters:
        active = adapter.active_adapters[0]
        if active in delta and adapter.token_indices[active] == vocabulary.token_ids:
            return delta[active]
    weight: Any = module.weight if delta is None else adapter.get_base_layer().weight
    return weight[vocabulary.begin_id : vocabulary.size]


def code_logits(model: PreTrainedModel, hidden: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Logits of the code tokens only, in float32.

    Args:
        model: The causal LM (not its PEFT wrapper).
        hidden: (..., width) last hidden states.
        vocabulary: Where the codes stand.

    Returns:
        (..., columns) logits, scaled and soft-capped as the architecture does.
    """
    head = model.get_output_embeddings()
    rows = new_rows(head, vocabulary)[1:]
    with torch.autocast(hidden.device.type, enabled=False):  # or bf16 training would round what inference does not
        logits = hidden.float() @ rows.float().T
    plain = head.token_adapter.get_base_layer() if hasattr(head, "token_adapter") else head
    if getattr(plain, "bias", None) is not None:  # Phi, GPT-J
        logits = logits + plain.bias[vocabulary.first_id : vocabulary.size].float()
    return scale_logits(model, logits)


def log_normaliser(model: PreTrainedModel, hidden: Tensor, chunk: int = 256) -> Tensor:
    """Log of the softmax denominator over the full vocabulary.

    Args:
        model: The causal LM (not its PEFT wrapper).
        hidden: (..., width) last hidden states.
        chunk: Positions whose logits exist at a time.

    Returns:
        (...) float32.
    """
    head = model.get_output_embeddings()
    parts = [
        scale_logits(model, head(part).float()).logsumexp(-1)
        for part in hidden.reshape(-1, hidden.shape[-1]).split(chunk)
    ]
    return torch.cat(parts).view(hidden.shape[:-1])


def scale_logits(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """What some architectures do behind the head: multiply (Cohere, Granite, Falcon-H1) and soft-cap (Gemma)."""
    config = model.config.get_text_config()
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
    scale = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        scale = config.logits_scaling if config.model_type == "hyperclovax" else 1 / config.logits_scaling
    if scale is not None:
        logits = logits * scale
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def text_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits of the full vocabulary in float32, (..., width) to (..., vocabulary)."""
    return scale_logits(model, model.get_output_embeddings()(hidden).float())

"""The policy that is trained is the policy that recommends: a softmax over legal codes where an item is written.

TRL calls the causal LM with `fused_lm_head=True` and reads log-probabilities, entropies and labels from the output.
This module answers that call itself: positions whose label is a code are scored over the legal children of their
prefix in the item trie (the decoder's rule), all others over the full vocabulary. The vocabulary-wide head is computed
only for the latter, so training on items alone never touches it. Everything else (losses, importance ratios, reference
log-probabilities, distributed training) is TRL's.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from trl.trainer.utils import FusedCausalLMOutput

from reasonrec.recipes.decoding.shared_prefix import shared_hidden
from reasonrec.tokenizers.constrain import legal_log_probs
from reasonrec.tokenizers.rows import code_logits, text_logits
from reasonrec.tokenizers.trie import Trie
from reasonrec.tokenizers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEXT_CHUNK = 1024  # text positions whose full-vocabulary logits exist at a time


def prefix_nodes(trie: Trie, vocabulary: Vocabulary, input_ids: Tensor, row: Tensor, position: Tensor) -> Tensor:
    """Trie node of the codes that stand before each code label.

    Args:
        trie: Trie of the items.
        vocabulary: Where the codes stand.
        input_ids: (batch, length) token ids.
        row: (n,) batch row of each label.
        position: (n,) position of each label in its row; `input_ids` holds the label there.

    Returns:
        (n,) node numbers, -1 where the codes before the label are no prefix of an item.
    """
    ends = torch.tensor(vocabulary.level_sizes, device=input_ids.device).cumsum(0)
    level = torch.searchsorted(ends, input_ids[row, position] - vocabulary.first_id, right=True)
    node = torch.zeros_like(row)
    for back in range(len(vocabulary.level_sizes) - 1):
        inside = back < level
        column = input_ids[row, (position - level + back).clamp(min=0)] - vocabulary.first_id
        node = torch.where(inside, trie.child(node, column), node)
    return node


def item_log_probs(
    model: PreTrainedModel,
    trie: Trie,
    vocabulary: Vocabulary,
    hidden: Tensor,
    node: Tensor,
    label: Tensor,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score code labels over the legal children of their prefixes.

    Args:
        model: Causal LM.
        trie: Trie of the items.
        vocabulary: Where the codes stand.
        hidden: (n, width) hidden states that predict the labels.
        node: (n,) prefix node of each label.
        label: (n,) token id of each label.
        temperature: What the logits are divided by.

    Returns:
        Log-probability, entropy and whether the label is the most probable child, each (n,).

    Raises:
        ValueError: If a label does not continue its prefix to an item of the catalogue.
    """
    target = trie.child(node, label - vocabulary.first_id)
    if bool((target < 0).any()):
        raise ValueError(
            "a code label does not continue a prefix of the item trie: the data was made with another index"
        )
    child, column = trie.children(node)
    log_probs = legal_log_probs(code_logits(model, hidden, vocabulary) / temperature, child, column)
    legal = child >= 0
    is_target = child == target[:, None]
    finite = torch.where(legal, log_probs, 0)
    entropy = -(finite.exp() * finite * legal).sum(-1)
    return (
        torch.where(is_target, finite, 0).sum(-1),
        entropy,
        is_target.gather(-1, log_probs.argmax(-1, keepdim=True))[:, 0],
    )


def _text_chunk(
    model: PreTrainedModel, hidden: Tensor, label: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    log_probs = (text_logits(model, hidden) / temperature).log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, label[:, None])[:, 0], entropy, log_probs.argmax(-1) == label


def text_log_probs(
    model: PreTrainedModel, hidden: Tensor, label: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Score text labels over the full vocabulary, in chunks that are recomputed in the backward pass.

    Args:
        model: Causal LM.
        hidden: (n, width) hidden states that predict the labels.
        label: (n,) token ids.
        temperature: What the logits are divided by.

    Returns:
        Log-probability, entropy and whether the label is the most probable token, each (n,).
    """
    parts = [
        checkpoint(_text_chunk, model, h, y, temperature, use_reentrant=False)
        for h, y in zip(hidden.split(TEXT_CHUNK), label.split(TEXT_CHUNK), strict=True)
    ]
    log_probs, entropy, top = (torch.cat(part) for part in zip(*parts, strict=True))
    return log_probs, entropy, top


def in_answer(vocabulary: Vocabulary, input_ids: Tensor) -> Tensor:
    """Whether each position but the first stands behind a begin marker.

    Args:
        vocabulary: Where the codes stand.
        input_ids: (batch, length) token ids.

    Returns:
        (batch, length - 1) for the positions 1, 2, …
    """
    return (input_ids[:, :-1] == vocabulary.begin_id).cummax(1).values


def install_item_policy(
    model: PreTrainedModel,
    trie: Trie,
    vocabulary: Vocabulary,
    *,
    temperature: float = 1.0,
    answers_only: bool = False,
) -> None:
    """Let the model answer `fused_lm_head=True` with the item policy.

    Install it after TRL's trainer was built (which installs its own answer), on the model below PEFT's wrapper.

    Args:
        model: Causal LM.
        trie: Trie of the items, on the model's device.
        vocabulary: Where the codes stand.
        temperature: What the logits are divided by: that of the sampler whose completions are scored.
        answers_only: The policy of rollouts: only what stands behind a begin marker is constrained (a chain may name
            items, but writes them as free text), and what follows a complete answer is certain: log-probability 0.
            Otherwise, for supervised examples, every code is an item's, except for codes before the answer of an
            example that supervises words as well: those are part of a chain.
    """
    inner = model.forward

    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return inner(*args, **kwargs)
        labels, given = kwargs.pop("labels"), kwargs.pop("num_items_in_batch", None)
        kwargs["use_cache"] = False
        input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        hidden, seen = None, kwargs.get("attention_mask")
        if answers_only and seen is not None and bool((labels != -100).any()):
            # As in the rollout: a prompt's first token has position 0, however much padding stands in front of it.
            kwargs["position_ids"] = (seen.cumsum(-1) - 1).clamp(min=0)
            first = int((labels != -100).any(0).int().argmax())
            hidden = shared_hidden(self, input_ids, seen, first)
        if hidden is None:
            hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        skipped = labels.shape[1] - 1 - hidden.shape[1]  # places in front that have no label
        target = labels[:, 1 + skipped :]
        mask = target != -100
        is_code = mask & (target >= vocabulary.first_id) & (target < vocabulary.size)
        is_text = mask & ~is_code
        if answers_only:
            answer = in_answer(vocabulary, input_ids)[:, skipped:]
            is_code, is_text = is_code & answer, mask & ~answer
        else:  # where words are supervised too, items in front of the answer are part of them: a chain is free text
            named = is_code & is_text.any(1, keepdim=True) & ~in_answer(vocabulary, input_ids)
            is_code, is_text = is_code & ~named, is_text | named
        fields = [torch.zeros(target.shape, device=target.device) for _ in range(3)]
        row, position = is_code.nonzero(as_tuple=True)
        # `+ 0 * hidden.sum()`: a batch without any label still reaches every parameter, as DDP requires.
        fields[0] = fields[0] + 0.0 * hidden.float().sum()
        if len(row):
            node = prefix_nodes(trie, vocabulary, input_ids, row, position + 1 + skipped)
            scored = item_log_probs(
                self, trie, vocabulary, hidden[is_code], node, target[is_code], temperature=temperature
            )
            fields = [f.masked_scatter(is_code, s.to(f.dtype)) for f, s in zip(fields, scored, strict=True)]
        if bool(is_text.any()):
            scored = text_log_probs(self, hidden[is_text], target[is_text], temperature=temperature)
            fields = [f.masked_scatter(is_text, s.to(f.dtype)) for f, s in zip(fields, scored, strict=True)]
        if skipped:
            fields, mask = [pad(f, (skipped, 0)) for f in fields], pad(mask, (skipped, 0))
        log_probs, entropy, top = fields
        count = mask.sum().clamp(min=1) if given is None else given
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / count,
            log_probs=log_probs,
            entropy=entropy if answers_only else entropy.detach(),  # an entropy bonus needs its gradient
            is_top1=top.bool(),
            label_mask=mask,
        )

    model.forward = types.MethodType(forward, model)

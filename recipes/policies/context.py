"""Does a model see the longest sequence that a run will make of it? Asked before the run, not in its middle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reasonrec.recipes.decoding.prefix import check_architecture, context_limit
from reasonrec.recipes.policies.base import Policy
from reasonrec.tokenizers.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_context(
    model: PreTrainedModel, policy: Policy, max_history: int, *, trained: bool, max_chain: int = 0, end: int = 0
) -> int | None:
    """Check that the longest history, a chain and an item fit.

    Args:
        model: Causal LM, or its PEFT wrapper.
        policy: How it reads and answers.
        max_history: Longest history in items.
        trained: Whether the model was trained with `max_history` already, so that it cannot be lowered here.
        max_chain: Longest chain in tokens; 0 in direct mode.
        end: Tokens read behind the item.

    Returns:
        Tokens that the model sees, None if its configuration names no limit.

    Raises:
        UserError: If they do not, with the value that does; or if the item search cannot read such models at all.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    check_architecture(base)
    limit, words = context_limit(base)
    prompts = policy.prompts
    item = max(len(ids) for ids in prompts.item_token_ids)
    fixed = sum(map(len, prompts.direct_parts())) + policy.answers.longest + end
    if max_chain:  # the tail's begin marker comes behind the chain
        fixed += len(prompts.think_ids) + len(prompts.close_ids)
    history = max_history * item
    tokens = fixed + history + max_chain
    if limit is None or tokens <= limit:
        return limit
    seen = f"but the model {words} {limit}"
    if max_chain and (room := limit - fixed - history) > 0:
        raise UserError(
            f"max_history={max_history} and max_chain={max_chain} make up to {tokens} tokens, {seen}: lower max_chain "
            f"to {room}"
        )
    fitting = (limit - fixed - min(max_chain, 1)) // item
    if fitting < 1:
        raise UserError(f"one item of history makes {fixed + item + max_chain} tokens, {seen}: take another model")
    if trained:
        raise UserError(
            f"the model was trained with max_history={max_history}, which makes up to {tokens} tokens, {seen}: train "
            f"it again with max_history={fitting}, or on a model with a longer context"
        )
    raise UserError(
        f"max_history={max_history} makes examples of up to {tokens} tokens, {seen}: lower max_history to {fitting}, "
        "or take a model with a longer context"
    )

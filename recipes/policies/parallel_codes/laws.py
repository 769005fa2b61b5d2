"""Three laws of what comes next in a set of codes: the maths alone, without a model.

    ordered   log π(c | prefix) = softmax over the legal codes of codebook σ(j), for a given order σ
    crss      the same, where σ(j) is the codebook left whose best code, by the softmax over its *whole* codebook, is
              the most probable of all (REG4Rec, equation 5)
    free      softmax over the legal codes of all codebooks left

Under the first two an item has one path, and the probabilities of all items sum to one. Under the third those of all
(item, order) pairs do, and an item is the sum of its orders.

With 300 codes and 10^4 items two codes nearly tell the item, and what is legal behind them has probability 1: such a
confidence would take forced codebooks first, and such a loss would have no gradient. So confidence and supervised
training use softmaxes over whole codebooks. Source: REG4Rec, arXiv 2508.15308, sections on CRSS and pre-training.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from reasonrec.recipes.policies.parallel_codes.sets import SetIndex

Law = Literal["crss", "ordered", "free"]


def confidence(sets: SetIndex, logits: Tensor) -> Tensor:
    """Log-probability of each codebook's best code, by the softmax over the whole codebook.

    Args:
        sets: The items.
        logits: (..., columns).

    Returns:
        (..., M).
    """
    parts = logits.split(sets.sizes.tolist(), dim=-1)
    return torch.stack([part.amax(-1) - part.logsumexp(-1) for part in parts], -1)


def next_books(law: Law, sets: SetIndex, logits: Tensor, chosen: Tensor, order: Tensor | None = None) -> Tensor:
    """The codebooks that the next code may come from.

    Args:
        law: Which law.
        sets: The items.
        logits: (..., columns) behind each prefix.
        chosen: (..., M) the column chosen in each codebook, -1 where none is.
        order: (..., M) codebooks in their order, for `ordered`.

    Returns:
        (..., 1) or, for `free`, (..., M) numbers of codebooks; -1 for none.
    """
    used = chosen >= 0
    if law == "free":
        every = torch.arange(sets.depth, device=chosen.device).expand_as(chosen)
        return every.masked_fill(used, -1)
    if law == "ordered":
        assert order is not None
        book = order.gather(-1, used.sum(-1, keepdim=True).clamp(max=sets.depth - 1))
    else:
        book = confidence(sets, logits).masked_fill(used, -torch.inf).argmax(-1, keepdim=True)
    return torch.where(used.all(-1, keepdim=True), -1, book)


def log_probs(sets: SetIndex, logits: Tensor, books: Tensor, legal: Tensor | None = None) -> Tensor:
    """Log-softmax over the codes of codebooks together.

    Args:
        sets: The items.
        logits: (..., columns) behind each prefix.
        books: (..., books) codebooks to choose from, -1 for none.
        legal: (..., books, widest) the codes that may be chosen; without it all of these codebooks.

    Returns:
        (..., books, widest), -inf where nothing may be chosen.
    """
    column, real = sets.table(books)
    allowed = real if legal is None else real & legal
    values = logits.gather(-1, column.flatten(-2)).view(column.shape).masked_fill(~allowed, -torch.inf)
    # Not NaN where nothing may be chosen at all (padding); NaN logits stay NaN.
    return values.flatten(-2).log_softmax(-1).view(column.shape).masked_fill(~allowed, -torch.inf)

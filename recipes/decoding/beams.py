"""One step of the item search: from the logits behind the prefixes read last to the best prefixes and items so far."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reasonrec.recipes.decoding.prior import Prior
from reasonrec.tokenizers.constrain import legal_log_probs
from reasonrec.tokenizers.trie import Trie


@dataclass(frozen=True)
class Beams:
    """Prefixes and finished items, all of shape (rows, beams).

    Attributes:
        node: Where each stands in the trie, -1 for none.
        score: Log-probability, -inf for none.
        item: The item, if it is finished, else -1.
        level: Codes it has.
        column: The last of them.
        parent: Number of the prefix in front of that code, among those read so far.
    """

    node: Tensor
    score: Tensor
    item: Tensor
    level: Tensor
    column: Tensor
    parent: Tensor

    @classmethod
    def root(cls, rows: int, device: torch.device) -> Beams:
        """The prefix of no code."""
        zero = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        return cls(zero, zero.float(), zero - 1, zero, zero, zero)

    @classmethod
    def none(cls, rows: int, device: torch.device) -> Beams:
        """No prefix and no item."""
        root = cls.root(rows, device)
        return root.without(torch.ones_like(root.node, dtype=torch.bool))

    def take(self, order: Tensor) -> Beams:
        """Those at (rows, n) places."""
        return Beams(**{name: values.gather(1, order) for name, values in vars(self).items()})

    def without(self, gone: Tensor) -> Beams:
        """All but those where `gone` (rows, beams) is true, which stay behind as none."""
        return replace(self, node=self.node.masked_fill(gone, -1), score=self.score.masked_fill(gone, -torch.inf))


@dataclass(frozen=True)
class Choice:
    """What a step kept.

    Attributes:
        beams: The best prefixes and items, best first.
        is_open: (rows, beams) the prefixes that have to be read.
        lost: (rows,) log-probability of the best that was not kept.
        is_nan: () whether the model returned NaN.
    """

    beams: Beams
    is_open: Tensor
    lost: Tensor
    is_nan: Tensor


def choose(
    trie: Trie,
    logits: Tensor,
    read: Beams,
    waiting: Beams,
    *,
    first: int,
    width: int,
    k: int,
    keep: int,
    normaliser: Tensor | None = None,
    excluded: Tensor | None = None,
    prior: Prior | None = None,
) -> Choice:
    """Keep the best among the legal continuations of the prefixes read last, and what waits beside them.

    Args:
        trie: Trie of the items.
        logits: (rows, beams, columns) behind the prefixes read last.
        read: These prefixes.
        waiting: Prefixes that were not read yet, and finished items.
        first: Number of the first of `read` among all that were read so far.
        width: The most children one of them has.
        k: Length of the list.
        keep: Beams to keep.
        normaliser: (rows, beams) what to subtract from logits; None normalises over the legal codes.
        excluded: What `trie.excluded_ranks` returned.
        prior: What the model is pooled with; not with a `normaliser`.
    """
    child, column = trie.children(read.node, width)  # (rows, beams, width)
    if normaliser is None:
        gain = legal_log_probs(logits, child, column)
    else:
        gain = (logits.gather(-1, column) - normaliser[..., None]).masked_fill(child < 0, -torch.inf)
    is_nan = gain.isnan().any()
    if prior is not None:
        gain = prior.pooled(gain, child, read.level)
    total = (read.score[..., None] + gain).masked_fill(~trie.allowed(child, excluded), -torch.inf).flatten(1)
    n_new = total.shape[1]
    every = torch.cat([total, waiting.score], 1)
    score, index = every.topk(min(keep + 1, every.shape[1]), dim=1)
    lost = score[:, keep] if score.shape[1] > keep else torch.full_like(score[:, 0], -torch.inf)
    score, index = score[:, :keep], index[:, :keep]
    is_new, at = index < n_new, index.clamp(max=n_new - 1)
    node = child.flatten(1).gather(1, at)
    of = at // width
    # Under full normalisation even a certain code has a probability below 1: only a leaf is the end.
    item = trie.only_item(node) if normaliser is None else trie.leaf_item(node)
    new = Beams(node, score, item, read.level.gather(1, of) + 1, column.flatten(1).gather(1, at), first + of)
    old = waiting.take((index - n_new).clamp(min=0))
    mixed = {name: torch.where(is_new, values, getattr(old, name)) for name, values in vars(new).items()}
    beams = Beams(**mixed)
    real = score > -torch.inf
    beams = replace(beams, node=torch.where(real, beams.node, -1), item=torch.where(real, beams.item, -1))
    unfinished = real & (beams.item < 0)
    enough = promised(trie, beams, unfinished, excluded, sums_up=normaliser is None, k=k)
    return Choice(beams, unfinished & (score >= enough[:, None]), lost, is_nan)


def promised(
    trie: Trie, beams: Beams, unfinished: Tensor, excluded: Tensor | None, *, sums_up: bool, k: int
) -> Tensor:
    """A log-probability that the `k`-th best item has at least.

    Args:
        trie: Trie of the items.
        beams: Prefixes and items, none below another.
        unfinished: (rows, beams) which are prefixes.
        excluded: What `trie.excluded_ranks` returned. A prefix that lost items promises nothing: the rest may be rare.
        sums_up: Whether the probabilities of the items below a prefix sum up to its own.
        k: Length of the list.

    Returns:
        (rows,) -inf where fewer than `k` are known.
    """
    if beams.score.shape[1] < k:
        return beams.score.new_full((len(beams.score),), -torch.inf)
    below = trie.count(beams.node)
    best_below = beams.score - below.clamp(min=1).log()
    if not sums_up:
        best_below = torch.full_like(best_below, -torch.inf)
    elif excluded is not None:
        best_below = best_below.masked_fill(trie.count(beams.node, excluded) < below, -torch.inf)
    return torch.where(unfinished, best_below, beams.score).topk(k, dim=1).values[:, -1]

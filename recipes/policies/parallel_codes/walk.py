"""Search and scores over sets of codes: beams that stand side by side behind one reading of the prompt.

As in the item search, a 4-D attention mask lets each prefix see the prompt, its own ancestors and itself, so the cache
is appended to and never reordered. A prefix that one item alone still fits is that item, in whatever order its other
codes would come: their probabilities sum to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from reasonrec.recipes.decoding.backbone import all_done
from reasonrec.recipes.decoding.prefix import Prefix, forward
from reasonrec.recipes.decoding.search import PATIENCE, Found, check_width, ranked
from reasonrec.recipes.policies.parallel_codes.laws import Law, log_probs, next_books
from reasonrec.recipes.policies.parallel_codes.sets import Barred, SetIndex
from reasonrec.tokenizers.rows import code_logits
from reasonrec.tokenizers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Walk:
    """Prefixes of answers that grow by a code at a time, all of them together.

    Args:
        model: The model that read the prompts.
        sets: The items.
        vocabulary: Where the codes stand.
        prefix: Prompts that end with the begin marker.
        law: What comes next.
        order: (M,) codebooks in their order, for `ordered`.

    Attributes:
        chosen: (rows, width, M) the column chosen in each codebook by each prefix, -1 where none is.
        hidden: (rows, width, size) last hidden state of each.
        seen: (rows, width, slots) what each attends to.
        codes_read: Codes that were read so far, of all rows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sets: SetIndex,
        vocabulary: Vocabulary,
        prefix: Prefix,
        law: Law,
        order: Tensor | None = None,
    ) -> None:
        rows, device = len(prefix.position), prefix.position.device
        self.model, self.sets, self.vocabulary, self.prefix, self.law = model, sets, vocabulary, prefix, law
        self.order = order
        self.chosen = torch.full((rows, 1, sets.depth), -1, device=device)
        self.hidden, self.seen, self.codes_read = prefix.hidden[:, None], prefix.seen[:, None], 0
        prefix.cache.rewind(prefix.length)

    def step(self, barred: Barred | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What may follow each prefix.

        Args:
            barred: What `SetIndex.barred` returned for the rows.

        Returns:
            The codebooks to choose from (rows, width, books), -1 for none; and of each of their codes the
            log-probability, -inf where it may not follow, how many items are left, and the item where there is one
            alone, else -1: (rows, width, books, widest) each.

        Raises:
            FloatingPointError: If the model returns NaN.
        """
        sets, (rows, width, _) = self.sets, self.chosen.shape
        logits = code_logits(self.model, self.hidden, self.vocabulary)[..., : sets.n_columns].flatten(0, 1)
        chosen = self.chosen.flatten(0, 1)
        if bool(logits.isnan().any()):
            step = int((chosen >= 0).sum(1).amax())
            raise FloatingPointError(f"the model returned NaN logits at step {step} of the item search")
        order = None if self.order is None else self.order.expand(len(chosen), -1)
        books = next_books(self.law, sets, logits, chosen, order)
        user = torch.arange(rows, device=chosen.device).repeat_interleave(width)
        after = sets.after(chosen, books, barred, user)
        found = log_probs(sets, logits, books, after.fits > 0)
        only = torch.where(after.fits == 1, after.item, -1)
        whole, left, item = (values.unflatten(0, (rows, width)) for values in (found, after.left, only))
        return books.unflatten(0, (rows, width)), whole, left, item

    def read(self, parent: Tensor, column: Tensor, counts: Sequence[int]) -> None:
        """Let prefixes grow.

        Args:
            parent: (rows, new width) number of the prefix that each new one begins with.
            column: (rows, new width) the column it adds.
            counts: How many of each row are real, the first ones.
        """
        rows, width = parent.shape
        cache = self.prefix.cache
        if cache.length + width > cache.capacity:
            cache.reserve(cache.length + 2 * width)
        book = self.sets.book_of(column)
        chosen = self.chosen.gather(1, parent[..., None].expand(-1, -1, self.sets.depth))
        position = self.prefix.position[:, None] + (chosen >= 0).sum(2)
        self.chosen = chosen.scatter(2, book[..., None], column[..., None])
        ancestors = self.seen.gather(1, parent[..., None].expand(-1, -1, self.seen.shape[2]))
        itself = torch.eye(width, dtype=torch.bool, device=parent.device).expand(rows, -1, -1)
        self.seen = torch.cat([ancestors, itself], 2)
        token = self.vocabulary.first_id + column
        self.hidden = forward(self.model, cache, token, position, self.seen, counts=counts)
        self.codes_read += sum(counts)

    def close(self) -> None:
        """Forget what was read behind the prompts."""
        self.prefix.cache.rewind(self.prefix.length)


class Watch(Protocol):
    """Looks at the prefixes of a search, and may take some of them out."""

    def offered(self, books: Tensor, total: Tensor, only: Tensor, kept: Tensor) -> None:
        """What may follow the walk's prefixes, behind `Walk.step`.

        Args:
            books: (rows, width, books) codebooks.
            total: (rows, width, children) log-probability of each child, -inf where it may not follow.
            only: (rows, width, children) the item where there is one alone, else -1.
            kept: (rows, width, children) the children that the search keeps.
        """

    def grown(self, parent: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The walk has new prefixes, behind `Walk.read`; others may be put in their places.

        Args:
            parent: (rows, width) number of the prefix that each begins with.
            score: (rows, width) log-probabilities, -inf for padding.

        Returns:
            The same scores, -inf where a prefix is out; and further items found (rows, n), -1 for none, with scores.
        """


@torch.no_grad()
def search(
    model: PreTrainedModel,
    sets: SetIndex,
    vocabulary: Vocabulary,
    prefix: Prefix,
    law: Law,
    *,
    k: int,
    num_beams: int,
    order: Tensor | None = None,
    barred: Barred | None = None,
    exact: bool = False,
) -> Found:
    """The `k` most probable items.

    Args:
        model: The model that read the prefix.
        sets: The items.
        vocabulary: Where the codes stand.
        prefix: Prompts that end with the begin marker.
        law: What comes next. Under `free`, where an item has many paths, scores are sums over those that were found,
            and no list is proven.
        k: Items to return.
        num_beams: Prefixes and items kept at every step.
        order: (M,) for `ordered`.
        barred: Items that must not appear, as `SetIndex.barred` returned them for the rows; the others keep their
            probabilities.
        exact: Search again with twice as many beams, up to `PATIENCE` times, until every list is proven.
    """
    k, num_beams = check_width(k, num_beams)
    most = num_beams * (PATIENCE if exact and law != "free" else 1)
    while True:
        found = beam_search(Walk(model, sets, vocabulary, prefix, law, order), k, num_beams, barred)
        if num_beams >= most or bool(found.proven.all()):
            return found
        num_beams = min(2 * num_beams, most)


def beam_search(
    walk: Walk,
    k: int,
    keep: int,
    barred: Barred | None,
    watch: Watch | None = None,
    wanted: Tensor | None = None,
) -> Found:
    """A search of one width.

    Args:
        walk: Where it begins.
        k: Items to return.
        keep: Prefixes and items kept at every step.
        barred: Items that must not appear.
        watch: Who may take prefixes out.
        wanted: (rows,) which rows are searched; the others find nothing, and cost nothing. All by default.
    """
    rows, device = len(walk.chosen), walk.chosen.device
    one_path = walk.law != "free"
    score = torch.zeros(rows, 1, device=device)
    if wanted is not None:
        score = score.masked_fill(~wanted[:, None], -torch.inf)
    done = torch.full((rows, 1), -torch.inf, device=device)  # items found so far
    item = torch.full((rows, 1), -1, device=device)
    lost = torch.full((rows,), -torch.inf, device=device)
    while True:
        books, gain, left, only = walk.step(barred)
        total = (score[..., None, None] + gain).masked_fill(left == 0, -torch.inf).flatten(1)
        new = total.shape[1]
        every = torch.cat([total, done], 1)
        best, index = every.topk(min(keep + 1, every.shape[1]), dim=1)
        if best.shape[1] > keep:
            lost = lost.maximum(best[:, keep])
        best, index = best[:, :keep], index[:, :keep]
        is_new, at = index < new, index.clamp(max=new - 1)
        if watch is not None:
            kept = torch.zeros_like(every, dtype=torch.bool).scatter(1, index, True)[:, :new]
            shape = (rows, books.shape[1], -1)
            watch.offered(books, total.view(shape), only.view(shape), kept.view(shape))
        item = torch.where(is_new, only.flatten(1).gather(1, at), item.gather(1, (index - new).clamp(min=0)))
        is_open = is_new & (item < 0) & (best > -torch.inf)
        item = item.masked_fill(best == -torch.inf, -1)
        done = best.masked_fill(item < 0, -torch.inf)
        if one_path and best.shape[1] >= k:  # below a prefix, nothing is more probable than itself
            is_open &= best > done.topk(k, dim=1).values[:, -1:]
        counts = is_open.sum(1).tolist()
        width = max(counts)
        if all_done(width):
            break
        chosen = (~is_open).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
        score = best.masked_fill(~is_open, -torch.inf).gather(1, chosen)
        at = at.gather(1, chosen)
        slot, code = at // walk.sets.widest, at % walk.sets.widest
        column = walk.sets.first[books.flatten(1).gather(1, slot).clamp(min=0)] + code
        parent = slot // books.shape[2]
        walk.read(parent, column.masked_fill(score == -torch.inf, 0), counts)
        if watch is not None:
            score, more, at_score = watch.grown(parent, score)
            item, done = torch.cat([item, more], 1), torch.cat([done, at_score], 1)
    walk.close()
    if not one_path:
        item, done = merged(item, done)
    found = ranked(item, done, k)
    proven = (lost <= found.scores[:, -1]) & (one_path | (lost == -torch.inf))
    return Found(found.items, found.scores, proven)


def merged(item: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the probabilities of each item.

    Args:
        item: (rows, n) items, -1 for none.
        score: (rows, n) log-probabilities of their parts, -inf for none.

    Returns:
        The same, with the sum at one of an item's places and none at the others.
    """
    item, order = item.sort(1)
    score = score.gather(1, order)
    starts = torch.ones_like(item, dtype=torch.bool)
    starts[:, 1:] = item[:, 1:] != item[:, :-1]
    group = starts.long().cumsum(1) - 1
    top = score.amax(1, keepdim=True).clamp(min=torch.finfo(score.dtype).min)
    total = torch.zeros_like(score, dtype=torch.float64).scatter_add(1, group, (score - top).double().exp())
    summed = (total.log() + top).to(score.dtype).gather(1, group)
    gone = ~starts | (item < 0)
    return item.masked_fill(gone, -1), summed.masked_fill(gone, -torch.inf)


@torch.no_grad()
def score_items(
    model: PreTrainedModel,
    sets: SetIndex,
    vocabulary: Vocabulary,
    prefix: Prefix,
    law: Law,
    items: Tensor,
    *,
    order: Tensor | None = None,
) -> Tensor:
    """Log-probabilities of given items.

    Under `free` every order that leaves a choice is read: 40 prefixes an item for four codebooks where nothing is
    forced, and many more for eight.

    Args:
        model: The model that read the prefix.
        sets: The items.
        vocabulary: Where the codes stand.
        prefix: Prompts that end with the begin marker.
        law: What comes next.
        items: (rows, n) item numbers; -1 is no item.
        order: (M,) for `ordered`.

    Returns:
        (rows, n) float32, -inf for no item.
    """
    walk = Walk(model, sets, vocabulary, prefix, law, order)
    rows, n = items.shape
    total = torch.full((rows, n), -torch.inf, dtype=torch.float64, device=items.device)
    of = torch.arange(n, device=items.device).expand(rows, -1)  # item that each path leads to
    at = torch.zeros_like(of)  # its prefix
    score = torch.zeros(rows, n, dtype=torch.float64, device=items.device).masked_fill(items < 0, -torch.inf)
    while True:
        books, gain, _, only = walk.step()
        book = books.gather(1, at[..., None].expand(-1, -1, books.shape[2]))  # (rows, paths, books)
        known = book.clamp(min=0)
        column = sets.columns[items.gather(1, of).clamp(min=0)].gather(2, known)
        # Where each item's own code stands among those of all prefixes.
        slot = at[..., None] * books.shape[2] + torch.arange(books.shape[2], device=at.device)
        place = (slot * sets.widest + column - sets.first[known]).flatten(1)
        step = gain.flatten(1).gather(1, place).view(book.shape).masked_fill(book < 0, -torch.inf)
        path = (score[..., None] + step).flatten(1)
        decided = only.flatten(1).gather(1, place) >= 0
        total = _add(total, of[..., None].expand_as(book).flatten(1), path.masked_fill(~decided, -torch.inf))
        is_open = ~decided & (path > -torch.inf)
        counts = is_open.sum(1).tolist()
        most = max(counts)
        if all_done(most):
            break
        chosen = (~is_open).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
        score = path.masked_fill(~is_open, -torch.inf).gather(1, chosen)
        above = chosen // books.shape[2]  # path that each goes on from
        walk.read(at.gather(1, above), column.flatten(1).gather(1, chosen), counts)
        of = of.gather(1, above)
        at = torch.arange(most, device=items.device).expand(rows, -1)
    walk.close()
    return total.float()


def _add(total: Tensor, of: Tensor, path: Tensor) -> Tensor:
    """Add log-probabilities of paths (rows, paths) to those of the items they lead to (rows, n)."""
    top = total.scatter_reduce(1, of, path, "amax")
    safe = top.clamp(min=torch.finfo(top.dtype).min)
    mass = (total - safe).exp().scatter_add(1, of, (path - safe.gather(1, of)).exp())
    return torch.where(top > -torch.inf, mass.log() + safe, top)

"""The search with pruned paths: a prefix whose category guess jumped goes back and is written anew (REG4Rec's CORP).

The rules are those of `decoding.consistency`. A path that ends goes back by `rollback` codes, and continues with the
most probable code that no path has taken yet, and by most probable codes up to where it ended: nothing is drawn. Every
prefix on that way is checked as any other. Items keep the probabilities that they have without a check; only which
prefixes are gone on from changes.

A prefix that one item alone still fits is that item, and is not read: behind it no code is chosen, so nothing could be
taken back, and nothing is compared there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from reasonrec.recipes.decoding.consistency import Checks, Consistency
from reasonrec.recipes.decoding.prefix import Prefix
from reasonrec.recipes.decoding.search import Found, check_width
from reasonrec.recipes.policies.parallel_codes.laws import Law
from reasonrec.recipes.policies.parallel_codes.sets import Barred, SetIndex
from reasonrec.recipes.policies.parallel_codes.walk import Walk, beam_search
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.rows import code_logits
from reasonrec.tokenizers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_rules(rules: Consistency, depth: int, orders: int) -> None:
    """Check that rules compare something in a search over sets.

    Args:
        rules: The rules.
        depth: Codes of an item.
        orders: Orders that the items are searched in.

    Raises:
        UserError: If no two guesses are so far apart, or several searches are averaged.
    """
    if rules.check_every >= depth:
        raise UserError(
            f"check_every={rules.check_every} compares nothing: an item has {depth} codes with a guess in front of "
            f"each, so choose 1 to {depth - 1}"
        )
    if orders > 1:
        raise UserError(
            f"theta={rules.theta:g} checks the paths of one search, but the model averages orders={orders}: leave "
            "theta out, or train with orders: 1"
        )


@torch.no_grad()
def checked_search(
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
    rules: Consistency,
    checks: Checks,
) -> Found:
    """`search` with paths that are checked.

    Places that no path was left for are filled with the best of the unchecked list, behind what was found.

    Args:
        model: The model that read the prefix.
        sets: The items.
        vocabulary: Where codes and categories stand.
        prefix: Prompts that end with the begin marker.
        law: What comes next.
        k: Items to return.
        num_beams: Prefixes and items kept at every step.
        order: (M,) for `ordered`.
        barred: Items that must not appear.
        exact: Not with a check: what is pruned depends on the beam.
        rules: What is pruned.
        checks: Where it is counted.

    Raises:
        UserError: If `exact` is asked for.
    """
    if exact:
        raise UserError("theta prunes the paths of a beam search, which proves nothing: set exact: false, or no theta")
    k, num_beams = check_width(k, num_beams)
    walk = Walk(model, sets, vocabulary, prefix, law, order)
    paths = _Paths(walk, rules, checks, barred)
    found = beam_search(walk, k, num_beams, barred, paths)
    pruned = paths.pruned > 0
    checks.users += len(pruned)
    checks.read += walk.codes_read
    found = Found(found.items, found.scores, found.proven & ~pruned)
    count = (found.items >= 0).sum(1)
    short = pruned & (count < k)
    checks.dead += int((short & (count == 0)).sum())
    checks.short += int((short & (count > 0)).sum())
    if rules.fallback == "unchecked" and bool(short.any()):
        walk = Walk(model, sets, vocabulary, prefix, law, order)
        found = filled(found, beam_search(walk, k, num_beams, barred, wanted=short), short)
        checks.unchecked += walk.codes_read
        checks.read += walk.codes_read
    return found


def filled(found: Found, other: Found, short: Tensor) -> Found:
    """Lists with the best of other lists behind them.

    Args:
        found: (users, k) lists.
        other: (users, k) lists.
        short: (users,) which lists are filled.

    Returns:
        The lists, in which no item stands twice.
    """
    k = found.items.shape[1]
    again = (other.items[:, :, None] == found.items[:, None]).any(2)
    items = torch.cat([found.items, other.items.masked_fill(again, -1)], 1)
    scores = torch.cat([found.scores, other.scores], 1)
    order = (items < 0).to(torch.int8).argsort(dim=1, stable=True)[:, :k]
    items = torch.where(short[:, None], items.gather(1, order), found.items)
    scores = torch.where(short[:, None], scores.gather(1, order), found.scores)
    return Found(items, scores.masked_fill(items < 0, -torch.inf), found.proven)


class _Paths:
    """All prefixes that a search has read, those that it left included; a `Watch`.

    Args:
        walk: The walk of the search, in front of its first step.
        rules: What is pruned.
        checks: Where it is counted.
        barred: Items that must not appear.

    Attributes:
        pruned: (rows,) how many paths ended.
    """

    def __init__(self, walk: Walk, rules: Consistency, checks: Checks, barred: Barred | None) -> None:
        self.walk, self.rules, self.checks, self.barred = walk, rules, checks, barred
        rows, device = len(walk.chosen), walk.chosen.device
        self.pruned = torch.zeros(rows, dtype=torch.int64, device=device)
        # Of every prefix read, (rows, read, …): the root first. Children are known of those that were stepped from.
        self.chosen, self.hidden, self.seen = walk.chosen, walk.hidden, walk.seen
        self.guess, self.parent = self._guesses(), torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.total = self.only = self.column = torch.empty(rows, 1, 0, dtype=torch.int64, device=device)
        self.at = self.parent  # the walk's own prefixes among them

    def offered(self, books: Tensor, total: Tensor, only: Tensor, kept: Tensor) -> None:
        """See `Watch`: what is left to take is what is not kept."""
        column = self.walk.sets.table(books)[0].flatten(2)
        if not self.total.shape[2]:  # how many children a prefix may have is known now
            shape = (*self.parent.shape, column.shape[2])
            self.total = total.new_full(shape, -torch.inf)
            self.only, self.column = only.new_full(shape, -1), column.new_zeros(shape)
        where = self.at[..., None].expand_as(column)
        self.total = self.total.scatter(1, where, total.masked_fill(kept, -torch.inf))
        self.only, self.column = self.only.scatter(1, where, only), self.column.scatter(1, where, column)

    def grown(self, parent: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Watch`: prefixes that ended are replaced, where a path could be written anew."""
        self.at = self._append(self.at.gather(1, parent))
        died = self._ended(self.at, score > -torch.inf)
        if not bool(died.any()):
            return score, self.at[:, :0], score[:, :0]
        frontier, last, score = self.at, self.at, score.masked_fill(died, -torch.inf)
        goal = self._step(self.at[:, :1])
        waits, tries = died, torch.zeros_like(last)
        items, scores = [], []
        while bool(waits.any()):
            back = waits & died & (tries < self.rules.retries)
            tries = tries + back
            self.checks.back += int(back.sum())
            waits = waits & (back | ~died)
            source = torch.where(back, self._back(last), last)
            taken, value, only, column = self._take(source, waits)
            whole = taken & (only >= 0)
            items.append(only.masked_fill(~whole, -1))
            scores.append(value.masked_fill(~whole, -torch.inf))
            # Where nothing is left to take, the next try finds nothing either, and the path is given up.
            stuck, grows = waits & ~taken, taken & ~whole
            last = torch.where(grows, self._read(source, column, value, grows, goal), last)
            died = stuck | (grows & self._ended(last, grows))
            alive = grows & ~died
            there = alive & (self._step(last) == goal)
            frontier, score = torch.where(there, last, frontier), torch.where(there, value, score)
            waits = stuck | (grows & ~there)
        self._stand(frontier)
        return score, torch.cat(items, 1), torch.cat(scores, 1)

    # -- moves

    def _take(self, source: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The most probable child of each prefix that no path has; the first of the list chooses first.

        Args:
            source: (rows, width) prefixes.
            wanted: (rows, width) which of them take one.

        Returns:
            Whether there was one, its log-probability, its item if it is alone (else -1), its column: (rows, width).
        """
        taken, value = torch.zeros_like(wanted), torch.full_like(source, -torch.inf, dtype=self.total.dtype)
        only, column = torch.full_like(source, -1), torch.zeros_like(source)
        row = torch.arange(len(source), device=source.device)
        for place in wanted.any(0).nonzero()[:, 0].tolist():
            whose = source[:, place]
            best, child = self.total[row, whose].max(1)
            took = wanted[:, place] & (best > -torch.inf)
            taken[:, place], value[:, place] = took, best.masked_fill(~took, -torch.inf)
            only[:, place], column[:, place] = self.only[row, whose, child], self.column[row, whose, child]
            self.total[row[took], whose[took], child[took]] = -torch.inf
        return taken, value, only, column

    def _read(self, source: Tensor, column: Tensor, value: Tensor, grows: Tensor, goal: Tensor) -> Tensor:
        """Read one more code behind some prefixes; gives the numbers of the new ones, in their places."""
        counts = grows.sum(1).tolist()
        width = max(counts)
        if not width:
            return source
        first = (~grows).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
        parent = source.gather(1, first)
        self.walk.chosen, self.walk.hidden, self.walk.seen = self.chosen, self.hidden, self.seen
        self.walk.read(parent, column.masked_fill(~grows, 0).gather(1, first), counts)
        self.checks.again += sum(counts)
        self.at = self._append(parent)
        if bool((self._step(self.at) < goal).any()):  # these have to be gone on from before the search's next step
            books, gain, left, only = self.walk.step(self.barred)
            score = value.masked_fill(~grows, -torch.inf).gather(1, first)
            total = (score[..., None, None] + gain).masked_fill(left == 0, -torch.inf).flatten(2)
            self.offered(books, total, only.flatten(2), torch.zeros_like(total, dtype=torch.bool))
        return source.scatter(1, first, self.at)

    def _append(self, parent: Tensor) -> Tensor:
        """Remember the walk's prefixes; gives their numbers (rows, width)."""
        walk, (rows, n) = self.walk, self.parent.shape
        self.chosen = torch.cat([self.chosen, walk.chosen], 1)
        self.hidden = torch.cat([self.hidden, walk.hidden], 1)
        self.seen = torch.cat([pad(self.seen, (0, walk.seen.shape[2] - self.seen.shape[2])), walk.seen], 1)
        self.guess = torch.cat([self.guess, self._guesses()], 1)
        self.parent = torch.cat([self.parent, parent], 1)
        more = (0, 0, 0, parent.shape[1])
        self.total, self.only = pad(self.total, more, value=-torch.inf), pad(self.only, more, value=-1)
        self.column = pad(self.column, more)
        return torch.arange(n, n + parent.shape[1], device=parent.device).expand(rows, -1)

    def _stand(self, at: Tensor) -> None:
        """Put the walk behind prefixes that were read."""
        self.at = at
        self.walk.chosen, self.walk.hidden, self.walk.seen = (
            values.gather(1, at[..., None].expand(-1, -1, values.shape[2]))
            for values in (self.chosen, self.hidden, self.seen)
        )

    # -- what is known of prefixes

    def _guesses(self) -> Tensor:
        """What the category head says behind each of the walk's prefixes (rows, width, categories)."""
        logits = code_logits(self.walk.model, self.walk.hidden, self.walk.vocabulary)
        return logits[..., self.walk.sets.n_columns :].float().softmax(-1)

    def _step(self, at: Tensor) -> Tensor:
        return (self.chosen >= 0).sum(2).gather(1, at)

    def _above(self, at: Tensor, by: Tensor) -> Tensor:
        """The prefix so many codes shorter than each."""
        for nth in range(int(by.amax())):
            at = torch.where(by > nth, self.parent.gather(1, at), at)
        return at

    def _back(self, at: Tensor) -> Tensor:
        """Where each goes on from if it ends."""
        step = self._step(at)
        return self._above(at, step - torch.from_numpy(self.rules.back_to(step.cpu().numpy())).to(at.device))

    def _ended(self, at: Tensor, real: Tensor) -> Tensor:
        """Which prefixes end; they are counted."""
        step = self._step(at)
        compared = real & torch.from_numpy(self.rules.compared(step.cpu().numpy())).to(at.device)
        row, place = compared.nonzero(as_tuple=True)
        before = self._above(at, torch.full_like(at, self.rules.check_every).minimum(step))
        pairs = (self.guess[row, numbers[row, place]].double().cpu().numpy() for numbers in (before, at))
        ended = torch.zeros_like(real)
        ended[row, place] = torch.from_numpy(self.rules.jumped(*pairs)).to(at.device)
        self.checks.compared += len(row)
        self.checks.pruned += int(ended.sum())
        self.pruned += ended.sum(1)
        return ended

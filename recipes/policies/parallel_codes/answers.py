"""Answers that are sets of codes: how labels are scored, items ranked and scored, and rollouts ended.

Supervised labels are scored by softmaxes over whole codebooks, rollouts and rankings over what is legal (`laws`). A
supervised step also guesses the item's category: λ times its log-probability is added to that of the code (REG4Rec's
L_cate). Categories are rows of the LLM's head like codes, behind them, but never written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NoReturn, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reasonrec.recipes.decoding.answers import Answers, Choices, Scored
from reasonrec.recipes.decoding.backbone import last_hidden
from reasonrec.recipes.decoding.consistency import Checks, Consistency
from reasonrec.recipes.decoding.merge_chains import log_mean_exp
from reasonrec.recipes.decoding.prefix import Prefix
from reasonrec.recipes.decoding.prior import Prior, Tree
from reasonrec.recipes.decoding.sample import Sampler, Step, check_finite, draw
from reasonrec.recipes.decoding.search import Exclude, Found, ranked
from reasonrec.recipes.policies.codes import split_codes
from reasonrec.recipes.policies.parallel_codes.consistent import check_rules, checked_search
from reasonrec.recipes.policies.parallel_codes.laws import Law, log_probs, next_books
from reasonrec.recipes.policies.parallel_codes.sets import SetIndex
from reasonrec.recipes.policies.parallel_codes.walk import score_items, search
from reasonrec.rewards.parse import Catalogue
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import ItemIndex
from reasonrec.tokenizers.rows import code_logits
from reasonrec.tokenizers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from reasonrec.recipes.decoding.branches import Lanes

_ROWS = 64  # completions read at a time for their categories


class SetAnswers(Answers):
    """Answers that are sets of codes.

    Args:
        index: The codes of all items, no two sets of them equal.
        vocabulary: Where the codes stand, and behind them the categories.
        law: What comes next.
        orders: (n, M) codebooks in the orders of `ordered`, shared by all items, whose mean is taken; (1, M) or more.
        category: (items,) category of each item, -1 where unknown.
        category_weight: λ of the category head, if the vocabulary has categories.

    Attributes:
        rollouts: Labels are scored as rollouts: over what is legal, without categories. Set by `split`, which the
            engine calls in front of `log_probs`.
        guessed: Sum of the categories' negative log-probabilities so far, and how many there were.
    """

    def __init__(
        self,
        index: ItemIndex,
        vocabulary: Vocabulary,
        law: Law,
        orders: np.ndarray,
        category: np.ndarray,
        category_weight: float,
    ) -> None:
        self.sets, self.vocabulary, self.law = SetIndex.from_index(index), vocabulary, law
        self.orders, self.category = torch.from_numpy(orders), torch.from_numpy(category)
        self.category_weight, self.n_categories = category_weight, vocabulary.level_sizes[-1]
        self.begin_id, self.longest = vocabulary.begin_id, self.sets.depth
        self.rollouts, self.guessed = False, (torch.zeros(()), 0)
        self._search: Callable[..., Found] = search
        self._find = Catalogue(index).find

    def to(self, device: torch.device | str) -> None:
        """See `Answers`."""
        self.sets = self.sets.to(device)
        self.orders, self.category = self.orders.to(device), self.category.to(device)

    def room(self, width: int, chains: int = 1) -> int:
        """Slots for the beams of two steps; few prefixes leave a choice behind two codes, and the cache grows."""
        return min(width, self.sets.n_items) * min(self.longest - 1, 2)

    def scored_room(self, n: int) -> int:
        """As for `n` beams."""
        return self.room(n)

    # -- inference

    @torch.no_grad()
    def rank(
        self,
        model: PreTrainedModel,
        prefix: Prefix,
        *,
        k: int,
        width: int,
        exclude: Exclude | None = None,
        exact: bool = False,
        chains: int = 1,
        prior: Prior | None = None,
    ) -> Found:
        """The search; behind several chains or in several orders, what any of them proposes, by its mean."""
        if prior is not None:
            self._no_tree()
        barred = self.sets.barred(exclude)
        if barred is not None:
            barred = barred.repeat(chains)
        orders = self._orders()
        one = chains == 1 and len(orders) == 1 and width >= k
        proposed = [
            self._search(
                model,
                self.sets,
                self.vocabulary,
                prefix,
                self.law,
                k=k if one else width,
                num_beams=width,
                order=order,
                barred=barred,
                exact=exact and one,
            )
            for order in orders
        ]
        if one:
            return proposed[0]
        users = len(prefix.position) // chains
        union = torch.cat([found.items for found in proposed], 1).view(users, -1).sort(1).values
        union[:, 1:] = torch.where(union[:, 1:] == union[:, :-1], -1, union[:, 1:])
        widest = max(int((union >= 0).sum(1).max()), 1)
        union = union.sort(1, descending=True).values[:, :widest]
        scores = self.score(model, prefix, union.repeat_interleave(chains, 0))
        found = ranked(union, log_mean_exp(scores.view(users, chains, -1)), k)
        return Found(found.items, found.scores, found.proven)

    def checked(self, rules: Consistency, checks: Checks) -> Self:
        """See `Checkable`.

        Raises:
            UserError: If the rules compare nothing, or not the paths of one search.
        """
        check_rules(rules, self.longest, len(self._orders()))
        other = copy.copy(self)
        other._search = partial(checked_search, rules=rules, checks=checks)
        return other

    @torch.no_grad()
    def score(self, model: PreTrainedModel, prefix: Prefix, items: Tensor, prior: Prior | None = None) -> Tensor:
        """See `Answers`; in several orders, the log of the mean probability."""
        if prior is not None:
            self._no_tree()
        parts = [
            score_items(model, self.sets, self.vocabulary, prefix, self.law, items, order=order)
            for order in self._orders()
        ]
        return log_mean_exp(torch.stack(parts, 1)).masked_fill(items < 0, -torch.inf)

    def _orders(self) -> Sequence[Tensor | None]:
        return list(self.orders) if self.law == "ordered" else [None]

    def _no_tree(self) -> NoReturn:
        raise UserError(
            "policy=parallel_codes has no tree of codes that experts could be pooled in, since the model chooses the "
            "order: evaluate it unpooled, or fuse a model of policy=semantic_id"
        )

    @property
    def tree(self) -> Tree:
        """There is none.

        Raises:
            UserError: Always.
        """
        self._no_tree()

    def choices(self, model: PreTrainedModel, prefix: Prefix, items: Tensor) -> Choices:
        """Not without a tree.

        Raises:
            UserError: Always.
        """
        self._no_tree()

    @torch.no_grad()
    def write(self, lanes: Lanes, sampler: Sampler, uniform: Tensor | None, steps: list[Step]) -> Tensor:
        """Draw code by code. Under `ordered`, the lanes of a prompt take the orders in turn.

        Which codebook `crss` takes is no draw and has no probability; the order that was written is the order that
        is optimised.
        """
        sets, shape = self.sets, lanes.position.shape
        chosen = torch.full((shape.numel(), sets.depth), -1, device=lanes.position.device)
        order = self.orders[lanes.number.flatten() % len(self.orders)]
        active = torch.ones(shape, dtype=torch.bool, device=chosen.device)
        for place in range(sets.depth):
            logits = code_logits(lanes.model, lanes.hidden, self.vocabulary)[..., : sets.n_columns].flatten(0, 1)
            check_finite(logits, f"code {place}")
            books = next_books(self.law, sets, logits, chosen, order)
            after = sets.after(chosen, books)
            found = log_probs(sets, logits / sampler.temperature, books, after.fits > 0).flatten(1)
            noise = None if uniform is None else uniform[..., sampler.max_chain + place].flatten()
            drawn, gain = draw(found, noise)
            column = sets.table(books)[0].flatten(1).gather(1, drawn[:, None])
            chosen = chosen.scatter(1, sets.book_of(column), column)
            token = (self.vocabulary.first_id + column[:, 0]).view(shape)
            steps.append((token, gain.view(shape), ((found > -torch.inf).sum(1) > 1).view(shape), active))
            if place + 1 < sets.depth:
                lanes.feed(token, active)
        item = after.item.flatten(1).gather(1, drawn[:, None])[:, 0]
        return item.view(shape)

    @torch.no_grad()
    def category_probs(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[NDArray[np.float32]]:
        """What the category head says in front of each code of an answer.

        Args:
            model: Causal LM below PEFT's wrapper, in evaluation mode.
            prompts: Token ids of each prompt.
            completions: Token ids of each completion, with an answer.

        Returns:
            Of each completion (M, categories).
        """
        depth, probs = self.longest, list[NDArray[np.float32]]()
        for begin in range(0, len(prompts), _ROWS):
            pairs = zip(prompts[begin : begin + _ROWS], completions[begin : begin + _ROWS], strict=True)
            rows = [[*prompt, *completion] for prompt, completion in pairs]
            # The begin marker of the answer is the last one, and its codes follow.
            places = [len(row) - 1 - row[::-1].index(self.begin_id) for row in rows]
            rows = [row[: place + depth] for row, place in zip(rows, places, strict=True)]
            ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
            seen = torch.zeros_like(ids)
            for number, row in enumerate(rows):
                ids[number, : len(row)], seen[number, : len(row)] = torch.tensor(row), 1
            hidden = last_hidden(model, input_ids=ids.to(model.device), attention_mask=seen.to(model.device))
            at = torch.tensor(places, device=hidden.device)[:, None] + torch.arange(depth, device=hidden.device)
            states = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[2]))
            logits = code_logits(model, states, self.vocabulary)[..., self.sets.n_columns :]
            probs.extend(logits.softmax(-1).float().cpu().numpy())
        return probs

    # -- training

    def split(self, input_ids: Tensor, labels: Tensor, answers_only: bool) -> tuple[Tensor, Tensor]:
        """Codes are answers."""
        self.rollouts = answers_only
        return split_codes(self.vocabulary, input_ids, labels, answers_only)

    def log_probs(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        row: Tensor,
        position: Tensor,
        hidden: Tensor,
        temperature: float,
    ) -> Scored:
        """Over what is legal in rollouts; else over whole codebooks, plus λ times that of the category.

        Raises:
            ValueError: If a rollout's label does not continue its prefix to an item.
        """
        sets, logits = self.sets, code_logits(model, hidden, self.vocabulary)
        codes = logits[:, : sets.n_columns]
        place = self._place(input_ids, row, position)
        chosen = self._chosen(input_ids, row, position - place, place)
        column = (input_ids[row, position] - self.vocabulary.first_id)[:, None]
        books = sets.book_of(column)
        if self.law == "free":
            books = next_books("free", sets, codes, chosen)
        legal = sets.after(chosen, books).fits > 0 if self.rollouts else None
        found = log_probs(sets, codes / temperature, books, legal)
        here = (sets.table(books)[0] == column[..., None]) & (books >= 0)[..., None] & (found > -torch.inf)
        here, found = here.flatten(1), found.flatten(1)
        if not bool(here.any(1).all()):
            raise ValueError("a code label does not continue its prefix to an item: the data has another index")
        finite = found.masked_fill(found == -torch.inf, 0)
        entropy = -(finite.exp() * finite).sum(-1)
        label = torch.where(here, finite, 0).sum(-1)
        top = here.gather(1, found.argmax(1, keepdim=True))[:, 0]
        if self.category_weight and self.n_categories and not self.rollouts:
            label = label + self.category_weight * self._category(input_ids, row, position - place, logits)
        return label, entropy, top

    def _category(self, input_ids: Tensor, row: Tensor, start: Tensor, logits: Tensor) -> Tensor:
        """Log-probability of the category of each label's item, 0 where it is unknown."""
        whole = self._chosen(input_ids, row, start, torch.full_like(start, self.longest))
        codes = torch.where(whole >= 0, whole - self.sets.first, -1)
        last = torch.full_like(codes[:, :1], -1)  # no disambiguation code
        item = torch.from_numpy(self._find(torch.cat([codes, last], 1).cpu().numpy())).to(row.device)
        wanted = torch.where(item >= 0, self.category[item.clamp(min=0)], -1)
        found = logits[:, self.sets.n_columns :].log_softmax(-1).gather(1, wanted.clamp(min=0)[:, None])[:, 0]
        known = torch.where(wanted >= 0, found, 0)
        total, count = self.guessed
        self.guessed = (total.to(known.device) - known.detach().sum(), count + int((wanted >= 0).sum()))
        return known

    def _is_code(self, token: Tensor) -> Tensor:
        return (token >= self.vocabulary.first_id) & (token < self.vocabulary.first_id + self.sets.n_columns)

    def _place(self, input_ids: Tensor, row: Tensor, position: Tensor) -> Tensor:
        """Codes of the same item in front of each label: items stand whole, one behind the other."""
        at = torch.arange(input_ids.shape[1], device=input_ids.device)
        other = torch.where(self._is_code(input_ids), -1, at).cummax(1).values  # the last token that is no code
        return (position - 1 - other[row, position - 1]) % self.longest

    def _chosen(self, input_ids: Tensor, row: Tensor, start: Tensor, count: Tensor) -> Tensor:
        """(n, M) columns of the first `count` codes from `start` on, -1 in other codebooks."""
        chosen = torch.full((len(row), self.longest), -1, device=row.device)
        last = input_ids.shape[1] - 1
        for place in range(self.longest):
            token = input_ids[row, (start + place).clamp(max=last)]
            inside = (place < count) & self._is_code(token)
            column = (token - self.vocabulary.first_id).clamp(min=0, max=self.sets.n_columns - 1)[:, None]
            book = self.sets.book_of(column)
            chosen = chosen.scatter(1, book, torch.where(inside[:, None], column, chosen.gather(1, book)))
        return chosen

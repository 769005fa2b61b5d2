"""Answers as vectors: an item is scored by the model's last hidden state against what it reads of the item's text.

    s(v) = h · e(v) / τ [+ log(1 + n(v))]        log π(v) = log softmax_v s(v)

`h` is the last hidden state at the token that opens answers (the end of the sequence, as in embedding models that pool
the last token), `e(v)` that of an item's prompt; both have length 1 for the cosine. Source: R2ec, arXiv 2505.16994.

Two options are not R2ec's. A language model's hidden states at one token are nearly parallel, whatever stands before
it: `centre` takes the catalogue's mean vector away from both before they are compared. `popularity_prior` adds the log
of an item's train count n(v), which would otherwise have to be learned.

In token ids, an answer is a number behind every vocabulary (`ITEM_BASE` + item). It is never embedded: as a label it
says which item, and in a rollout it is the action whose log-probability is log π(v).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from reasonrec.recipes.decoding.answers import Answers, Choices, Scored
from reasonrec.recipes.decoding.attention import as_taken
from reasonrec.recipes.decoding.backbone import last_hidden
from reasonrec.recipes.decoding.merge_chains import log_mean_exp
from reasonrec.recipes.decoding.prefix import Prefix
from reasonrec.recipes.decoding.prior import Prior, Tree
from reasonrec.recipes.decoding.sample import Sampler, Step
from reasonrec.recipes.decoding.search import Exclude, Found, ranked
from reasonrec.recipes.decoding.shared_prefix import can_share
from reasonrec.recipes.policies.dual_head.table import best_rows, products
from reasonrec.tokenizers.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from reasonrec.recipes.decoding.branches import Lanes

ITEM_BASE = 1 << 24  # no tokenizer has as many tokens
TOKENS = 4096  # tokens of item prompts read at a time
Similarity = Literal["cosine", "dot"]


class ItemAnswers(Answers):
    """Answers that are vectors.

    Args:
        item_prompts: Token ids of each item's prompt; its last token is where the vector is read.
        begin_id: The token that opens answers.
        branch: Tokens in front of an answer, the begin marker included, that belong to it alone (the prompt's tail).
        popularity: (items,) train counts: equal scores rank by them, then by number.
        temperature: τ.
        similarity: `cosine`, or the plain product.
        centre: Compare what is left without the catalogue's mean vector.
        popularity_prior: Add the log of the train count, plus one.
        over: What the supervised loss normalises over: the whole catalogue, or the targets of the batch.
        fresh_items: At most so many targets of a batch are read with gradient; the others come from the table.

    Attributes:
        table: (items, width) float32, by item number; None before the first `refresh`.
        mean: (width,) float32 mean of the catalogue's hidden states, when the table was made; None if not `centre`.
        candidates: What reinforcement learning normalises over: item numbers, ascending; None elsewhere.
    """

    longest = 1

    def __init__(
        self,
        item_prompts: Sequence[list[int]],
        begin_id: int,
        branch: int,
        popularity: np.ndarray,
        *,
        temperature: float,
        similarity: Similarity,
        centre: bool,
        popularity_prior: bool,
        over: Literal["catalogue", "batch"],
        fresh_items: int,
    ) -> None:
        self.item_prompts, self.begin_id, self.branch = item_prompts, begin_id, branch
        self.temperature, self.similarity, self.centre = temperature, similarity, centre
        self.over, self.fresh_items = over, fresh_items
        self.n_items = len(item_prompts)
        self.order = torch.from_numpy(np.lexsort([np.arange(self.n_items), -popularity]))  # row to item
        self.place = torch.empty_like(self.order)  # item to row
        self.place[self.order] = torch.arange(self.n_items)
        self.log_counts = torch.from_numpy(np.log1p(popularity)).float()  # (items,)
        self.popularity_prior = popularity_prior
        self.tokens_read = 0  #: tokens of item prompts that were read
        self._rows: Tensor | None = None  # the table in the order of ranking
        self.mean: Tensor | None = None
        self.candidates: Tensor | None = None

    # -- vectors

    @property
    def table(self) -> Tensor | None:
        """Vectors by item number."""
        return None if self._rows is None else self._rows[self.place, : -1 if self.popularity_prior else None]

    @table.setter
    def table(self, vectors: Tensor) -> None:
        order = self.order.to(vectors.device)
        self._rows = self._with_prior(vectors[order], order)

    def to(self, device: torch.device | str) -> None:
        """See `Answers`."""
        self.order, self.place = self.order.to(device), self.place.to(device)
        self.log_counts = self.log_counts.to(device)
        if self._rows is not None:
            self._rows = self._rows.to(device)
        if self.mean is not None:
            self.mean = self.mean.to(device)
        if self.candidates is not None:
            self.candidates = self.candidates.to(device)

    def unit(self, hidden: Tensor) -> Tensor:
        """Hidden states as they are compared: float32, without the mean, of length 1 for the cosine."""
        hidden = hidden.float()
        if self.mean is not None:
            hidden = hidden - self.mean
        return normalize(hidden, dim=-1) if self.similarity == "cosine" else hidden

    def query(self, hidden: Tensor) -> Tensor:
        """What is multiplied with the table: a unit vector, and a 1 that the prior is multiplied with."""
        vectors = self.unit(hidden)
        return torch.cat([vectors, vectors.new_ones(len(vectors), 1)], 1) if self.popularity_prior else vectors

    def _with_prior(self, vectors: Tensor, items: Tensor) -> Tensor:
        """Vectors of items, with the prior in one more place."""
        if not self.popularity_prior:
            return vectors.contiguous()
        return torch.cat([vectors, self.temperature * self.log_counts[items].to(vectors.device)[:, None]], 1)

    def encode(self, model: PreTrainedModel, items: Tensor) -> Tensor:
        """Read items, with gradient where it is on: (n,) numbers to rows of the table."""
        return self._with_prior(self.unit(self._read(model, items)), items)

    def _read(self, model: PreTrainedModel, items: Tensor) -> Tensor:
        """Hidden states at the last token of items' prompts, (n, width)."""
        prompts = [self.item_prompts[item] for item in items.tolist()]
        ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
        seen = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)], seen[row, : len(prompt)] = torch.tensor(prompt), 1
        self.tokens_read += int(seen.sum())
        ids, seen = ids.to(model.device), seen.to(model.device)
        hidden = last_hidden(model, input_ids=ids, attention_mask=seen, use_cache=False)
        return hidden[torch.arange(len(prompts), device=model.device), seen.sum(1) - 1]

    @torch.no_grad()
    def read_all(self, model: PreTrainedModel) -> None:
        """Make the table, and the mean, of the whole catalogue."""
        lengths = np.array([len(prompt) for prompt in self.item_prompts])
        order, parts, begin = np.argsort(lengths, kind="stable"), [], 0
        while begin < len(order):
            fits = TOKENS // lengths[order[begin : begin + TOKENS]]
            size = max(int((np.arange(1, len(fits) + 1) <= fits).sum()), 1)
            parts.append(self._read(model, torch.from_numpy(order[begin : begin + size])).float())
            begin += size
        vectors = torch.cat(parts)
        table = torch.empty_like(vectors)
        table[torch.from_numpy(order).to(vectors.device)] = vectors
        self.mean = table.mean(0) if self.centre else None
        self.table = self.unit(table)

    @property
    def rows(self) -> Tensor:
        """The table in the order of ranking."""
        if self._rows is None:
            raise RuntimeError("the item table was never computed: call Policy.refresh")
        return self._rows

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
        """One product with the table; always exact. Behind several chains, of their mean probabilities."""
        barred = None
        if exclude is not None:
            place = self.place.cpu().numpy()
            barred = [place[np.asarray(items, dtype=np.int64)] for items in exclude]
        if chains == 1 and prior is None:
            best = best_rows(self.rows, self.query(prefix.hidden), k, temperature=self.temperature, exclude=barred)
            rows, scores = best.rows, best.log_probs
        else:
            merged = log_mean_exp(self._log_probs(prefix, prior).view(-1, chains, self.n_items))
            for user, excluded in enumerate(barred or ()):
                merged[user, torch.from_numpy(excluded).to(merged.device)] = -torch.inf
            everything = torch.arange(self.n_items, device=merged.device).expand(len(merged), -1)
            found = ranked(everything, merged, k)
            scores, rows = found.scores, found.items.masked_fill(found.scores == -torch.inf, -1)
        items = torch.where(rows >= 0, self.order[rows.clamp(min=0)], -1)
        return Found(items, scores, torch.ones(len(items), dtype=torch.bool, device=items.device))

    @torch.no_grad()
    def score(self, model: PreTrainedModel, prefix: Prefix, items: Tensor, prior: Prior | None = None) -> Tensor:
        """See `Answers`."""
        found = self._log_probs(prefix, prior).gather(1, self.place[items.clamp(min=0)])
        return found.masked_fill(items < 0, -torch.inf)

    @property
    def tree(self) -> Tree:
        """Items by their place in the ranking, on one level."""
        return Tree(self.place[:, None], self.n_items)

    @torch.no_grad()
    def choices(self, model: PreTrainedModel, prefix: Prefix, items: Tensor) -> Choices:
        """The whole catalogue."""
        log_probs = self._log_probs(prefix)[:, None]
        return Choices(log_probs, self._places(log_probs))

    def _log_probs(self, prefix: Prefix, prior: Prior | None = None) -> Tensor:
        """Those of the whole catalogue, (rows, items) in the order of ranking."""
        log_probs = (products(self.query(prefix.hidden), self.rows) / self.temperature).log_softmax(1)
        if prior is None:
            return log_probs
        alone = log_probs[:, None]
        return prior.pooled(alone, self._places(alone), torch.zeros_like(alone[..., 0], dtype=torch.int64))[:, 0]

    def _places(self, log_probs: Tensor) -> Tensor:
        return torch.arange(self.n_items, device=log_probs.device).expand(log_probs.shape)

    def write(self, lanes: Lanes, sampler: Sampler, uniform: Tensor | None, steps: list[Step]) -> Tensor:
        """The best item of the table; what is optimised in its place is the target (`DualHead.optimised`)."""
        shape = lanes.position.shape
        best = best_rows(self.rows, self.query(lanes.hidden.flatten(0, 1)), 1, temperature=self.temperature)
        item = self.order[best.rows[:, 0]].view(shape)
        chosen = torch.ones(shape, dtype=torch.bool, device=item.device)
        steps.append((ITEM_BASE + item, torch.zeros(shape, device=item.device), chosen, chosen))
        return item

    # -- training

    def hidden(self, model: PreTrainedModel, labels: Tensor, answers_only: bool, inputs: dict[str, Any]) -> Tensor:
        """Answers are never read; those in the middle of a history are branches that nothing behind them sees."""
        ids, seen = inputs["input_ids"], inputs.get("attention_mask")
        is_item = ids >= ITEM_BASE
        inputs["input_ids"] = torch.where(is_item, self.begin_id, ids)
        real = torch.ones_like(is_item) if seen is None else seen.bool()
        behind = (is_item.cumsum(1)[:, :-1] > 0) & real[:, 1:] & ~is_item[:, 1:]
        if not answers_only and bool(behind.any()):
            inputs |= self._branches(model, is_item, real)
        return super().hidden(model, labels, answers_only, inputs)

    def _branches(self, model: PreTrainedModel, is_item: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Mask and positions of a history whose items are each followed by a prompt's tail and an answer."""
        if not can_share(model):
            raise UserError(
                f"{model.config.get_text_config().model_type} models take no attention mask of one's own, which "
                "supervising every position of a history needs here: set one_per_prefix: true"
            )
        length, device = is_item.shape[1], is_item.device
        branch = torch.zeros_like(is_item, dtype=torch.int64)  # number of the branch a token belongs to, 0 for none
        number = is_item.cumsum(1) * is_item
        inside = torch.zeros_like(branch)  # place in the branch
        for back in range(self.branch + 1):
            branch[:, : length - back] = torch.maximum(branch[:, : length - back], number[:, back:])
            inside[:, : length - back] += is_item[:, back:] * (self.branch - back)
        stem = (branch == 0) & real
        before = stem.cumsum(1) - stem.long()  # stem tokens in front of each
        place = torch.arange(length, device=device)
        sees = (branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])  # (batch, from, to)
        sees = sees & real[:, None] & (place[:, None] >= place)
        mask = as_taken(model, sees | torch.eye(length, dtype=torch.bool, device=device))
        return {"attention_mask": mask, "position_ids": before + inside}

    def split(self, input_ids: Tensor, labels: Tensor, answers_only: bool) -> tuple[Tensor, Tensor]:
        """Answers are known by their numbers; behind one, a rollout has nothing left to choose."""
        target = labels[:, 1:]
        mask, is_item = target != -100, target >= ITEM_BASE
        is_text = mask & ~is_item
        if answers_only:
            is_text = is_text & (is_item.cumsum(1) == 0)
        return is_item, is_text

    def log_probs(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        row: Tensor,
        position: Tensor,
        hidden: Tensor,
        temperature: float,
    ) -> Scored:
        """Over what reinforcement learning fixed, or over catalogue or batch; targets are read with gradient."""
        item = input_ids[row, position] - ITEM_BASE
        queries = self.query(hidden) / self.temperature
        if self.candidates is not None:
            target = torch.searchsorted(self.candidates, item)
            logits = products(queries, self.encode(model, self.candidates))
        else:
            among = torch.arange(self.n_items, device=item.device) if self.over == "catalogue" else item.unique()
            target = torch.searchsorted(among, item)
            logits = products(queries, self.rows[self.place[among]]) - self._often(among)
            if torch.is_grad_enabled():
                logits = self._with_fresh(model, queries, logits, among, item.unique())
        log_probs = logits.log_softmax(1)
        entropy = -(log_probs.exp() * log_probs).sum(1)
        return log_probs.gather(1, target[:, None])[:, 0], entropy, log_probs.argmax(1) == target

    def _often(self, items: Tensor) -> Tensor:
        """What is taken off the logits of items, (n,): how often, in logs, each is among the targets of a batch.

        Popular items are rivals more often than others. Uncorrected, the loss in the batch would learn how much more
        likely than usual an item is, and rank rare ones first. Source: Yi et al., RecSys 2019
        (https://doi.org/10.1145/3298689.3346996).
        """
        return self.log_counts[items] if self.over == "batch" else torch.zeros(len(items), device=items.device)

    def _with_fresh(
        self, model: PreTrainedModel, queries: Tensor, logits: Tensor, among: Tensor, targets: Tensor
    ) -> Tensor:
        """Put the products with freshly read targets into the logits.

        Beside rows of an older table, new vectors would stand apart by all that moved since it was made: the model
        would learn to move, and lose it at the next reading. So they have the table's values and their own gradient,
        unless all rivals are read as well.
        """
        if len(targets) > self.fresh_items:
            chosen = torch.randperm(len(targets))[: self.fresh_items].sort().values
            targets = targets[chosen.to(targets.device)]
        vectors = self.encode(model, targets)
        if len(targets) < len(among):
            vectors = self.rows[self.place[targets]] + (vectors - vectors.detach())
        fresh = products(queries, vectors) - self._often(targets)
        return logits.index_copy(1, torch.searchsorted(among, targets), fresh)

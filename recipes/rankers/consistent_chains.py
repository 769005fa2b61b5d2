"""Chains that are kept only where the codes behind them agree with the category that they state.

REG4Rec's CORP (arXiv 2508.15308) carried over to semantic IDs behind chains, which is ours: a chain says in words what
kind of item comes next (`Next: Comedy, Drama.`), and the first code of the answer says it again. Both are read as
distributions over categories: those stated are equally likely, and a code has the categories of its items, weighed by
how often each was chosen in training. Where the Jensen-Shannon divergence of the two (to base 2) is above a threshold,
the chain is left out; a user whose chains all are is ranked at once. A chain that states no category contradicts
nothing, and is kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from reasonrec.data_gen.histories import UserHistory
from reasonrec.data_gen.reasoning.checks import contains
from reasonrec.data_gen.reasoning.label_statistics import ItemLabels
from reasonrec.data_gen.reasoning.traces import CUES
from reasonrec.recipes.policies.inference import choices
from reasonrec.recipes.rankers.likelihood import behind_chains
from reasonrec.recipes.rankers.model import may_repeat
from reasonrec.recipes.rankers.reasoning import ReasoningRanker
from reasonrec.recipes.recommender import Recommender
from reasonrec.rewards.consistency import jensen_shannon
from reasonrec.tokenizers.catalogue import Catalogue
from reasonrec.tokenizers.errors import UserError

_NEXT = re.compile(rf"\b{CUES['formulation']}:(.*?)(?:\b{CUES['rewriting']}:|$)", re.S)


def unstated(recommender: Recommender) -> str | None:
    """Why chains of a model cannot be compared with its codes; None if they can."""
    if not recommender.policy.with_tree:
        return f"policy {recommender.policy.name} has no first code that stands for a category, as semantic_id has"
    if not any(recommender.policy.catalogue.items["category"]):
        return "the items have no categories"
    return None


def stated(chain: str, names: Sequence[str]) -> NDArray[np.float64] | None:
    """What a chain says comes next.

    Args:
        chain: Its words.
        names: The categories.

    Returns:
        (categories,) equal shares of those that its sentence names; None if it names none.
    """
    found = _NEXT.search(chain)
    named = np.array([found is not None and contains(found[1], name) for name in names], dtype=np.float64)
    return named / named.sum() if named.any() else None


def code_categories(catalogue: Catalogue, first: NDArray[np.integer], labels: ItemLabels) -> NDArray[np.float64]:
    """What each first code says of the category.

    Args:
        catalogue: The items.
        first: (items,) number of the first code of each.
        labels: Their categories; an item with several is split alike.

    Returns:
        (codes, categories), rows sum to 1; all categories alike where no item has one. Where no item of a code was
        chosen in training, all of them weigh the same.
    """
    weight = catalogue.items["train_count"].to_numpy().astype(np.float64)
    bought = np.bincount(first, weights=weight)
    weight = np.where(bought[first] > 0, weight, 1.0)
    share = np.zeros((len(bought), len(labels.names)))
    for item, own in enumerate(labels.of_item):
        if own:
            share[first[item], list(own)] += weight[item] / len(own)
    total = share.sum(1, keepdims=True)
    return np.where(total > 0, share / np.where(total > 0, total, 1.0), 1.0 / len(labels.names))


@dataclass
class ConsistentChains:
    """Ranks behind those chains of a model that its codes agree with.

    Attributes:
        ranker: The model that thinks.
        theta: The largest divergence of what a chain states and what codes say behind it.

    Raises:
        UserError: If there is nothing to compare.
    """

    ranker: ReasoningRanker
    theta: float
    _told: str = field(default="", init=False)

    def __post_init__(self) -> None:
        if (why := unstated(self.ranker.reasoner.recommender)) is not None:
            raise UserError(f"chain_theta={self.theta} has nothing to compare: {why}")

    @property
    def name(self) -> str:
        """Name in the table."""
        return f"{self.ranker.name}, consistent chains"

    @property
    def note(self) -> str:
        """What the last ranking left out."""
        return self._told

    @property
    def tokens_per_user(self) -> float:
        """See `Thinks`: chains are written before they are left out."""
        return self.ranker.tokens_per_user

    @property
    def cut(self) -> float:
        """See `Thinks`."""
        return self.ranker.cut

    @property
    def thoughts(self) -> list[str]:
        """See `Thinks`."""
        return self.ranker.thoughts

    def rank(self, rows: pl.DataFrame, k: int) -> NDArray[np.int64]:
        """See `Ranker`."""
        items = self.ranker.rank(rows, k).copy()
        assert self.ranker.last is not None
        chains = self.ranker.last.chains
        divergence = self.divergences(rows, chains)
        keep = ~(divergence > self.theta)  # NaN states nothing
        left = keep.sum(1)
        for n in np.unique(left[left < keep.shape[1]]):  # as many chains in each user of a ranking
            users = np.flatnonzero(left == n)
            own = [[chain for chain, kept in zip(chains[user], keep[user], strict=True) if kept] for user in users]
            items[users] = self._behind(rows[users], own, k) if n else self._direct(rows[users], k)
        unknown, out = int(np.isnan(divergence).sum()), int((~keep).sum())
        self._told = (
            f"chain_theta={self.theta:g} left out {out} of {keep.size} chains whose category the first code "
            f"contradicts; {unknown} state none and were kept; {int((left == 0).sum())} of {len(left)} users had no "
            "chain left, and are ranked without one"
        )
        return items

    def score(self, rows: pl.DataFrame, items: NDArray[np.integer]) -> NDArray[np.floating]:
        """Not behind a different number of chains for each user.

        Raises:
            UserError: Always.
        """
        raise UserError(f"{self.name} ranks, and scores nothing: score items with the model that thinks")

    def divergences(self, rows: pl.DataFrame, chains: Sequence[Sequence[Sequence[int]]]) -> NDArray[np.float64]:
        """How far each chain and the codes behind it are apart.

        Args:
            rows: The cases.
            chains: Token ids of the chains of each, the closing delimiter included.

        Returns:
            (cases, chains) in [0, 1]; NaN where a chain states no category.
        """
        reasoner, recommender = self.ranker.reasoner, self.ranker.reasoner.recommender
        policy, labels = recommender.policy, ItemLabels.of(recommender.policy.catalogue.items, "category")
        prompts = [prompt for own in behind_chains(recommender, rows, chains) for prompt in own]
        nodes = policy.answers.tree.nodes[:, 0].cpu().numpy()
        codes, first = np.unique(nodes, return_inverse=True)
        share = code_categories(policy.catalogue, first, labels)
        implied = np.empty((len(prompts), len(labels.names)))
        anything = np.zeros(len(prompts), dtype=np.int64)  # what the first code is chosen from is the same for all
        for chunk, choice in choices(policy, recommender.model, prompts, anything, batch_size=reasoner.batch_size):
            node, log_probs = choice.node[:, 0].cpu().numpy(), choice.log_probs[:, 0].double().cpu().numpy()
            probability = np.where(node >= 0, np.exp(log_probs), 0.0)
            implied[chunk] = np.einsum("rn,rnc->rc", probability, share[np.searchsorted(codes, node.clip(codes[0]))])
        words = [policy.readable(policy.without_items(chain)) for own in chains for chain in own]
        flat = [stated(text, labels.names) for text in words]
        found = np.full(len(flat), np.nan)
        for place, said in enumerate(flat):
            if said is not None:
                found[place] = jensen_shannon(said[None], implied[place, None])[0]
        return found.reshape(len(chains), -1)

    def _behind(self, rows: pl.DataFrame, chains: Sequence[Sequence[Sequence[int]]], k: int) -> NDArray[np.int64]:
        reasoner = replace(self.ranker.reasoner, k=k)
        return reasoner.behind(UserHistory.of_rows(rows), chains, repeats=may_repeat(rows))

    def _direct(self, rows: pl.DataFrame, k: int) -> NDArray[np.int64]:
        reasoner = self.ranker.reasoner
        return reasoner.recommender.rank(
            UserHistory.of_rows(rows),
            k=k,
            num_beams=reasoner.num_beams,
            exact=False,
            repeats=may_repeat(rows),
            batch_size=reasoner.batch_size,
            pooled=False,
        )[0]

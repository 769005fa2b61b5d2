"""Chains against the codes behind them, on a trained adapter and chains that are put there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from reasonrec.data_gen.histories import UserHistory
from reasonrec.data_gen.reasoning.label_statistics import ItemLabels
from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.policies.inference import Ranked, score
from reasonrec.recipes.rankers.consistent_chains import ConsistentChains, code_categories, stated, unstated
from reasonrec.recipes.rankers.likelihood import behind_chains
from reasonrec.recipes.rankers.model import may_repeat
from reasonrec.recipes.rankers.reasoning import Reasoner, ReasoningRanker, Thinking
from reasonrec.recipes.recommender import Recommender
from reasonrec.rewards.consistency import jensen_shannon
from reasonrec.tokenizers.catalogue import SCHEMA, Catalogue
from reasonrec.tokenizers.errors import UserError


@dataclass
class Given(ReasoningRanker):
    """Thinks what it is given."""

    chains: list[list[list[int]]] = field(default_factory=list)

    def rank(self, rows: pl.DataFrame, k: int) -> np.ndarray:
        reasoner = replace(self.reasoner, k=k)
        items = reasoner.behind(UserHistory.of_rows(rows), self.chains, repeats=may_repeat(rows))
        tokens, nothing = np.full(len(items), 9), np.zeros(len(items))
        self.last = Ranked(items, nothing[:, None], nothing > 0, self.chains, tokens, nothing)
        return items


@pytest.fixture(scope="module")
def recommender(adapter: Path) -> Recommender:
    return Recommender.from_pretrained(adapter, dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def rows(tiny_dataset: Path) -> pl.DataFrame:
    return Dataset.load(tiny_dataset).rows("valid").head(6)


@pytest.fixture(scope="module")
def labels(recommender: Recommender) -> ItemLabels:
    return ItemLabels.of(recommender.policy.catalogue.items, "category")


@pytest.fixture
def given(recommender: Recommender, labels: ItemLabels) -> Given:
    """Two chains a user: one that names a category, one that names another, or none for the last user."""
    reasoner = Reasoner(recommender, k=5, num_beams=20, batch_size=4)

    def chain(words: str) -> list[int]:
        return [*recommender.policy.tokenizer.encode(words, add_special_tokens=False), *reasoner.close_ids]

    names = labels.names
    chains = [[chain(f" Next: {names[n % len(names)]}. Keep: x."), chain(f" Next: {names[-1]}.")] for n in range(5)]
    chains.append([chain(" Next: Comedy."), chain(f" Wants: {names[0]}. Keep: y.")])
    return Given(reasoner, Thinking(2), "tiny, 2 chains, beam 20", chains=chains)


def test_the_sentence_about_the_next_item_is_what_states_a_category() -> None:
    names = ["Comedy", "Dark Comedy", "War", "Drama"]
    assert stated(" Wants: War. Next: drama, War. Keep: Comedy.", names).tolist() == [0, 0, 0.5, 0.5]
    assert stated("Next: a Dark Comedy", names).tolist() == [0.5, 0.5, 0, 0]
    assert stated("Next: Warfare. Keep: War", names) is None
    assert stated("War", names) is None


def test_codes_have_the_categories_of_their_items_by_purchases() -> None:
    texts, counts = ["War", "War, Drama", "", "Drama", "War", ""], [3, 1, 5, 0, 0, 0]
    rows = [
        dict.fromkeys(SCHEMA, "") | {"item_id": str(n), "title": "t", "category": text, "train_count": count}
        for n, (text, count) in enumerate(zip(texts, counts, strict=True))
    ]
    catalogue = Catalogue(pl.DataFrame(rows, schema=SCHEMA), "six items", mask_history=False, dataset="")
    labels = ItemLabels.of(catalogue.items, "category")
    assert labels.names == ("War", "Drama")
    found = code_categories(catalogue, np.array([0, 0, 0, 1, 1, 2]), labels)
    np.testing.assert_allclose(found, [[3.5 / 4, 0.5 / 4], [0.5, 0.5], [0.5, 0.5]])


def test_divergences_are_those_of_the_probabilities_of_all_items(recommender, rows, labels, given) -> None:
    found = ConsistentChains(given, 0.5).divergences(rows, given.chains)
    assert np.isnan(found[5]).all()
    catalogue, n = recommender.policy.catalogue, recommender.policy.catalogue.n_items
    first = catalogue.codes.codes[:, 0]
    share = code_categories(catalogue, first, labels)
    prompts = [prompt for own in behind_chains(recommender, rows, given.chains) for prompt in own]
    scores = score(recommender.policy, recommender.model, prompts, np.tile(np.arange(n), (12, 1)))
    implied = (np.exp(scores)[..., None] * share[first]).sum(1).reshape(6, 2, -1)
    for user in range(5):
        for chain, name in enumerate((user % len(labels.names), len(labels.names) - 1)):
            expected = jensen_shannon(np.eye(len(labels.names))[name][None], implied[user, chain, None])[0]
            assert found[user, chain] == pytest.approx(expected, abs=1e-4)


def test_chains_above_the_threshold_are_left_out(recommender, rows, given) -> None:
    plain = given.rank(rows, 5)
    everything = ConsistentChains(given, 1.0)
    assert (everything.rank(rows, 5) == plain).all()
    assert "left out 0 of 12 chains" in everything.note
    divergence = everything.divergences(rows, given.chains)
    direct = recommender.rank(
        UserHistory.of_rows(rows), k=5, num_beams=20, exact=False, repeats=may_repeat(rows), pooled=False
    )[0]
    nothing = ConsistentChains(given, 0.0)
    found = nothing.rank(rows, 5)
    assert (found[:5] == direct[:5]).all()
    assert (found[5] == plain[5]).all(), "a chain that states nothing is kept"
    assert "left out 10 of 12 chains" in nothing.note
    assert "2 state none and were kept; 5 of 6 users had no chain left" in nothing.note
    assert (nothing.tokens_per_user, nothing.cut, len(nothing.thoughts)) == (9, 0, 6)
    some = ConsistentChains(given, float(np.median(divergence[:5].max(1))))
    found, keep = some.rank(rows, 5), ~(divergence > some.theta)
    assert (keep.sum(1) == 1).any()
    for user in np.flatnonzero(keep.sum(1) == 1):
        own: Any = [[given.chains[user][int(keep[user].argmax())]]]
        alone = given.reasoner.behind(UserHistory.of_rows(rows[[int(user)]]), own, repeats=may_repeat(rows))
        assert (found[user] == alone[0]).all()
    with pytest.raises(UserError, match="ranks, and scores nothing"):
        some.score(rows, found)


def test_items_without_categories_are_refused(recommender, given) -> None:
    import copy

    assert unstated(recommender) is None
    other = copy.copy(recommender)
    other.policy = copy.copy(recommender.policy)
    other.policy.catalogue = replace(
        recommender.policy.catalogue, items=recommender.policy.catalogue.items.with_columns(category=pl.lit(""))
    )
    assert unstated(other) == "the items have no categories"
    with pytest.raises(UserError, match=r"chain_theta=0\.5 has nothing to compare: the items have no categories"):
        ConsistentChains(replace(given, reasoner=replace(given.reasoner, recommender=other)), 0.5)

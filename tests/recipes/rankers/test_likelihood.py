"""Likelihood at once and behind chains, against scores computed item by item."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from reasonrec.data_gen.histories import UserHistory
from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.policies.inference import score
from reasonrec.recipes.rankers import likelihood, pooled
from reasonrec.recipes.rankers.likelihood import behind_chains, nats, thought_nats
from reasonrec.recipes.rankers.pool import MODEL, Weights
from reasonrec.recipes.rankers.reasoning import Reasoner, Thinking
from reasonrec.recipes.recommender import Recommender


@pytest.fixture(scope="module")
def recommender(adapter: Path) -> Recommender:
    return Recommender.from_pretrained(adapter, dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def rows(tiny_dataset: Path) -> pl.DataFrame:
    return Dataset.load(tiny_dataset).rows("valid").head(12)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A temperature of one everywhere, so that the log-probabilities are the policy's own."""

    def ones(heard: pooled.Heard, names: list[str], fitted: object = None) -> Weights:
        assert names == [MODEL]
        return {MODEL: np.ones(len(heard.levels))}

    monkeypatch.setattr(pooled.Heard, "weights", ones)


def among_unmasked(recommender: Recommender, rows: pl.DataFrame, prompts: list[list[int]]) -> np.ndarray:
    """Log-probability of every item behind each prompt, without what is masked."""
    n = recommender.policy.catalogue.n_items
    scores = score(recommender.policy, recommender.model, prompts, np.tile(np.arange(n), (len(prompts), 1)))
    for row, masked in zip(scores, rows["masked"], strict=True):
        row[masked.to_numpy()] = -np.inf
    return scores


def test_nats_are_minus_the_log_probability_of_the_target(plain, recommender, rows) -> None:
    """On a world that masks nothing, over the whole catalogue."""
    nothing = rows.with_columns(masked=pl.lit([], dtype=rows.schema["masked"]))
    scores = among_unmasked(recommender, nothing, recommender.prompts(UserHistory.of_rows(rows)))
    expected = -scores[np.arange(rows.height), rows["target"].to_numpy()]
    np.testing.assert_allclose(nats(recommender, nothing, batch_size=5), expected, atol=1e-4)


def test_behind_several_chains_it_is_the_mean_probability_that_counts(plain, recommender, rows) -> None:
    nothing = rows.with_columns(masked=pl.lit([], dtype=rows.schema["masked"]))
    reasoner, thinking = Reasoner(recommender, batch_size=5), Thinking(3, 6, seed=1)
    chains = reasoner(UserHistory.of_rows(rows), thinking).chains
    prompts = behind_chains(recommender, rows, chains)
    found, lists = thought_nats(reasoner, nothing, thinking)
    each = np.stack(
        [
            among_unmasked(recommender, nothing, [own[c] for own in prompts])[
                np.arange(rows.height), rows["target"].to_numpy()
            ]
            for c in range(3)
        ]
    )
    np.testing.assert_allclose(found, -np.log(np.exp(each).mean(0)), atol=2e-4)
    assert lists.shape == (rows.height, 10)
    np.testing.assert_allclose(likelihood.nats(recommender, nothing, prompts), found, atol=2e-4)


def test_a_temperature_is_fitted_on_the_other_half(recommender, rows) -> None:
    """Doubling all logits changes nothing, as the temperature takes it back."""
    before = nats(recommender, rows)
    assert np.isfinite(before).all()
    assert len(before) == rows.height
    other = nats(recommender, rows, seed=1)
    assert (before != other).any(), "other halves, other temperatures"

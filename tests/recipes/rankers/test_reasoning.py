"""Reasoning mode: what is searched behind chains, the controls, and the rows of the table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from reasonrec.recipes.decoding.score import score_all_items
from reasonrec.recipes.rankers.reasoning import CONTROLS, Reasoner, Thinking, control_chains
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.errors import UserError

HISTORIES = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12, 13], [20, 21], [30, 4, 40]]


@pytest.fixture(scope="module")
def recommender(adapter: Path) -> Recommender:
    return Recommender.from_pretrained(adapter, dtype=torch.float32, device="cpu")


def exact(recommender: Recommender, history: list[int], chains: list[list[int]]) -> np.ndarray:
    """Log of the mean probability of every item, by reading prompt, chain and item together."""
    policy = recommender.policy
    opening = policy.prompts.reasoning(np.array(history)[-recommender.setting.max_history :])
    scores = []
    for chain in chains:
        ids = torch.tensor([[*opening, *chain, policy.vocabulary.begin_id]])
        scores.append(
            score_all_items(
                recommender.model,
                policy.trie,
                policy.vocabulary,
                ids,
                torch.ones_like(ids),
                item_token_ids=policy.prompts.item_token_ids,
            )
        )
    return torch.stack(scores, 1).logsumexp(1)[0].numpy() - np.log(len(chains))


@pytest.mark.parametrize("thinking", [Thinking(1, 7), Thinking(3, 7, seed=2), Thinking(2, 5, temperature=0.5)])
def test_the_ranking_is_that_of_the_mean_probability_behind_the_chains(recommender, thinking):
    n = recommender.policy.index.n_items
    reasoner = Reasoner(recommender, k=10, num_beams=n, batch_size=2)
    found = reasoner(HISTORIES, thinking)
    for row, history in enumerate(HISTORIES):
        assert len(found.chains[row]) == thinking.chains
        expected = exact(recommender, history, found.chains[row])
        np.testing.assert_allclose(found.scores[row], np.sort(expected)[::-1][:10], atol=2e-4)
        np.testing.assert_allclose(found.scores[row], expected[found.items[row]], atol=2e-4)
    assert (found.tokens >= 1).all()
    assert (found.tokens <= thinking.chains * thinking.max_chain).all()


def test_chains_that_are_put_there_give_what_own_ones_gave(recommender):
    reasoner = Reasoner(recommender, k=10, num_beams=20, batch_size=3)
    own = reasoner(HISTORIES, Thinking(3, 6, seed=1), exclude=HISTORIES)
    again = reasoner.behind(HISTORIES, own.chains, exclude=HISTORIES)
    assert (again == own.items).all()
    for items, history in zip(own.items, HISTORIES, strict=True):
        assert not set(items) & set(history)


def test_batches_change_nothing(recommender):
    thinking = Thinking(2, 6, seed=3)
    results = [Reasoner(recommender, 10, 20, size)(HISTORIES, thinking) for size in (1, 2, 16)]
    for other in results[1:]:
        assert other.chains == results[0].chains
        assert (other.items == results[0].items).all()
        np.testing.assert_allclose(other.scores, results[0].scores, atol=1e-4)


def test_the_controls(recommender):
    reasoner = Reasoner(recommender, k=5, num_beams=10)
    first = recommender.policy.vocabulary.first_id
    item = recommender.policy.prompts.item_token_ids[3]
    close = list(reasoner.close_ids)
    bodies = [[10, *item, 11], [12, 13], [*item, 14], [15], [16, 17, 18, 19]]
    chains = [[body + close] for body in bodies]
    made = control_chains(reasoner, [np.array(h) for h in HISTORIES], chains, seed=0)
    assert tuple(made) == CONTROLS
    assert made["empty chain"] == [[close]] * 5
    assert [len(own[0]) for own in made["filler chain"]] == [len(own[0]) for own in chains]
    assert made["chain without items"] == [
        [body + close] for body in ([10, 11], [12, 13], [14], [15], [16, 17, 18, 19])
    ]
    others = made["another user's chain"]
    assert sorted(others) == sorted(chains)
    assert all(a != b for a, b in zip(others, chains, strict=True))
    assert all(token < first for own in made["filler chain"] for token in own[0])


def test_one_merged_prompt_is_direct_mode(recommender):
    reasoner = Reasoner(recommender, k=10, num_beams=20)
    direct, _ = recommender.rank(HISTORIES, k=10, num_beams=20)
    assert (reasoner.variants(HISTORIES, 1) == direct).all()
    assert (reasoner.variants(HISTORIES, 3) != direct).any()


def test_a_chain_is_readable(recommender):
    policy = recommender.policy
    titles = policy.catalogue.titles
    words = policy.tokenizer("likes")["input_ids"]
    text = Reasoner(recommender).readable([*words, *policy.prompts.item_token_ids[4], *words])
    assert text == f"likes [{titles[4]}]likes"


def test_settings_that_make_no_sense():
    with pytest.raises(UserError, match="chains=0"):
        Thinking(chains=0)
    with pytest.raises(UserError, match="max_chain=0"):
        Thinking(max_chain=0)


def test_both_modes_and_the_controls_in_one_table(stage, adapter, tiny_dataset, tmp_path):
    stage(
        "eval_ranking", "--dataset", str(tiny_dataset), "--output_dir", str(tmp_path / "report"), "--models",
        str(adapter), "--reasoning_models", str(adapter), "--num_beams", "20", "--chains", "2", "--max_chain", "6",
    )  # fmt: skip
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    by_mode: dict[str, list[str]] = {}
    for row in metrics["rows"]:
        by_mode.setdefault(row["mode"], []).append(row["name"])
        assert row["valid_ratio"] == 1
        assert (row["tokens_per_user"] > 0) == (row["mode"] == "reasoning")
    assert by_mode["reasoning"] == ["lora, 2 sampled chains, beam 20"]
    assert by_mode["control"] == [
        "lora, another user's history", *(f"lora, {name}" for name in CONTROLS), "lora, 2 prompts merged",
    ]  # fmt: skip
    compared = {pair["b"] for pair in metrics["paired"] if pair["a"] == by_mode["reasoning"][0]}
    assert compared >= {"lora, exact search", *by_mode["control"][1:]}
    assert "sampled chains" in (tmp_path / "report" / "report.html").read_text()


def test_recommend_shows_what_was_thought(stage, adapter):
    flags = ["--model", str(adapter), "--history", "item_1,item_2", "--mode", "reasoning", "--max_chain", "5"]
    ids = Recommender.from_pretrained(adapter).policy.catalogue.item_ids
    flags[3] = ",".join(ids[:2])
    done = stage("recommend", *flags, "--unproven")
    assert done.stdout.count("thought: ") == 1
    assert "log-prob" in done.stdout
    done = stage("recommend", *flags, "--exhaustive", status=2)
    assert "exhaustive is for mode=direct" in done.stderr

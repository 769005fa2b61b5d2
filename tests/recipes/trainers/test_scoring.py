"""How wide a list rewards are served, and what else they are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import save_file

from reasonrec.data_gen.schema import Dataset
from reasonrec.data_gen.tasks.rl_prompts import RlPrompts
from reasonrec.recipes.decoding.sample import Sampler, roll_out
from reasonrec.recipes.models.checkpoint import Setting
from reasonrec.recipes.models.load import add_code_rows, load_base, load_tokenizer
from reasonrec.recipes.models.precision import choose
from reasonrec.recipes.policies.base import build_policy
from reasonrec.recipes.trainers.item_grpo import RolloutSettings
from reasonrec.recipes.trainers.scoring import Scorer, build_scorer
from reasonrec.rewards.registry import load_rewards
from reasonrec.tokenizers.artefact import staged
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import ItemIndex
from reasonrec.tokenizers.vocabulary import Vocabulary


@pytest.fixture
def policy_on(tiny_base: Path, tiny_dataset: Path) -> Callable[..., Any]:
    """Semantic IDs of the small dataset with an index, whose items may have other columns."""

    def build(index: Path, **columns: Any) -> Any:
        catalogue = Dataset.load(tiny_dataset).catalogue(ItemIndex.load(index))
        setting = Setting(str(tiny_base), "full", "History:{history}", chat=False, system=None, max_history=5)
        return build_policy(replace(catalogue, items=catalogue.items.with_columns(**columns)), setting)

    return build


WIDE = """
def wide(*, beam_items, k=50, **_):
    assert all(len(beam) == {width} for beam in beam_items)
    return [float(len(set(beam))) for beam in beam_items]
"""


@pytest.mark.parametrize("k", [1, 3])
def test_a_reward_gets_as_many_items_as_it_asks_for(tiny_base, make_grpo, problem, tmp_path, k):
    """Two rewards share the list of the one that wants more."""
    (tmp_path / "wide.py").write_text(WIDE.format(width=3))
    rewards = {f"{tmp_path / 'wide.py'}:wide": {"weight": 1.0, "k": 3}, "rank": {"weight": 0, "k": k}}
    trainer = make_grpo(tiny_base, settings=RolloutSettings(rounds=1), problem=problem(rewards=rewards))
    assert trainer._collect(4).scores.values[:, 0].tolist() == [3.0] * 16


def test_a_reward_that_declares_fifty_gets_fifty(tiny_base, policy_of, tmp_path):
    """Of 64 items fifty, of seven seven."""
    codes = np.stack(np.divmod(np.arange(64), 8), axis=1)
    tokenizer = load_tokenizer(str(tiny_base))
    vocabulary = Vocabulary.extend(tokenizer, (8, 8))
    model = load_base(str(tiny_base), method="full", precision=choose("fp32", "cpu"))
    add_code_rows(model, tokenizer, vocabulary, codes, [f"item {n}" for n in range(64)])
    prompt = [*tokenizer("History:", add_special_tokens=False)["input_ids"], vocabulary.begin_id]
    prompts = RlPrompts([np.array([5, 9])], np.array([0]), np.array([1]), np.array([6]), 5, lambda history: prompt)
    for size in (64, 7):
        (tmp_path / "wide.py").write_text(WIDE.format(width=min(size, 50)))
        policy = policy_of(tokenizer, vocabulary, codes[:size], [f"item {n}" for n in range(size)])
        rewards = load_rewards({f"{tmp_path / 'wide.py'}:wide": 1.0})
        scorer = Scorer(rewards, policy, reasoning=False)
        rollouts = roll_out(model, policy.answers, [prompt], Sampler(2, greedy=True), eos_ids=[2], pad_id=0)
        scores = scorer(model, rollouts, prompts, np.array([0, 0]), None)
        assert scores.values[:, 0].tolist() == [min(size, 50)] * 2


def test_a_list_that_no_search_makes_is_refused_before_anything_is_rolled_out(tiny_base, make_grpo, problem):
    with pytest.raises(UserError, match=r"^reward 'rank': k=1000001 has to be at most 1,000,000; lower it$"):
        make_grpo(tiny_base, problem=problem(rewards={"exact": 1.0, "rank": {"weight": 0, "k": 1_000_001}}))


RATED = """
def rated(*, predicted_items, target_items, target_rating, **_):
    return [None if r is None else r * (p == t) for p, t, r in zip(predicted_items, target_items, target_rating)]
"""


def test_a_reward_is_told_what_the_user_gave_the_target(tiny_base, policy_of, tmp_path):
    """And, for the comparison with another prompt's target, what its user gave that one."""
    codes = np.stack(np.divmod(np.arange(16), 4), axis=1)
    tokenizer = load_tokenizer(str(tiny_base))
    vocabulary = Vocabulary.extend(tokenizer, (4, 4))
    model = load_base(str(tiny_base), method="full", precision=choose("fp32", "cpu"))
    add_code_rows(model, tokenizer, vocabulary, codes, [f"item {n}" for n in range(16)])
    prompt = [*tokenizer("History:", add_special_tokens=False)["input_ids"], vocabulary.begin_id]
    (tmp_path / "rated.py").write_text(RATED)
    policy = policy_of(tokenizer, vocabulary, codes, [f"item {n}" for n in range(16)])
    scorer = Scorer(load_rewards({f"{tmp_path / 'rated.py'}:rated": 1.0}), policy, reasoning=False)
    rollouts = roll_out(model, policy.answers, [prompt], Sampler(3, greedy=True), eos_ids=[2], pad_id=0)
    found = int(rollouts.items[0])
    prompts = RlPrompts(
        [np.array([5, found, 9])] * 3, np.arange(3), np.ones(3, dtype=np.int64), np.array([found, found, 15 - found]),
        5, lambda history: prompt, np.array([4.0, np.nan, 2.0]),
    )  # fmt: skip
    scores = scorer(model, rollouts, prompts, np.array([0, 1, 2]), np.array([2, 0, 0]))
    np.testing.assert_array_equal(scores.values[:, 0], [4, np.nan, 0])
    np.testing.assert_array_equal(scores.permuted_total, [0, 4, 4])


def test_a_reward_that_reads_ratings_needs_some(tiny_dataset, tmp_path):
    (tmp_path / "rated.py").write_text(RATED)
    rewards = load_rewards({f"{tmp_path / 'rated.py'}:rated": 1.0})
    dataset = Dataset.load(tiny_dataset)
    unrated = replace(dataset, train=dataset.train.drop("ratings"))
    with pytest.raises(UserError, match=r"^reward '.*rated' reads ratings, and .* has none: prepare it anew with"):
        build_scorer(rewards, None, unrated, reasoning=False)


def test_a_reward_that_reads_categories_needs_some(tiny_dataset, tiny_index, policy_on):
    rewards, policy = load_rewards({"category": 1.0}), policy_on(tiny_index)
    dataset = Dataset.load(tiny_dataset)
    found = build_scorer(rewards, policy, dataset, reasoning=False).context["categories"]
    names = dataset.items["category"].to_list()
    assert len(found) == dataset.n_items
    assert [sorted(set(names)).index(name) for name in names] == found.tolist()
    bare = policy_on(tiny_index, category=pl.lit(""))
    with pytest.raises(UserError, match=r"^reward 'category' reads categories, and no item of .* has one: prepare it"):
        build_scorer(rewards, bare, dataset, reasoning=False)


def test_a_reward_that_reads_vectors_of_codes_gets_those_of_the_index(tiny_dataset, tiny_index, policy_on, tmp_path):
    rewards, dataset, policy = load_rewards({"path": 1.0}), Dataset.load(tiny_dataset), policy_on(tiny_index)
    build = partial(build_scorer, rewards, policy, dataset, reasoning=False)
    for codes, name in ((policy.index.codes, "same"), (policy.index.codes[::-1].copy(), "other")):
        with staged(tmp_path / name, kind="index", config={}) as (folder, _):
            replace(policy.index, codes=codes).save(folder)
            books = {"codebook_0": np.eye(4, 5, dtype=np.float32), "codebook_1": np.ones((6, 5), np.float32)}
            save_file(books, folder / "quantizer.safetensors")
    words = build(index=str(tmp_path / "same")).context["codewords"]
    np.testing.assert_array_equal(words.items, np.eye(4, 5)[policy.index.codes[:, 0]] + 1)
    with pytest.raises(
        UserError, match=r"^reward 'path' reads vectors of codes, and the model does not say where its"
    ):
        build()
    with pytest.raises(UserError, match=r"^reward 'path' reads vectors of codes, and index=.*other has other codes"):
        build(index=str(tmp_path / "other"))
    with pytest.raises(UserError, match="an imported index has no embeddings"):
        build(index=str(tiny_index))


HEADED = """
def headed(*, completions, category_probs, **_):
    return [float(probs[0][0]) for probs in category_probs]
"""


def test_a_reward_is_told_what_the_policy_observed(tiny_base, make_grpo, problem, tmp_path, monkeypatch):
    """Asked once for what the rewards want; it is what these get."""
    asked = []

    def observed(self, model, rollouts, wanted):
        asked.append((len(rollouts), tuple(wanted)))
        return {"category_probs": [[[row / 100, 1 - row / 100]] for row in range(len(rollouts))]}

    (tmp_path / "headed.py").write_text(HEADED)
    trainer = make_grpo(tiny_base, settings=RolloutSettings(rounds=1), problem=problem(rewards={
        f"{tmp_path / 'headed.py'}:headed": 1.0,
    }))  # fmt: skip
    monkeypatch.setattr(type(trainer._policy), "observed", observed)
    assert trainer._collect(4).scores.values[:, 0].tolist() == [row / 100 for row in range(16)]
    assert asked == [(16, ("category_probs",))]


def test_rewards_look_ahead_to_what_came_later(tiny_base, make_grpo, problem, tmp_path):
    """Hits, log-probabilities and ratings of the later targets, of the rollouts whose sequence goes on."""
    (tmp_path / "rated.py").write_text("def rated(*, target_rating, **_):\n    return list(target_rating)\n")
    rewards = {"exact": {"weight": 1.0, "horizon": 3}, "likelihood": {"weight": 0, "horizon": 2, "decay": 1.0},
               "rsvr": 0, f"{tmp_path / 'rated.py'}:rated": {"weight": 0, "horizon": 2, "decay": 0.5}}  # fmt: skip
    trainer = make_grpo(tiny_base, settings=RolloutSettings(rounds=1), problem=problem(rewards=rewards))
    scorer, sequence = trainer._scorer, np.array([5, 1, 4, 2])
    prompts = replace(
        trainer._prompts, sequences=[sequence, sequence], source=np.array([0, 0, 0, 1]),
        position=np.array([1, 2, 3, 3]), target=np.array([1, 4, 2, 2]), rating=np.array([1.0, 5.0, 3.0, 2.0]),
    )  # fmt: skip
    assert scorer.shortened(prompts) == (
        "horizon=3: 3 of 4 prompts have fewer targets left in their training sequence, and look ahead to those"
    )
    rollouts = roll_out(
        trainer._base(), scorer.policy.answers, [prompts.token_ids(n) for n in range(4)], Sampler(2, greedy=True),
        eos_ids=[2], pad_id=0,
    )  # fmt: skip
    numbers = np.arange(4).repeat(2)
    model = trainer.model.eval()
    found = scorer(model, rollouts, prompts, numbers, None)
    near = replace(scorer, rewards=load_rewards({"exact": 1.0, "likelihood": 0}))
    alone = {item: near(model, rollouts, replace(prompts, target=np.full(4, item)), numbers, None).values
             for item in (1, 2, 4)}  # fmt: skip
    for row, targets in enumerate(([1, 4, 2], [4, 2], [2], [2])):
        weights = 0.8 ** np.arange(len(targets))
        hit, log_prob = np.stack([alone[target][2 * row] for target in targets]).T
        assert found.values[2 * row, 0] == pytest.approx((weights * hit).sum() / weights.sum())
        assert found.values[2 * row, 1] == pytest.approx(log_prob[:2].mean(), abs=1e-4)
    assert found.values[::2, 3].tolist() == pytest.approx([(1 + 2.5) / 1.5, (5 + 1.5) / 1.5, 3, 2])
    assert found.hits.tolist() == (rollouts.items == prompts.target[numbers]).tolist(), "of the next target alone"
    assert near.shortened(prompts) == ""

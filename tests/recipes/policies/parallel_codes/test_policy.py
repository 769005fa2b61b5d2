"""What parallel codes train on and roll out: one order an item, one policy in sampling and training."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

from reasonrec.recipes.decoding.generate_chains import GenerateWriter
from reasonrec.recipes.decoding.sample import Rollouts, Sampler, noise, roll_out
from reasonrec.recipes.policies.base import install
from reasonrec.tokenizers.errors import UserError

LAWS = [{"law": "crss"}, {"law": "ordered", "orders": 3}, {"law": "free"}]


def trained_on(made, rows: list[list[int]], labels: list[list[int]], **how):
    """Log-probabilities of labels as a trainer gets them."""
    install(made.model, made.policy.answers, **how)
    ids = torch.tensor(rows)
    return made.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor(labels),
                      fused_lm_head=True)  # fmt: skip


def test_every_item_of_an_example_has_an_order_of_its_own(make_sets):
    policy = make_sets().policy
    examples = policy.examples(pl.DataFrame({"items": [[0, 1, 2, 3, 4, 5, 6]]}), one_per_prefix=False)
    task = next(n for n, task in enumerate(examples.tasks) if task.name == "seqrec")
    rendered = [examples.render(task, 0, 0, 7, -1, variant) for variant in (3, 3, 4)]
    assert rendered[0] == rendered[1] != rendered[2]
    first, end = policy.vocabulary.first_id, policy.vocabulary.first_id + sum((3, 4, 3))
    orders = set()
    for ids, labels in rendered:
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
        items = np.array([token for token in ids if first <= token < end]).reshape(-1, 3)
        assert [sorted(row) for row in items.tolist()] == policy.prompts.item_token_ids[:7]
        orders |= {tuple(np.argsort(row)) for row in items}
    assert len(orders) > 2


def test_supervised_codes_are_scored_by_whole_codebooks_and_with_the_category(make_sets):
    made = make_sets(category_weight=0.5)
    policy, answers = made.policy, made.policy.answers
    low = policy.vocabulary.first_id
    with torch.no_grad():
        for item, known in ((3, True), (0, False)):
            prompt = policy.prompts.direct([1, 2])
            tokens = [policy.prompts.item_token_ids[item][book] for book in (2, 0, 1)]
            row = [*prompt, *tokens]
            out = trained_on(made, [row], [[-100] * len(prompt) + tokens])
            logits = made.model(input_ids=torch.tensor([row])).logits[0, len(prompt) - 1 : -1]
            for place, book in enumerate((2, 0, 1)):
                begin = low + (0, 3, 7)[book]
                whole = logits[place, begin : begin + (3, 4, 3)[book]].log_softmax(-1)[tokens[place] - begin]
                head = logits[place, low + 10 : low + 12].log_softmax(-1)[answers.category[item]]
                found = out.log_probs[0, len(prompt) - 1 + place]
                assert found.item() == pytest.approx((whole + 0.5 * head * known).item(), abs=1e-4)
    assert answers.guessed[1] == 3
    assert policy.measured()["category_loss"] > 0


def draw(made, generations: int = 6, writer=None, **how) -> Rollouts:
    policy, sampler = made.policy, Sampler(generations, temperature=0.7, **how)
    render = policy.prompts.reasoning if sampler.max_chain else policy.prompts.direct
    return roll_out(
        made.model, policy.answers, [render(history) for history in ([0, 3], [5])], sampler,
        eos_ids=[policy.eos_id], pad_id=policy.pad_id, noise=noise(0, 0, range(2), generations, sampler.max_chain + 3),
        writer=writer,
    )  # fmt: skip


@pytest.mark.parametrize("options", LAWS)
def test_behind_chains_of_another_engine_answers_are_the_same(make_sets, options):
    """The lanes of a prompt take the orders in turn wherever they stand."""
    made = make_sets(**options)
    how = {"max_chain": 4, "close_ids": made.policy.prompts.close_ids}
    expected = draw(made, **how)
    found = draw(made, writer=GenerateWriter(made.model, made.policy.pad_id), **how)
    assert found.completion_ids == expected.completion_ids
    assert found.items.tolist() == expected.items.tolist()
    for ours, theirs in zip(found.log_probs, expected.log_probs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("options", LAWS)
def test_the_sampler_and_the_trainer_mean_the_same_policy(make_sets, options):
    made = make_sets(**options)
    rollouts = draw(made)
    parsed = made.policy.parser(reasoning=False)(rollouts.completion_ids)
    assert parsed.predicted_items == rollouts.items.tolist()
    assert made.policy.columns(rollouts.items)["target_codes"] == parsed.predicted_codes
    assert (made.policy.levels(parsed, rollouts.items) == 3).all()
    orders = {tuple(np.argsort(ids[:3])) for ids in rollouts.completion_ids}
    assert len(orders) > 1, "the order that was written is kept"
    for prompt, ids, recorded, mask in zip(
        rollouts.prompt_ids, rollouts.completion_ids, rollouts.log_probs, rollouts.mask, strict=True
    ):
        with torch.no_grad():
            out = trained_on(made, [prompt + ids], [[-100] * len(prompt) + ids], answers_only=True, temperature=0.7)
        found = out.log_probs[0, len(prompt) - 1 :]
        np.testing.assert_allclose(found.numpy(), recorded, atol=1e-4)
        assert ((np.array(recorded) < 0) == np.array(mask, dtype=bool)).all()


def test_rollouts_have_gradients_where_there_was_a_choice(make_sets):
    made = make_sets()
    rollouts = draw(made, 2)
    prompt, ids = rollouts.prompt_ids[0], rollouts.completion_ids[0]
    trained_on(made, [prompt + ids], [[-100] * len(prompt) + ids], answers_only=True).loss.backward()
    assert made.model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_a_codebook_used_twice_is_no_item(make_sets):
    policy = make_sets().policy
    tokens = policy.prompts.item_token_ids[4]
    parse = policy.parser(reasoning=False)
    assert parse([tokens[::-1], [tokens[0], *tokens[:2]], tokens[:2]]).predicted_items == [4, -1, -1]


def test_category_distributions_come_from_the_path(make_sets):
    made = make_sets()
    rollouts = draw(made, 2)
    assert made.policy.observed(made.model, rollouts, []) == {}
    found = made.policy.observed(made.model, rollouts, ["category_probs"])["category_probs"]
    assert [row.shape for row in found] == [(3, 2)] * 4
    np.testing.assert_allclose(np.concatenate(found).sum(1), 1, rtol=1e-5)
    row = rollouts.prompt_ids[2] + rollouts.completion_ids[2]  # a shorter prompt, alone
    with torch.no_grad():
        logits = made.model(input_ids=torch.tensor([row])).logits[0, len(rollouts.prompt_ids[2]) - 1 :][:3]
    low = made.policy.vocabulary.first_id
    np.testing.assert_allclose(found[2], logits[:, low + 10 : low + 12].softmax(-1).numpy(), atol=1e-5)
    without = make_sets(with_category=False)
    with pytest.raises(UserError, match="no category head"):
        without.policy.observed(without.model, rollouts, ["category_probs"])


def test_a_catalogue_without_categories_says_what_is_left_out(make_sets, capsys):
    made = make_sets(with_category=False)
    assert "category head is left out" in "".join(capsys.readouterr())
    assert made.policy.vocabulary.level_sizes == (3, 4, 3, 0)


def test_several_orders_are_averaged(make_sets):
    from reasonrec.recipes.policies.inference import Ranking, rank, score

    made = make_sets(law="ordered", orders=3)
    policy, prompts = made.policy, [made.policy.prompts.direct([0, 3])]
    everything = np.arange(16)[None]
    found = score(policy, made.model, prompts, everything)[0]
    assert np.exp(found).sum() == pytest.approx(1, abs=1e-4)
    parts = []
    for order in policy.answers.orders.clone():
        policy.answers.orders = order[None]
        parts.append(np.exp(score(policy, made.model, prompts, everything)[0]))
    assert np.std(parts, axis=0).max() > 0.01, "orders differ"
    np.testing.assert_allclose(np.exp(found), np.mean(parts, axis=0), rtol=1e-4)
    policy = make_sets(law="ordered", orders=3).policy
    best = rank(policy, made.model, prompts, Ranking(16, 16))
    np.testing.assert_allclose(best.scores[0], np.sort(found)[::-1], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"law": "random"}, "choose crss, ordered, free"),
        ({"law": "crss", "orders": 2}, "under law: ordered"),
        ({"orders": 0}, "at least 1"),
        ({"category_weight": -1}, "at least 0"),
        ({"laws": "free"}, "laws"),
    ],
)
def test_a_wrong_option_is_named(make_sets, options, message):
    with pytest.raises(UserError, match=message):
        make_sets(**options)


def test_there_is_no_tree_to_pool_in(make_sets):
    with pytest.raises(UserError, match="no tree"):
        _ = make_sets().policy.answers.tree

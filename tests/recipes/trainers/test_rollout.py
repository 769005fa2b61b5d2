"""Rollouts: drawn from the right distribution, from the same noise wherever they run, and cut where they should be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from reasonrec.recipes.decoding import sample as module
from reasonrec.recipes.decoding.sample import Rollouts, Sampler, noise, roll_out
from reasonrec.recipes.decoding.score import score_all_items
from reasonrec.recipes.policies.base import install
from reasonrec.recipes.policies.semantic_id import CodeAnswers
from reasonrec.tokenizers.errors import UserError

HISTORIES = [[0, 3], [1], [6, 2, 1, 0, 4], [5, 5, 6], [2]]


def draw(kit, sampler: Sampler, histories=HISTORIES, numbers=None, *, seed: int = 0, step: int = 0) -> Rollouts:
    numbers = list(range(len(histories))) if numbers is None else numbers
    return roll_out(
        kit.base.eval(),
        CodeAnswers(kit.trie, kit.vocabulary),
        [kit.prompt(history, reasoning=sampler.max_chain > 0) for history in histories],
        sampler,
        eos_ids=[kit.tokenizer.eos_token_id],
        pad_id=kit.tokenizer.pad_token_id,
        noise=noise(seed, step, numbers, sampler.generations, sampler.max_chain + kit.trie.depth),
    )


def scored(kit, rollouts: Rollouts, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies as the trainer gets them: prompts padded left, completions right."""
    pad = kit.tokenizer.pad_token_id
    p, c = (max(map(len, ids)) for ids in (rollouts.prompt_ids, rollouts.completion_ids))
    rows = zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)
    ids = torch.tensor([[pad] * (p - len(a)) + a + b + [pad] * (c - len(b)) for a, b in rows])
    rows = zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)
    mask = torch.tensor([[0] * (p - len(a)) + [1] * (len(a) + len(b)) + [0] * (c - len(b)) for a, b in rows])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :p] = -100
    install(kit.base, CodeAnswers(kit.trie, kit.vocabulary), temperature=temperature, answers_only=True)
    out = kit.model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    return out.log_probs[:, -c:], out.entropy[:, -c:]


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("chain", [0, 6])
def test_the_sampler_and_the_trainer_mean_the_same_policy(tiny_base, make_kit, method, chain):
    kit = make_kit(tiny_base, method)
    rollouts = draw(kit, Sampler(4, 0.7, chain, kit.close_ids if chain else ()))
    log_probs, entropy = scored(kit, rollouts, 0.7)
    for row, (recorded, mask) in enumerate(zip(rollouts.log_probs, rollouts.mask, strict=True)):
        for place, (value, chosen) in enumerate(zip(recorded, mask, strict=True)):
            if chosen:
                assert log_probs[row, place].item() == pytest.approx(value, abs=1e-4)
                assert value < 0
                assert entropy[row, place] > 0
            else:
                assert value == 0
        assert log_probs[row, len(mask) - 1].item() == 0, "the end is certain"


def test_answers_are_drawn_from_the_distribution_over_items(tiny_base, make_kit):
    kit = make_kit(tiny_base)
    rollouts = draw(kit, Sampler(4000), [[0, 3]])
    prompt = torch.tensor([rollouts.prompt_ids[0]])
    scores = score_all_items(
        kit.model, kit.trie, kit.vocabulary, prompt, torch.ones_like(prompt),
        item_token_ids=kit.vocabulary.item_token_ids(kit.index.codes),
    )  # fmt: skip
    share = np.bincount(rollouts.items, minlength=7) / 4000
    expected = scores[0].double().exp().numpy()
    assert expected.sum() == pytest.approx(1, abs=1e-5)
    assert np.abs(share - expected).max() < 4 * 0.5 / np.sqrt(4000)
    assert share.max() < 0.9, "a choice between items"


def test_a_lower_temperature_sharpens(tiny_base, make_kit):
    kit = make_kit(tiny_base)
    most = {t: np.bincount(draw(kit, Sampler(500, t), [[0, 3]]).items).max() for t in (0.25, 1.0, 4.0)}
    assert most[0.25] > most[1.0] > most[4.0]
    greedy = draw(kit, Sampler(3, greedy=True), [[0, 3]])
    assert len(set(greedy.items.tolist())) == 1


@pytest.mark.parametrize("chain", [0, 5])
def test_noise_belongs_to_seed_step_prompt_and_generation(tiny_base, make_kit, chain):
    """Batches, order, neighbours and the number of generations change nothing."""
    kit = make_kit(tiny_base)
    close = kit.close_ids if chain else ()
    whole = draw(kit, Sampler(4, 1.0, chain, close))
    small = draw(kit, Sampler(4, 1.0, chain, close, batch=2))
    assert small.completion_ids == whole.completion_ids
    order = [3, 0, 4]
    some = draw(kit, Sampler(4, 1.0, chain, close), [HISTORIES[i] for i in order], order)
    assert some.completion_ids == [whole.completion_ids[4 * i + g] for i in order for g in range(4)]
    np.testing.assert_allclose(some.log_probs[0], whole.log_probs[12], atol=1e-5)
    fewer = draw(kit, Sampler(2, 1.0, chain, close))
    assert fewer.completion_ids == [whole.completion_ids[4 * i + g] for i in range(5) for g in range(2)]
    for other in ({"seed": 1}, {"step": 1}):
        assert draw(kit, Sampler(4, 1.0, chain, close), **other).completion_ids != whole.completion_ids


def test_noise_is_uniform_and_different_everywhere():
    drawn = noise(0, 0, range(200), 4, 5)
    assert drawn.shape == (200, 4, 5)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert len(np.unique(drawn)) == drawn.size
    assert drawn.mean() == pytest.approx(0.5, abs=0.02)


def test_a_prompt_is_read_once_and_shared_by_its_generations(tiny_base, make_kit, monkeypatch):
    kit = make_kit(tiny_base)
    read = []
    inner = kit.base.base_model.forward

    def count(*args, **kwargs):
        read.append(tuple(kwargs["input_ids"].shape))
        return inner(*args, **kwargs)

    monkeypatch.setattr(kit.base.base_model, "forward", count)
    draw(kit, Sampler(6))
    lengths = [len(kit.prompt(h)) for h in HISTORIES]
    assert np.prod(read[0]) <= sum(lengths) < len(lengths) * max(lengths), "short prompts share a row"
    assert all(np.prod(step) <= 6 * len(HISTORIES) for step in read[1:])
    assert len(read) <= kit.trie.depth


def test_what_is_forced_is_masked(tiny_base, make_kit):
    """Behind the first code 1 or 2 there are two items each; behind (0, 0) two, (0, 2) one."""
    kit = make_kit(tiny_base)
    rollouts = draw(kit, Sampler(50))
    items = kit.vocabulary.item_token_ids(kit.index.codes)
    for row, item in enumerate(rollouts.items):
        assert rollouts.completion_ids[row] == [*items[item], kit.tokenizer.eos_token_id]
        assert rollouts.mask[row] == ([1, 1, 1, 0] if item < 2 else [1, 1, 0])
    only = type(kit.trie).from_codes(np.array([[0, 0, -1], [0, 1, -1], [2, 3, -1]]), (3, 4, 2))
    rollouts = roll_out(
        kit.base, CodeAnswers(only, kit.vocabulary), [kit.prompt([0])], Sampler(40), eos_ids=[2], pad_id=0,
        noise=noise(0, 0, [0], 40, 3),
    )  # fmt: skip
    assert {tuple(m) for m, i in zip(rollouts.mask, rollouts.items, strict=True) if i == 2} == {(1, 0, 0)}


def script(monkeypatch, kit, lines: list[list[int]]) -> None:
    """Let the lanes of one prompt write the given tokens, each its own line; lanes that are done leave the queue."""
    alive = list(range(len(lines)))
    place = [0] * len(lines)
    ends = [*kit.close_ids, kit.vocabulary.begin_id, kit.tokenizer.eos_token_id]

    def scripted(model, hidden):
        logits = torch.full((len(hidden), len(kit.tokenizer) + 20), -torch.inf)
        writing = [lane for lane in alive if place[lane] < len(lines[lane])][: len(hidden)]
        assert len(writing) == len(hidden), "a lane that is done is not asked again"
        for row, lane in enumerate(writing):
            logits[row, lines[lane][place[lane]]] = 0.0
            place[lane] += 1
        return logits

    assert ends
    monkeypatch.setattr(module, "text_logits", scripted)


def test_chains_end_in_four_ways(tiny_base, make_kit, monkeypatch):
    kit = make_kit(tiny_base)
    begin, eos, close = kit.vocabulary.begin_id, kit.tokenizer.eos_token_id, kit.close_ids
    word = kit.tokenizer("oak", add_special_tokens=False)["input_ids"][0]
    longest = len(close) + 2
    closed, opened, ended, endless = [word, *close], [word, begin], [word, eos], [word] * longest
    script(monkeypatch, kit, [closed, opened, ended, endless])
    rollouts = draw(kit, Sampler(4, 1.0, longest, close), [[0, 3]])
    answers = [kit.vocabulary.item_token_ids(kit.index.codes)[i] for i in rollouts.items]
    assert rollouts.completion_ids == [
        [*closed, begin, *answers[0], eos],
        [*opened, *answers[1], eos],
        [*ended, *close, begin, *answers[2], eos],
        [*endless, *close, begin, *answers[3], eos],
    ]
    assert rollouts.cut.tolist() == [False, False, True, True]
    assert rollouts.chain.tolist() == [len(closed), 1, 2, longest]
    forced = len(close) + 1
    for mask, written, opening in zip(
        rollouts.mask, (closed, opened, ended, endless), (1, 0, forced, forced), strict=True
    ):
        assert mask[: len(written)] == [1] * len(written), "the policy chose these"
        assert mask[len(written) : len(written) + opening] == [0] * opening
        assert mask[-1] == 0


def test_an_answer_is_searched_behind_its_own_chain(tiny_base, make_kit):
    """Lanes do not see each other: each row alone gives the same log-probabilities (as the trainer reads it)."""
    kit = make_kit(tiny_base)
    rollouts = draw(kit, Sampler(3, 1.0, 8, kit.close_ids))
    assert len({tuple(c) for c in rollouts.completion_ids[:3]}) == 3, "lanes differ"
    alone = rollouts.take([1])
    value, _ = scored(kit, alone, 1.0)
    chosen = np.array(alone.mask[0]) == 1
    np.testing.assert_allclose(value[0].detach().numpy()[chosen], np.array(alone.log_probs[0])[chosen], atol=1e-5)


def test_direct_mode_never_computes_the_head_of_the_whole_vocabulary(tiny_base, make_kit, monkeypatch):
    kit = make_kit(tiny_base, "lora")
    head = kit.base.get_output_embeddings()

    def refuse(*args, **kwargs):
        raise AssertionError("the whole vocabulary was scored")

    monkeypatch.setattr(head, "forward", refuse)
    rollouts = draw(kit, Sampler(4))
    log_probs, _ = scored(kit, rollouts, 1.0)
    log_probs.sum().backward()


def test_eager_attention_gives_the_same(tiny_base, make_kit):
    kit = make_kit(tiny_base)
    expected = draw(kit, Sampler(4, 1.0, 4, kit.close_ids))
    kit.model.set_attn_implementation("eager")
    found = draw(kit, Sampler(4, 1.0, 4, kit.close_ids))
    assert found.completion_ids == expected.completion_ids


def test_taking_and_joining_rows(tiny_base, make_kit):
    rollouts = draw(make_kit(tiny_base), Sampler(2))
    joined = Rollouts.join([rollouts.take([0, 1]), rollouts.take(range(2, len(rollouts)))])
    assert joined.completion_ids == rollouts.completion_ids
    assert joined.items.tolist() == rollouts.items.tolist()
    assert len(rollouts.take([3, 3])) == 2


def test_mistakes_are_named(tiny_base, make_kit):
    kit = make_kit(tiny_base)
    with pytest.raises(UserError, match="has to end with the begin marker"):
        roll_out(kit.base, CodeAnswers(kit.trie, kit.vocabulary), [[1, 2]], Sampler(2), eos_ids=[2], pad_id=0)
    with pytest.raises(UserError, match="temperature=0"):
        Sampler(2, 0.0)
    with pytest.raises(UserError, match="generations=0"):
        Sampler(0)
    kit.model.config.sliding_window = 20
    with pytest.raises(UserError, match="lower max_history"):
        draw(kit, Sampler(2, 1.0, 12))
    kit.model.config.sliding_window = None
    assert isinstance(kit.model, LlamaForCausalLM)
    with torch.no_grad():
        kit.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="code 0"):
        draw(kit, Sampler(2))
    with pytest.raises(FloatingPointError, match="token 0 of the chains"):
        draw(kit, Sampler(2, 1.0, 3))

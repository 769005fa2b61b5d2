"""Chains written by another engine: the same rollouts as the sampler's own, whatever way a chain ends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from reasonrec.recipes.decoding import sample as module
from reasonrec.recipes.decoding.chain_writers import Written, ended
from reasonrec.recipes.decoding.generate_chains import GenerateWriter
from reasonrec.recipes.decoding.sample import Rollouts, Sampler, noise, roll_out
from reasonrec.recipes.policies.semantic_id import CodeAnswers
from reasonrec.recipes.trainers.chain_engines import check_chain_engine
from reasonrec.recipes.trainers.item_grpo import RolloutSettings
from reasonrec.tokenizers.errors import UserError

HISTORIES = [[0, 3], [1], [6, 2, 1, 0, 4], [5, 5, 6], [2]]
BEGIN, EOS = 90, 91


class Wrote:
    """An engine that wrote what it is told it wrote, and remembers what it was asked."""

    def __init__(self, lines: list[list[int]], log_probs: list[list[float]] | None = None) -> None:
        self.lines, self.log_probs, self.asked = lines, log_probs, []

    def update(self, step: int) -> None:
        """It has no weights."""

    def write(self, prompts, sampler, *, stop_ids, noise) -> Written:
        self.asked.append((list(prompts), tuple(stop_ids), None if noise is None else noise.shape))
        return Written(self.lines, self.log_probs)


def drawn(kit, sampler: Sampler, writer=None, histories=HISTORIES, given=None) -> Rollouts:
    return roll_out(
        kit.base.eval(),
        CodeAnswers(kit.trie, kit.vocabulary),
        [kit.prompt(history, reasoning=True) for history in histories],
        sampler,
        eos_ids=[kit.tokenizer.eos_token_id],
        pad_id=kit.tokenizer.pad_token_id,
        noise=noise(0, 0, range(len(histories)), sampler.generations, sampler.max_chain + kit.trie.depth),
        given=given,
        writer=writer,
    )


def check_same(found: Rollouts, expected: Rollouts) -> None:
    for name in ("prompt_ids", "completion_ids", "mask"):
        assert getattr(found, name) == getattr(expected, name), name
    for name in ("items", "chain", "cut", "given"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    for ours, theirs in zip(found.log_probs, expected.log_probs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("greedy", [True, False])
def test_generate_and_the_sampler_write_the_same(tiny_base, make_kit, method, greedy):
    kit = make_kit(tiny_base, method)
    sampler = Sampler(3, 0.7, 8, kit.close_ids, greedy=greedy, batch=2)
    expected = drawn(kit, sampler)
    found = drawn(kit, sampler, GenerateWriter(kit.base, kit.tokenizer.pad_token_id))
    check_same(found, expected)
    assert np.isnan(expected.gap).all()
    assert found.gap.shape == (15,)
    assert found.gap.max() < 1e-4, "both read the same weights"


def test_what_a_base_model_generates_with_changes_nothing(tiny_base, make_kit):
    kit = make_kit(tiny_base)
    expected = drawn(kit, Sampler(2, 1.0, 6, kit.close_ids))
    own = kit.base.generation_config = GenerationConfig(
        repetition_penalty=5.0, min_new_tokens=6, do_sample=True, top_k=2
    )
    check_same(drawn(kit, Sampler(2, 1.0, 6, kit.close_ids), GenerateWriter(kit.base, 0)), expected)
    assert kit.base.generation_config is own


def test_given_codes_stand_behind_chains_of_their_own_prompt(tiny_base, make_kit):
    kit = make_kit(tiny_base)
    codes = kit.vocabulary.item_token_ids(kit.index.codes)
    given = [codes[6][:1], [], codes[0][:2], codes[3][:1], []]
    sampler = Sampler(2, 1.0, 5, kit.close_ids)
    expected = drawn(kit, sampler, given=given)
    check_same(drawn(kit, sampler, GenerateWriter(kit.base, 0), given=given), expected)
    assert expected.given.tolist() == [1, 1, 0, 0, 2, 2, 1, 1, 0, 0]


def test_every_way_to_end_is_as_in_the_sampler(tiny_base, make_kit, monkeypatch):
    """Lines of few words, written by the sampler's own lanes and by an engine that writes on behind the end."""
    kit = make_kit(tiny_base)
    begin, eos, close = kit.vocabulary.begin_id, kit.tokenizer.eos_token_id, kit.close_ids
    word = kit.tokenizer("oak", add_special_tokens=False)["input_ids"][0]
    rng = np.random.default_rng(0)
    longest = len(close) + 3
    sampler = Sampler(4, 1.0, longest, close)
    pieces = [[word], [begin], [eos], list(close), list(close[:-1])]
    seen = set()
    for _ in range(12):
        chosen = [[pieces[p] for p in rng.choice(5, longest, p=[0.5, 0.1, 0.1, 0.2, 0.1])] for _ in range(4)]
        lines = [[token for piece in line for token in piece][: longest + 2] for line in chosen]
        chains = [ended(line, sampler, begin, [eos]) for line in lines]
        seen |= {(chain.opened, chain.cut, chain.token_ids[-1] == eos) for chain in chains}
        with monkeypatch.context() as patch:
            script(patch, kit, [chain.token_ids for chain in chains])
            expected = drawn(kit, sampler, histories=[[0, 3]])
        engine = Wrote(lines)
        found = drawn(kit, sampler, engine, histories=[[0, 3]])
        for rows in (found.log_probs, expected.log_probs):  # those of scripted words are 0, and no policy's
            rows[:] = [[0.0] * len(values) for values in rows]
        check_same(found, expected)
        ((prompts, stop_ids, shape),) = engine.asked
        assert prompts == [kit.prompt([0, 3], reasoning=True)]
        assert (set(stop_ids), shape) == ({begin, eos}, (1, 4, longest))
    assert seen == {(True, False, False), (False, True, True), (False, True, False), (False, False, False)}


def script(patch, kit, lines: list[list[int]]) -> None:
    """Let the lanes of one prompt draw the given tokens, each its own line."""
    place = [0] * len(lines)

    def scripted(model, hidden):
        logits = torch.full((len(hidden), kit.vocabulary.size), -torch.inf)
        writing = [lane for lane, line in enumerate(lines) if place[lane] < len(line)]
        assert len(writing) == len(hidden), "a lane ends where the engine's chain does"
        for row, lane in enumerate(writing):
            logits[row, lines[lane][place[lane]]] = 0.0
            place[lane] += 1
        return logits

    patch.setattr(module, "text_logits", scripted)


def test_the_end_of_a_sequence_may_open_answers():
    sampler = Sampler(1, max_chain=4, close_ids=(7, 8))
    assert ended([1, EOS, 2], sampler, EOS, [EOS]) == ([1, EOS], True, False)
    assert ended([1, 7, 8, EOS], sampler, BEGIN, [EOS]) == ([1, 7, 8], False, False)
    assert ended([1, 2, 3, 4, BEGIN], sampler, BEGIN, [EOS]) == ([1, 2, 3, 4], False, True)
    assert ended([7, 8], replace(sampler, close_ids=(), max_chain=2), BEGIN, [EOS]) == ([7, 8], False, True)
    with pytest.raises(ValueError, match="chain 3 of the engine stops behind 2 tokens"):
        ended([1, 2], sampler, BEGIN, [EOS], row=3)


def test_how_far_an_engine_is_off_is_measured(tiny_base, make_kit):
    """Over what was drawn, whatever the engine wrote behind it."""
    kit = make_kit(tiny_base)
    sampler = Sampler(2, 1.0, 5, kit.close_ids)
    exact = GenerateWriter(kit.base, 0).write(
        [kit.prompt([0, 3], reasoning=True)],
        sampler,
        stop_ids=[kit.tokenizer.eos_token_id],
        noise=np.full((1, 2, 5), 0.4),
    )
    off = [[value + 0.25 for value in row] + [9.0] for row in exact.log_probs]
    ids = [[*row, 0] for row in exact.token_ids]
    found = drawn(kit, sampler, Wrote(ids, off), histories=[[0, 3]])
    np.testing.assert_allclose(found.gap, 0.25, atol=1e-4)
    assert Rollouts.join([found, found.take([1])]).gap.shape == (3,)


def test_a_training_is_the_same_with_chains_by_generate(tiny_base, make_grpo):
    """The same rollouts at every step, hints included, and so the same weights up to rounding."""
    logs, weights = [], []
    for engine in ("own", "generate"):
        settings = RolloutSettings(rounds=2, max_chain=6, chain_engine=engine, hint_weight=0.01)
        trainer = make_grpo(tiny_base, "lora", settings=settings, optim="sgd", max_steps=3, logging_steps=1)
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "rollouts/chain_length" in entry])
        weights.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
    own, generated = logs
    assert len(own) == 3
    for before, after in zip(own, generated, strict=True):
        assert "rollouts/engine_gap" not in before
        assert after["rollouts/engine_gap"] < 1e-4
        same = {name for name in before if name.startswith("rollouts/")} | {"reward", "entropy", "grad_norm"}
        assert {name: after[name] for name in same} == pytest.approx({name: before[name] for name in same}, abs=1e-3)
    for before, after in zip(*weights, strict=True):
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)


def test_engines_that_have_nothing_to_write_are_refused(tiny_base, make_grpo, monkeypatch):
    check_chain_engine("own", 0)
    with pytest.raises(UserError, match="chain_engine=generate writes chains, and mode=direct has none"):
        make_grpo(tiny_base, settings=RolloutSettings(chain_engine="generate"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="shares them out"):
        check_chain_engine("generate", 8)

"""The trainer on a catalogue of seven items: the policy, the groups, the reference, resuming, and that it learns."""

from __future__ import annotations

import gc
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from reasonrec.data_gen.tasks.rl_prompts import prompt_block
from reasonrec.recipes.models.load import load_tokenizer
from reasonrec.recipes.trainers.algorithms import Srpo
from reasonrec.recipes.trainers.best import best_folder
from reasonrec.recipes.trainers.grpo_arguments import GrpoArguments
from reasonrec.recipes.trainers.item_grpo import ItemGRPOTrainer, RolloutSettings
from reasonrec.recipes.trainers.resume import last_checkpoint
from reasonrec.tokenizers.errors import UserError

methods = pytest.mark.parametrize("method", ["full", "lora", "qlora"])
modes = pytest.mark.parametrize("settings", [RolloutSettings(rounds=2), RolloutSettings(rounds=1, max_chain=6)])


@pytest.fixture(scope="module", autouse=True)
def _quick_collection():
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def untied_base(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_base, tie_word_embeddings=False)).save_pretrained(folder)
    load_tokenizer(str(tiny_base)).save_pretrained(folder)
    return folder


def generation(trainer: ItemGRPOTrainer) -> dict[str, torch.Tensor]:
    """What one generation step hands to the loss."""
    trainer.model.train()
    rows = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
    return trainer._generate_and_score_completions([{"prompt": ""}] * rows)


def trainers_log_probs(trainer: ItemGRPOTrainer, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    keep = batch["completion_ids"].shape[1]
    found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, keep, compute_entropy=True)
    return found[0], found[1]


@methods
@modes
def test_what_is_sampled_from_is_what_is_optimised(tiny_base, make_grpo, method, settings):
    """Log-probabilities recorded by the sampler are the trainer's, at a temperature other than 1, padded left."""
    trainer = make_grpo(tiny_base, method, settings=settings, temperature=0.7)
    batch = generation(trainer)
    log_probs, entropy = trainers_log_probs(trainer, batch)
    chosen = (batch["tool_mask"] * batch["completion_mask"]).bool()
    recorded = batch["sampling_per_token_logps"]
    assert chosen.any(1).all()
    torch.testing.assert_close(log_probs[chosen], recorded[chosen], atol=1e-4, rtol=0)
    assert (recorded[chosen] < 0).all()
    assert (recorded[~chosen] == 0).all()
    assert (entropy[chosen] > 0).all()


def test_the_probabilities_of_all_items_sum_to_one(tiny_base, make_grpo):
    trainer = make_grpo(tiny_base, "lora", temperature=0.6)
    answers = trainer._policy.vocabulary.item_token_ids(
        np.array([[0, 0, 0], [0, 0, 1], [0, 2, -1], [1, 3, -1], [1, 1, -1], [2, 1, -1], [2, 3, -1]])
    )
    prompt = trainer._prompts.token_ids(0)
    longest = max(map(len, answers))
    pad = trainer._tokenizer.pad_token_id
    ids = torch.tensor([prompt + a + [pad] * (longest - len(a)) for a in answers])
    mask = torch.tensor([[1] * (len(prompt) + len(a)) + [0] * (longest - len(a)) for a in answers])
    log_probs, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, longest)
    assert log_probs.sum(1).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_forced_positions_have_no_log_probability_entropy_or_gradient(tiny_base, make_grpo):
    trainer = make_grpo(tiny_base, "lora")
    batch = generation(trainer)
    log_probs, entropy = trainers_log_probs(trainer, batch)
    forced = batch["completion_mask"].bool() & ~batch["tool_mask"].bool()
    assert forced.sum() >= len(forced), "the end of each completion at least"
    assert (log_probs[forced] == 0).all()
    assert (entropy[forced] == 0).all()
    log_probs[forced].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_the_first_ratio_is_one_where_old_log_probabilities_are_kept(tiny_base, make_grpo):
    trainer = make_grpo(tiny_base, "lora", steps_per_generation=2, per_device_train_batch_size=8)
    batch = generation(trainer)
    log_probs, _ = trainers_log_probs(trainer, batch)
    assert "old_per_token_logps" in batch
    ratio = (log_probs - batch["old_per_token_logps"]).exp()
    assert (ratio - 1).abs().max().item() < 1e-5


def test_every_completion_ends(tiny_base, make_grpo):
    trainer = make_grpo(tiny_base, settings=RolloutSettings(rounds=1, max_chain=4), max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["completions/clipped_ratio"] == 0
    assert log["rollouts/chain_length"] > 0
    assert 0 <= log["rollouts/chain_cut"] <= 1


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_reference_is_the_adapter_that_was_started_from(tiny_base, untied_base, make_grpo, tmp_path, method, tied):
    options = {"beta": 0.1, "max_steps": 2, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    trainer = make_grpo(tiny_base if tied else untied_base, method, **options)
    parameters = dict(trainer.model.named_parameters())
    copies = {name: p for name, p in parameters.items() if ".ref" in name}
    assert sum("trainable_tokens" in name for name in copies) == (1 if tied else 2)
    start = {name: p.detach().clone() for name, p in copies.items()}
    for name, parameter in copies.items():
        assert torch.equal(parameter, parameters[name.replace(".ref", ".default")]), name
        assert not parameter.requires_grad
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert abs(kl[0]) < 1e-6
    assert kl[1] > 1e-6
    for name, parameter in copies.items():
        assert torch.equal(parameter, start[name]), f"{name} moved"
    folder = last_checkpoint(tmp_path / "out")
    assert not (folder / "ref").exists()
    with safe_open(folder / "adapter_model.safetensors", "pt") as stored:
        names = list(stored.keys())
    assert not any("ref" in name.split(".") for name in names)
    assert sum("trainable_tokens" in name for name in names) == (1 if tied else 2)


def test_a_full_model_is_compared_with_what_it_was_loaded_from(tiny_base, make_kit, make_grpo, tmp_path):
    kit = make_kit(tiny_base)
    kit.model.save_pretrained(tmp_path / "sft")
    kit.model = AutoModelForCausalLM.from_pretrained(tmp_path / "sft", dtype=torch.float32)
    trainer = make_grpo(tiny_base, kit=kit, beta=0.1)
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert abs(kl[0]) < 1e-6
    assert kl[1] > 1e-6


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_what_trains_is_float32_and_moves_at_the_smallest_rate(tiny_base, make_grpo, method):
    trainer = make_grpo(tiny_base, method, learning_rate=1e-6, max_steps=1, beta=0.1)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert not any(".ref" in name for name in trained)
    assert {before[name].dtype for name in trained} == {torch.float32}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        change = (parameter - before[name]).abs().max().item() if parameter.is_floating_point() else 0.0
        assert (0 < change < 1e-5) if name in trained else change == 0, name


def test_groups_with_variance_are_kept_and_dead_ones_fill_up(tiny_base, make_grpo):
    trainer = make_grpo(tiny_base, settings=RolloutSettings(rounds=3))
    trainer.model.train()
    pool = trainer._collect(4)
    size = trainer.num_generations
    rewards = pool.scores.total.reshape(-1, size)
    living = rewards.max(1) > rewards.min(1)
    assert len(living) in (4, 8, 12), "whole rounds"
    assert len(living) == 12 or living.sum() >= 4
    assert len(living) == 4 or living[:-4].sum() < 4, "no round too many"
    assert pool.numbers.tolist() == prompt_block(24, 12, 0, trainer.args.seed)[: len(living)].tolist()
    batch = generation(trainer)
    groups = batch["advantages"].view(-1, size)
    expected = min(4, int(living.sum()))
    assert int((groups != 0).any(1).sum()) == expected
    wanted = [*np.flatnonzero(living), *np.flatnonzero(~living)][:4]
    rows = pool.rows(np.array(wanted))
    assert [list(filter(None, r)) for r in (batch["completion_ids"] * batch["completion_mask"]).tolist()] == [
        list(filter(None, pool.rollouts.completion_ids[row])) for row in rows
    ]
    torch.testing.assert_close(
        batch["advantages"], torch.from_numpy(Srpo(size)(pool.scores.total, pool.scores.hits)[rows]).float()
    )


def test_the_two_losses_differ_by_the_bonus(tiny_base, make_grpo, problem):
    found = {}
    for loss in ("grpo", "srpo"):
        options = {
            "algorithm": (loss, {"bonus_k": 2} if loss == "srpo" else {}),
            "settings": RolloutSettings(rounds=1),
        }
        found[loss] = generation(make_grpo(tiny_base, problem=problem(rewards={"rsvr": 1.0}), **options))
    assert torch.equal(found["grpo"]["completion_ids"], found["srpo"]["completion_ids"])
    difference = (found["srpo"]["advantages"] - found["grpo"]["advantages"]).view(4, 4)
    assert difference.abs().max() > 0
    torch.testing.assert_close(difference.sum(1), torch.zeros(4), atol=1e-5, rtol=0)


def test_a_weight_of_zero_logs_and_changes_nothing(tiny_base, make_grpo, problem):
    logs, weights = [], []
    for rewards in ({"exact": 1.0}, {"exact": 1.0, "prefix": 0, "likelihood": 0.0, "rank": 0}):
        trainer = make_grpo(tiny_base, problem=problem(rewards=rewards))
        trainer.train()
        logs.append(trainer.state.log_history[0])
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert logs[0]["reward"] == logs[1]["reward"]
    assert {"rewards/prefix/mean", "rewards/rank/mean"} <= logs[1].keys() - logs[0].keys()
    assert logs[1]["rewards/likelihood/mean"] < 0


def test_rewards_that_ask_the_model_get_what_it_says(tiny_base, make_grpo, problem):
    """The gold log-probability behind a chain is that of the item scorer, and the beam is a beam search's."""
    from reasonrec.recipes.decoding.score import score_all_items

    rewards = {"likelihood": {"weight": 1.0, "floor": -1000.0}, "rank": {"weight": 0, "k": 7}}
    trainer = make_grpo(tiny_base, settings=RolloutSettings(rounds=1, max_chain=3), problem=problem(rewards=rewards))
    trainer.model.train()
    pool = trainer._collect(4)
    vocabulary, trie, codes = trainer._policy.vocabulary, trainer._policy.trie, trainer._policy.index.codes
    model = trainer.model.eval()
    for row in range(0, 16, 5):
        completion = pool.rollouts.completion_ids[row]
        prefix = torch.tensor(
            [pool.rollouts.prompt_ids[row] + completion[: completion.index(vocabulary.begin_id) + 1]]
        )
        scores = score_all_items(
            model, trie, vocabulary, prefix, torch.ones_like(prefix), item_token_ids=vocabulary.item_token_ids(codes)
        )[0]
        target = trainer._prompts.target[pool.numbers[row // 4]]
        likelihood, ndcg = pool.scores.values[row]
        assert likelihood == pytest.approx(scores[target].item(), abs=1e-4)
        rank = int((scores > scores[target]).sum()) + 1
        assert ndcg == pytest.approx(1 / math.log2(rank + 1), abs=1e-6)


def test_all_zero_rewards_warn_and_stop_if_asked(tiny_base, make_grpo, problem, tmp_path):
    nothing = tmp_path / "nothing.py"
    nothing.write_text("def nothing(*, completions, **_):\n    return [0.0] * len(completions)\n")
    options = {"problem": problem(rewards={f"{nothing}:nothing": 1.0}), "max_steps": 4}
    trainer = make_grpo(tiny_base, settings=RolloutSettings(rounds=1, zero_reward_steps=2), **options)
    with pytest.warns(UserWarning, match="all rewards were 0 in the last 2 generation steps") as caught:
        trainer.train()
    assert sum("all rewards were 0" in str(w.message) for w in caught) == 1
    assert trainer.state.global_step == 4
    settings = RolloutSettings(rounds=1, zero_reward_steps=2, stop_on_zero_rewards=True)
    with pytest.raises(UserError, match="reward of your own never fires"):
        make_grpo(tiny_base, settings=settings, **options).train()


def test_the_probe_keeps_the_best_and_stops_early(tiny_base, make_grpo, tmp_path):
    scores = iter([0.1, 0.4, 0.3, 0.2, 0.9])
    seen = []

    def probe(model, process, processes):
        assert not model.training
        assert (process, processes) == (0, 1)
        seen.append([p.detach().clone() for p in model.parameters()])
        value = next(scores)
        return [{"ndcg@10": value, "hr@10": 1.0}, {"ndcg@10": value, "hr@10": 0.0}]

    trainer = make_grpo(tiny_base, probe=probe, max_steps=9, eval_steps=2, settings=RolloutSettings(patience=2))
    trainer.train()
    assert trainer.state.global_step == 6, "two probes in a row were not better than the one at step 2"
    entries = [(e["step"], e["eval_ndcg@10"], e["eval_hr@10"]) for e in trainer.state.log_history if "eval_hr@10" in e]
    assert entries == [(0, 0.1, 0.5), (2, 0.4, 0.5), (4, 0.3, 0.5), (6, 0.2, 0.5)]
    best = AutoModelForCausalLM.from_pretrained(best_folder(tmp_path / "out", 2), dtype=torch.float32)
    for kept, then in zip(best.parameters(), seen[1], strict=True):
        assert torch.equal(kept, then)


@methods
def test_resuming_changes_nothing(tiny_base, make_grpo, tmp_path, method):
    """Also across passes over the prompts, two steps per generation, and with a reference."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "num_iterations": 2, "save_total_limit": 9}
    options |= {"beta": 0.0 if method == "full" else 0.05, "learning_rate": 3e-3}
    probe = _ConstantProbe()
    whole = make_grpo(tiny_base, method, probe=probe, **options)
    whole.train()
    again = make_grpo(tiny_base, method, probe=probe, out=tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert again.state.global_step == 6
    now = dict(again.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(now[name], parameter), name
    logs = [
        [
            {k: v for k, v in e.items() if "time" not in k and "num_tokens" not in k}
            for e in t.state.log_history
            if "reward" in e
        ]
        for t in (whole, again)
    ]
    assert logs[0] == logs[1]
    names = {path.name for path in (tmp_path / "out" / "checkpoint-4").iterdir()}
    assert "training_args.bin" not in names, "a pickle"


class _ConstantProbe:
    def __call__(self, model, process, processes):
        return [{"ndcg@10": 0.5}]


@pytest.mark.parametrize(("method", "rate"), [("full", 1e-3), ("lora", 5e-3)])
def test_it_learns_from_hits_and_not_from_permuted_targets(tiny_base, make_grpo, problem, method, rate):
    """What comes next is a function of the last item; under permuted targets there is next to nothing to know."""
    rates = {}
    for permuted in (False, True) if method == "full" else (False,):
        trainer = make_grpo(
            tiny_base,
            method,
            problem=problem(prompts=64, permuted=permuted),
            scale=0.0,
            settings=RolloutSettings(rounds=2),
            per_device_train_batch_size=64,
            num_generations=8,
            learning_rate=rate,
            max_steps=50,
        )
        trainer.train()
        hits = [e["rollouts/exact_hit"] for e in trainer.state.log_history if "rollouts/exact_hit" in e]
        rates[permuted] = (np.mean(hits[:5]), np.mean(hits[-5:]))
    assert rates[False][0] < 0.25, "about one in seven"
    assert rates[False][1] > rates[False][0] + 0.25
    if True in rates:
        assert rates[True][1] < 0.35
        assert rates[False][1] > rates[True][1] + 0.15


def test_arguments_that_do_not_fit_are_refused_with_what_does(tmp_path):
    def arguments(**options):
        base = {"output_dir": str(tmp_path), "per_device_train_batch_size": 8, "num_generations": 4, "bf16": False}
        return GrpoArguments(**(base | options))

    arguments()
    with pytest.raises(UserError, match=r"num_generations=3 does not divide the 8 rollouts.*choose 2, 4, 8"):
        arguments(num_generations=3)
    with pytest.raises(UserError, match=r"the 12 rollouts .*6 × 2 steps\): choose 2, 3, 4, 6, 12"):
        arguments(num_generations=5, per_device_train_batch_size=6, gradient_accumulation_steps=2)
    with pytest.raises(UserError, match="choose a larger batch"):
        arguments(num_generations=4, per_device_train_batch_size=1)
    with pytest.raises(UserError, match="steps_per_generation=3 has to be a multiple"):
        arguments(steps_per_generation=3, gradient_accumulation_steps=2)
    with pytest.raises(UserError, match="save_steps=50 has to be a multiple of 4"):
        arguments(num_iterations=4)
    with pytest.raises(UserError, match=r"top_p=0\.9 is not supported"):
        arguments(top_p=0.9)
    with pytest.raises(UserError, match="use_vllm=True is not supported"):
        arguments(use_vllm=True)
    with pytest.raises(UserError, match="output_dir is required"):
        GrpoArguments()
    with pytest.raises(UserError, match="rounds=0"):
        RolloutSettings(rounds=0)


def test_too_few_prompts_are_named(tiny_base, make_grpo, problem):
    with pytest.raises(UserError, match="there are 3 prompts, but a generation step trains on 4"):
        make_grpo(tiny_base, problem=problem(prompts=3))
    trainer = make_grpo(tiny_base, problem=problem(prompts=5), settings=RolloutSettings(rounds=4))
    assert trainer._rounds == 1, "the budget shrinks to what there is"


@pytest.mark.parametrize("settings", [RolloutSettings(rounds=1), RolloutSettings(rounds=1, max_chain=6)])
def test_hints_bring_dead_groups_to_life(tiny_base, make_grpo, settings):
    """Codes that are given begin the target, and are learned with a weight of their own."""
    dead = make_grpo(tiny_base, settings=settings, per_device_train_batch_size=64)
    before = (generation(dead)["advantages"] != 0).float().mean()
    hints = replace(settings, hint_weight=0.125)
    trainer = make_grpo(tiny_base, settings=hints, per_device_train_batch_size=64)
    batch = generation(trainer)
    (hinted,) = trainer._metrics["train"]["rollouts/hinted"]
    assert 0 < hinted < 1
    advantage = batch["advantages"]
    assert (advantage.reshape(len(advantage), -1) != 0).any(1).float().mean() > before
    given = advantage == 0.125
    assert given.any(1).float().mean().item() == hinted
    chosen = (batch["tool_mask"] * batch["completion_mask"]).bool()
    log_probs, _ = trainers_log_probs(trainer, batch)
    torch.testing.assert_close(log_probs[chosen], batch["sampling_per_token_logps"][chosen], atol=1e-4, rtol=0)
    policy = trainer._policy
    targets = {tuple(trainer._prompts.token_ids(n)): policy.prompts.answer(int(trainer._prompts.target[n]))
               for n in range(len(trainer._prompts))}  # fmt: skip
    for row in given.any(1).nonzero()[:, 0]:
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
        codes = batch["completion_ids"][row][given[row]].tolist()
        assert targets[tuple(prompt)][: len(codes)] == codes
    trainer.train()  # the loss takes advantages of tokens

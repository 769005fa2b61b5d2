"""RecPO on TRL with the dual head: what the tokens get, what the item gets, and that the first ratio is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from reasonrec.data_gen.tasks.rl_prompts import RlPrompts
from reasonrec.recipes.policies.dual_head.answers import ITEM_BASE
from reasonrec.recipes.trainers.algorithms import build_algorithm
from reasonrec.recipes.trainers.grpo_arguments import GrpoArguments
from reasonrec.recipes.trainers.item_grpo import ItemGRPOTrainer, RolloutSettings
from reasonrec.recipes.trainers.scoring import Scorer
from reasonrec.rewards.registry import load_rewards

REWARDS = {"rank": {"weight": 0.95, "k": 7}, "probability": 0.05}


@pytest.fixture
def make_trainer(make_head, tmp_path):
    """Builds a trainer on histories of two items, with chains of at most four tokens."""

    def make(algorithm: str = "recpo", *, method: str = "lora", chain: int = 4, rewards: Any = None, **options: Any):
        own = options.pop("algorithm_options", {})
        made = make_head(method, temperature=0.1)
        policy = made.policy
        rng = np.random.default_rng(0)
        sequences = [rng.integers(0, 7, size=3) for _ in range(16)]
        target = np.array([(3 * items[1] + 2) % 7 for items in sequences])
        render = policy.prompts.reasoning if chain else policy.prompts.direct
        prompts = RlPrompts(sequences, np.arange(16), np.full(16, 2), target, 5, render)
        arguments: dict[str, Any] = {
            "per_device_train_batch_size": 16,
            "num_generations": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "beta": 0.0,
            "max_steps": 2,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        } | options
        return ItemGRPOTrainer(
            prompts=prompts,
            scorer=Scorer(load_rewards(rewards or REWARDS), policy, reasoning=chain > 0),
            algorithm=build_algorithm(algorithm, own, arguments["num_generations"]),
            settings=RolloutSettings(rounds=1, max_chain=chain, close_ids=policy.prompts.close_ids if chain else ()),
            model=made.model,
            args=GrpoArguments(output_dir=str(tmp_path / "out"), **arguments),
            processing_class=policy.tokenizer,
        )

    return make


def generation(trainer) -> dict[str, torch.Tensor]:
    trainer._policy.refresh(trainer._base())
    size = trainer.args.per_device_train_batch_size * (trainer.args.steps_per_generation or 1)
    return trainer._generate_and_score_completions([{"prompt": ""}] * size)


def gradient(trainer, batch) -> torch.Tensor:
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    batch = dict(batch, num_items_in_batch=batch["completion_mask"].sum())
    trainer.compute_loss(trainer.model, batch).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def test_tokens_have_the_advantage_of_their_rollout_and_the_item_that_of_the_winner(make_trainer):
    trainer = make_trainer(algorithm_options={"item_weight": 3.0})
    batch = generation(trainer)
    advantages, ids = batch["advantages"], batch["completion_ids"]
    assert advantages.shape == ids.shape
    is_item = ids >= ITEM_BASE
    assert (is_item.sum(1) == 1).all()
    own = advantages[:, 0]
    assert own.view(4, 4).sum(1).abs().max() < 1e-5, "sums to zero in each group"
    assert own.abs().max() > 0.1
    for row in range(16):
        group = own[row // 4 * 4 : row // 4 * 4 + 4]
        won = bool((group != 0).any()) and int(group.argmax()) == row % 4
        assert float(advantages[row][is_item[row]]) == pytest.approx(3 * float(own[row]) if won else 0, abs=1e-6)
        before = int(is_item[row].int().argmax())
        assert (advantages[row, :before] == own[row]).all()
    targets = trainer._prompts.target
    assert set((ids[is_item] - ITEM_BASE).tolist()) <= set(targets.tolist())


@pytest.mark.parametrize("shape", [(16, 1), (4, 1), (2, 2)], ids=["four groups", "one group", "half a group"])
def test_sum_zero_advantages_teach_chains_and_the_released_objective_does_not(make_trainer, shape):
    """The item action is switched off, so that what is left is the gradient of the chains' tokens."""
    rows, accumulation = shape
    found = {}
    for algorithm in ("recpo", "recpo_released"):
        trainer = make_trainer(
            algorithm, algorithm_options={"item_weight": 0.0}, per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer._policy.refresh(trainer._base())
        batch = trainer._generate_and_score_completions([{"prompt": ""}] * (rows * accumulation))
        assert batch["advantages"][:, 0].sum().abs() < 1e-5
        found[algorithm] = gradient(trainer, batch).abs().max()
    assert found["recpo"] > 1e-4
    assert found["recpo_released"] < 1e-8


def test_the_item_action_teaches_the_history_and_reading_the_items(make_trainer):
    trainer = make_trainer("infonce", chain=0)
    batch = generation(trainer)
    found = gradient(trainer, batch)
    # By hand: the mean over rows of the InfoNCE loss among the distinct targets, over the tokens that count.
    policy, base = trainer._policy, trainer._base()
    targets = (batch["completion_ids"][:, 0] - ITEM_BASE).tolist()
    among = sorted(set(targets))
    trainer.model.zero_grad()

    def read(prompts):
        rows = [base.base_model(input_ids=torch.tensor([p])).last_hidden_state[0, -1] for p in prompts]
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)

    items = read([policy.answers.item_prompts[i] for i in among])
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
    log_probs = (read(prompts) @ items.T / 0.1).log_softmax(1)
    (-log_probs[torch.arange(16), [among.index(t) for t in targets]].sum() / batch["completion_mask"].sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-2)
    assert expected.abs().max() > 1e-3


def test_the_first_ratio_is_one(make_trainer):
    trainer = make_trainer(steps_per_generation=2, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    trainer._policy.refresh(trainer._base())
    batch = trainer._generate_and_score_completions([{"prompt": ""}] * 16)
    old = batch["old_per_token_logps"]
    trainer.model.train()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    now, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, mask, batch["completion_ids"].shape[1], batch_size=8
    )
    is_item = batch["completion_ids"] >= ITEM_BASE
    assert (now[is_item] < 0).all()
    kept = batch["completion_mask"].bool()
    assert ((now - old)[kept].exp() - 1).abs().max() < 1e-5


@pytest.mark.parametrize("algorithm", ["recpo", "recpo_released", "infonce"])
def test_it_trains(make_trainer, algorithm):
    trainer = make_trainer(algorithm, chain=0 if algorithm == "infonce" else 4)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    table = trainer._policy.answers.table.clone()
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("lora" in name for name in moved)
    log = [entry for entry in trainer.state.log_history if "rollouts/reward" in entry]
    assert all(np.isfinite(entry["loss"]) for entry in log)
    assert 0 < log[0]["rollouts/reward"] < 1
    assert not torch.equal(trainer._policy.answers.table, table), "read again at the end"


def test_rewards_of_the_kit_and_of_ones_own_work_beside_it(make_trainer, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def short(*, completions, chains, target_items, **_):\n    return [1.0 / (1 + len(c)) for c in chains]\n"
    )
    rewards = REWARDS | {"length": 0.1, "repetition": {"weight": 0.1, "n": 2}, "likelihood": 0, f"{mine}:short": 0.2}
    trainer = make_trainer(rewards=rewards)
    generation(trainer)
    logged = trainer._chosen_values
    assert logged.shape[1] == 6
    assert torch.isfinite(logged).all()

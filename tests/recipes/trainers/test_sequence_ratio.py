"""The ratio of whole completions: numbers by hand, and TRL's loss where both are the same."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl import GRPOTrainer

from reasonrec.recipes.trainers import sequence_ratio
from reasonrec.recipes.trainers.grpo_arguments import GrpoArguments
from reasonrec.recipes.trainers.item_grpo import ItemGRPOTrainer, RolloutSettings
from reasonrec.recipes.trainers.sequence_ratio import SequenceRatio, clipped, product_ratio
from reasonrec.tokenizers.errors import UserError

# Batches of two steps a generation, so that the log-probabilities of the policy that wrote them are kept.
OPTIONS = {"steps_per_generation": 2, "per_device_train_batch_size": 8, "epsilon": 0.15, "algorithm": ("grpo", {})}
LOGGED = ("entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "clip_ratio/low_min",
          "clip_ratio/high_max")  # fmt: skip


@pytest.fixture
def build(tiny_base, make_grpo, problem):
    """A trainer whose rollouts are worth something."""

    def make(level: str, **options) -> ItemGRPOTrainer:
        settings = options.pop("settings", RolloutSettings(rounds=1))
        rewards = problem(rewards={"set_overlap": 1.0})
        return make_grpo(
            tiny_base,
            "lora",
            problem=rewards,
            settings=settings,
            importance_sampling_level=level,
            **(OPTIONS | options),
        )

    return make


def test_the_ratio_is_the_product_over_what_was_chosen() -> None:
    """1.1 · 1.1 = 1.21, a forced token between them; 0.9 · 1.2 = 1.08; nothing chosen: 1."""
    factors = torch.tensor([[1.1, 9.0, 1.1], [0.9, 1.2, 5.0], [2.0, 3.0, 4.0]])
    mask = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 0]])
    old = torch.full((3, 3), -1.5)
    torch.testing.assert_close(product_ratio(old + factors.log(), old, mask), torch.tensor([1.21, 1.08, 1.0]))


def test_it_is_clipped_where_it_went_too_far_the_right_way() -> None:
    """ε = 0.15. The factors 1.1 · 1.1 are clipped as a product, where neither is alone."""
    ratio = torch.tensor([1.21, 1.21, 0.8, 0.8, 1.1, 1.21])
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, 0.0])
    found = clipped(ratio, advantage, 0.15, 0.15)
    torch.testing.assert_close(found, torch.tensor([2.3, -2.42, 1.6, -1.7, 2.2, 0.0]))
    torch.testing.assert_close(clipped(ratio[:1], advantage[:1], 0.15, 0.3), torch.tensor([2.42]))


@given(st.floats(0.1, 3), st.floats(-3, 3))
def test_clipping_never_adds(ratio: float, advantage: float) -> None:
    (found,) = clipped(torch.tensor([ratio]), torch.tensor([advantage]), 0.15, 0.15).tolist()
    assert found <= ratio * advantage + 1e-5


def log_ratios(trainer: ItemGRPOTrainer, batch: dict[str, torch.Tensor], wanted: torch.Tensor) -> None:
    """Make the old log-probabilities such that the ratios of the tokens are those wanted."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    keep = batch["completion_ids"].shape[1]
    with torch.no_grad():
        log_probs, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, keep)
    batch["old_per_token_logps"] = log_probs - wanted


def made(trainer: ItemGRPOTrainer) -> dict[str, torch.Tensor]:
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions([{"prompt": ""}] * 16)


def gradients(trainer: ItemGRPOTrainer, loss: torch.Tensor) -> list[torch.Tensor]:
    trainer.model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("corrected", [True, False])
def test_for_completions_of_one_token_it_is_trls_loss(build, corrected):
    """Value, gradient and what is logged, with a divergence: what is replaced, pinned."""
    trainer = build("product", beta=0.2, use_bias_correction_kl=corrected)
    batch = made(trainer)
    batch["tool_mask"] = torch.zeros_like(batch["completion_mask"])
    batch["tool_mask"][:, 0] = 1
    generator = torch.Generator().manual_seed(0)
    shift = 0.3 * torch.randn(batch["completion_ids"].shape, generator=generator)
    log_ratios(trainer, batch, shift)
    batch["ref_per_token_logps"] = batch["old_per_token_logps"] + 0.1
    found = []
    for level in ("product", "sequence", "token"):
        trainer.importance_sampling_level, trainer.loss_type = level, "grpo"
        trainer._metrics["train"].clear()
        loss = trainer._compute_loss(trainer.model, batch)
        found.append((loss.detach(), gradients(trainer, loss), dict(trainer._metrics["train"])))
    (loss, ours, logged), *theirs = found
    assert 0 < logged["clip_ratio/region_mean"][0] < 1
    assert any(part.abs().max() > 0 for part in ours)
    assert logged.keys() == {*LOGGED, "kl"}
    for other, gradient, log in theirs:
        torch.testing.assert_close(loss, other)
        for a, b in zip(ours, gradient, strict=True):
            torch.testing.assert_close(a, b)
        for name in ("kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
            assert logged[name] == pytest.approx(log[name], abs=1e-6), name


def test_for_completions_of_several_tokens_it_is_the_equation(build):
    """Each chosen token moved by 6%, forced ones by anything: 1.06² = 1.12 is inside of ε = 0.15, 1.06³ = 1.19 not.

    TRL's mean of the same tokens stays 1.06.
    """
    trainer = build("product", beta=0.0)
    batch = made(trainer)
    wanted = torch.where(batch["tool_mask"] > 0, math.log(1.06), 7.0)
    log_ratios(trainer, batch, wanted)
    chosen, advantage = (batch["tool_mask"] * batch["completion_mask"]).sum(1), batch["advantages"]
    assert set(chosen.tolist()) == {2, 3}
    ratio = 1.06 ** chosen.double()
    expected = -torch.minimum(ratio * advantage, ratio.clamp(0.85, 1.15) * advantage).mean()
    loss = trainer._compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    clip = ((chosen == 3) & (advantage > 0)).double().mean().item()
    assert trainer._metrics["train"]["clip_ratio/high_mean"] == [pytest.approx(clip)]
    assert clip > 0
    trainer.importance_sampling_level, trainer.loss_type = "sequence", "grpo"
    assert trainer._compute_loss(trainer.model, batch).item() == pytest.approx(
        -(1.06 * advantage).mean().item(), abs=1e-5
    )
    trainer.current_gradient_accumulation_steps = 4
    trainer.importance_sampling_level = "product"
    assert trainer._compute_loss(trainer.model, batch).item() == pytest.approx(expected.item() / 4, abs=1e-5)


def test_the_divergence_is_that_of_the_completion(build):
    """A step away from the reference: e^x − x − 1 with x = −0.2 for each token that was chosen, forced ones none."""
    trainer = build("product", beta=0.5)
    batch = made(trainer)
    log_ratios(trainer, batch, torch.zeros(batch["completion_ids"].shape))
    batch["ref_per_token_logps"] = batch["old_per_token_logps"] - 0.2
    chosen = (batch["tool_mask"] * batch["completion_mask"]).sum(1)
    expected = -batch["advantages"].mean() + 0.5 * (math.exp(-0.2) + 0.2 - 1) * chosen.double().mean()
    assert trainer._compute_loss(trainer.model, batch).item() == pytest.approx(expected.item(), abs=1e-5)
    assert trainer._metrics["train"]["kl"] == [pytest.approx(math.exp(-0.2) + 0.2 - 1, abs=1e-5)]


def test_with_one_step_a_batch_the_ratio_is_one_and_with_two_it_moves(build, monkeypatch):
    """num_iterations=2: the second step trains on the same completions, which another policy wrote by then."""
    seen = []

    def watched(log_probs, old, mask):
        seen.append(product_ratio(log_probs, old, mask).detach())
        return product_ratio(log_probs, old, mask)

    monkeypatch.setattr(sequence_ratio, "product_ratio", watched)
    options = {"per_device_train_batch_size": 16, "steps_per_generation": 1, "max_steps": 4, "optim": "sgd"}
    trainer = build("product", num_iterations=2, learning_rate=2.0, max_grad_norm=0.0, **options)
    trainer.train()
    assert len(seen) == 4
    for first, second in (seen[:2], seen[2:]):
        assert (first - 1).abs().max() < 1e-4
        assert (second - 1).abs().max() > 0.15
    log = [entry for entry in trainer.state.log_history if "clip_ratio/region_mean" in entry]
    assert [entry["clip_ratio/region_mean"] > 0 for entry in log] == [False, True, False, True]
    seen.clear()
    trainer = build("product", num_iterations=1, learning_rate=2.0, max_grad_norm=0.0, **options)
    trainer.train()
    assert len(seen) == 4
    assert (torch.cat(seen) - 1).abs().max() == 0


def test_the_levels_part_at_the_second_step(build):
    """With one chosen token a completion all three would be the same; here there are two or three."""
    weights = {}
    for level, loss in (("token", "grpo"), ("sequence", "grpo"), ("product", "dapo")):
        trainer = build(
            level, loss_type=loss, num_iterations=2, per_device_train_batch_size=16, steps_per_generation=1,
            max_steps=2, learning_rate=1e-2,
        )  # fmt: skip
        trainer.train()
        weights[level] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        assert torch.isfinite(weights[level]).all()
    assert not torch.equal(weights["product"], weights["sequence"])
    assert not torch.equal(weights["token"], weights["sequence"])


# What is replaced, and what it relies on.


def test_what_is_replaced_keeps_its_parameters():
    ours, theirs = (inspect.signature(cls._compute_loss) for cls in (SequenceRatio, GRPOTrainer))
    assert list(ours.parameters) == list(theirs.parameters)
    assert {name for name, value in vars(SequenceRatio).items() if callable(value)} == {"_compute_loss", "_log_loss"}
    assert not hasattr(GRPOTrainer, "_log_loss")


def test_trl_has_no_product(build):
    """If it has one, ours can go."""
    trainer = build("product")
    batch = made(trainer)
    with pytest.raises(ValueError, match="Unknown importance sampling level: product"):
        GRPOTrainer._compute_loss(trainer, trainer.model, batch)


@pytest.mark.parametrize(
    ("name", "value"),
    [("loss_type", "grpo"), ("delta", 2.0), ("entropy_coef", 0.1), ("use_adaptive_entropy", True),
     ("top_entropy_quantile", 0.5), ("off_policy_mask_threshold", 0.5)],
)  # fmt: skip
def test_keys_that_it_does_not_read_are_refused(tmp_path, name, value):
    base = {"output_dir": str(tmp_path), "bf16": False, "per_device_train_batch_size": 8}
    GrpoArguments(**base, importance_sampling_level="product")
    GrpoArguments(**base, **{name: value})
    with pytest.raises(UserError, match=rf"^{name}={value} is not read with importance_sampling_level=product"):
        GrpoArguments(**base, importance_sampling_level="product", **{name: value})


def test_an_algorithm_with_two_advantages_is_refused(build):
    trainer = build(
        "product", algorithm=("recpo", {"item_weight": 2.0}), settings=RolloutSettings(rounds=1, max_chain=3)
    )
    with pytest.raises(UserError, match="one ratio for a chain and its answer, which this algorithm gives different"):
        trainer._compute_loss(trainer.model, made(trainer))

"""What the GRPO trainer relies on in TRL, PEFT and bitsandbytes: if one of these fails, read the new version first."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from reasonrec.recipes.trainers.grpo_arguments import GrpoArguments
from reasonrec.recipes.trainers.item_grpo import ItemGRPOTrainer
from reasonrec.recipes.trainers.keys import REFUSED

OVERRIDDEN = {
    "__init__", "create_optimizer", "_save", "_generate_and_score_completions", "_calculate_rewards", "evaluate",
}  # fmt: skip
OWN = {
    "_base", "_copy_rows_to_reference", "_collect", "_sampling", "_roll_out", "_lives", "_hinted", "_replay",
    "_watch_zero_rewards", "write_weights",
}  # fmt: skip
# Three rollouts of a prompt of three tokens; what stands behind 0 in a mask was not drawn.
PROMPT, LOG_PROBS, MASK = [30, 31, 32], [-0.5, -1.5], [1, 0]


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


class Passing(GRPOTrainer):
    """TRL's own trainer, with rollouts that are given; keeps what passes the methods that ours overrides."""

    advantages: torch.Tensor | None = None  # in place of TRL's
    mask = MASK

    def __init__(self, **kwargs: Any) -> None:
        self.rewarded, self.made, self.trained, self.evaluated = [], [], [], []
        super().__init__(rollout_func=self.roll_out, reward_funcs=[lambda **_: None], **kwargs)

    def roll_out(self, prompts, trainer):
        assert trainer is self
        end = self.processing_class.eos_token_id
        return {
            "prompt_ids": [PROMPT] * len(prompts),
            "completion_ids": [[40 + row, end if row % 2 else 50] for row in range(len(prompts))],
            "logprobs": [LOG_PROBS] * len(prompts),
            "env_mask": [self.mask] * len(prompts),
        }

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self.rewarded.append(completion_ids_list)
        return torch.arange(float(len(prompts)))[:, None]

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.advantages is not None:
            output["advantages"] = self.advantages
        self.made.append((self._step, self.state.global_step, output))
        return output

    def _compute_loss(self, model, inputs):
        self.trained.append(inputs)
        return super()._compute_loss(model, inputs)

    def evaluate(self, *args, **kwargs):
        self.evaluated.append(self.state.global_step)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {})
        return {}


@pytest.fixture
def passing(tiny_base, make_kit, tmp_path):
    """Builds `Passing`: three rollouts of one prompt a step, with SGD, so that no gradient means no change."""

    def build(method: str = "full", model: Any = None, **options: Any) -> Any:
        kit = make_kit(tiny_base, method)
        settings = {
            "per_device_train_batch_size": 3, "per_device_eval_batch_size": 3, "num_generations": 3, "max_steps": 2,
            "logging_steps": 1, "beta": 0.0, "max_completion_length": 4, "optim": "sgd", "learning_rate": 1.0,
            "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": "none", "use_cpu": True,
            "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False,
        }  # fmt: skip
        return Passing(
            model=kit.model if model is None else model,
            args=GRPOConfig(str(tmp_path / "passing"), **(settings | options)),
            train_dataset=Dataset.from_dict({"prompt": ["some"] * 8}),
            eval_dataset=Dataset.from_dict({"prompt": ["some"]}) if "eval_strategy" in options else None,
            processing_class=kit.tokenizer,
        )

    return build


def watch_forward(model: Any) -> list[tuple[dict[str, Any], Any, str | None]]:
    """A list that fills with what a causal LM is called with, what it answers, and under which adapter."""
    calls: list[tuple[dict[str, Any], Any, str | None]] = []
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    forward = base.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        answer = forward(*args, **kwargs)
        calls.append((kwargs, answer, getattr(model, "active_adapter", None)))
        return answer

    base.forward = watched
    return calls


def with_lora(base: Path) -> Any:
    """A model with an adapter on its layers alone, which TRL's own head can read too."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)


def values(trainer: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters() if parameter.requires_grad]


def changed(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_version_this_was_written_for():
    assert trl.__version__.startswith("1.16.")


def test_only_what_is_meant_to_be_is_overridden(passing):
    """A method or attribute of the same name in a new version would be replaced by accident."""
    ours = {name for name, value in vars(ItemGRPOTrainer).items() if callable(value)}
    assert ours == OVERRIDDEN | OWN
    trainer = passing()
    trainer.train()
    attributes = {"_rounds", "_settings", "_prompts", "_probe", "_scorer", "_chosen", "_chosen_values", "_zero_steps"}
    attributes |= {
        "_silenced",
        "_algorithm",
        "_policy",
        "_keep_fresh",
        "_chain_writer",
        "_losses",
        "_skipped",
        "_whole",
        "_row_learning_rate",
    }
    assert not (OWN | attributes) & {*vars(trainer), *dir(GRPOTrainer)}


@pytest.mark.parametrize(
    "name", ["_generate_and_score_completions", "_calculate_rewards", "create_optimizer", "_save"]
)
def test_overridden_methods_keep_their_parameters(name):
    assert parameters(getattr(ItemGRPOTrainer, name)) == parameters(getattr(GRPOTrainer, name))


def test_every_log_probability_comes_through_the_fused_head(passing, tiny_base):
    """Policy, old policy and reference."""
    trainer = passing(model=with_lora(tiny_base), beta=0.1, steps_per_generation=2)
    calls = watch_forward(trainer.model)
    trainer.train()
    assert all(kwargs["fused_lm_head"] is True for kwargs, *_ in calls)
    assert all((kwargs["labels"] == -100).sum(1).eq(len(PROMPT)).all() for kwargs, *_ in calls), "completions only"
    (_, _, made), *_ = trainer.made
    found = [answer.log_probs[:, -2:] for _, answer, _ in calls]
    adapters = [adapter for *_, adapter in calls]
    old, reference = (
        torch.cat([rows for rows, adapter in zip(found[:-2], adapters[:-2], strict=True) if adapter == name])
        for name in ("default", "ref")
    )
    assert adapters[-2:] == ["default", "default"], "the loss of two steps"
    torch.testing.assert_close(made["old_per_token_logps"], old)
    torch.testing.assert_close(made["ref_per_token_logps"], reference)
    entropy, mask = calls[-1][1].entropy[:, -2:], torch.tensor([MASK] * 3)
    (line,) = [line for line in trainer.state.log_history if line["step"] == 2 and "entropy" in line]
    assert line["entropy"] == pytest.approx(float((entropy.detach() * mask).sum() / mask.sum()), abs=1e-4)


def test_where_rollouts_rewards_and_advantages_pass(passing):
    trainer = passing(max_steps=1)
    trainer.train()
    end = trainer.processing_class.eos_token_id
    completions = [[40, 50], [41, end], [42, 50]]
    assert trainer.rewarded == [completions]
    ((_, _, made),) = trainer.made
    assert made["completion_ids"].tolist() == completions
    assert made["prompt_ids"].tolist() == [PROMPT] * 3
    torch.testing.assert_close(made["sampling_per_token_logps"], torch.tensor([LOG_PROBS] * 3))
    assert made["tool_mask"].tolist() == [MASK] * 3
    torch.testing.assert_close(made["advantages"], torch.tensor([-1.0, 0.0, 1.0]), atol=1e-3, rtol=0)
    (line,) = [line for line in trainer.state.log_history if "completions/clipped_ratio" in line]
    assert line["completions/clipped_ratio"] == pytest.approx(2 / 3), "completions have to end"
    # What was rolled out counts, less what the mask leaves out; in the state, and so in checkpoints.
    assert trainer.state.num_input_tokens_seen == 3 * (len(PROMPT) + sum(MASK))


@pytest.mark.parametrize(
    ("advantages", "mask", "learns"),
    [([-1.0, 0.0, 1.0], MASK, True), ([0.0, 0.0, 0.0], MASK, False), ([-1.0, 0.0, 1.0], [0, 0], False)],
)
def test_the_loss_obeys_advantages_and_mask(passing, advantages, mask, learns):
    trainer = passing(max_steps=1)
    trainer.advantages, trainer.mask = torch.tensor(advantages), mask
    before = values(trainer)
    trainer.train()
    assert changed(before, values(trainer)) == learns


@pytest.mark.parametrize(("steps", "iterations", "wanted"), [(1, 1, [0, 1, 2, 3]), (2, 1, [0, 2]), (2, 2, [0])])
def test_when_a_generation_happens(passing, steps, iterations, wanted):
    trainer = passing(max_steps=4, steps_per_generation=steps, num_iterations=iterations)
    trainer.train()
    assert [step for step, *_ in trainer.made] == wanted
    assert {len(made["completion_ids"]) for *_, made in trainer.made} == {3 * steps}
    # Shuffled in between, and none is dropped.
    trained = [row for inputs in trainer.trained[:steps] for row in inputs["completion_ids"].tolist()]
    assert sorted(trained) == sorted(trainer.made[0][2]["completion_ids"].tolist())


def test_the_count_of_steps_is_not_restored(passing):
    options = {"steps_per_generation": 2, "max_steps": 3}
    passing(save_strategy="steps", save_steps=1, **options).train()
    resumed = passing(**options)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-1")
    assert [made[:2] for made in resumed.made] == [(0, 1)], "in the middle of what was generated, anew from 0"


def test_the_reference_adapter_misses_the_code_rows(passing):
    """It copies what has `.default.` in its name; names that end in .default are left out: ours to copy."""
    trainer = passing("lora", beta=0.1)
    named = dict(trainer.model.named_parameters())
    copies = {name: named[name.replace(".ref", ".default")] for name in named if ".ref" in name}
    equal = {name: torch.equal(named[name], parameter) for name, parameter in copies.items()}
    assert equal == {name: not name.endswith(".ref") for name in copies}
    assert set(equal.values()) == {True, False}


def test_the_reference_of_a_whole_model_is_read_from_its_folder(passing, tiny_base):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        model.get_input_embeddings().weight += 1
    trainer = passing(model=model, beta=0.1, max_steps=1)
    rows = trainer.ref_model.get_input_embeddings().weight
    torch.testing.assert_close(rows + 1, model.get_input_embeddings().weight)
    calls = watch_forward(trainer.ref_model)
    trainer.train()
    ((asked, answer, _),) = calls
    assert asked["fused_lm_head"] is True
    torch.testing.assert_close(trainer.made[0][2]["ref_per_token_logps"], answer.log_probs[:, -2:])


def test_the_order_in_which_the_trainer_is_built(passing, tiny_base):
    """The copy has the exact values, then the weights are rounded; our policy is installed after TRL's."""
    model = with_lora(tiny_base)
    exact = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name}
    model.is_loaded_in_4bit = True  # what TRL asks; the weights are whole
    trainer = passing(model=model, beta=0.1)
    named = dict(trainer.model.named_parameters())
    for name, value in exact.items():
        assert named[name].dtype == torch.bfloat16
        assert torch.equal(named[name.replace(".default.", ".ref.")], value)
    ids = torch.tensor([PROMPT])
    assert trainer.model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs is not None
    trainer._metrics["train"]["ours"].append(1.0)
    assert trainer._metrics == {"train": {"ours": [1.0]}, "eval": {}}


def test_the_start_is_evaluated_through_the_method_that_is_overridden(passing):
    trainer = passing(eval_strategy="steps", eval_steps=1, eval_on_start=True)
    trainer.train()
    assert trainer.evaluated == [0, 1, 2]


# What the rollouts rely on; TRL would do something else with other values, or nothing.
RELIED_ON = {
    "use_vllm": False, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0, "disable_dropout": True,
    "mask_truncated_completions": False, "multi_objective_aggregation": "sum_then_normalize", "reward_weights": None,
    "cast_lm_head_to_fp32": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        *RELIED_ON, "num_generations", "steps_per_generation", "generation_batch_size", "num_iterations",
        "beta",
        "temperature", "max_completion_length", "eval_on_start", "eval_strategy", "eval_steps", "scale_rewards",
        "num_generations_eval", "gradient_accumulation_steps", "save_steps", "save_strategy",
    ],
)  # fmt: skip
def test_configuration_fields_exist(name):
    assert name in {f.name for f in fields(GRPOConfig)}


def test_our_arguments_add_the_precision_only(tmp_path):
    assert {f.name for f in fields(GrpoArguments)} == {f.name for f in fields(GRPOConfig)} | {"precision"}
    args = GrpoArguments(output_dir=str(tmp_path), bf16=False, per_device_train_batch_size=8)
    for name, wanted in RELIED_ON.items():
        assert getattr(args, name) == wanted
        assert name in REFUSED["grpo"]
    assert args.importance_sampling_level == "token"
    assert args.generation_batch_size == 8


@pytest.mark.parametrize("flag", [True, False])
def test_4_bit_weights_would_be_packed_in_evaluation_mode(monkeypatch, flag):
    """The reason for `keep_unpacked`; the flag that it sets is the one that is asked."""
    bnb = pytest.importorskip("bitsandbytes")
    packed = []

    def pack(data, state):
        packed.append(data)
        return data, state

    monkeypatch.setattr(bnb.nn.modules, "_convert_weight_packed_for_cpu", pack)
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    assert hasattr(layer, "support_avx512bf16_for_cpu")
    layer.support_avx512bf16_for_cpu = flag
    layer.train()(torch.ones(1, 64))
    assert not packed
    layer.eval()(torch.ones(1, 64))
    assert len(packed) == flag

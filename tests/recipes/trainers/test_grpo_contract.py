"""What the GRPO trainer relies on in TRL, PEFT and bitsandbytes: if one of these fails, read the new version first."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
import torch
import trl
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

from reasonrec.recipes.trainers.item_grpo import GrpoArguments, ItemGRPOTrainer
from reasonrec.recipes.trainers.keys import REFUSED

OVERRIDDEN = {
    "__init__", "create_optimizer", "_save", "_generate_and_score_completions", "_calculate_rewards", "evaluate",
}  # fmt: skip
SOURCE = inspect.getsource(GRPOTrainer)


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_version_this_was_written_for():
    assert trl.__version__.startswith("1.16.")


def test_only_what_is_meant_to_be_is_overridden():
    ours = {name for name, value in vars(ItemGRPOTrainer).items() if callable(value)}
    own = {"_base", "_copy_rows_to_reference", "_collect", "_roll_out", "_replay", "_watch_zero_rewards"}
    own |= {"write_weights"}
    assert ours == OVERRIDDEN | own
    theirs = {name for cls in (GRPOTrainer, Trainer) for name in dir(cls)}
    assert not own & theirs
    attributes = {"_rounds", "_settings", "_prompts", "_probe", "_scorer", "_chosen", "_chosen_values", "_zero_steps"}
    attributes |= {"_silenced", "_algorithm", "_policy"}
    for name in attributes:
        assert f"self.{name} " not in SOURCE + inspect.getsource(Trainer)


@pytest.mark.parametrize(
    "name", ["_generate_and_score_completions", "_calculate_rewards", "create_optimizer", "_save"]
)
def test_overridden_methods_keep_their_parameters(name):
    assert parameters(getattr(ItemGRPOTrainer, name)) == parameters(getattr(GRPOTrainer, name))


def test_every_log_probability_comes_through_the_fused_head():
    source = inspect.getsource(GRPOTrainer._get_per_token_logps_and_entropies)
    assert "outputs = model(**model_inputs, labels=labels, fused_lm_head=True)" in source
    assert "outputs.log_probs[:, -logits_to_keep:]" in source
    assert "outputs.entropy[:, -logits_to_keep:]" in source
    assert "labels[:, :-logits_to_keep] = -100" in source
    assert SOURCE.count("self._get_per_token_logps_and_entropies(") == 4, "policy, old, and two references"


def test_where_rollouts_rewards_and_advantages_pass():
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert "rewards_per_func = self._calculate_rewards(inputs, prompts, completions, completion_ids_list)" in source
    assert '"advantages": advantages,' in source
    assert 'output["sampling_per_token_logps"] = sampling_per_token_logps' in source
    assert "loss_mask = completion_mask if tool_mask is None else completion_mask * tool_mask" in source
    generate = inspect.getsource(GRPOTrainer._generate)
    assert "output = self.rollout_func(prompts, self)" in generate
    assert 'tool_mask = extra_fields.pop("env_mask", None)' in generate
    assert "ids[-1] not in eos_and_pad" in generate, "completions have to end"
    assert 'completion_mask * inputs["tool_mask"]' in inspect.getsource(GRPOTrainer._compute_loss)


def test_when_a_generation_happens():
    source = inspect.getsource(GRPOTrainer._prepare_inputs)
    assert "generate_every = self.args.steps_per_generation * self.num_iterations" in source
    assert "if self._step % generate_every == 0 or self._buffered_inputs is None:" in source
    assert "self._step = 0" in inspect.getsource(GRPOTrainer.__init__), "and it is not restored on resume"
    assert "self._train_batch_size * self.args.steps_per_generation" in inspect.getsource(
        GRPOTrainer.get_train_dataloader
    )


def test_the_reference_adapter_misses_the_code_rows():
    source = inspect.getsource(GRPOTrainer.__init__)
    assert 'model.add_adapter("ref", default_config)' in source
    assert 'if ".default." in name:' in source, "names that end in .default are left out: ours to copy"
    assert 'with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None)' in SOURCE
    assert "self.ref_model = create_model_from_path(get_config_model_id(self.model.config)" in source


def test_the_order_in_which_the_trainer_is_built():
    source = inspect.getsource(GRPOTrainer.__init__)
    copied, rounded, fused = (
        source.index(part)
        for part in ('model.add_adapter("ref"', "param.data = param.data.to(torch.bfloat16)", "add_fused_lm_head(")
    )
    assert copied < rounded < fused, "the copy has the exact values; our policy is installed after TRL's"
    assert 'self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}' in source


def test_completions_are_not_dropped_between_generation_and_loss():
    assert "shuffle_sequence_dict(generation_batch)" in inspect.getsource(GRPOTrainer._prepare_inputs)
    assert callable(grpo_trainer.shuffle_sequence_dict)


def test_the_start_is_evaluated_through_the_method_that_is_overridden():
    assert "self.evaluate(ignore_keys=ignore_keys_for_eval)" in inspect.getsource(Trainer._evaluate)
    assert "eval_on_start" in inspect.getsource(Trainer)


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


def test_4_bit_weights_would_be_packed_in_evaluation_mode():
    """The reason for `keep_unpacked`; the flag that it sets is the one that is asked."""
    bnb = pytest.importorskip("bitsandbytes")
    source = inspect.getsource(bnb.nn.Linear4bit.forward)
    assert "self.support_avx512bf16_for_cpu" in source
    assert "not self.training" in source
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)
    assert hasattr(layer, "support_avx512bf16_for_cpu")

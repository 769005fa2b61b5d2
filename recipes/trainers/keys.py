"""The keys that `recipes/sft.py` and `recipes/grpo.py` inherit from TRL and transformers, read without importing them.

`keys.json` lists those that work here, with their types and defaults. It is made from the pinned version, by

    python -m reasonrec.recipes.trainers.keys

The others are refused, each with what to do instead (`REFUSED`). A new version of TRL may bring keys that are in
neither: the command names them. Add each to `REFUSED`, or, if a training here obeys it, repeat the command with its
name behind it.
"""

from __future__ import annotations

import enum
import functools
import json
import operator
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal

from reasonrec.recipes.keys import MAX_SEED, Key, KeyTable
from reasonrec.tokenizers.errors import UserError

TABLE = Path(__file__).with_name("keys.json")
Stage = Literal["sft", "grpo"]
# Old names that transformers is about to drop, as they are still written everywhere.
ALIASES = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
_PATHS = {"output_dir"}
_AT_LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "max_steps": 1, "learning_rate": 0, "warmup_steps": 0, "weight_decay": 0, "max_grad_norm": 0, "adam_beta1": 0,
    "adam_beta2": 0, "neftune_noise_alpha": 0, "torch_empty_cache_steps": 1, "logging_steps": 0, "eval_steps": 0,
    "eval_delay": 0, "save_steps": 0, "save_total_limit": 1, "seed": 0, "data_seed": 0, "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": 1, "ddp_bucket_cap_mb": 1, "ddp_timeout": 1, "num_generations": 2,
    "steps_per_generation": 1, "num_iterations": 1, "beta": 0, "epsilon": 0, "epsilon_high": 0, "delta": 0,
    "entropy_coef_min": 0, "top_entropy_quantile": 0,
}  # fmt: skip
_ABOVE = {"num_train_epochs": 0, "temperature": 0, "adam_epsilon": 0}
_AT_MOST = {"top_entropy_quantile": 1, "seed": MAX_SEED, "data_seed": MAX_SEED}
_BELOW = {"adam_beta1": 1, "adam_beta2": 1}
_RULES: dict[str, Mapping[str, Any]] = {
    "path": dict.fromkeys(_PATHS, True), "at_least": _AT_LEAST, "above": _ABOVE, "at_most": _AT_MOST, "below": _BELOW,
}  # fmt: skip


def _all(names: str, instead: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), instead)


_BOTH = {
    **_all("do_train do_eval do_predict", "each stage is a command of its own; valid_rows has validation reported"),
    "resume_from_checkpoint": "the same command goes on from its last checkpoint by itself",
    **_all(
        "ignore_data_skip restore_callback_states_from_checkpoint save_only_model",
        "an interrupted run goes on where it stopped, with the same data and optimizer state",
    ),
    **_all(
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
        "when the training is done, publish its folder: hf upload <repository> <output_dir>",
    ),
    **_all(
        "remove_unused_columns label_names train_sampling_strategy length_column_name shuffle_dataset "
        "dataloader_drop_last dataloader_in_order accelerator_config",
        "the order of the examples and their layout in batches are planned from seed; every example is trained on",
    ),
    **_all(
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
        "include_for_metrics batch_eval_metrics bf16_full_eval fp16_full_eval",
        "a training reports the validation figures of valid_rows; recipes/eval_ranking.py ranks",
    ),
    "optim_target_modules": "GaLore and APOLLO are not available; lora_target_modules of sft.py says what is trained",
    "auto_find_batch_size": "lower per_device_train_batch_size, and raise gradient_accumulation_steps as much",
    "use_cache": "training keeps no cache, and rollouts always do",
    "label_smoothing_factor": "it would smooth over the whole vocabulary, but items are a softmax over legal codes",
    "model_init_kwargs": "model, method and trust_remote_code say how the model is loaded",
    "router_aux_loss_coef": "the item policy has no load-balancing loss",
    **_all(
        "fsdp fsdp_config deepspeed parallelism_config",
        "every process holds the whole model: accelerate launch --num_processes; method: qlora needs little memory",
    ),
    "local_rank": "the launcher sets it: accelerate launch --num_processes",
}
_SFT = {
    "max_length": "nothing is truncated in tokens; max_history says how many items a history may have",
    "truncation_mode": "a history loses its oldest items beyond max_history",
    **_all("completion_only_loss assistant_only_loss", "one_per_prefix: true supervises answers only"),
    **_all("packing packing_strategy eval_packing padding_free", "histories are whole: raise max_history instead"),
    **_all("pad_token eos_token", "they are the tokenizer's: save the base model with the one you want"),
    "chat_template_path": "chat: true uses the template of the base model's tokenizer",
    **_all(
        "dataset_text_field dataset_num_proc dataset_kwargs",
        "dataset is a folder of recipes/prepare.py; tasks and history_prompt say how it is written",
    ),
    "max_steps": "num_train_epochs says how long to train, and may be a fraction such as 0.05",
}
_SAMPLING = "completions are drawn from the very policy that is trained: temperature is what can be changed"
_LOGGING = "rollouts/… and the rewards are logged at every step (report_to, train_metrics.json)"
_GRPO = {
    **_all("max_completion_length", "max_chain is the longest chain of thought; an item has as many codes as it has"),
    **_all(
        "top_p top_k min_p repetition_penalty generation_kwargs cache_implementation disable_dropout "
        "cast_lm_head_to_fp32 use_transformers_continuous_batching transformers_continuous_batching_config "
        "use_transformers_paged ds3_gather_for_generation",
        _SAMPLING,
    ),
    **_all(
        "use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url "
        "vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization "
        "vllm_max_model_length vllm_tensor_parallel_size vllm_importance_sampling_correction "
        "vllm_importance_sampling_mode vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min "
        "vllm_importance_sampling_cap",
        "codes are drawn inside the training process, from the item trie; chain_engine: vllm has it write the chains",
    ),
    **_all("chat_template_kwargs", "prompts are written as in the training that model comes from"),
    "reward_weights": "rewards has them: {name: weight, …}",
    "multi_objective_aggregation": "the weighted rewards are summed, and algorithm says how they become advantages",
    "mask_truncated_completions": "raise max_chain: a chain that is cut is closed and answered like any other",
    "max_tool_calling_iterations": "there are no tools",
    "generation_batch_size": "it depends on the number of processes: set steps_per_generation",
    **_all(
        "log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo", _LOGGING
    ),
    "include_num_input_tokens_seen": _LOGGING,
    **_all(
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
        "the reference stays the model that the training starts from; beta is its weight",
    ),
    **_all(
        "eval_strategy eval_on_start per_device_eval_batch_size num_generations_eval",
        "valid_rows cases are ranked at the start and every eval_steps",
    ),
    **_all(
        "load_best_model_at_end metric_for_best_model greater_is_better", "keep: best keeps the best-ranking weights"
    ),
    "enable_jit_checkpoint": "rollouts are not part of a checkpoint: save_steps says when one is written",
    "data_seed": "seed draws prompts and rollouts",
    **_all(
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context",
        "prompts are in memory: there is nothing to load",
    ),
}
REFUSED: dict[Stage, dict[str, str]] = {"sft": {**_BOTH, **_SFT}, "grpo": {**_BOTH, **_GRPO}}


@functools.cache
def inherited(stage: Stage) -> KeyTable:
    """The keys that a stage inherits."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    return KeyTable(
        tuple(_key(name, entry) for name, entry in {**table["both"], **table[stage]}.items()), REFUSED[stage]
    )


def prepare_arguments(arguments: Any, stage: Stage) -> None:
    """Refuse what `REFUSED` names where the arguments are made in Python; settle what transformers warns about.

    Args:
        arguments: SftArguments or GrpoArguments, before TRL's `__post_init__`.
        stage: Which of them.

    Raises:
        UserError: If one of them has another value than its default, or the launch asks for what no training can use.
    """
    from reasonrec.recipes.trainers.engine import check_engine

    check_engine()
    for item in fields(arguments):
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        value = getattr(arguments, item.name)
        if item.name in REFUSED[stage] and value != default:
            raise UserError(f"{item.name}={value} is not supported here: {REFUSED[stage][item.name]}")
    for new, old in ALIASES.items():  # transformers would warn of TRL's default for the old name
        if getattr(arguments, new) is None:
            setattr(arguments, new, getattr(arguments, old))
    if arguments.disable_tqdm is None:
        arguments.disable_tqdm = not sys.stderr.isatty()


def check_reports(report_to: Sequence[str]) -> None:
    """Refuse to log where nothing is installed to log with.

    Raises:
        UserError: If one of the integrations is unknown or not installed.
    """
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    there = sorted(get_available_reporting_integrations())
    for name in report_to:
        if name not in there:
            why = f"pip install {name}" if name in INTEGRATION_TO_CALLBACK else "there is no such integration"
            raise UserError(f"report_to={name}: not installed ({why}); choose from {', '.join([*there, 'none'])}")


def _key(name: str, entry: Mapping[str, Any]) -> Key:
    kinds: dict[str, Any] = {
        "int": int, "float": float, "bool": bool, "str": str, "dict": dict, "list[str]": list[str], "None": type(None),
    }  # fmt: skip
    parts = [kinds[kind] for kind in entry.get("type", "").split(" | ") if kind]
    if choices := entry.get("choices"):
        parts.insert(0, Literal[tuple(choices)])
    rules = {rule: bounds[name] for rule, bounds in _RULES.items() if name in bounds}
    aliases = (ALIASES[name],) if name in ALIASES else ()
    annotation = functools.reduce(operator.or_, parts)
    default = MISSING if name == "output_dir" else entry["default"]  # TRL would make up a name
    return Key(name, annotation, default, entry["help"], rules, own=entry.get("own", False), aliases=aliases)


def make_table(known: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """The table of the installed version.

    Args:
        known: Names that work beyond those of the table there is.

    Raises:
        UserError: If a key is neither known to work nor refused.
    """
    from reasonrec.recipes.trainers.grpo_arguments import GrpoArguments
    from reasonrec.recipes.trainers.item_sft import SftArguments

    old = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.is_file() else {}
    works = {*known, *(name for part in old.values() for name in part)}
    sft, grpo = dict(_entries(SftArguments, "sft")), dict(_entries(GrpoArguments, "grpo"))
    if unknown := [name for name in {**sft, **grpo} if name not in works]:
        raise UserError(
            f"neither known to work nor refused: {' '.join(unknown)}; add each to REFUSED, or to this command if a "
            "training here obeys it"
        )
    both = {name: entry for name, entry in sft.items() if grpo.get(name) == entry}
    rest = [{name: entry for name, entry in part.items() if name not in both} for part in (sft, grpo)]
    return {"both": both, "sft": rest[0], "grpo": rest[1]}


def _entries(cls: type, stage: Stage) -> Iterator[tuple[str, dict[str, Any]]]:
    annotations = typing.get_type_hints(cls)
    for item in fields(cls):
        if item.name in REFUSED[stage] or item.name in ALIASES.values():
            continue
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        default = default.value if isinstance(default, enum.Enum) else default
        own = item.name in cls.__annotations__
        text = " ".join(str(item.metadata.get("help", "")).replace("%%", "%").split())
        entry = {**_type(annotations[item.name]), "default": default, "help": re.split(r"(?<=\w\.) ", text)[0]}
        yield item.name, entry | ({"own": True} if own else {})


def _type(annotation: Any) -> dict[str, Any]:
    """A type as the table has it: enumerations become choices."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    options = typing.get_args(annotation) if union else (annotation,)
    choices = [member.value for o in options if isinstance(o, type) and issubclass(o, enum.Enum) for member in o]
    if typing.get_origin(annotation) is Literal:
        choices = list(typing.get_args(annotation))
    kinds = []
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is list:
            kinds.append("list[str]")
        elif origin is type(None):
            kinds.append("None")
        elif origin in (int, float, bool, str, dict) and not (choices and origin is str):
            kinds.append(origin.__name__)
    return {**({"type": " | ".join(kinds)} if kinds else {}), **({"choices": choices} if choices else {})}


def dump(table: Mapping[str, Mapping[str, Any]]) -> str:
    """The table as text: a key a line."""
    parts = []
    for part, keys in table.items():
        lines = ",\n".join(
            f"    {json.dumps(name)}: {json.dumps(entry, ensure_ascii=False)}" for name, entry in keys.items()
        )
        parts.append(f"  {json.dumps(part)}: {{\n{lines}\n  }}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    """Write the table of the installed version."""
    try:
        TABLE.write_text(dump(make_table(sys.argv[1:])), encoding="utf-8")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

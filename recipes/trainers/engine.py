"""What a launch shares out among its processes, and what of accelerate's engines the trainings here can use."""

from __future__ import annotations

import os
from typing import Any

from accelerate.utils import parse_flag_from_env

from reasonrec.tokenizers.errors import UserError

SEE = "see recipes/configs/accelerate/fsdp2.yaml"
# What a configuration of accelerate puts into the environment: name there, key of fsdp_config, what it has to be, why.
FSDP = (
    ("FSDP_VERSION", "fsdp_version", "2", "the first version shares out what has to be saved and sampled whole"),
    ("FSDP_STATE_DICT_TYPE", "fsdp_state_dict_type", "SHARDED_STATE_DICT", "each process saves what it holds"),
    ("FSDP_CPU_RAM_EFFICIENT_LOADING", "fsdp_cpu_ram_efficient_loading", "false", "each process loads the base model"),
    (
        "FSDP_ACTIVATION_CHECKPOINTING",
        "fsdp_activation_checkpointing",
        "false",
        "the stage's own activation_checkpointing decides",
    ),
)


def is_sharded() -> bool:
    """Whether this launch shares weights out among its processes (FSDP)."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def check_engine() -> None:
    """Refuse what the launch asks of accelerate and no training here can use.

    Raises:
        UserError: If it is DeepSpeed, or FSDP with other settings than those of `configs/accelerate/fsdp2.yaml`.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(
            "this launch asks for DeepSpeed, and the trainings here know FSDP: it shares out what ZeRO-2 "
            f"(fsdp_reshard_after_forward: false) and ZeRO-3 (true) do; {SEE}"
        )
    if not is_sharded():
        return
    for name, key, needed, why in FSDP:
        if (value := os.environ.get(name, needed)).lower() != needed.lower():
            raise UserError(f"{key}={value} of this launch has to be {needed}: {why}; {SEE}")


def check_shares(trainer: Any) -> None:
    """Refuse to train on whole weights where the launch asks for shards: accelerate would do that without a word.

    Args:
        trainer: A transformers trainer, built.

    Raises:
        UserError: If accelerate did not turn FSDP on.
    """
    if is_sharded() and not trainer.is_fsdp_enabled:
        raise UserError(
            "this launch asks for FSDP, and accelerate turns that on for two or more processes with a GPU each: "
            "launch with cpu.yaml or single_gpu.yaml of recipes/configs/accelerate instead"
        )

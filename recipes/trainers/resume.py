"""Beginning a training, or going on with one that was interrupted: what all training stages do alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState

from reasonrec.recipes.models.precision import Precision
from reasonrec.recipes.trainers.item_sft import last_checkpoint
from reasonrec.recipes.trainers.versions import versions
from reasonrec.tokenizers.artefact import disk_full_is_clear, keep_if_same, partial_folder

# These may change between an interrupted run and the one that goes on: they say what is written, not what is learned.
INDECISIVE = {"overwrite", "report_to", "run_name", "disable_tqdm", "logging_steps", "save_steps", "save_total_limit"}
# So may these: another machine computes in something else, on another device. What trains is float32 everywhere.
HARDWARE = {"precision", "bf16", "fp16", "use_cpu"}


def stage_config(stage: Any, args: Any) -> dict[str, Any]:
    """The configuration as the manifest keeps it: no tokens.

    Args:
        stage: The stage's own keys, a dataclass.
        args: TRL's arguments.
    """
    return {**asdict(stage), **{k: v for k, v in args.to_sanitized_dict().items() if "token" not in k}}


def keep_or_clear(out: Path, config: Mapping[str, Any], inputs: Mapping[str, Any], precision: Precision) -> None:
    """Keep what an interrupted run of the same settings left behind, or clear it away and say why.

    Args:
        out: Folder of the finished artefact.
        config: From `stage_config`.
        inputs: Hashes of what is read: artefacts, the base model's weights, reward files. A name that `config` has
            too takes its place.
        precision: What this run computes in; the interrupted one may have computed in another, which is said.
    """
    state = PartialState()
    if state.is_main_process:
        decisive = {name: value for name, value in config.items() if name not in INDECISIVE | HARDWARE}
        settings = {**decisive, **inputs, "processes": state.num_processes}
        cleared, changed = keep_if_same(out, settings, free={"precision": precision.name, **versions()})
        if cleared:
            print(f"{partial_folder(out)} was begun with other settings ({', '.join(cleared)}): starting anew")
        for name, (before, now) in changed.items():
            print(f"{partial_folder(out)} was begun with {name} {before}: going on with {now}")
    state.wait_for_everyone()


def train_or_resume(trainer: Any, out: Path) -> Any:
    """Train, from the last whole checkpoint if there is one; returns the trainer's result when all processes are done.

    Args:
        trainer: A transformers trainer that works in the artefact's partial folder.
        out: Folder of the finished artefact.
    """
    state, checkpoint = PartialState(), last_checkpoint(partial_folder(out))
    if checkpoint and state.is_main_process:
        print(f"going on from {checkpoint}")
    with disk_full_is_clear(out):
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state.wait_for_everyone()
    return result

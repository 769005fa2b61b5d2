"""How a checkpoint was trained: the configuration of each stage that led to it, as a file that launches it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from reasonrec.recipes.keys import Key, keys_of
from reasonrec.recipes.trainers.keys import inherited
from reasonrec.tokenizers.artefact import read_manifest
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.manifest import Manifest
from reasonrec.tokenizers.places import located

# A key that only the configuration of this stage has; what has none of them was trained by sft.
_MARKS = {"algorithm": "grpo", "experts": "fuse", "direct": "judge_reasoning"}
_CLASSES = {"sft": "SftStage", "grpo": "GrpoStage", "fuse": "FuseConfig", "judge_reasoning": "JudgeConfig"}
# What says where things are, how fast they go and what is logged, and nothing about what was learned.
_LEFT_OUT = frozenset(
    {
        *("output_dir", "overwrite", "base_model", "device", "batch_size", "run_name", "logging_dir", "report_to"),
        *("debug", "disable_tqdm", "use_cpu", "bf16", "fp16", "tf32", "precision", "dataloader_pin_memory"),
        *("seed", "save_steps", "trust_remote_code"),
    }
)


def stage_of(manifest: Manifest) -> str:
    """The stage that made a checkpoint."""
    if isinstance(known := manifest.config.get("stage"), str):
        return known
    return next((stage for mark, stage in _MARKS.items() if mark in manifest.config), "sft")


def lineage(path: Path, manifest: Manifest) -> list[Manifest]:
    """The checkpoints that led to one, the first one first, as far back as they are still there.

    Args:
        path: Folder of the checkpoint.
        manifest: Its manifest.
    """
    found = [manifest]
    while (before := found[0].inputs.get("model")) is not None:
        name = found[0].config.get("model")
        try:
            folder = Path(located(name, path)) if isinstance(name, str) else None
            made = None if folder is None else read_manifest(folder)
        except UserError:
            break
        if folder is None or made is None or made.hash != before:
            break  # it was trained again since
        path, found = folder, [made, *found]
    return found


def launch_file(manifest: Manifest) -> str:
    """The configuration of a checkpoint's stage as YAML: what differs from the defaults, without places."""
    stage = stage_of(manifest)
    kept = {"seed": manifest.seed} | dict(_chosen(stage, manifest.config))
    first = f"# accelerate launch recipes/{stage}.py --config {stage}.yaml\n"
    return first + str(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=1 << 16))


def _chosen(stage: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if stage not in _CLASSES:
        return
    own = keys_of(getattr(importlib.import_module(f"reasonrec.recipes.{stage}"), _CLASSES[stage]))
    theirs = inherited(stage).keys if stage in ("sft", "grpo") else ()
    keys: dict[str, Key] = {key.name: key for key in (*own, *theirs)}
    for name, key in keys.items():
        if name not in config or name in _LEFT_OUT:
            continue
        value = config[name]
        # transformers writes what is no number and no text as its text
        if value in (key.default, str(key.default), "None") or (isinstance(value, float) and not math.isfinite(value)):
            continue
        yield name, _nameless(value) if key.rules.get("path") else value


def _nameless(value: Any) -> Any:
    """Paths without their place: the last name of each."""
    if isinstance(value, str):
        name = PurePosixPath(value.replace("\\", "/"))
        return name.name if value.startswith((".", "/", "~")) else value
    if isinstance(value, list):
        return [_nameless(part) for part in value]
    return {_nameless(name): part for name, part in value.items()} if isinstance(value, dict) else value

"""Read the `adapter_config.json` of a trained adapter: only what a training of this kit decides is taken from it.

PEFT obeys much more: other kinds of adapters, modules to import (`auto_mapping`, `megatron_core`), ways to start
weights that read files. In an adapter of this kit all of that stands at its default, so anything else is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasonrec.recipes.keys import fit
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.manifest import distinct, plain
from reasonrec.tokenizers.model_folder import ADAPTER_CONFIG
from reasonrec.tokenizers.places import own_name
from reasonrec.tokenizers.terminal import shown

if TYPE_CHECKING:
    from peft import LoraConfig

# What `add_adapter` chooses.
_TAKEN: dict[str, Any] = {
    "r": int,
    "lora_alpha": int,
    "lora_dropout": float,
    "target_modules": list[str],
    "trainable_token_indices": list[int] | dict[str, list[int]] | None,
}
# Not obeyed: where the base is says the manifest or the caller, and whether it trains, the caller.
_IGNORED = frozenset({"base_model_name_or_path", "inference_mode", "peft_version"})


def read_adapter_config(folder: Path, base_model: str) -> LoraConfig:
    """The shape of a trained adapter.

    Args:
        folder: Folder of the adapter.
        base_model: Where its base is, for those who read the configuration of what is trained from it.

    Raises:
        UserError: If the file says anything that no training of this kit writes.
    """
    from peft import LoraConfig, TaskType

    path = folder / ADAPTER_CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=distinct)
        taken = {name: fit(kind, found[name]) for name, kind in _TAKEN.items()}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is no configuration of this kit's adapters ({error!r}): train it again") from error
    usual = plain(LoraConfig(task_type=TaskType.CAUSAL_LM).to_dict())
    for name, value in found.items():
        # A key that this PEFT does not know is nothing as long as it says nothing.
        same = value == usual[name] if name in usual else not value
        if name not in _TAKEN and name not in _IGNORED and not same:
            raise UserError(
                f"{path} has {shown(name)}: {shown(value)}, which no training of this kit writes: train it again with "
                "recipes/sft.py"
            )
    return LoraConfig(task_type=TaskType.CAUSAL_LM, base_model_name_or_path=own_name(base_model), **taken)

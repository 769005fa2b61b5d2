"""An adapter merged into its base: one checkpoint, which plain transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from reasonrec.recipes.models.precision import choose
from reasonrec.recipes.models.quantized import expanded, forget_quantization
from reasonrec.recipes.policies.loading import causal_lm, load_trained, save_checkpoint
from reasonrec.tokenizers.terminal import say


def merge(
    source: Path, folder: Path, *, base_model: str | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Write the merged model and all that belongs to it.

    An adapter corrects the base that it was trained on. If that was in 4 bit, it goes into the weights that the 4-bit
    ones stand for, not into the original ones, in float32: rounded to 16 bits, or to 4 again, they would be others.

    Args:
        source: Folder of the adapter.
        folder: Where to write.
        base_model: Where its base is now; where the training found it by default.
        trust_remote_code: Run code that comes with the base.

    Returns:
        The facts for the manifest.
    """
    # On the CPU: float32 needs most memory, and nothing is computed but one sum.
    trained = load_trained(
        source, base_model=base_model, precision=choose("fp32", "cpu"), trust_remote_code=trust_remote_code
    )
    if trained.setting.method == "qlora":
        _expand(trained.model)
        forget_quantization(causal_lm(trained.model))
    model = trained.model.merge_and_unload()
    model.float()
    model.config._name_or_path = ""  # of this machine
    model.save_pretrained(folder, safe_serialization=True)
    say(f"merged: {sum(p.numel() for p in model.parameters()):,} weights in float32")
    return save_checkpoint(folder, trained.setting, trained.policy)


def _expand(model: torch.nn.Module) -> None:
    """Merge layers that are still 4 bit into what they stand for; PEFT would round the sum to 4 bit again."""
    from bitsandbytes.nn import Linear4bit
    from peft.tuners.lora import LoraLayer

    adapted = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    for name, module in adapted.items():
        if isinstance(base := module.get_base_layer(), Linear4bit):
            layer = expanded(base, torch.float32)
            for adapter in module.active_adapters:
                layer.weight.data += module.get_delta_weight(adapter).float()
            model.set_submodule(name, layer)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            model.set_submodule(name, expanded(module, torch.float32))

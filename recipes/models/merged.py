"""An adapter merged into its base: an ordinary causal LM with the policy's weights, the code rows in its embedding."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from reasonrec.recipes.models.quantized import expanded, forget_quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merge_adapter(model: Any) -> PreTrainedModel:
    """Merge an adapter into its base.

    An adapter corrects the base that it was trained on. If that was in 4 bit, it goes into the weights that the 4-bit
    ones stand for, not into the original ones, in float32: rounded to 16 bits, or to 4 again, they would be others.

    Args:
        model: PEFT's model; it is used up.
    """
    _expand(model)
    forget_quantization(model.get_base_model())
    merged: PreTrainedModel = model.merge_and_unload()
    return merged


def merged_copy(model: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of a model in training, merged; the model stays as it is.

    While it is made, the device holds the weights of a base in 4 bit a second time, in float32.

    Args:
        model: Causal LM, or PEFT's model, without the wrappers of a distributed training.
        dtype: Of the copy.
    """
    copied: Any = copy.deepcopy(model)
    with torch.autocast(next(model.parameters()).device.type, enabled=False):  # products of adapters are not rounded
        merged: PreTrainedModel = merge_adapter(copied) if hasattr(copied, "peft_config") else copied
    return merged.to(dtype)


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

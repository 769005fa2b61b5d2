"""4-bit base models: how they are loaded, and what a CPU makes of their frozen weights.

A GPU multiplies NF4 weights as they are. A CPU expands all of them at every product, forwards and backwards, which is
pure overhead while memory lasts: a small model is expanded once, after loading. The numbers are the same, for they are
those of the 4-bit weights; nothing of it is saved.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from reasonrec.recipes.models.precision import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CGROUP = Path("/sys/fs/cgroup")


def nf4(compute_dtype: torch.dtype) -> Any:
    """NF4 with double quantisation, for `from_pretrained`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def prepare_4bit(model: PreTrainedModel, precision: Precision) -> str:
    """Make a freshly loaded 4-bit model fast where it is, with the numbers it has.

    Args:
        model: Loaded with `nf4`; changed in place.
        precision: What is computed in, and where.

    Returns:
        What was done with its frozen weights, for people; empty on an accelerator.
    """
    if precision.device.type != "cpu":
        return ""
    from bitsandbytes.nn import Linear4bit

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    needed = sum(m.weight.quant_state.shape.numel() for _, m in layers) * precision.dtype.itemsize
    if needed > free_memory() // 2:
        if precision.name != "bf16":
            keep_unpacked(model)
        return f"4-bit weights are expanded at every step: {needed / 2**30:.1f} GiB would exceed half of free memory"
    for name, layer in layers:
        model.set_submodule(name, expanded(layer, precision.dtype))
    forget_quantization(model)
    return f"4-bit weights are expanded once ({needed / 2**20:,.0f} MiB)"


def forget_quantization(model: PreTrainedModel) -> None:
    """Make an ordinary model of one whose 4-bit layers were all expanded: what was 4 bit is its values."""
    for holder in (model, model.config):
        for attribute in ("quantization_config", "hf_quantizer", "quantization_method", "is_loaded_in_4bit"):
            holder.__dict__.pop(attribute, None)
    model.is_quantized = False


def expanded(layer: Any, dtype: torch.dtype) -> torch.nn.Linear:
    """A frozen linear layer with the values of a 4-bit one, as bitsandbytes expands them for every product.

    Args:
        layer: bitsandbytes' `Linear4bit`.
        dtype: Of the values: what is computed in.
    """
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(layer.weight.quant_state)
    state.dtype = dtype
    n_out, n_in = state.shape
    plain = torch.nn.Linear(n_in, n_out, bias=layer.bias is not None, device="meta")
    plain.weight = torch.nn.Parameter(dequantize_4bit(layer.weight.data, state), requires_grad=False)
    if layer.bias is not None:
        plain.bias = torch.nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
    return plain


def free_memory() -> int:
    """Bytes that this process may still take: what the machine has free, or its container, shared by processes."""
    free = psutil.virtual_memory().available
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        free = free if limit == "max" else min(free, int(limit) - int(used))
    except (OSError, ValueError):
        pass  # no container, or one of another kind
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def keep_unpacked(model: torch.nn.Module) -> None:
    """Switch off the packing of 4-bit weights.

    On CPUs with AVX512-BF16, bitsandbytes packs 4-bit weights at the first forward pass in evaluation mode, and never
    unpacks them; its kernel for packed weights computes in bf16 whatever `compute_dtype` says, and passes no gradient
    back. A trainer whose model is evaluated in between would then train the last layers only.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.__dict__["support_avx512bf16_for_cpu"] = False

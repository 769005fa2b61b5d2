"""Weights that several processes share out (FSDP2): DTensors, of which each process holds a part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, unless it is shared out.

    Args:
        tensor: Of any shape.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Every process has to ask for it.

    Args:
        tensor: Of any shape.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def together(model: nn.Module) -> Iterator[None]:
    """Lend every process the whole weights, to ask the model in.

    No call waits for another process then, so each may make as many as its prompts need: chains end at different
    lengths, and a search is over when it has proven its list. Each device holds the whole model meanwhile.

    Every process has to enter. It changes nothing of a model that is not shared out.

    Args:
        model: The model as it was wrapped.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    reshard = parse_flag_from_env("FSDP_RESHARD_AFTER_FORWARD", True)  # what the launch says of the layers
    if parts:
        _call_first(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(reshard and part is not model, recurse=False)


def held(model: nn.Module) -> dict[str, Tensor] | None:
    """What a state dict would hold, of weights that `together` lends: asked for its own, FSDP takes them back.

    Args:
        model: The model.

    Returns:
        Name to value; None for a model that was never shared out, whose own state dict is as good.
    """
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return None
    found: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}".lstrip(".")] = buffer
    return found


def _call_first(model: nn.Module) -> None:
    """Let FSDP see that this is the whole model: it takes what it is first called through for that."""
    called: Any = model
    called.see_whole = lambda: None
    register_fsdp_forward_method(model, "see_whole")
    called.see_whole()
    del called.see_whole


@torch.no_grad()
def gather(model: nn.Module, *, keep: bool) -> None:
    """Put a model's weights together again behind its training, one after the other, so that one device can save them.

    Every process has to call it. It changes nothing of a model that is not shared out.

    Args:
        model: The trained model; it computes nothing any more.
        keep: Whether this process is to hold the weights, in main memory; the others are left with none.
    """
    made: dict[Tensor, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(parameter, DTensor):
                continue
            if parameter not in made:
                full = whole(parameter)
                made[parameter] = nn.Parameter(full.cpu() if keep else full.new_empty(0), parameter.requires_grad)
            holder: Any = module._parameters
            holder[name] = made[parameter]

"""A trainer that leaves out what costs time on the way to the loss, and changes nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from reasonrec.recipes.decoding.attention import branches
from reasonrec.recipes.policies.loading import causal_lm
from reasonrec.recipes.trainers.watched import WatchedTrainer


class QuickTrainer(WatchedTrainer):
    """To be put in front of another trainer; `make bench BENCH=precision` says what it is worth."""

    def compute_loss_context_manager(self) -> ExitStack:
        """Attend by products where that is faster, and let autocast alone cast what LoRA reads."""
        stack = super().compute_loss_context_manager()
        if not self.args.gradient_checkpointing:  # activations are computed again behind it, and have to be the same
            stack.enter_context(branches(causal_lm(self.model)))
        if self.accelerator.mixed_precision != "no":
            stack.enter_context(self.accelerator.autocast())
            stack.enter_context(cast_by_autocast(self.model))
        return stack

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Keep embeddings that are tied, and trained in a few rows, in one group of shards."""
        with embeddings_in_one_group(self.model):
            return super()._prepare_for_training(*args, **kwargs)


@contextmanager
def cast_by_autocast(model: torch.nn.Module) -> Iterator[None]:
    """For use under autocast: LoRA's layers do not cast.

    They would cast what they read to float32, the dtype of their weights, and autocast would cast it back at once.
    `peft.helpers.disable_input_dtype_casting` does the same for models that have no layers but LoRA's.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.cast_input_dtype_enabled = True


@contextmanager
def embeddings_in_one_group(model: torch.nn.Module) -> Iterator[None]:
    """For use where accelerate shards a model (FSDP2): it leaves the embeddings to the group of the whole model.

    It would give input and output embeddings a group each, unless both have one `weight`. PEFT's wrapper of trainable
    tokens answers with a new tensor each time, and weights that are tied may not be in two groups.
    """
    wrapped = hasattr(model, "peft_config")
    hidden = ("get_input_embeddings", "get_output_embeddings") if wrapped else ()
    for name in hidden:
        setattr(model, name, lambda: None)
    try:
        yield
    finally:
        for name in hidden:
            delattr(model, name)

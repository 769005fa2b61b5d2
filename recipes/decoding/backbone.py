"""The one place where a model is called below its head, and where loops ask whether they are done.

Sharded models have to be called through their wrapper, and by all processes equally often: what changes for them,
changes here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def last_hidden(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Last hidden states, (batch, length, width), of what a causal LM reads.

    Args:
        model: Causal LM below PEFT's wrapper.
        **inputs: What it is called with: `input_ids`, `attention_mask` …
    """
    hidden: Tensor = model.base_model(**inputs).last_hidden_state
    return hidden


def all_done(active: int) -> bool:
    """Whether a step may be left out, and with it the loop.

    Args:
        active: How many rows of this process have something to read.
    """
    return active == 0

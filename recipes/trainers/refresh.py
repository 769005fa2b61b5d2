"""Keeping what a policy computes from the weights as fresh as it wants it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from reasonrec.recipes.policies.base import Policy
from reasonrec.recipes.policies.loading import causal_lm


class KeepFresh(TrainerCallback):
    """Asks the policy before every step, and to compute everything at the start, the end and behind checkpoints.

    What is computed is in no checkpoint: behind one it is a function of the weights alone, so a resumed run goes on
    with the same.

    Args:
        policy: The policy that is trained.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Compute what is due."""
        self.policy.refresh(causal_lm(model), state.global_step)

    def _everything(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self.policy.refresh(causal_lm(model))

    on_train_begin = on_save = on_train_end = _everything

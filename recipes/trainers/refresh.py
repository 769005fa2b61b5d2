"""Keeping what a policy computes from the weights as fresh as it wants it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from reasonrec.recipes.models.shards import together
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
        self._read_at: int | None = None  # step behind which everything was computed

    def everything(self, model: Any, step: int) -> None:
        """Compute everything, unless that was done behind this step: the weights are still the same.

        Args:
            model: The model that is trained.
            step: Steps done.
        """
        if step != self._read_at:
            self._refresh(model)
            self._read_at = step

    def _refresh(self, model: Any, step: int | None = None) -> None:
        if type(self.policy).refresh is not Policy.refresh:  # else nothing is computed, and nothing has to be lent
            with together(model):
                self.policy.refresh(causal_lm(model), step)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Compute everything, whatever was trained before."""
        self._read_at = None
        self.everything(model, state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Compute what is due."""
        if state.global_step != self._read_at:
            self._refresh(model, state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Compute everything."""
        self.everything(model, state.global_step)

    on_train_end = on_save

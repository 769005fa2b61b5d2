"""A trainer that ends when its numbers do, and that reports the whole run, also after a kill.

Both trainings are built on it. Nothing that is learned changes: losses, gradients, steps and checkpoints are those of
transformers and TRL.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from reasonrec.recipes.models.shards import whole
from reasonrec.recipes.trainers.divergence import (
    SKIPPED_IN_A_ROW,
    bad_number,
    bad_tensor,
    diverged,
    overflow_diverges,
    trained_tensors,
)
from reasonrec.recipes.trainers.engine import check_shares
from reasonrec.tokenizers.errors import UserError


class WatchedTrainer(Trainer):
    """To be put in front of another trainer.

    After every optimiser step, before anything is logged, ranked or saved, all processes look at the mean of their
    losses and at the gradient norm, and stop together where these are not finite. transformers' own
    `logging_nan_inf_filter` would replace such a loss by the mean of the others. Weights are looked at before they are
    saved or ranked, and at the end.

    A step that fp16's loss scaling skips is not one: the weights stay as they are, and the scale is lowered.
    """

    control: TrainerControl
    _skipped = 0
    _total_train_tokens: int  # TRL's, as is the next
    _metrics: dict[str, dict[str, list[float]]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._losses: list[torch.Tensor] = []
        self._whole = WholeRun(self)
        super().__init__(*args, **kwargs)
        check_shares(self)
        self.add_callback(self._whole)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as transformers does; a user's error where the numbers end."""
        with overflow_diverges(lambda what: self.diverged(what, step=self.state.global_step + 1)):
            return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Keep the loss of each batch until the step is done."""
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss)
        return loss

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """Check the step that was done: whatever is made of it comes after."""
        if self._losses:
            self._check_step(tr_loss, grad_norm)
        control = self.control
        if control.should_save or control.should_evaluate or control.should_training_stop:
            self._check_weights()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _check_step(self, unlogged: torch.Tensor, grad_norm: Any) -> None:
        loss = torch.stack(self._losses).sum().float()
        self._losses.clear()
        norm = whole(torch.as_tensor(0.0 if grad_norm is None else grad_norm, dtype=torch.float32, device=loss.device))
        # A mean over processes is finite where all of it is.
        seen = torch.stack([loss, norm, unlogged.float()])
        mean_loss, mean_norm, self._whole.unlogged = self.accelerator.reduce(seen, "mean").tolist()
        bad = bad_number({"loss": mean_loss, "gradient norm": mean_norm})
        if math.isfinite(mean_loss):  # else the step was skipped, or is the last one
            self._whole.add(mean_loss)
        if not self.accelerator.optimizer_step_was_skipped:
            self._skipped = 0
            if bad is not None:
                raise self.diverged(bad)
            return
        self._skipped += 1
        if self._skipped >= SKIPPED_IN_A_ROW:
            what = f"loss scaling skipped {self._skipped} steps in a row{f', and {bad}' if bad else ''}"
            raise self.diverged(what, "precision=fp32")

    def _check_weights(self) -> None:
        bad = bad_tensor(trained_tensors(self.model))
        found = torch.tensor(float(bad is not None), device=self.accelerator.device)
        if float(self.accelerator.reduce(found, "sum")):
            raise self.diverged(bad or "the weights of another process are not finite")

    def diverged(self, what: str, more: str = "", *, step: int | None = None) -> UserError:
        """The error of this training.

        Args:
            what: What is wrong.
            more: Another way out.
            step: Optimiser step, the last one that was done if unset.
        """
        rates = {
            "learning_rate": self.args.learning_rate,
            "row_learning_rate": getattr(self, "_row_learning_rate", None),
            "max_grad_norm": self.args.max_grad_norm,
        }
        return diverged(self.state.global_step if step is None else step, what, rates, more)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Let the last line be about the whole run."""
        if "loss" in logs:
            self._whole.unlogged = 0.0
        if "train_loss" in logs:
            for name in ("train_samples_per_second", "train_steps_per_second"):
                logs.pop(name, None)  # they are of the part since the last kill
            logs.update(self._whole.metrics())
        super().log(logs, start_time)


class WholeRun(TrainerCallback, ExportableState):
    """Counts over all parts of a run: what it has counted is in its checkpoints, in `trainer_state.json`.

    transformers and TRL count anew where a run goes on. They also drop what was not logged yet when it was killed:
    a line of the log would then be about fewer steps than it is in a run that nothing disturbs.

    Args:
        trainer: The trainer whose run it is.
    """

    def __init__(self, trainer: WatchedTrainer) -> None:
        self.trainer = trainer
        self.loss, self.steps = 0.0, 0
        self.before, self.began = 0.0, time.perf_counter()  # seconds of the interrupted parts, start of this one
        self.unlogged = 0.0  # sum of the losses since the last line of the log

    def add(self, loss: float) -> None:
        """Count a step.

        Args:
            loss: Its mean loss over processes.
        """
        self.loss, self.steps = self.loss + loss, self.steps + 1

    def metrics(self) -> dict[str, float]:
        """Mean loss over all steps, seconds, and tokens read so far."""
        tokens = getattr(self.trainer, "_total_train_tokens", 0) or self.trainer.state.num_input_tokens_seen
        found = {"train_runtime": self._seconds(), "num_tokens": float(tokens)}
        return found | ({"train_loss": self.loss / self.steps} if self.steps else {})

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        trainer = self.trainer
        lines = getattr(trainer, "_metrics", {}).get("train", {})  # TRL's, averaged when they are logged
        logged = getattr(trainer, "_globalstep_last_logged", trainer.state.global_step)  # not there before the start
        kept = {
            "loss": self.loss,
            "steps": self.steps,
            "seconds": self._seconds(),
            "tokens": getattr(trainer, "_total_train_tokens", 0),
            "unlogged": {
                "loss": self.unlogged,
                "steps": trainer.state.global_step - logged,
                "metrics": {name: [float(value) for value in values] for name, values in lines.items()},
            },
        }
        return {"args": {}, "attributes": kept}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on counting."""
        self.began = time.perf_counter()
        callbacks: Any = state.stateful_callbacks
        kept = callbacks.setdefault(type(self).__name__, {}).get("attributes", {})
        if not state.global_step or not kept:
            return
        trainer, unlogged = self.trainer, kept["unlogged"]
        self.loss, self.steps, self.before = kept["loss"], kept["steps"], kept["seconds"]
        # SFTTrainer counts tokens in an attribute, which no checkpoint holds; GRPOTrainer counts in the state.
        trainer._total_train_tokens = kept["tokens"]
        self.unlogged = unlogged["loss"]
        trainer._tr_loss += unlogged["loss"]
        trainer._globalstep_last_logged -= unlogged["steps"]
        for name, values in unlogged["metrics"].items():
            trainer._metrics["train"][name] = values

    def _seconds(self) -> float:
        return self.before + time.perf_counter() - self.began

"""What a reinforcement learning is told: TRL's GRPOConfig, with other defaults and checks of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trl import GRPOConfig

from reasonrec.recipes.keys import PRECISION_HELP, PrecisionName
from reasonrec.recipes.models.precision import decide
from reasonrec.recipes.trainers.keys import check_reports, prepare_arguments
from reasonrec.recipes.trainers.sequence_ratio import check_ratio
from reasonrec.tokenizers.errors import UserError


@dataclass
class GrpoArguments(GRPOConfig):
    """TRL's GRPOConfig; `num_train_epochs` are passes over the prompts, those that are not trained on included."""

    output_dir: str | None = field(default=None, metadata={"help": "folder of the trained model"})
    precision: PrecisionName = field(default="auto", metadata={"help": PRECISION_HELP})
    report_to: str | list[str] = field(
        default="tensorboard", metadata={"help": "where to log: tensorboard, wandb, none …"}
    )
    logging_steps: float = field(default=1, metadata={"help": "log every so many steps"})
    save_steps: float = field(default=50, metadata={"help": "checkpoint every so many steps"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep"})
    eval_steps: float | None = field(default=10, metadata={"help": "probe validation every so many steps"})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "learning-rate schedule"})
    warmup_steps: float = field(default=0, metadata={"help": "warm-up: steps, or a share of them"})
    beta: float = field(default=0.001, metadata={"help": "weight of the KL divergence from the model started from"})
    importance_sampling_level: Literal["token", "sequence", "product"] = field(
        default="token", metadata={"help": "a ratio for each token, or one for all: their mean (sequence) or product"}
    )
    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "compute activations twice instead of keeping them; on if unset"}
    )
    disable_tqdm: bool | None = field(
        default=None, metadata={"help": "no progress bars; if unset, bars where stderr is a terminal"}
    )
    num_generations_eval: int | None = field(default=1, metadata={"help": "not used: validation is searched"})
    disable_dropout: bool = field(default=True, metadata={"help": "has to be on: sampler and trainer must agree"})

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise UserError("output_dir is required: set it in the YAML file or pass --output_dir")
        prepare_arguments(self, "grpo")
        if self.scale_rewards == "batch":
            raise UserError("scale_rewards=batch is not supported here: choose group or none")
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        if steps % self.gradient_accumulation_steps:
            raise UserError(
                f"steps_per_generation={steps} has to be a multiple of "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}, so that no update mixes policies"
            )
        rows = self.per_device_train_batch_size * steps
        if self.num_generations < 2 or rows % self.num_generations:
            fitting = [n for n in range(2, rows + 1) if rows % n == 0]
            raise UserError(
                f"num_generations={self.num_generations} does not divide the {rows} rollouts of a process "
                f"(per_device_train_batch_size={self.per_device_train_batch_size} × {steps} steps): choose "
                f"{', '.join(map(str, fitting)) or 'a larger batch'}"
            )
        check_ratio(self)
        cycle = steps * self.num_iterations // self.gradient_accumulation_steps
        if self.save_strategy != "no" and (self.save_steps < 1 or self.save_steps % cycle):
            raise UserError(
                f"save_steps={self.save_steps} has to be a multiple of {cycle}, the steps between two generations: "
                "rollouts are not part of a checkpoint"
            )
        self.chosen = decide(self)
        super().__post_init__()
        self.chosen.apply(self)
        check_reports(self.report_to)

"""TRL's SFTTrainer and SFTConfig with the item policy, float32 adapters and adapter-only checkpoints: no more."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import torch
from datasets import Dataset as HfDataset
from torch.utils.data import Sampler, SequentialSampler
from trl import SFTConfig, SFTTrainer

from reasonrec.recipes.keys import PRECISION_HELP, PrecisionName
from reasonrec.recipes.models.load import restore_trainable, trainable_values
from reasonrec.recipes.models.precision import decide
from reasonrec.recipes.models.shards import held
from reasonrec.recipes.policies.base import Policy, install
from reasonrec.recipes.policies.loading import causal_lm
from reasonrec.recipes.trainers.divergence import check_trained
from reasonrec.recipes.trainers.keys import check_reports, prepare_arguments
from reasonrec.recipes.trainers.quick import QuickTrainer
from reasonrec.recipes.trainers.refresh import KeepFresh
from reasonrec.recipes.trainers.soft_targets import Taught
from reasonrec.tokenizers.errors import UserError

FEW_UPDATES = 100  # a rule of thumb


@dataclass
class SftArguments(SFTConfig):
    """TRL's SFTConfig; `num_train_epochs` are passes over the interactions and may be a fraction."""

    output_dir: str | None = field(default=None, metadata={"help": "folder of the trained model"})
    precision: PrecisionName = field(default="auto", metadata={"help": PRECISION_HELP})
    report_to: str | list[str] = field(
        default="tensorboard", metadata={"help": "where to log: tensorboard, wandb, none …"}
    )
    logging_steps: float = field(default=10, metadata={"help": "log every so many steps"})
    save_steps: float = field(default=200, metadata={"help": "checkpoint every so many steps"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "learning-rate schedule"})
    warmup_steps: float = field(default=0.05, metadata={"help": "warm-up: steps, or a share of them"})
    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "compute activations twice instead of keeping them; on if unset"}
    )
    disable_tqdm: bool | None = field(
        default=None, metadata={"help": "no progress bars; if unset, bars where stderr is a terminal"}
    )

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise UserError("output_dir is required: set it in the YAML file or pass --output_dir")
        prepare_arguments(self, "sft")
        self.chosen = decide(self)
        super().__post_init__()
        self.chosen.apply(self)
        # Examples are rendered as they are fed, from the lines of a plan.
        self.remove_unused_columns, self.dataset_kwargs = False, {"skip_prepare_dataset": True}
        check_reports(self.report_to)


def planned(plan: pl.DataFrame, render: Callable[[Any], dict[str, Any]]) -> HfDataset:
    """Examples that are made from the lines of a plan when a process asks for them.

    Args:
        plan: What is shown when.
        render: Makes a batch of lines into a batch of examples.
    """
    # With a fingerprint of its own the library does not pickle the plan to find one; nothing is cached by it.
    return HfDataset(plan.to_arrow(), fingerprint="plan").with_transform(render)


class ItemSFTTrainer(QuickTrainer, SFTTrainer):
    """Trains on plan lines in their order.

    Args:
        policy: How the model reads and answers.
        row_learning_rate: Learning rate of the code rows under PEFT; the others use `learning_rate`.
        taught: Soft targets, where the examples have some.
        **kwargs: What SFTTrainer takes.
    """

    data_collator: Any

    def __init__(
        self, *, policy: Policy, row_learning_rate: float | None = None, taught: Taught | None = None, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        start = trainable_values(model)
        super().__init__(**kwargs)
        restore_trainable(self.model, start)
        policy.answers.to(self.accelerator.device)
        install(causal_lm(self.model), policy.answers, soft=None if taught is None else taught.score)
        if taught is not None:
            self.data_collator = taught.collated(self.data_collator)
        self.add_callback(KeepFresh(policy))
        self._row_learning_rate = row_learning_rate

    @property
    def amount(self) -> str:
        """How much is trained on how much, for people."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        batches = math.ceil(len(self.train_dataset) / (self.args.train_batch_size * self.args.world_size))
        updates = math.ceil(batches / self.args.gradient_accumulation_steps)
        few = (
            f"\nonly {updates} updates: new tokens start from rough text vectors and need hundreds of them; raise "
            "num_train_epochs, or lower per_device_train_batch_size"
        )
        amount = f"{len(self.train_dataset)} examples, {batches} batches, {trained:,} trainable weights"
        return amount + (few if updates < FEW_UPDATES else "")

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        """The plan's order is the training order."""
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Give the code rows a group of their own: they start from text, LoRA from zero, and want different rates."""
        if self.optimizer is None:
            named = [(n, p) for n, p in (model or self.model).named_parameters() if p.requires_grad]
            rows = [p for n, p in named if "trainable_tokens" in n]
            decayed = set(self.get_decay_parameter_names(model or self.model))
            others = [(n, p) for n, p in named if "trainable_tokens" not in n]
            groups = [
                {"params": [p for n, p in others if n in decayed], "weight_decay": self.args.weight_decay},
                {"params": [p for n, p in others if n not in decayed], "weight_decay": 0.0},
                {
                    "params": rows,
                    "weight_decay": 0.0,
                    "lr": self.args.learning_rate if self._row_learning_rate is None else self._row_learning_rate,
                },
            ]
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer: torch.optim.Optimizer = optimizer_class([g for g in groups if g["params"]], **options)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the adapter without PEFT's copies of the whole embeddings, and no pickled arguments."""
        if self.args.should_save:
            save_weights(self.model, output_dir or self.args.output_dir)


def save_weights(model: Any, folder: str | Path) -> None:
    """Save LoRA and code rows, or the whole model if it was fine-tuned in full; safetensors only.

    Args:
        model: A `PeftModel` or a plain model.
        folder: Where to.

    Raises:
        UserError: If the training diverged (`check_trained`).
    """
    check_trained(model)
    state = held(model)
    if hasattr(model, "peft_config"):
        # "auto" would add both embedding matrices once the vocabulary differs from the base's.
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=False, selected_adapters=["default"])
    else:
        model.save_pretrained(folder, state_dict=state)

"""The keys of a training that choose what is fed, and what they choose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from reasonrec.data_gen.reasoning.traces import Arm, Traces
from reasonrec.data_gen.schema import Dataset
from reasonrec.data_gen.tasks.curriculum import make_curriculum, parse_phases
from reasonrec.data_gen.tasks.mixture import BASE, PlanConfig, make_plan
from reasonrec.data_gen.tasks.reasoning import Mention
from reasonrec.data_gen.tasks.render import Examples, Material, tasks
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.manifest import Manifest

_BASE_ONLY = {BASE: 1.0}


@dataclass
class TaskChoice:
    """The keys that choose what is trained on; part of the stage's configuration."""

    tasks: dict[str, float] = field(
        default_factory=lambda: dict(_BASE_ONLY),
        metadata={
            "help": "weights of seqrec, item2index, index2item, fusionseqrec and of tasks made of traces",
            "at_least": 0,
        },
    )
    curriculum: dict[str, dict[str, float]] = field(
        default_factory=dict,
        metadata={"help": "phases: {name: {share: 1, task: ratio, …}, …}, instead of tasks", "at_least": 0},
    )
    traces: str | None = field(
        default=None, metadata={"help": "folder of reasoning traces (synthesize.py)", "path": True}
    )
    trace_arm: Arm = field(default="all", metadata={"help": "all traces, or those that passed the likelihood filter"})
    mention: Mention = field(default="codes", metadata={"help": "how chains name items: codes, titles, or both"})
    max_history: int = field(default=20, metadata={"help": "longest history in items", "at_least": 1})
    one_per_prefix: bool = field(default=False, metadata={"help": "one example per prefix instead of whole histories"})

    soft_targets: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "a teacher's part in the targets of seqrec: {teacher: co_visitation, sasrec, popularity or "
            "uniform, alpha: 0.5, top_k: 50}"
        },
    )

    def check_tasks(self) -> None:
        """Refuse contradictions.

        Raises:
            UserError: If tasks and traces, or tasks and soft targets, do not fit together, or tasks and a curriculum
                are given both.
        """
        if self.curriculum and self.tasks != _BASE_ONLY:
            raise UserError("tasks and curriculum both say what is fed: give one of them")
        phases = parse_phases(self.curriculum) if self.curriculum else []
        weights = [phase.ratios for phase in phases] or [self.tasks]
        read = [name for name, task in tasks().items() if task.traces]
        used = {task for ratios in weights for task, weight in ratios.items() if weight > 0 and task in read}
        if used and self.traces is None:
            raise UserError(f"the task {min(used)} is made of reasoning traces: set traces to a folder of them")
        if self.traces is not None and not used:
            raise UserError(f"traces={self.traces} is read by no task; those that do: {', '.join(read)}")
        if self.soft_targets and not any(ratios.get(BASE, 0) > 0 for ratios in weights):
            raise UserError(f"soft_targets are for the task {BASE}, which is not trained: give it a weight")

    def load_traces(self, dataset: Manifest) -> Traces | None:
        """The traces that the run was given.

        Args:
            dataset: Manifest of its dataset.

        Raises:
            UserError: If they were made from another dataset, or explain longer histories than are shown.
        """
        if self.traces is None:
            return None
        found = Traces.load(self.traces, dataset, arm=self.trace_arm)
        longest = max((len(trace.history) for trace in found.train), default=0)
        if longest > self.max_history:
            raise UserError(
                f"traces={self.traces} explain histories of up to {longest} items, but max_history="
                f"{self.max_history}: make both the same"
            )
        return found

    def plan(self, examples: Examples, *, passes: float, batch_size: int, seed: int) -> pl.DataFrame:
        """The training examples in the order they are fed.

        Args:
            examples: Renders them.
            passes: Passes over the interactions.
            batch_size: Examples per optimiser step, over all processes.
            seed: Seed of every choice.
        """
        config = PlanConfig(self.tasks, self.max_history, self.one_per_prefix, passes, batch_size, seed)
        lengths = np.array([len(ids) for ids in examples.prompts.item_token_ids])
        material = Material(examples.sequences, lengths, examples.set_order, examples.chains)
        if self.curriculum:
            return make_curriculum(config, parse_phases(self.curriculum), material)
        return make_plan(config, material)


def validation_sample(dataset: Dataset, n_rows: int, *columns: str) -> pl.DataFrame:
    """The validation cases that a training looks at: a seeded sample, the same for all trainings of so many.

    Args:
        dataset: The data set, of whose validation rows no more than the sample is kept in memory.
        n_rows: How many, at most.
        columns: What of them.
    """
    return dataset.sample("valid", *columns, n=n_rows, seed=0)


def validation_examples(
    examples: Examples, dataset: Dataset, n_rows: int, max_history: int
) -> dict[str, list[list[int]]]:
    """A seeded sample of validation cases in the layout of direct inference: `input_ids` and `labels`.

    Args:
        examples: Renders them.
        dataset: The data set.
        n_rows: How many, at most.
        max_history: Longest history in items.
    """
    rows = validation_sample(dataset, n_rows, "history", "target").iter_rows()
    rendered = [examples.history(history[-max_history:], target, every_item=False) for history, target in rows]
    return {"input_ids": [ids for ids, _ in rendered], "labels": [labels for _, labels in rendered]}

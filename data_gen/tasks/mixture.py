"""Which examples are fed in which order: tasks with weights, over passes through the interactions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from reasonrec.data_gen.tasks.render import COLUMNS, TASKS, Examples, Material, Task, task_names, tasks, text_bytes
from reasonrec.tokenizers.errors import UserError

BASE = "seqrec"  # what the other tasks' weights are relative to
_GROUPED_BATCHES = 32  # examples of this many batches are sorted by length together
_BOUNDED = 1 << 17  # examples whose tokens are bounded at once


@dataclass(frozen=True)
class PlanConfig:
    """What decides a plan.

    Attributes:
        tasks: Weight of each task; a task's number of examples is its weight over seqrec's times seqrec's number.
        max_history: Longest history in items; windows hold one item more.
        one_per_prefix: One example per prefix instead of one per window.
        passes: Passes over the interactions; fractions are allowed.
        batch_size: Examples per optimiser step, over all processes.
        seed: Seed of every choice.
    """

    tasks: Mapping[str, float]
    max_history: int
    one_per_prefix: bool
    passes: float
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        check_tasks("tasks", self.tasks)
        if self.max_history < 1:
            raise UserError(f"max_history={self.max_history} must be at least 1")
        if not self.passes > 0:
            raise UserError(f"num_train_epochs={self.passes} must be above 0")


def check_tasks(where: str, weights: Mapping[str, float]) -> None:
    """Check weights of tasks.

    Raises:
        UserError: If a task is unknown, a weight is negative, or none is above 0.
    """
    for name in sorted(set(weights) - set(task_names())):
        raise UserError(f"{where} names {name!r}{TASKS.nearest(name)}")
    if not any(weight > 0 for weight in weights.values()) or any(w < 0 for w in weights.values()):
        raise UserError(f"{where}={dict(weights)}: weights must be at least 0, and one of them above 0")


def make_plan(config: PlanConfig, material: Material) -> pl.DataFrame:
    """Decide what is shown when.

    Args:
        config: What decides the plan.
        material: What examples are made of.

    Returns:
        One row per example in training order: `task`, `source` (sequence, item or trace), `start` and `stop` (the part
        of the sequence), `shuffle` (seed of the basket's order, -1 for none), `variant` (template), `length` (about,
        in tokens).
    """
    parts = []
    n_passes = int(np.ceil(config.passes))
    for number in range(n_passes):
        rng = np.random.default_rng([config.seed, number])
        columns = _one_pass(config, material, rng)
        order = length_grouped(columns["length"], config.batch_size, rng)
        if number == n_passes - 1:
            order = order[: max(1, round(len(order) * (config.passes - number)))]
        # A column at a time: there may be millions of examples, and each goes as its successor comes.
        parts.append(pl.DataFrame([pl.Series(name, columns.pop(name)[order]) for name in list(columns)]))
    return pl.concat(parts)


def _one_pass(config: PlanConfig, material: Material, rng: np.random.Generator) -> dict[str, np.ndarray]:
    known = tasks()
    base = known[BASE].draw(material, config, None, rng)
    unit = config.tasks.get(BASE, 0) or max(config.tasks.values())
    blocks: list[tuple[np.ndarray, ...]] = []
    for number, (name, task) in enumerate(known.items()):
        count = round(len(base[0]) * config.tasks.get(name, 0) / unit)
        if count:
            block = base if name == BASE else task.draw(material, config, count, rng)
            blocks.append((np.full(len(block[0]), number, dtype=np.int8), *block))
    numbers, *rest = (np.concatenate(part) for part in zip(*blocks, strict=True))
    return material.columns(numbers, rest, rng)


def length_grouped(length: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """A random order in which the examples of a batch are about equally long, so that little is padding.

    Args:
        length: (examples,) tokens of each.
        batch_size: Examples of a batch.
        rng: Draws the order.

    Returns:
        (examples,) a permutation; batches that are not full come last.
    """
    order = rng.permutation(len(length))
    for begin in range(0, len(order), batch_size * _GROUPED_BATCHES):
        chunk = order[begin : begin + batch_size * _GROUPED_BATCHES]
        chunk[:] = chunk[np.argsort(length[chunk], kind="stable")]
    in_batches = len(order) // batch_size * batch_size
    whole = order[:in_batches].reshape(-1, batch_size)
    whole[:] = whole[rng.permutation(len(whole))]
    return order  # what is no whole batch stays last, or it would shift every batch after it


def check_texts(plan: pl.DataFrame, examples: Examples, limit: int | None) -> None:
    """Check that the examples with words fit; those of histories alone are as long as `max_history` makes them.

    A token stands for a byte at least, so the texts' sizes bound the lengths, and nearly all examples are known to fit
    without being rendered. The others are, the longest bound first.

    Args:
        plan: The plan.
        examples: Renders its lines.
        limit: Tokens that the model sees; None if that is not known.

    Raises:
        UserError: If one does not fit.
    """
    if limit is None:
        return
    known = list(tasks().values())
    lines = plan.filter(pl.col("task") != task_names().index(BASE)).select(COLUMNS).unique(maintain_order=True)
    parts = [_token_bounds(part, examples, known) for part in lines.iter_slices(_BOUNDED)]
    bounds = np.concatenate(parts) if parts else np.empty(0)
    worst = (0, "")
    for row in np.argsort(-bounds, kind="stable"):
        if bounds[row] <= max(limit, worst[0]):
            break
        line = lines.row(int(row))
        worst = max(worst, (len(examples.render(*line)[0]), known[line[0]].name))
    tokens, task = worst
    if tokens > limit:
        raise UserError(
            f"the task {task} has examples of up to {tokens} tokens, but the model sees {limit}: leave {task} out, or "
            "take a model with a longer context"
        )


def _token_bounds(lines: pl.DataFrame, examples: Examples, known: list[Task]) -> np.ndarray:
    """At most so many tokens has each line's example (lines,)."""
    longest = max(text_bytes(one) for task in known for one in task.templates)
    fixed = longest + len(examples.prompts.prompter("", {})) + 8
    sizes: dict[tuple[int, int, int], int] = {}
    for task, source, start, stop, *_ in lines.iter_rows():
        if (task, source, stop - start) not in sizes:
            sizes[task, source, stop - start] = fixed + known[task].most_tokens(examples, source, stop - start)
    return np.array([sizes[task, source, stop - start] for task, source, start, stop, *_ in lines.iter_rows()])

"""A curriculum: which tasks are fed at which point of the training.

It is written as phases, each with a share of the examples and the ratios of its tasks:

    curriculum:
      alignment: {share: 6, seqrec: 0.9, index2item: 0.1}
      evidence: {share: 1, evidence: 0.7, seqrec: 0.3}
      whole: {share: 2, reason: 1.0}

What comes out is a plan like any other (`mixture.make_plan`): one list of examples in training order, a pure
function of configuration and seed. So a run that was interrupted anywhere goes on with the very next example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from reasonrec.data_gen.tasks.mixture import BASE, PlanConfig, check_tasks, length_grouped
from reasonrec.data_gen.tasks.render import Material, task_names, tasks
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.terminal import visible

SHARE = "share"
_ORDER = 1 << 20  # keeps the seeds of orders apart from those of rounds


@dataclass(frozen=True)
class Phase:
    """A stretch of the training.

    Attributes:
        name: Name in the plot.
        share: Share of the examples, relative to the other phases.
        ratios: Ratio of each task within the phase.
    """

    name: str
    share: float
    ratios: Mapping[str, float]


def parse_phases(curriculum: Mapping[str, Mapping[str, float]]) -> list[Phase]:
    """Read a curriculum as it stands in YAML.

    Raises:
        UserError: If a phase has no share above 0, no task, or an unknown one.
    """
    phases = []
    for name, values in curriculum.items():
        ratios = {task: ratio for task, ratio in values.items() if task != SHARE}
        if not values.get(SHARE, 0) > 0:
            raise UserError(f"curriculum: phase {name} needs a share above 0, such as {{{SHARE}: 1, seqrec: 1}}")
        check_tasks(f"curriculum: phase {name}", ratios)
        phases.append(Phase(name, values[SHARE], ratios))
    if not phases:
        raise UserError("curriculum: there is no phase")
    return phases


class _Stream:
    """Examples of one task without end: round after round, each in an order of its own."""

    def __init__(self, task: str, config: PlanConfig, material: Material) -> None:
        self.task, self.config, self.material = task, config, material
        self.number = task_names().index(task)
        self.rounds = 0
        self.ready: pl.DataFrame | None = None

    def take(self, n: int) -> pl.DataFrame:
        """The next n examples."""
        while self.ready is None or self.ready.height < n:
            more = self._round()
            self.ready = more if self.ready is None else pl.concat([self.ready, more])
        taken, self.ready = self.ready[:n], self.ready[n:]
        return taken

    def _round(self) -> pl.DataFrame:
        rng = np.random.default_rng([self.config.seed, self.number, self.rounds])
        self.rounds += 1
        block = tasks()[self.task].draw(self.material, self.config, None, rng)
        order = rng.permutation(len(block[0]))
        numbers = np.full(len(order), self.number)
        return pl.DataFrame(self.material.columns(numbers, [part[order] for part in block], rng))


def make_curriculum(config: PlanConfig, phases: list[Phase], material: Material) -> pl.DataFrame:
    """Decide what is shown when.

    There are as many examples as `config.passes` passes over the interactions have windows. A task goes on in a phase
    where an earlier phase left it, so nothing is shown twice before everything was shown once.

    Args:
        config: What decides the plan; `tasks` is not read.
        phases: The phases in their order.
        material: What examples are made of.

    Returns:
        A plan with the columns of `make_plan`, and `phase`, the number of each example's phase.

    Raises:
        UserError: If a phase is too short for one batch.
    """
    first = np.random.default_rng([config.seed, task_names().index(BASE), 0])
    total = max(1, round(len(tasks()[BASE].draw(material, config, None, first)[0]) * config.passes))
    shares = np.cumsum([phase.share for phase in phases])
    # Phases begin with a batch, or a short batch in the middle would shift all behind it.
    ends = np.round(total * shares / shares[-1] / config.batch_size).astype(int) * config.batch_size
    ends[-1] = total
    sizes = np.diff(ends, prepend=0)
    streams: dict[str, _Stream] = {}
    parts = []
    for number, (phase, size) in enumerate(zip(phases, sizes.tolist(), strict=True)):
        if size <= 0:
            raise UserError(
                f"curriculum: phase {phase.name} gets none of the {total} examples in batches of "
                f"{config.batch_size}; raise its share or num_train_epochs"
            )
        lines = [
            streams.setdefault(task, _Stream(task, config, material)).take(count)
            for task, count in _shared_out(phase.ratios, size).items()
            if count
        ]
        part = pl.concat(lines)
        order = length_grouped(
            part["length"].to_numpy(), config.batch_size, np.random.default_rng([config.seed, _ORDER, number])
        )
        parts.append(part[order].with_columns(pl.lit(number, dtype=pl.Int16).alias("phase")))
    return pl.concat(parts)


def _shared_out(ratios: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers in the given ratios; what rounding leaves over goes to the largest remainders."""
    exact = np.array(list(ratios.values()), dtype=np.float64) / sum(ratios.values()) * total
    counts = np.floor(exact).astype(int)
    for i in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[i] += 1
    return dict(zip(ratios, counts.tolist(), strict=True))


def plot_plan(plan: pl.DataFrame, phases: list[Phase], path: Path, *, bins: int = 100) -> None:
    """Draw what is fed when.

    Args:
        plan: What `make_curriculum` returned.
        phases: Its phases.
        path: PNG file to write.
        bins: Stretches of the training that are counted together.
    """
    from matplotlib.figure import Figure

    bins = min(bins, plan.height)
    where = np.arange(plan.height) * bins // plan.height
    task, names = plan["task"].to_numpy(), task_names()
    fed = [number for number in range(len(names)) if (task == number).any()]
    counts = np.array([np.bincount(where[task == number], minlength=bins) for number in fed], dtype=np.float64)
    shares = 100 * counts / counts.sum(axis=0)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    x = (np.arange(bins) + 0.5) / bins * 100
    bottom = np.zeros(bins)
    for number, share in zip(fed, shares, strict=True):
        axes.bar(x, share, width=100 / bins, bottom=bottom, label=names[number])
        bottom += share
    begins = np.flatnonzero(np.diff(plan["phase"].to_numpy(), prepend=-1))
    for number, begin in enumerate(begins / plan.height * 100):
        axes.axvline(begin, color="black", linewidth=0.8)
        name = visible(phases[number].name, 40)
        axes.text(begin + 0.5, 101, name, fontsize=8, rotation=25, va="bottom", parse_math=False)
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel=f"training progress, % of {plan.height:,} examples", ylabel="% fed")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(path, dpi=120)

"""What `recipes/sft.py` trains on: plans of examples, with or without reasoning traces and a curriculum."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from reasonrec.data_gen.clean import neutralise
from reasonrec.data_gen.reasoning.traces import Arm, Trace, Traces, pieces
from reasonrec.data_gen.tasks.curriculum import make_curriculum, parse_phases, plot_plan
from reasonrec.data_gen.tasks.prompts import TEMPLATES
from reasonrec.data_gen.tasks.reasoning import QUESTIONS, REASONING_TASKS, Mention, ReasoningRenderer
from reasonrec.data_gen.tasks.render import KNOWN, Material, PlanConfig, Renderer, make_plan
from reasonrec.tokenizers.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset as HfDataset

    from reasonrec.recipes.models.checkpoint import Bundle

SEQREC_ONLY = {"seqrec": 1.0}


@dataclass
class TaskChoice:
    """The keys that choose what is trained on; part of the stage's configuration."""

    tasks: dict[str, float] = field(
        default_factory=lambda: dict(SEQREC_ONLY),
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

    def check_tasks(self) -> None:
        """Refuse contradictions.

        Raises:
            UserError: If tasks and traces do not fit together, or tasks and a curriculum are given both.
        """
        if self.curriculum and self.tasks != SEQREC_ONLY:
            raise UserError("tasks and curriculum both say what is fed: give one of them")
        phases = parse_phases(self.curriculum) if self.curriculum else []
        weights = [phase.ratios for phase in phases] or [self.tasks]
        used = {
            task for ratios in weights for task, weight in ratios.items() if weight > 0 and task in REASONING_TASKS
        }
        if used and self.traces is None:
            raise UserError(f"the task {min(used)} is made of reasoning traces: set traces to a folder of them")
        if self.traces is not None and not used:
            raise UserError(f"traces={self.traces} is read by no task; those that do: {', '.join(REASONING_TASKS)}")


def load_traces(choice: TaskChoice, bundle: Bundle) -> Traces | None:
    """The traces that a run was given, hung on the bundle's renderer.

    Raises:
        UserError: If they were made from another dataset.
    """
    if choice.traces is None:
        return None
    traces = Traces.load(choice.traces, bundle.dataset.manifest, arm=choice.trace_arm)
    longest = max((len(trace.history) for trace in traces.train), default=0)
    if longest > choice.max_history:
        raise UserError(
            f"traces={choice.traces} explain histories of up to {longest} items, but max_history="
            f"{choice.max_history}: make both the same"
        )
    bundle.renderer.reasoning = ReasoningRenderer(bundle.renderer, traces.train, choice.mention)
    return traces


def build_plan(choice: TaskChoice, bundle: Bundle, *, passes: float, batch_size: int, seed: int) -> pl.DataFrame:
    """The training examples in the order they are fed, for the bundle's renderer.

    Args:
        choice: What is trained on.
        bundle: Dataset, index and tokenizer.
        passes: Passes over the interactions.
        batch_size: Examples per optimiser step, over all processes.
        seed: Seed of every choice.
    """
    config = PlanConfig(choice.tasks, choice.max_history, choice.one_per_prefix, passes, batch_size, seed)
    renderer = bundle.renderer
    lengths = np.array([len(ids) for ids in renderer.item_token_ids])
    set_order = bundle.dataset.facts["order"] == "set"
    if choice.curriculum:
        phases = parse_phases(choice.curriculum)
        return make_curriculum(config, phases, Material(renderer.sequences, lengths, set_order, renderer.reasoning))
    return make_plan(config, renderer.sequences, lengths, set_order, renderer.reasoning)


def check_texts(plan: pl.DataFrame, renderer: Renderer, limit: int | None) -> None:
    """Check that the examples with words fit; those of histories alone are as long as `max_history` makes them.

    A token stands for a byte at least, so the texts' sizes bound the lengths, and nearly all examples are known to fit
    without being rendered. The others are, the longest bound first.

    Args:
        plan: The plan.
        renderer: Renders its lines.
        limit: Tokens that the model sees; None if that is not known.

    Raises:
        UserError: If one does not fit.
    """
    if limit is None:
        return
    lines = plan.select("task", "source", "start", "stop", "shuffle", "variant").unique(maintain_order=True)
    lines = lines.filter(pl.col("task") != KNOWN.index("seqrec"))
    bounds = _token_bounds(lines, renderer)
    worst = (0, "")
    for row in np.argsort(-bounds, kind="stable"):
        if bounds[row] <= max(limit, worst[0]):
            break
        line = lines.row(int(row))
        worst = max(worst, (len(renderer.render(*line)[0]), KNOWN[line[0]]))
    tokens, task = worst
    if tokens > limit:
        raise UserError(
            f"the task {task} has examples of up to {tokens} tokens, but the model sees {limit}: leave {task} out, or "
            "take a model with a longer context"
        )


def _token_bounds(lines: pl.DataFrame, renderer: Renderer) -> np.ndarray:
    """At most so many tokens has each line's example (lines,)."""
    item = max(len(ids) for ids in renderer.item_token_ids)
    text = renderer.max_text_tokens
    templates = [*TEMPLATES.values(), *QUESTIONS.values()]
    fixed = max(_bytes(one) for phrasings in templates for one in phrasings) + len(renderer.prompter("", {})) + 8
    traces = renderer.reasoning.traces if renderer.reasoning is not None else ()
    titles = np.array([_bytes(title) + 2 for title in renderer.titles])
    sizes: dict[int, int] = {}
    bounds = np.empty(lines.height, dtype=np.int64)
    for row, (task, source, start, stop, _, _) in enumerate(lines.iter_rows()):
        if KNOWN[task] in REASONING_TASKS:
            if source not in sizes:
                sizes[source] = _trace_bound(traces[source], item, text)
            bounds[row] = fixed + sizes[source]
        elif KNOWN[task] == "fusionseqrec":
            # Any order of a set: the longest titles of the whole sequence.
            longest = np.sort(titles[renderer.sequences[source]])[start - stop :]
            bounds[row] = fixed + text + item * (stop - start) + longest.sum()
        else:
            bounds[row] = fixed + text + item
    return bounds


def _trace_bound(trace: Trace, item: int, text: int) -> int:
    """Tokens of a history and of all stages, each in the chain or in a question."""
    bound = len(trace.history) * item + item
    for stage in trace.stages.values():
        for piece in pieces(stage):
            bound += text + item + 4 if isinstance(piece, int) else _bytes(piece) + 2
        bound += 32  # the cue, and what joins sentences
    return bound


def _bytes(text: str) -> int:
    return len(neutralise(text).encode())


def plot_curriculum(choice: TaskChoice, plan: pl.DataFrame, path: Path) -> None:
    """Draw what a curriculum feeds when; nothing without one."""
    if choice.curriculum:
        plot_plan(plan, parse_phases(choice.curriculum), path)


def build_eval(bundle: Bundle, n_rows: int, max_history: int) -> HfDataset | None:
    """Validation cases in the layout of direct inference; None for no rows."""
    from datasets import Dataset as HfDataset

    if n_rows == 0:
        return None
    rows = bundle.dataset.valid.sample(min(n_rows, bundle.dataset.valid.height), seed=0)
    examples = [
        bundle.renderer.history_example(history[-max_history:], target, every_item=False)
        for history, target in rows.select("history", "target").iter_rows()
    ]
    return HfDataset.from_dict(
        {"input_ids": [ids for ids, _ in examples], "labels": [labels for _, labels in examples]}
    )

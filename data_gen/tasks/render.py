"""Training examples for aligning the LLM with the items and how people use them.

A *plan* says what is shown when: one line per example, in training order, a pure function of the configuration and
the seed. Examples are rendered from it when they are needed, so a plan for millions of users stays small, and a
resumed run sees exactly what the interrupted one would have.

Tasks (after GREAM and LC-Rec, whose names they keep; templates are our own):
    seqrec: the user's history and what comes next. With whole-history training one example is a window of the history,
        with the loss on every item; the last one is the answer behind the begin marker, as in inference. With
        `one_per_prefix` every item is the answer of an example of its own.
    item2index, index2item: an item's words to its codes, and back.
    fusionseqrec: history in codes to the next title, or history in titles to the next codes.
    The tasks of `reasoning_tasks`: made of reasoning traces, which the plan and the renderer have to be given.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from reasonrec.data_gen.tasks.prompts import TEMPLATES, Prompter
from reasonrec.data_gen.tasks.reasoning import REASONING_TASKS
from reasonrec.tokenizers.errors import UserError

if TYPE_CHECKING:
    from reasonrec.data_gen.tasks.reasoning import ReasoningRenderer

TASKS = ("seqrec", "item2index", "index2item", "fusionseqrec")
KNOWN = (*TASKS, *REASONING_TASKS)  # a plan's numbers of tasks count through this
_GROUPED_BATCHES = 32  # examples of this many batches are sorted by length together
_TEXT_TOKENS = 24  # rough length of a title, only used to put examples of similar length together
_FUSION_HISTORY = 5  # titles are long: this many of them


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
    unknown = set(weights) - set(KNOWN)
    if unknown:
        name = sorted(unknown)[0]
        near = difflib.get_close_matches(name, KNOWN, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"{where} names {name!r}{hint}; known are {', '.join(KNOWN)}")
    if not any(weight > 0 for weight in weights.values()) or any(w < 0 for w in weights.values()):
        raise UserError(f"{where}={dict(weights)}: weights must be at least 0, and one of them above 0")


@dataclass(frozen=True)
class Material:
    """What examples are made of.

    Attributes:
        sequences: Items of each training sequence.
        item_lengths: (items,) tokens of each item.
        set_order: The sequences are sets (baskets): their items are shuffled anew in every pass.
        reasoning: Reasoning traces, for the tasks that need them.
    """

    sequences: Sequence[np.ndarray]
    item_lengths: np.ndarray
    set_order: bool = False
    reasoning: ReasoningRenderer | None = None

    def __post_init__(self) -> None:
        if (self.lengths > 1).sum() == 0:
            raise UserError("no training sequence has two items or more: there is nothing to learn an order from")

    @cached_property
    def lengths(self) -> np.ndarray:
        """Items of each sequence (sequences,)."""
        return np.array([len(s) for s in self.sequences])

    @cached_property
    def cumulative(self) -> list[np.ndarray]:
        """Tokens of each sequence's first 0, 1, … items."""
        return [np.concatenate([[0], np.cumsum(self.item_lengths[s])]) for s in self.sequences]

    def windows(self, config: PlanConfig, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """One pass over the interactions: source, start, stop and length of each sequence example."""
        cut = _prefixes if config.one_per_prefix else _windows
        source, start, stop = cut(self.lengths, config.max_history, rng)
        tokens = [self.cumulative[s][b] - self.cumulative[s][a] for s, a, b in zip(source, start, stop, strict=True)]
        return source, start, stop, np.array(tokens)

    def draw(self, task: str, count: int | None, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Source, start, stop and length of some examples of any task but seqrec; one round of it without a count."""
        if task == "fusionseqrec":
            long = np.flatnonzero(self.lengths > 1)
            chosen = long[rng.integers(0, len(long), len(long) if count is None else count)]
            end = rng.integers(2, self.lengths[chosen] + 1)
            begin = np.maximum(0, end - 1 - _FUSION_HISTORY)
            return chosen, begin, end, (end - begin) * int(float(self.item_lengths.mean()) + _TEXT_TOKENS)
        if task in REASONING_TASKS:
            if self.reasoning is None:
                raise UserError(f"the task {task} is made of reasoning traces: set traces to a folder of them")
            pool, size = self.reasoning.eligible(task), self.reasoning.lengths(task)
        else:
            pool, size = np.arange(len(self.item_lengths)), self.item_lengths + _TEXT_TOKENS
        count = len(pool) if count is None else count
        # Whole rounds over the pool first: every item is seen equally often.
        rounds = [rng.permutation(len(pool)) for _ in range(count // len(pool) + 1)]
        picked = pool[np.concatenate(rounds)[:count]]
        return picked, np.zeros(count, np.int64), np.ones(count, np.int64), size[picked]

    def columns(
        self, numbers: np.ndarray, blocks: Sequence[np.ndarray], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """The columns of a plan from the numbers of tasks, and source, start, stop and length."""
        source, start, stop, length = blocks
        n = len(numbers)
        shuffle = np.full(n, -1, dtype=np.int64)
        if self.set_order:  # one order for all examples that a set is cut into, so that they share out its items
            _, first, which = np.unique(source, return_index=True, return_inverse=True)
            shuffle = rng.integers(0, 2**31, n)[first][which]
        return {
            "task": numbers.astype(np.int8),
            "source": source.astype(np.int64),
            "start": start.astype(np.int32),
            "stop": stop.astype(np.int32),
            "shuffle": shuffle,
            "variant": rng.integers(0, 2**15, n).astype(np.int32),
            "length": length.astype(np.int32),
        }


def make_plan(
    config: PlanConfig,
    sequences: Sequence[np.ndarray],
    item_lengths: np.ndarray,
    set_order: bool,
    reasoning: ReasoningRenderer | None = None,
) -> pl.DataFrame:
    """Decide what is shown when.

    Args:
        config: What decides the plan.
        sequences: Items of each training sequence.
        item_lengths: (items,) tokens of each item.
        set_order: The sequences are sets (baskets): their items are shuffled anew in every pass.
        reasoning: Reasoning traces, for the tasks that need them.

    Returns:
        One row per example in training order: `task`, `source` (sequence or item), `start` and `stop` (the part of the
        sequence), `shuffle` (seed of the basket's order, -1 for none), `variant` (template), `length` (about, in
        tokens).
    """
    material = Material(sequences, item_lengths, set_order, reasoning)
    parts = []
    n_passes = int(np.ceil(config.passes))
    for number in range(n_passes):
        rng = np.random.default_rng([config.seed, number])
        columns = _one_pass(config, material, rng)
        order = length_grouped(columns["length"], config.batch_size, rng)
        part = {name: values[order] for name, values in columns.items()}
        if number == n_passes - 1:
            keep = max(1, round(len(order) * (config.passes - number)))
            part = {name: values[:keep] for name, values in part.items()}
        parts.append(pl.DataFrame(part))
    return pl.concat(parts)


def _one_pass(config: PlanConfig, material: Material, rng: np.random.Generator) -> dict[str, np.ndarray]:
    windows = material.windows(config, rng)
    n_seqrec = len(windows[0])
    unit = config.tasks.get("seqrec", 0) or max(config.tasks.values())
    blocks: list[tuple[np.ndarray, ...]] = []
    for number, task in enumerate(KNOWN):
        count = round(n_seqrec * config.tasks.get(task, 0) / unit)
        if count:
            block = windows if task == "seqrec" else material.draw(task, count, rng)
            blocks.append((np.full(len(block[0]), number), *block))
    numbers, *rest = (np.concatenate(part) for part in zip(*blocks, strict=True))
    return material.columns(numbers, rest, rng)


def _windows(lengths: np.ndarray, max_history: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Cut sequences into windows of `max_history + 1` items at an offset drawn per sequence and pass."""
    size = max_history + 1
    source, start, stop = [], [], []
    for i in np.flatnonzero(lengths > 1):
        n = int(lengths[i])
        first = 0 if n <= size else int(rng.integers(-size + 2, 1))
        cuts = [0, *range(first + size, n, size), n]
        if n - cuts[-2] == 1 and size > 2:
            cuts[-2] -= 1  # a last item by itself would have no history
        for begin, end in pairwise(cuts):
            source.append(i)
            start.append(min(begin, end - 2))  # pairs leave an odd item over: its predecessor is shown twice
            stop.append(end)
    return np.array(source), np.array(start), np.array(stop)


def _prefixes(lengths: np.ndarray, max_history: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    source = np.repeat(np.arange(len(lengths)), np.maximum(lengths - 1, 0))
    stop = np.concatenate([np.arange(2, n + 1) for n in lengths])
    return source, np.maximum(0, stop - 1 - max_history), stop


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
    batches: list[np.ndarray] = []
    for begin in range(0, len(order), batch_size * _GROUPED_BATCHES):
        chunk = order[begin : begin + batch_size * _GROUPED_BATCHES]
        chunk = chunk[np.argsort(length[chunk], kind="stable")]
        batches.extend(np.split(chunk, range(batch_size, len(chunk), batch_size)))
    whole = [b for b in batches if len(b) == batch_size]
    rest = [b for b in batches if len(b) < batch_size]
    shuffled = [whole[i] for i in rng.permutation(len(whole))]
    return np.concatenate([*shuffled, *rest])  # short batches last, or they would shift every batch after them


class Renderer:
    """Renders plan lines to token ids and labels; a `datasets` transform.

    Args:
        prompter: Fills templates.
        history_prompt: The template that histories are read with.
        sequences: Items of each training sequence.
        item_token_ids: Token ids of each item.
        titles: Title of each item.
        texts: Description of each item with its category and brand; used beside the title.
        begin_id: The begin marker.
        eos_id: What ends a text answer.
        one_per_prefix: Put the loss on the answer alone.
        max_text_tokens: Cut for titles and texts, in tokens.

    Attributes:
        reasoning: Renders the tasks that are made of reasoning traces, where there are some.
    """

    def __init__(
        self,
        prompter: Prompter,
        history_prompt: str,
        sequences: Sequence[np.ndarray],
        item_token_ids: Sequence[list[int]],
        titles: Sequence[str],
        texts: Sequence[str],
        *,
        begin_id: int,
        eos_id: int,
        one_per_prefix: bool,
        max_text_tokens: int = 48,
    ) -> None:
        self.prompter = prompter
        self.history_prompt = history_prompt
        self.sequences = sequences
        self.item_token_ids = item_token_ids
        self.titles = titles
        self.texts = texts
        self.begin_id = begin_id
        self.eos_id = eos_id
        self.one_per_prefix = one_per_prefix
        self.max_text_tokens = max_text_tokens
        self.reasoning: ReasoningRenderer | None = None

    def __call__(self, lines: Mapping[str, Sequence[Any]]) -> dict[str, list[list[int]]]:
        """Render a batch of plan lines: `input_ids`, and `labels` with -100 where there is no loss."""
        names = ("task", "source", "start", "stop", "shuffle", "variant")
        rendered = [self.render(*line) for line in zip(*(lines[name] for name in names), strict=True)]
        return {"input_ids": [ids for ids, _ in rendered], "labels": [labels for _, labels in rendered]}

    def render(
        self, task: int, source: int, start: int, stop: int, shuffle: int, variant: int
    ) -> tuple[list[int], list[int]]:
        """Token ids and labels of one example."""
        name = KNOWN[task]
        if name in REASONING_TASKS:
            assert self.reasoning is not None  # the plan was made of it
            return self.reasoning.render(name, source, variant)
        if name == "seqrec":
            items = self._part(source, start, stop, shuffle)
            return self.history_example(items[:-1], items[-1], every_item=not self.one_per_prefix)
        if name == "fusionseqrec":
            items = self._part(source, start, stop, shuffle)
            history, target = items[:-1], items[-1]
            if variant % 2:
                prompt = self._fill("history2title", variant // 2, history=self.item_ids(history))
                return self._text_answer(prompt, self.titles[target])
            titles = " " + "; ".join(self.titles[i] for i in history)
            return self._item_answer(self._fill("titles2index", variant // 2, titles=titles), target)
        if name == "index2item":
            return self._text_answer(self._fill(name, variant, item=self.item_token_ids[source]), self.titles[source])
        text = f"{self.titles[source]}. {self.texts[source]}".strip()
        return self._item_answer(self._fill(name, variant, title=self.titles[source], text=text), source)

    def _part(self, source: int, start: int, stop: int, shuffle: int) -> np.ndarray:
        items = self.sequences[source]
        if shuffle >= 0:
            items = np.random.default_rng(shuffle).permutation(items)
        return items[start:stop]

    def item_ids(self, items: Sequence[int] | np.ndarray) -> list[int]:
        """Token ids of several items, one after the other."""
        return [token for item in items for token in self.item_token_ids[item]]

    def _fill(self, name: str, variant: int, **values: str | list[int]) -> list[int]:
        templates = TEMPLATES[name]
        cut = {k: self._cut(v) if isinstance(v, str) and k != "titles" else v for k, v in values.items()}
        return self.prompter(templates[variant % len(templates)], cut)

    def _cut(self, text: str) -> list[int]:
        return self.prompter.data(" " + text)[: self.max_text_tokens]

    def _text_answer(self, prompt: list[int], text: str) -> tuple[list[int], list[int]]:
        answer = [*self._cut(text), self.eos_id]
        return prompt + answer, [-100] * len(prompt) + answer

    def _item_answer(self, prompt: list[int], item: int) -> tuple[list[int], list[int]]:
        answer = self.item_token_ids[item]
        return [*prompt, self.begin_id, *answer], [-100] * (len(prompt) + 1) + answer

    def history_prompt_ids(self, history: Sequence[int] | np.ndarray) -> list[int]:
        """Prompt of a history, the begin marker included: what inference reads."""
        return [*self.prompter(self.history_prompt, {"history": self.item_ids(history)}), self.begin_id]

    def history_prompt_parts(self) -> tuple[list[int], list[int]]:
        """Token ids of a history's prompt in front of its items, and behind them, the begin marker included."""
        whole = [*self.prompter(self.history_prompt, {"history": [-1]}), self.begin_id]
        place = whole.index(-1)
        return whole[:place], whole[place + 1 :]

    def history_example(
        self, history: Sequence[int] | np.ndarray, target: int, *, every_item: bool
    ) -> tuple[list[int], list[int]]:
        """A history and its continuation, with the loss on the answer, or on the history's items too."""
        prompt = self.history_prompt_ids(history)
        answer = self.item_token_ids[target]
        labels = [-100] * len(prompt)
        if every_item:
            ids = self.item_ids(history)
            begin = len(self.history_prompt_parts()[0])
            labels[begin : begin + len(ids)] = ids
        return prompt + answer, labels + answer

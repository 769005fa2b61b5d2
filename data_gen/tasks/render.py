"""Training examples: what tasks are, what they are made of, and how a plan's lines become token ids and labels.

A *plan* (`mixture`, `curriculum`) says what is shown when: one line per example, a pure function of the configuration
and the seed. Examples are rendered from it when they are needed, so a plan for millions of users stays small, and a
resumed run sees exactly what the interrupted one would have.

A task stands in a file of its own or beside those like it (`alignment`, `reasoning`) and registers itself: which
examples there are (`draw`), and what one looks like (`render`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from scipy import sparse

from reasonrec.data_gen.clean import neutralise
from reasonrec.data_gen.sequences import Sequences
from reasonrec.data_gen.tasks.prompts import Example, Prompts
from reasonrec.tokenizers.collaborative import near_pairs, set_pairs
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.registry import Registry

if TYPE_CHECKING:
    from reasonrec.data_gen.reasoning.traces import Trace

TEXT_TOKENS = 24  # rough length of a title, only used to put examples of similar length together
# Modules whose tasks register themselves, in the order of their numbers.
FAMILIES = ("alignment", "reasoning", "companions")
PAIR_WINDOW, MOST_COMPANIONS = 5, 20  # of items beside items: places apart, and how many are kept
COLUMNS = ("task", "source", "start", "stop", "shuffle", "variant")
Companions = tuple[np.ndarray, np.ndarray]  # items, and the chance of each
Block = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # source, start, stop, and length in tokens


class Window(Protocol):
    """How much of a sequence an example shows."""

    @property
    def max_history(self) -> int:
        """Longest history in items; a window holds one item more."""

    @property
    def one_per_prefix(self) -> bool:
        """Whether each example supervises its answer alone."""


class Chains(Protocol):
    """Reasoning traces, for the tasks that are made of them (`reasoning.TraceChains`)."""

    traces: Sequence[Trace]

    def eligible(self, task: str) -> np.ndarray:
        """Numbers of the traces that a task can be made of."""

    def lengths(self, task: str) -> np.ndarray:
        """About how many tokens an example of each trace has."""


class Task(ABC):
    """One kind of example.

    Attributes:
        name: Its name in configurations.
        templates: Its phrasings, by which prompts are bounded.
        traces: Whether it is made of reasoning traces.
    """

    name: str
    templates: Sequence[str] = ()
    traces: bool = False

    @abstractmethod
    def draw(self, material: Material, window: Window, count: int | None, rng: np.random.Generator) -> Block:
        """Some examples; one round of them without a count."""

    @abstractmethod
    def render(self, examples: Examples, source: int, part: slice, shuffle: int, variant: int) -> Example:
        """One example.

        Args:
            examples: What it is made of.
            source: Number of the sequence, the item or the trace.
            part: Part of the sequence.
            shuffle: Seed of a basket's order, -1 for none.
            variant: Chooses among phrasings.
        """

    def most_tokens(self, examples: Examples, source: int, items: int) -> int:
        """At most so many tokens has an example, its template not counted."""
        return examples.max_text_tokens + examples.longest_item


TASKS: Registry[Task] = Registry("task", [f"reasonrec.data_gen.tasks.{family}" for family in FAMILIES])


def register(*added: Task) -> None:
    """Make tasks known by their names.

    Raises:
        ValueError: If a name is taken.
    """
    for task in added:
        TASKS.add(task.name, task, type(task).__module__)


def tasks() -> dict[str, Task]:
    """All tasks; a plan's numbers of tasks count through them."""
    return TASKS.entries()


def task_names() -> list[str]:
    """Names of all tasks, in the order of their numbers."""
    return list(tasks())


@dataclass(frozen=True)
class Material:
    """What the lines of a plan are drawn from.

    Attributes:
        sequences: Items of each training sequence.
        item_lengths: (items,) tokens of each item.
        set_order: The sequences are sets (baskets): their items are shuffled anew in every pass.
        chains: Reasoning traces, for the tasks that need them.
    """

    sequences: Sequence[np.ndarray]
    item_lengths: np.ndarray
    set_order: bool = False
    chains: Chains | None = None

    def __post_init__(self) -> None:
        if not (self.lengths > 1).any():
            raise UserError("no training sequence has two items or more: there is nothing to learn an order from")

    @cached_property
    def flat(self) -> Sequences:
        """The sequences behind one another."""
        return Sequences.of(self.sequences)

    @property
    def lengths(self) -> np.ndarray:
        """Items of each sequence (sequences,)."""
        return self.flat.lengths

    @cached_property
    def companions(self) -> list[Companions]:
        """What each item stands beside in the sequences."""
        return companions(self.sequences, len(self.item_lengths), set_order=self.set_order)

    def columns(self, numbers: np.ndarray, block: Sequence[np.ndarray], rng: np.random.Generator) -> dict[str, Any]:
        """The columns of a plan from the numbers of tasks, and source, start, stop and length."""
        source, start, stop, length = block
        n = len(numbers)
        shuffle = np.full(n, -1)
        if self.set_order:  # one order for all examples that a set is cut into, so that they share out its items
            _, first, which = np.unique(source, return_index=True, return_inverse=True)
            shuffle = rng.integers(0, 2**31, n)[first][which]
        return {
            "task": numbers.astype(np.int8),
            "source": source.astype(np.int32),
            "start": start.astype(np.int32),
            "stop": stop.astype(np.int32),
            "shuffle": shuffle.astype(np.int32),
            "variant": rng.integers(0, 2**15, n).astype(np.int16),
            "length": length.astype(np.int32),
        }


def text_bytes(text: str) -> int:
    """Bytes of a text as a prompt has it; a token stands for one at least."""
    return len(neutralise(text).encode())


def companions(sequences: Sequence[np.ndarray], n_items: int, *, set_order: bool) -> list[Companions]:
    """For each item its strongest companions: pairs over the root of both items' counts.

    Args:
        sequences: Items of each training sequence.
        n_items: Size of the catalogue.
        set_order: The sequences are sets.

    Returns:
        Items, the strongest first, and how likely each is drawn; none for an item that stands beside no other.
    """
    flat = Sequences.of(sequences)
    items, sequence = flat.items(0, len(flat)), np.repeat(np.arange(len(flat)), flat.lengths)
    pairs = set_pairs(items, sequence, n_items) if set_order else near_pairs(items, sequence, n_items, PAIR_WINDOW)
    scale = sparse.diags_array(np.maximum(np.bincount(items, minlength=n_items), 1) ** -0.5)
    table = (scale @ pairs @ scale).tocsr()
    found = []
    for item in range(n_items):
        row = slice(table.indptr[item], table.indptr[item + 1])
        others, strength = table.indices[row], table.data[row]
        others, strength = others[others != item], strength[others != item]
        strongest = np.lexsort([others, -strength])[:MOST_COMPANIONS]
        found.append((others[strongest], strength[strongest] / strength[strongest].sum()))
    return found


def rounds(pool: np.ndarray, size: np.ndarray, count: int | None, rng: np.random.Generator) -> Block:
    """Examples that are made of single things: whole rounds over them first, so that each is seen equally often.

    Args:
        pool: Numbers of the things.
        size: Length of the example of each number.
        count: How many; one round without a count.
        rng: Draws the order.
    """
    count = len(pool) if count is None else count
    drawn = [rng.permutation(len(pool)) for _ in range(count // len(pool) + 1)]
    picked = pool[np.concatenate(drawn)[:count]]
    return picked, np.zeros(count, np.int64), np.ones(count, np.int64), size[picked]


@dataclass(frozen=True)
class Examples:
    """Renders plan lines to token ids and labels; a `datasets` transform.

    Attributes:
        prompts: How histories are read.
        sequences: Items of each training sequence.
        titles: Title of each item.
        texts: Description of each item with its category and brand; used beside the title.
        one_per_prefix: Put the loss on the answer alone.
        max_text_tokens: Cut for titles and texts, in tokens.
        chains: The reasoning traces, where there are some.
        set_order: The sequences are sets (baskets).
    """

    prompts: Prompts
    sequences: Sequence[np.ndarray]
    titles: Sequence[str]
    texts: Sequence[str]
    one_per_prefix: bool = False
    max_text_tokens: int = 48
    chains: Any = None
    set_order: bool = False

    def __call__(self, lines: Mapping[str, Sequence[Any]]) -> dict[str, list[list[int]]]:
        """Render a batch of plan lines: `input_ids`, and `labels` with -100 where there is no loss."""
        rendered = [self.render(*line) for line in zip(*(lines[name] for name in COLUMNS), strict=True)]
        return {"input_ids": [ids for ids, _ in rendered], "labels": [labels for _, labels in rendered]}

    @cached_property
    def tasks(self) -> list[Task]:
        """The tasks by their numbers."""
        return list(tasks().values())

    @cached_property
    def companions(self) -> list[Companions]:
        """What each item stands beside in the sequences."""
        return companions(self.sequences, len(self.prompts.item_token_ids), set_order=self.set_order)

    @cached_property
    def longest_item(self) -> int:
        """Tokens of the longest item."""
        return max(len(ids) for ids in self.prompts.item_token_ids)

    @cached_property
    def title_bytes(self) -> list[int]:
        """At most so many tokens has each item's title."""
        return [text_bytes(title) + 2 for title in self.titles]

    def render(self, task: int, source: int, start: int, stop: int, shuffle: int, variant: int) -> Example:
        """Token ids and labels of one example."""
        return self.tasks[task].render(self, source, slice(start, stop), shuffle, variant)

    def part(self, source: int, part: slice, shuffle: int) -> np.ndarray:
        """Items of a part of a sequence, of a basket in the order of `shuffle`."""
        items = self.sequences[source]
        if shuffle >= 0:
            items = np.random.default_rng(shuffle).permutation(items)
        return items[part]

    def fill(self, templates: Sequence[str], variant: int, **values: str | list[int]) -> list[int]:
        """One of several phrasings; texts are cut."""
        cut = {name: self.cut(value) if isinstance(value, str) else value for name, value in values.items()}
        return self.prompts.prompter(templates[variant % len(templates)], cut)

    def cut(self, text: str) -> list[int]:
        """Token ids of a title or a text."""
        return self.prompts.words(text, self.max_text_tokens)

    def answered(self, prompt: list[int], answer: list[int]) -> Example:
        """A prompt with the loss on what answers it."""
        return prompt + answer, [-100] * len(prompt) + answer

    def in_words(self, prompt: list[int], words: list[int]) -> Example:
        """A prompt that is answered by words."""
        return self.answered(prompt, [*words, self.prompts.eos_id])

    def item_answer(self, prompt: list[int], item: int) -> Example:
        """A prompt that is answered by an item."""
        return self.answered([*prompt, self.prompts.begin_id], self.prompts.answer(item))

    def history(self, history: Sequence[int] | np.ndarray, target: int, *, every_item: bool) -> Example:
        """A history and its continuation, with the loss on the answer, or on the history's items too."""
        if every_item:
            return self.prompts.sequence(history, target)
        return self.answered(self.prompts.direct(history), self.prompts.answer(target))

"""Aligning the LLM with the items and how people use them (after GREAM and LC-Rec, whose names the tasks keep).

The templates are our own. Each task has several phrasings, so that the model learns the task and not one sentence. No
space stands before a place: text brings its own, as a word and the space before it are one token; codes need none.
"""

from __future__ import annotations

import numpy as np

from reasonrec.data_gen.tasks.prompts import Example
from reasonrec.data_gen.tasks.render import (
    TEXT_TOKENS,
    Block,
    Examples,
    Material,
    Task,
    Window,
    register,
    rounds,
)

_FUSION_HISTORY = 5  # titles are long: this many of them
_ITEM2INDEX = (
    "Item named{title}:",
    "Which item is this?{text}\nItem:",
    "Find the item for the name{title}. Item:",
)
_INDEX2ITEM = (
    "Item:{item}\nName:",
    "What is{item} called?\nName:",
    "Give the name of the item{item}.\nName:",
)
_HISTORY2TITLE = (
    "History:{history}\nName of the next item:",
    "These were chosen, oldest first:{history}\nThe next one is called:",
)
_TITLES2INDEX = (
    "Chosen so far, oldest first:{titles}\nNext:",
    "Someone went from{titles} to:",
)


class SequentialRecommendation(Task):
    """The user's history and what comes next.

    With whole-history training one example is a window of the history, with the loss on every item; the last one is
    the answer behind the begin marker, as in inference. With `one_per_prefix` every item is the answer of an example
    of its own.
    """

    name = "seqrec"

    def draw(self, material: Material, window: Window, count: int | None, rng: np.random.Generator) -> Block:
        """One pass over the interactions; it is what the other tasks are counted against, so it has no count."""
        cut = _prefixes if window.one_per_prefix else _windows
        source, start, stop = cut(material.lengths, window.max_history, rng)
        return source, start, stop, material.flat.sums(material.item_lengths, source, start, stop)

    def render(self, examples: Examples, source: int, part: slice, shuffle: int, variant: int) -> Example:
        """A history and its continuation."""
        items = examples.part(source, part, shuffle)
        return examples.history(items[:-1], items[-1], every_item=not examples.one_per_prefix)


class _OfItems(Task):
    """An example for each item."""

    def draw(self, material: Material, window: Window, count: int | None, rng: np.random.Generator) -> Block:
        """Rounds over the catalogue."""
        return rounds(np.arange(len(material.item_lengths)), material.item_lengths + TEXT_TOKENS, count, rng)


class ItemToIndex(_OfItems):
    """An item's words to its codes."""

    name, templates = "item2index", _ITEM2INDEX

    def render(self, examples: Examples, source: int, part: slice, shuffle: int, variant: int) -> Example:
        """Words, and codes as the answer."""
        title = examples.titles[source]
        text = f"{title}. {examples.texts[source]}".strip()
        return examples.item_answer(examples.fill(_ITEM2INDEX, variant, title=title, text=text), source)


class IndexToItem(_OfItems):
    """An item's codes to its title."""

    name, templates = "index2item", _INDEX2ITEM

    def render(self, examples: Examples, source: int, part: slice, shuffle: int, variant: int) -> Example:
        """Codes, and a title as the answer."""
        prompt = examples.fill(_INDEX2ITEM, variant, item=examples.prompts.item_token_ids[source])
        return examples.in_words(prompt, examples.cut(examples.titles[source]))


class FusedSequentialRecommendation(Task):
    """A history in codes to the next title, or one in titles to the next codes."""

    name, templates = "fusionseqrec", (*_HISTORY2TITLE, *_TITLES2INDEX)

    def draw(self, material: Material, window: Window, count: int | None, rng: np.random.Generator) -> Block:
        """Short histories that end anywhere."""
        long = np.flatnonzero(material.lengths > 1)
        chosen = long[rng.integers(0, len(long), len(long) if count is None else count)]
        end = rng.integers(2, material.lengths[chosen] + 1)
        begin = np.maximum(0, end - 1 - _FUSION_HISTORY)
        return chosen, begin, end, (end - begin) * int(float(material.item_lengths.mean()) + TEXT_TOKENS)

    def render(self, examples: Examples, source: int, part: slice, shuffle: int, variant: int) -> Example:
        """Codes to words at odd variants, words to codes at even ones."""
        *history, target = examples.part(source, part, shuffle)
        if variant % 2:
            prompt = examples.fill(_HISTORY2TITLE, variant // 2, history=examples.prompts.item_ids(history))
            return examples.in_words(prompt, examples.cut(examples.titles[target]))
        titles = examples.prompts.prompter.data(" " + "; ".join(examples.titles[i] for i in history))
        return examples.item_answer(examples.fill(_TITLES2INDEX, variant // 2, titles=titles), target)

    def most_tokens(self, examples: Examples, source: int, items: int) -> int:
        """Any order of a set: the longest titles of the whole sequence."""
        longest = sorted(examples.title_bytes[item] for item in examples.sequences[source])[-items:]
        return super().most_tokens(examples, source, items) + items * examples.longest_item + sum(longest)


def _windows(lengths: np.ndarray, max_history: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Cut sequences into windows of `max_history + 1` items at an offset drawn per sequence and pass."""
    size = max_history + 1
    source = np.flatnonzero(lengths > 1).astype(np.int32)
    n = lengths[source].astype(np.int32)
    long = n > size
    first = np.full(len(source), size, dtype=np.int32)  # where the second window begins
    first[long] += rng.integers(-size + 2, 1, int(long.sum())).astype(np.int32)
    windows = 1 + np.maximum(0, -(-(n - first) // size))
    ends = np.cumsum(windows)
    number = np.arange(ends[-1]) - np.repeat(ends - windows, windows)  # of each window in its sequence
    start = (np.repeat(first - size, windows) + number * size).clip(min=0).astype(np.int32)
    stop = np.repeat(first, windows) + (number * size).astype(np.int32)
    stop[ends - 1] = n
    if size > 2:  # a last item by itself would have no history
        alone = ends[stop[ends - 1] - start[ends - 1] == 1] - 1
        start[alone] -= 1
        stop[alone - 1] -= 1
    # Pairs leave an odd item over: its predecessor is shown twice.
    return np.repeat(source, windows), np.minimum(start, stop - 2), stop


def _prefixes(lengths: np.ndarray, max_history: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    answers = np.maximum(lengths - 1, 0)
    source = np.repeat(np.arange(len(lengths)), answers)
    stop = np.arange(len(source)) - np.repeat(np.cumsum(answers) - answers, answers) + 2
    return source, np.maximum(0, stop - 1 - max_history), stop


register(SequentialRecommendation(), ItemToIndex(), IndexToItem(), FusedSequentialRecommendation())

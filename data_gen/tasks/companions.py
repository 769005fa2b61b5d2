"""Items beside items: the item-item graph of the training sequences, in the layout of histories."""

from __future__ import annotations

import numpy as np

from reasonrec.data_gen.tasks.prompts import Example
from reasonrec.data_gen.tasks.render import Block, Examples, Material, Task, Window, register, rounds

SHOWN = 8  # companions of an example


class ItemToItem(Task):
    """An item, and behind it some of its strongest companions, drawn by their weight, as the rest of a history.

    What is learned is read at inference in the same place, and one example supervises several items. The first item
    is given: it was drawn from the catalogue, not by what people choose. Source of the idea: GRLM, arXiv 2601.06798.
    """

    name = "item2item"

    def draw(self, material: Material, window: Window, count: int | None, rng: np.random.Generator) -> Block:
        """Rounds over the items that have companions."""
        shown = min(SHOWN, window.max_history)
        length = (1 + shown) * int(np.ceil(material.item_lengths.mean()))
        lengths = np.full(len(material.item_lengths), length)
        known = np.flatnonzero([len(items) > 0 for items, _ in material.companions])
        source, _, _, tokens = rounds(known, lengths, count, rng)
        return source, np.zeros(len(source), np.int64), np.full(len(source), shown), tokens

    def render(self, examples: Examples, source: int, part: slice, shuffle: int, variant: int) -> Example:
        """The item, and as many companions as the part is long."""
        items, chances = examples.companions[source]
        n = 1 if examples.one_per_prefix else min(part.stop, len(items))
        chosen = np.random.default_rng([source, variant]).choice(items, size=n, replace=False, p=chances)
        *between, last = chosen
        ids, labels = examples.history([source, *between], last, every_item=not examples.one_per_prefix)
        prompts = examples.prompts
        given = len(prompts.direct_parts()[0]) + len(prompts.item_token_ids[source])
        return ids, [-100] * given + labels[given:]

    def most_tokens(self, examples: Examples, source: int, items: int) -> int:
        """As many items as the part is long, and the one they belong to."""
        return (1 + items) * examples.longest_item


register(ItemToItem())

"""What an LLM teacher is asked, and nothing about how it is reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import polars as pl

from reasonrec.data_gen.clean import neutralise
from reasonrec.data_gen.reasoning.label_statistics import Case

Messages = list[dict[str, str]]


class Question(Protocol):
    """What a teacher is asked about: a moment of a history, or an item."""

    @property
    def key(self) -> str:
        """Its name among all that are asked about."""
        ...


QuestionT = TypeVar("QuestionT", bound=Question)
_AskedT = TypeVar("_AskedT", contravariant=True)


class Asks(Protocol[_AskedT]):
    """Turns what a teacher is asked about into chat messages."""

    def messages(self, case: _AskedT, /) -> Messages:
        """The messages for a case."""
        ...


_SYSTEM = """You explain people's choices. You get the items that someone chose, oldest first, each with a number in \
brackets. Reply with exactly these five lines and nothing else:
Evidence: what the list shows, with the numbers of the items that show it, such as [2][5]
Taste: what this person generally goes for, in a few words
Wants: what they seem to be after right now, in a few words
Next: what kind of item to suggest, in a few words
Keep: the numbers of those items that fit what they want, in the order of the list, such as [2][4]
Refer to items by their number only; never write a name. Use only what the list shows. Each line is at most {words} \
words long."""
_HINDSIGHT = """Afterwards this person chose: {target}
Explain how the list leads there. Do not name that item, its maker or its kind, and write as if you did not know it."""


@dataclass(frozen=True)
class Asker:
    """Turns cases into chat messages.

    Attributes:
        items: The dataset's items.
        words: Longest line that is asked for.
        targets: What was chosen in each case, by key; None for a teacher without hindsight.
    """

    items: pl.DataFrame
    words: int = 12
    targets: Mapping[str, int] | None = None

    def messages(self, case: Case) -> Messages:
        """The messages for a case."""
        lines = [f"[{place}] {self._describe(item)}" for place, item in enumerate(case.history, 1)]
        if self.targets is not None:
            lines += ["", _HINDSIGHT.format(target=self._describe(self.targets[case.key]))]
        return [
            {"role": "system", "content": _SYSTEM.format(words=self.words)},
            {"role": "user", "content": "\n".join(lines)},
        ]

    def _describe(self, item: int) -> str:
        title, category, brand = (self.items[name][item] for name in ("title", "category", "brand"))
        about = "; ".join(filter(None, (category, brand)))
        return neutralise(f"{title} ({about})" if about else title)

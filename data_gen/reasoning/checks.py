"""What a reply has to pass before it becomes a trace.

It has to fall into its five stages, to name only items of the history, and to give nothing of the target away that
the history or the blind guess does not say already: no title, brand or label. A check that is too strict loses a
trace, one that is too lax teaches the model to read an answer that it will not have: in doubt, a reply is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import polars as pl

from reasonrec.data_gen.reasoning.label_statistics import Case, ItemLabels
from reasonrec.data_gen.reasoning.traces import STAGES, Reply, Trace, mentions, parse_reply, places_to_items

_CODE = re.compile(r"[<\u2039]\|[a-z]_\d+\|[>\u203a]", re.I)
_WORD = re.compile(r"\w+(?:'\w+)*")
_YEAR = re.compile(r"\s*\(\d{4}\)\s*$")
_SHORT = 4  # a title of one word shorter than this is looked for as it is written, capitals and all
_LONGEST = 12  # words of a title that are compared


def words(text: str) -> tuple[str, ...]:
    """The words of a text in lower case."""
    return tuple(_WORD.findall(text.lower()))


def contains(text: str, phrase: str) -> bool:
    """Whether a phrase stands in a text word for word, in any case."""
    wanted, have = words(phrase), words(text)
    n = len(wanted)
    return bool(n) and any(have[i : i + n] == wanted for i in range(len(have) - n + 1))


def _has_title(text: str, title: str) -> bool:
    """Whether a text names a title, with or without its year."""
    name = _YEAR.sub("", title)
    if len(words(name)) == 1 and len(name) < _SHORT:
        return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None
    return contains(text, name)


@dataclass
class Checker:
    """Checks replies against items.

    Args:
        items: The dataset's items.
        labels: Their labels.
    """

    items: pl.DataFrame
    labels: ItemLabels
    _titles: list[str] = field(init=False, repr=False)
    _brands: list[str] = field(init=False, repr=False)
    _by_words: dict[tuple[str, ...], set[int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Index the titles by their words."""
        self._titles, self._brands = self.items["title"].to_list(), self.items["brand"].to_list()
        self._texts = [" ".join(parts) for parts in self.items.select("title", "category", "brand").iter_rows()]
        self._by_words = {}
        for item, title in enumerate(self._titles):
            if len(key := words(_YEAR.sub("", title))[:_LONGEST]) > 1:  # one word may be a word
                self._by_words.setdefault(key, set()).add(item)
        self._lengths = sorted({len(key) for key in self._by_words})
        self._label_by_words = {words(name): i for i, name in enumerate(self.labels.names)}
        self._label_lengths = sorted({len(key) for key in self._label_by_words} - {0})

    def check(
        self, reply: Reply, case: Case, target: int, row: int, position: int, guess: Sequence[str]
    ) -> Trace | str:
        """Make a trace of a reply.

        Args:
            reply: The reply; it has a text.
            case: Its case.
            target: What was chosen.
            row: Row of the case in its table.
            position: Place of the target in it.
            guess: Labels that the statistics name as likely next.

        Returns:
            The trace, or the first reason against it.
        """
        stages = parse_reply(reply.text or "")
        if stages is None:
            return "not in five stages"
        history = case.history
        resolved = {stage: places_to_items(text, history) for stage, text in stages.items()}
        if any(text is None for text in resolved.values()):
            return "names an item outside the history"
        known = {stage: text for stage, text in resolved.items() if text is not None}
        text = re.sub(r"\[\d+\]", " | ", "\n".join(known.values()))  # references are no words
        if _CODE.search(text):
            return "code in the text"
        said = " | ".join([*(self._texts[item] for item in history), *guess])
        reason = self._leak(text, target, said) or self._foreign_title(text, history, said)
        reason = reason or self._rewriting(known, history)
        if reason:
            return reason
        own = set(self.labels.of_item[target])
        named = own & self._labels_in(known["formulation"])
        trace = Trace(case.key, row, position, case.user, history, target)
        for stage in STAGES:
            setattr(trace, stage, known[stage])
        trace.guess, trace.hit = tuple(guess), bool(named) if own else None
        return trace

    def _leak(self, text: str, target: int, said: str) -> str | None:
        title, brand = self._titles[target], self._brands[target]
        if _has_title(text, title) and not _has_title(said, title):
            return "title of the target"
        if brand and contains(text, brand) and not contains(said, brand):
            return "brand of the target"
        for label in self.labels.words(self.labels.of_item[target]):
            if contains(text, label) and not contains(said, label):
                return "label of the target"
        return None

    def _foreign_title(self, text: str, history: Sequence[int], said: str) -> str | None:
        for line in text.splitlines():
            have = words(line)
            for n in self._lengths:
                for i in range(len(have) - n + 1):
                    found = self._by_words.get(have[i : i + n])
                    if found and not found & set(history) and not contains(said, " ".join(have[i : i + n])):
                        return "title outside the history"
        return None

    def _labels_in(self, text: str) -> set[int]:
        have = words(text)
        grams = (have[i : i + n] for n in self._label_lengths for i in range(len(have) - n + 1))
        return {self._label_by_words[gram] for gram in grams if gram in self._label_by_words}

    def _rewriting(self, stages: dict[str, str], history: Sequence[int]) -> str | None:
        kept = mentions(stages["rewriting"])
        left = re.sub(r"\[\d+\]", "", stages["rewriting"]).strip(" ,;")
        if not kept or left or not _is_part(kept, history):
            return "rewriting is no part of the history"
        stated = self._labels_in(stages["intent"])
        if stated and not all(stated & set(self.labels.of_item[item]) for item in kept):
            return "rewriting keeps what the intent does not name"
        return None


def _is_part(kept: Sequence[int], history: Sequence[int]) -> bool:
    """Whether the items stand in the history, in this order, each at most as often."""
    rest = iter(history)
    return all(item in rest for item in kept)

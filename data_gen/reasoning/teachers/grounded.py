"""A teacher without an LLM: every sentence is a statistic of the history and of other users' training interactions.

It never sees what was chosen, needs no network, and says the same thing every time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from reasonrec.data_gen.reasoning.label_statistics import Case, LabelStatistics
from reasonrec.data_gen.reasoning.traces import CUES, Reply


@dataclass(frozen=True)
class GroundedTeacher:
    """Says what a history shows, in as few words as can be.

    Attributes:
        statistics: Where the numbers come from.
        tastes: Labels of the lasting preference, and of the intent.
        evidence_items: History items named as evidence.
        kept_items: History items that the rewritten history keeps at most.
        guesses: Labels named as likely next.
        recent: The newest items, in which the intent is looked for.
    """

    statistics: LabelStatistics
    tastes: int = 2
    evidence_items: int = 3
    kept_items: int = 4
    guesses: int = 2
    recent: int = 5
    name: str = "grounded"
    hindsight: bool = False

    def write(self, cases: Iterable[Case]) -> Iterator[Reply]:
        """Write a reply for each case."""
        return (self._one(case) for case in cases)

    def _one(self, case: Case) -> Reply:
        labels = self.statistics.labels
        history = np.array(case.history)
        carried = [set(labels.of_item[item]) for item in case.history]
        if not any(carried):
            return Reply(case.key, problem="no labels in the history")
        base = self.statistics.base(case)
        counts = labels.count(history)
        preference = _standing_out(counts, len(history) * base, self.tastes, least=2)
        # What is wanted now stands out of the newest items, measured by the user's own habits and everybody's.
        newest = history[-self.recent :]
        usual = len(newest) * (counts / len(history) + base) / 2
        now = labels.count(newest)
        if not now.any():  # the newest items carry no label
            now, usual = counts, len(history) * base
        intent = _standing_out(now, usual, 1, least=2)
        guess = self.statistics.likeliest(case, self.guesses)
        evidence = self._evidence(preference, carried)
        kept = [place for place, has in enumerate(carried) if has & set(intent)][-self.kept_items :]
        lines = {
            "evidence": evidence,
            "preference": ", ".join(labels.words(preference)),
            "intent": ", ".join(labels.words(intent)),
            "formulation": ", ".join(labels.words(guess)),
            "rewriting": _mentions(kept),
        }
        return Reply(case.key, text="\n".join(f"{CUES[stage]}: {line}" for stage, line in lines.items()))

    def _evidence(self, preference: list[int], carried: list[set[int]]) -> str:
        """The newest items of each preferred label, each item once, label by label in turn."""
        taken: dict[int, list[int]] = {label: [] for label in preference}
        used: set[int] = set()
        for _ in range(self.evidence_items):
            for label in preference:
                free = [p for p, has in enumerate(carried) if label in has and p not in used]
                if free and len(used) < self.evidence_items:
                    taken[label].append(free[-1])
                    used.add(free[-1])
        names = self.statistics.labels.names
        return ", ".join(f"{names[label]} {_mentions(sorted(places))}" for label, places in taken.items() if places)


def _mentions(places: Iterable[int]) -> str:
    return "".join(f"[{place + 1}]" for place in places)


def _standing_out(counts: np.ndarray, expected: np.ndarray, n: int, *, least: int) -> list[int]:
    """The labels furthest above what is expected, in standard deviations of a count; the best one in any case."""
    surprise = np.where(counts > 0, (counts - expected) / np.sqrt(expected + 1), -np.inf)
    order = [int(i) for i in np.argsort(-surprise, kind="stable") if counts[i] > 0]
    chosen = [i for i in order if counts[i] >= least and surprise[i] > 0][:n]
    return chosen or order[:1]

"""From cases to traces: a teacher writes, a checker refuses, and everything is counted.

The order matters. The teacher and the blind guess see a case without its target; what they wrote is fixed before the
target is looked at. Only then the target decides which traces are kept (`on_miss`), and how that tilts the data
towards easy rows is measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from reasonrec.data_gen.reasoning.cases import Selection
from reasonrec.data_gen.reasoning.checks import Checker
from reasonrec.data_gen.reasoning.label_statistics import LabelStatistics
from reasonrec.data_gen.reasoning.traces import STAGES, Reply, Teacher, Trace, mentions

OnMiss = Literal["strip", "drop", "keep"]
_HEAD = 0.2


@dataclass
class Synthesis:
    """What came out of a split.

    Attributes:
        traces: The traces that were kept, in the order of the cases.
        cases: Number of cases asked about.
        problems: Cases without a reply, by reason.
        rejected: Replies that were refused, by reason.
        misses: Traces whose formulation names no label of the target, by what happened to them.
        verified: All verified traces, before misses were dealt with; for the bias only.
    """

    traces: list[Trace] = field(default_factory=list)
    cases: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    misses: Counter[str] = field(default_factory=Counter)
    verified: list[Trace] = field(default_factory=list, repr=False)

    def counts(self) -> dict[str, Any]:
        """All counts; `kept` and everything that was lost add up to `cases`."""
        lengths = [trace.tokens for trace in self.traces if trace.tokens]
        hits = [trace.hit for trace in self.verified if trace.hit is not None]
        return {
            "cases": self.cases,
            "kept": len(self.traces),
            "no_reply": dict(self.problems.most_common()),
            "rejected": dict(self.rejected.most_common()),
            "formulation": {
                "names a label of the target": sum(hits),
                "misses it": len(hits) - sum(hits),
                "target without label": len(self.verified) - len(hits),
                "share": round(float(np.mean(hits)), 4) if hits else None,
                **dict(self.misses),
            },
            "stages": {stage: sum(stage in trace.stages for trace in self.traces) for stage in STAGES},
            "chain_tokens": {"mean": round(float(np.mean(lengths)), 1), "max": max(lengths)} if lengths else None,
        }


def synthesize(
    teacher: Teacher,
    selection: Selection,
    checker: Checker,
    statistics: LabelStatistics,
    *,
    guesses: int,
    on_miss: OnMiss,
    length: Callable[[Trace], int] | None = None,
    max_tokens: int = 0,
    progress: Callable[[Iterable[Reply]], Iterable[Reply]] = iter,
) -> Synthesis:
    """Have a teacher write about cases, and keep what can be kept.

    Args:
        teacher: The teacher.
        selection: Cases and their targets.
        checker: Refuses replies.
        statistics: Makes the blind guess.
        guesses: Labels of the blind guess.
        on_miss: What happens to a trace whose formulation names no label of the target: it loses that stage, is
            dropped, or is kept as it is.
        length: Tokens of a trace's chain.
        max_tokens: Longest chain, if `length` is given; a longer one keeps fewer items in its rewritten history.
        progress: Wraps the replies, say with a progress bar.
    """
    result = Synthesis(cases=len(selection.cases))
    place = {case.key: i for i, case in enumerate(selection.cases)}
    found: dict[int, Trace] = {}
    for reply in progress(teacher.write(selection.cases)):
        i = place[reply.key]
        case = selection.cases[i]
        if reply.text is None:
            result.problems[reply.problem or "unknown"] += 1
            continue
        guess = statistics.labels.words(statistics.likeliest(case, guesses))
        trace = checker.check(
            reply, case, int(selection.targets[i]), int(selection.rows[i]), int(selection.positions[i]), guess
        )
        if isinstance(trace, Trace) and length is not None:
            trace = _fit(trace, length, max_tokens)
        if isinstance(trace, Trace):
            found[i] = trace
        else:
            result.rejected[trace] += 1
    result.verified = [found[i] for i in sorted(found)]
    result.traces = list(_settle(result.verified, on_miss, length, result.misses))
    return result


def _fit(trace: Trace, length: Callable[[Trace], int], most: int) -> Trace | str:
    """Take the oldest items out of the rewritten history until the chain is short enough."""
    trace.tokens = length(trace)
    while trace.tokens > most:
        kept = mentions(trace.rewriting or "")
        if len(kept) < 2:
            return "too long"
        trace.rewriting = "".join(f"[{item}]" for item in kept[1:])
        trace.tokens = length(trace)
    return trace


def _settle(
    traces: Iterable[Trace], on_miss: OnMiss, length: Callable[[Trace], int] | None, misses: Counter[str]
) -> Iterator[Trace]:
    for trace in traces:
        if trace.hit or on_miss == "keep":
            yield trace
        elif on_miss == "drop":
            misses["dropped"] += 1
        else:
            misses["kept without the formulation"] += 1
            stripped = replace(trace, formulation=None)
            if length is not None:
                stripped.tokens = length(stripped)
            yield stripped


def easy_rows(traces: Iterable[Trace], popularity: np.ndarray) -> dict[str, dict[str, float]]:
    """How rows whose formulation is right differ from those where it is not.

    A formulation that survives only where it is right makes the rows that have one easier than those that have not.

    Args:
        traces: Verified traces.
        popularity: (items,) how often each item is a training target.

    Returns:
        For `right`, `wrong` and `all`: rows, share of targets in the most popular fifth of the catalogue, median count
        of the target, mean length of the history.
    """
    everything = [trace for trace in traces if trace.hit is not None]
    head = set(np.argsort(-popularity, kind="stable")[: max(1, round(_HEAD * len(popularity)))].tolist())
    groups = {
        "right": [trace for trace in everything if trace.hit],
        "wrong": [trace for trace in everything if not trace.hit],
        "all": everything,
    }
    return {
        name: {
            "rows": len(group),
            "head_share": round(float(np.mean([trace.target in head for trace in group])), 4),
            "median_target_count": float(np.median([popularity[trace.target] for trace in group])),
            "mean_history": round(float(np.mean([len(trace.history) for trace in group])), 2),
        }
        for name, group in groups.items()
        if group
    }


def hindsight_targets(*selections: Selection) -> dict[str, int]:
    """What was chosen in each case, by key: what a teacher with hindsight is shown."""
    return {
        case.key: int(target)
        for selection in selections
        for case, target in zip(selection.cases, selection.targets, strict=True)
    }

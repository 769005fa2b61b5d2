"""What the numbers of a health report mean: good, acceptable, or what to change.

The limits are rules of thumb for choosing what to look at first, from the indexes of this repository; whether codes
help a model is known when one was trained on them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Grade = Literal["good", "acceptable", "change"]


@dataclass(frozen=True)
class Verdict:
    """A judgement of one part of the report.

    Attributes:
        about: `usage`, `collisions` or `meaning`: which part.
        grade: The judgement.
        sentence: The number behind it, and what to change where it is bad.
    """

    about: str
    grade: Grade
    sentence: str

    def __str__(self) -> str:
        return f"{self.grade}: {self.sentence}"


def verdicts(report: dict[str, Any]) -> list[dict[str, str]]:
    """Judge a health report.

    Args:
        report: What `health_report` measured.

    Returns:
        The fields of one `Verdict` for each part that could be measured.
    """
    found = (_usage(report["levels"]), _collisions(report["collisions"]), _meaning(report))
    return [asdict(verdict) for verdict in found if verdict is not None]


def _grade(value: float, good: float, acceptable: float) -> Grade:
    """Of a value of which more is better."""
    return "good" if value >= good else "acceptable" if value >= acceptable else "change"


def _usage(levels: list[dict[str, Any]]) -> Verdict:
    worst = min(levels, key=lambda level: float(level["perplexity"] / level["size"]))
    grade = _grade(worst["perplexity"] / worst["size"], 0.75, 0.4)
    sentence = (
        f"items spread over level {worst['level']} as over {worst['perplexity']:.0f} of its {worst['size']} codes"
    )
    if grade == "change":
        sentence += "; use quantizer: balanced, or fewer codes there"
    return Verdict("usage", grade, sentence)


def _collisions(collisions: dict[str, Any]) -> Verdict:
    share, of = collisions["target_share"], "training targets"
    if share is None:  # nothing was bought
        share, of = collisions["item_share"], "items"
    grade = _grade(1 - share, 0.75, 0.35)
    sentence = f"{share:.0%} of the {of} need a code that only tells equals apart"
    if grade == "change":
        sentence += "; use larger codebook_sizes"
    return Verdict("collisions", grade, sentence)


def _meaning(report: dict[str, Any]) -> Verdict | None:
    """Of the first code: neighbours in a history are what a model is trained on, so they count before categories."""
    if behaviour := report.get("behaviour", {}).get("prefixes"):
        first = behaviour[0]
        grade = _grade(first["lift"], 3, 1.5)
        sentence = f"neighbours in a history share the first code {first['lift']:.1f} times as often as by chance"
    elif agreement := report["agreement"]["prefixes"]:
        first = agreement[0]
        grade = _grade(first["purity"] / max(first["purity_by_chance"], 1e-9), 1.5, 1.2)
        sentence = (
            f"{first['purity']:.0%} of the items have the main {report['agreement']['with']} of their first code, "
            f"{first['purity_by_chance']:.0%} by chance"
        )
    else:
        return None
    if grade == "change":
        sentence += "; try collaboration: auto, another embedding_model, or better texts"
    return Verdict("meaning", grade, sentence)

"""Reasoning traces: what a teacher wrote between a history and a choice, in five stages.

    evidence: what the history shows, with the items that show it.
    preference: the lasting taste behind it.
    intent: what is wanted now.
    formulation: what to suggest, in words.
    rewriting: the items of the history that support the stated intent, and no others.

A teacher replies with one line per stage, `Evidence: …`, and refers to items by their place in the history it was
shown, `[3]`. Kept traces refer to items by number; brackets never occur in item text (`clean.neutralise` replaces
them), so a reference cannot be forged. How a trace becomes tokens is `reasoning_tasks`' business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import polars as pl

from reasonrec.data_gen.clean import neutralise
from reasonrec.data_gen.reasoning.label_statistics import Case
from reasonrec.tokenizers.artefact import check_input, read_manifest
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.manifest import Manifest

STAGES = ("evidence", "preference", "intent", "formulation", "rewriting")
# What opens each stage, in a teacher's reply and in the chain that the model learns to write.
CUES = {
    "evidence": "Evidence",
    "preference": "Taste",
    "intent": "Wants",
    "formulation": "Next",
    "rewriting": "Keep",
}
Arm = Literal["all", "filtered"]
_STAGE_OF = {cue.lower(): stage for stage, cue in CUES.items()}
# A cue at the start of a line, whatever bullets, numbers or bold type a chat model puts around it.
_LINE = re.compile(rf"^[^\w\[]*(?:\d+[.)]\s*)?[^\w\[]*({'|'.join(CUES.values())})[*_\s]*:[*_]*", re.I | re.M)
_MENTION = re.compile(r"\[(\d+)\]")
_SPACES = re.compile(r"\s+")

SCHEMA: dict[str, Any] = {
    "key": pl.String,
    "row": pl.Int32,
    "position": pl.Int32,
    "user": pl.Int32,
    "history": pl.List(pl.Int32),
    "target": pl.Int32,
    **dict.fromkeys(STAGES, pl.String),
    "guess": pl.List(pl.String),
    "hit": pl.Boolean,
    "tokens": pl.Int32,
    "gain": pl.Float32,
    "filtered": pl.Boolean,
}


@dataclass(frozen=True)
class Reply:
    """What came back from a teacher for one case.

    Attributes:
        key: The case.
        text: The reply; None if there is none.
        problem: Why there is none: refused, junk, failed, …
    """

    key: str
    text: str | None = None
    problem: str | None = None


class Teacher(Protocol):
    """Writes replies for cases.

    Attributes:
        name: Name in reports.
        hindsight: Whether it is shown what was chosen.
    """

    @property
    def name(self) -> str:
        """Name in reports."""
        ...

    @property
    def hindsight(self) -> bool:
        """Whether it is shown what was chosen."""
        ...

    def write(self, cases: Iterable[Case]) -> Iterator[Reply]:
        """Write one reply for each case, in any order."""
        ...


@dataclass
class Trace:
    """A trace with everything that is known about it; the columns of the traces table.

    Attributes:
        key: The case.
        row: Row in the table of its split.
        position: Place of the target in the training sequence; -1 for held-out cases.
        user: Number of the user.
        history: Items the teacher saw, oldest first.
        target: The item that was chosen.
        evidence: Text of the stage; `[12]` is item number 12. Likewise the next four; None if it was taken out.
        preference: See above.
        intent: See above.
        formulation: See above.
        rewriting: See above.
        guess: Labels that the statistics name as likely next.
        hit: Whether the formulation names a label of the target; None if the target has no label.
        tokens: Length of the chain in tokens; 0 if it was not measured.
        gain: By how much the chain raises the target's log-probability under the filter's model, if there is one.
        filtered: Whether it belongs to the filtered arm, if there is one.
    """

    key: str
    row: int
    position: int
    user: int
    history: tuple[int, ...]
    target: int
    evidence: str | None = None
    preference: str | None = None
    intent: str | None = None
    formulation: str | None = None
    rewriting: str | None = None
    guess: tuple[str, ...] = ()
    hit: bool | None = None
    tokens: int = 0
    gain: float | None = None
    filtered: bool | None = None

    @property
    def stages(self) -> dict[str, str]:
        """The stages that it has, in order."""
        return {stage: text for stage in STAGES if (text := getattr(self, stage)) is not None}


def parse_reply(text: str) -> dict[str, str] | None:
    r"""Cut a reply into its stages.

    Args:
        text: What a teacher wrote; anything before the first stage is ignored.

    Returns:
        Text of each stage, on one line; None unless every stage is there once, in order, and says something.

    Example:
        >>> parse_reply("Sure!\nEvidence: Drama [2]\nTaste: Drama\nWants: fun\nNext: Comedy\nKeep: [1]")["intent"]
        'fun'
    """
    found = list(_LINE.finditer(text))
    if [_STAGE_OF[match[1].lower()] for match in found] != list(STAGES):
        return None
    ends = [match.start() for match in found[1:]] + [len(text)]
    bodies = [text[match.end() : end] for match, end in zip(found, ends, strict=True)]
    stages = {stage: _SPACES.sub(" ", body).strip(" *_.") for stage, body in zip(STAGES, bodies, strict=True)}
    return stages if all(stages.values()) else None


def mentions(text: str) -> list[int]:
    """The numbers that stand in brackets, in order."""
    return [int(number) for number in _MENTION.findall(text)]


def pieces(text: str) -> list[str | int]:
    """A stage's text cut at its references: words, item numbers, words, and so on."""
    return [int(part) if i % 2 else part for i, part in enumerate(_MENTION.split(text)) if part]


def places_to_items(text: str, history: Sequence[int]) -> str | None:
    """Turn places in a history into item numbers, and make the words safe.

    Args:
        text: A stage with references such as `[1]`, the oldest item.
        history: The items.

    Returns:
        The text with references to item numbers; None if a place is not in the history.
    """
    parts = []
    for piece in pieces(text):
        if isinstance(piece, str):
            parts.append(neutralise(piece))
        elif 1 <= piece <= len(history):
            parts.append(f"[{history[piece - 1]}]")
        else:
            return None
    return "".join(parts)


def to_frame(traces: Sequence[Trace]) -> pl.DataFrame:
    """Traces as a table with the columns of `SCHEMA`."""
    rows = [asdict(trace) for trace in traces]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row") if rows else pl.DataFrame(schema=SCHEMA)


def from_frame(frame: pl.DataFrame) -> list[Trace]:
    """The reverse of `to_frame`."""
    rows = frame.iter_rows(named=True)
    return [Trace(**row | {"history": tuple(row["history"]), "guess": tuple(row["guess"])}) for row in rows]


@dataclass(frozen=True)
class Traces:
    """A traces artefact that was read and verified.

    Attributes:
        train: Traces to train on.
        valid: Traces of validation cases, for tests of the traces themselves.
        manifest: The manifest.
        path: Folder it was read from.
    """

    train: list[Trace] = field(repr=False)
    valid: list[Trace] = field(repr=False)
    manifest: Manifest
    path: Path

    @classmethod
    def load(cls, path: str | Path, dataset: Manifest | None = None, *, arm: Arm = "all") -> Traces:
        """Read traces.

        Args:
            path: Folder that `recipes/synthesize.py` wrote.
            dataset: Manifest of the dataset they are used with.
            arm: `filtered` keeps those that passed the likelihood filter.

        Raises:
            UserError: If there is no finished artefact, it was made from another dataset, or has no such arm.
        """
        path = Path(path)
        manifest = read_manifest(path, "traces")
        if dataset is not None:
            again = "accelerate launch recipes/synthesize.py --dataset …"
            check_input(
                manifest, "dataset", dataset, f"use the dataset they were made from, or make them again: {again}"
            )
        if arm == "filtered" and not manifest.facts.get("filter_model"):
            raise UserError(
                f"trace_arm=filtered, but {path} was made without a likelihood filter: set filter_model in the "
                "synthesize stage, or trace_arm: all"
            )
        train, valid = (from_frame(pl.read_parquet(path / f"{name}.parquet")) for name in ("train", "valid"))
        if arm == "filtered":
            train = [trace for trace in train if trace.filtered]
        return cls(train, valid, manifest, path)

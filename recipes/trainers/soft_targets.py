"""Soft targets of a training: which teacher, what it says at each place of the sequences, and how a batch finds it.

What a teacher says depends on a place of a sequence alone, not on the window that shows it or the pass. So it is asked
once before the training, about all sequences of the plan, and its answers are kept beside the checkpoints as a table,
which a training that goes on reads. An example carries the numbers of its places, and no more. A place costs 8 k bytes
(400 at k = 50) and a step one look-up; if examples were rendered with the answers in them, the model would wait for
the teacher in every pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from reasonrec.data_gen.schema import Dataset, to_lists
from reasonrec.data_gen.tasks.mixture import BASE
from reasonrec.data_gen.tasks.render import COLUMNS, Examples, task_names
from reasonrec.recipes.policies.base import POLICIES, TEACHER_ROWS, Policy
from reasonrec.recipes.policies.semantic_id import CodeAnswers
from reasonrec.recipes.policies.soft import SoftCodes
from reasonrec.recipes.rankers.item_teachers import ITEM_TEACHERS, ItemTeacher
from reasonrec.recipes.rankers.top_k import chunk_rows
from reasonrec.tokenizers.artefact import write_tensors
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.output import disk_full_is_clear, resume_folder
from reasonrec.tokenizers.registry import nearest
from reasonrec.tokenizers.terminal import say, shown
from reasonrec.tokenizers.whole import whole

TABLE = "soft_targets.safetensors"  # in the resume folder
Order = tuple[int, int]  # number of a sequence, and the seed of its order, -1 for its own


@dataclass(frozen=True)
class SoftTargets:
    """The options of `soft_targets`.

    Attributes:
        teacher: Name of the teacher.
        options: Its own options, as they build it.
        alpha: Its part of the targets, in [0, 1].
        top_k: Items that it names at each place.
    """

    teacher: str
    options: Any
    alpha: float = 0.5
    top_k: int = 50

    @classmethod
    def parse(cls, asked: Mapping[str, Any] | None, policy: str) -> SoftTargets | None:
        """What a configuration asks for; None without it, or where the teacher's part is 0.

        Args:
            asked: `teacher`, and `alpha`, `top_k` and the teacher's own options where they are not the defaults.
            policy: Name of the training's policy.

        Raises:
            UserError: If there is no such teacher or option, a value is out of range, or the policy has no codes.
        """
        if not asked:
            return None
        teachers = ITEM_TEACHERS.entries()
        if "teacher" not in asked:
            raise UserError(f"soft_targets={shown(dict(asked))} names no teacher: set one of {', '.join(teachers)}")
        kind = ITEM_TEACHERS.find(str(asked["teacher"]))
        own, ours = {item.name for item in fields(kind)}, ("teacher", "alpha", "top_k")
        for name in asked:
            if name not in own and name not in ours:
                raise UserError(f"soft_targets has no option {shown(name)}{nearest(str(name), [*ours, *own])}")
        alpha, top_k = asked.get("alpha", cls.alpha), asked.get("top_k", cls.top_k)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
            raise UserError(f"soft_targets[alpha]={shown(alpha)} has to be a number from 0 to 1")
        whole("soft_targets[top_k]", top_k, at_least=1)
        fitting = [name for name, one in POLICIES.entries().items() if one.with_tree]
        if policy not in fitting:
            raise UserError(
                f"soft_targets are for items in a tree of codes, and policy={policy} has none: leave them out, or "
                f"choose one of {', '.join(fitting)}"
            )
        options = kind(**{name: value for name, value in asked.items() if name in own})
        return cls(str(asked["teacher"]), options, float(alpha), top_k) if alpha > 0 else None

    def prepare(
        self,
        dataset: Dataset,
        policy: Policy,
        examples: Examples,
        plan: pl.DataFrame,
        out: Path,
        seed: int,
    ) -> Taught:
        """Ask the teacher about every place of the plan's sequences, or read what an interrupted run was told.

        Args:
            dataset: What it learns from.
            policy: The policy.
            examples: Renders the plan.
            plan: What is trained on.
            out: Folder of the finished artefact; the table is kept in its resume folder.
            seed: Seed of the teacher.

        Raises:
            UserError: If the plan has no example of histories, or the folder holds a table of another dataset; and as
                the teacher.
        """
        lines = plan.filter(pl.col("task") == task_names().index(BASE))
        if not lines.height:
            raise UserError(f"soft_targets: the plan of {plan.height} examples has none of {BASE}: train for longer")
        known = list(lines.select("source", "shuffle").unique().sort("source", "shuffle").iter_rows())
        path = resume_folder(out) / TABLE
        about = {"dataset": dataset.manifest.hash, "asked": repr((self.teacher, self.options, self.top_k, seed))}
        with PartialState().main_process_first(), disk_full_is_clear(out):  # one process asks, the others read
            if not path.exists():
                table = _table(self.options.build(dataset, seed), dataset, examples, known, self.top_k)
                write_tensors(path, table, {"about": json.dumps(about)})
            items, shares = _read(path, about)
        assert isinstance(policy.answers, CodeAnswers)
        soft = SoftCodes(policy.answers, items, shares, self.alpha)
        lengths = np.array([len(examples.sequences[source]) for source, _ in known])
        first = dict(zip(known, (np.cumsum(lengths) - lengths).tolist(), strict=True))
        return Taught(soft, TaughtExamples(examples, first))


@dataclass(frozen=True)
class TaughtExamples:
    """Renders plan lines as `Examples` does, with the number of the teacher's place beside each label.

    Attributes:
        examples: Renders them.
        first: Number of the first place of each sequence.
    """

    examples: Examples
    first: Mapping[Order, int]

    def __call__(self, lines: Mapping[str, Sequence[Any]]) -> dict[str, list[list[int]]]:
        """`input_ids`, `labels`, and `TEACHER_ROWS`, which is -1 where there is no label, and in other tasks."""
        found = self.examples(lines)
        base = task_names().index(BASE)
        found[TEACHER_ROWS] = [
            self._rows(labels, *line[1:5]) if line[0] == base else [-1] * len(labels)
            for labels, *line in zip(found["labels"], *(lines[name] for name in COLUMNS), strict=True)
        ]
        return found

    def _rows(self, labels: Sequence[int], source: int, start: int, stop: int, shuffle: int) -> list[int]:
        """The labels are the answers of the part's last items, one after the other: of all of them, or of the last."""
        items = self.examples.part(source, slice(start, stop), shuffle)
        places = self.first[source, shuffle] + np.arange(start, stop)
        of_token = np.repeat(places, [len(self.examples.prompts.answer(item)) for item in items])
        rows, is_label = np.full(len(labels), -1), np.array(labels) != -100
        rows[is_label] = of_token[len(of_token) - is_label.sum() :]
        told: list[int] = rows.tolist()
        return told


@dataclass(frozen=True)
class Taught:
    """What a trainer needs for soft targets.

    Attributes:
        score: Scores code labels by them.
        examples: Renders plan lines.
    """

    score: SoftCodes
    examples: TaughtExamples

    @staticmethod
    def collated(collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        """A collator that pads `TEACHER_ROWS` as it pads labels; examples without them (validation) stay without.

        Args:
            collate: The trainer's own, which pads on the right and drops columns that it does not know.
        """

        def with_rows(examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = collate(examples)
            if TEACHER_ROWS in examples[0]:
                rows = torch.full_like(batch["labels"], -1)
                for row, example in zip(rows, examples, strict=True):
                    told = torch.as_tensor(example[TEACHER_ROWS])
                    row[: len(told)] = told
                batch[TEACHER_ROWS] = rows
            return batch

        return with_rows


def _table(
    teacher: ItemTeacher, dataset: Dataset, examples: Examples, known: Sequence[Order], k: int
) -> dict[str, NDArray[Any]]:
    """What a teacher says at every place of sequences: `items` and `shares`, (places, k) each."""
    parts = [examples.part(source, slice(None), shuffle) for source, shuffle in known]
    flat, lengths = np.concatenate(parts), np.array([len(part) for part in parts])
    users = np.repeat(dataset.train["user"].to_numpy()[[source for source, _ in known]], lengths)
    place = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    mask, k = bool(dataset.facts["mask_history"]), min(k, dataset.n_items)
    items, shares = np.empty((len(flat), k), dtype=np.int32), np.empty((len(flat), k), dtype=np.float32)
    step = chunk_rows(dataset.n_items)
    for start in tqdm(range(0, len(flat), step), desc="soft targets", unit="chunk", disable=None):
        here = slice(start, min(start + step, len(flat)))
        numbers, before = np.arange(here.start, here.stop), place[here]
        inside = np.arange(before.sum()) - np.repeat(np.cumsum(before) - before, before)
        history = flat[np.repeat(numbers - before, before) + inside]
        rows = pl.DataFrame(
            {"row": numbers, "user": users[here], "history": to_lists(history.astype(np.int32), before)}
        )
        items[here], shares[here] = teacher.top(rows, k, mask=mask)
    hit = (items == flat[:, None]) & (shares > 0)
    say(
        f"soft targets: at {np.mean(shares.sum(1) > 0):.0%} of {len(flat):,} places the teacher names items, and at "
        f"{hit.any(1).mean():.0%} the one that came, with a share of {shares[hit].mean() if hit.any() else 0:.3f}"
    )
    return {"items": items.clip(min=0), "shares": shares}


def _read(path: Path, about: Mapping[str, str]) -> tuple[Tensor, Tensor]:
    """Items and shares of a table.

    Raises:
        UserError: If it was made of another dataset, or of other settings.
    """
    with safe_open(path, framework="pt") as stored:
        found = json.loads((stored.metadata() or {}).get("about", "{}"))
        for name, value in about.items():
            if found.get(name) != value:
                raise UserError(
                    f"{path} holds soft targets of {name} {shown(found.get(name))}, and this training is of "
                    f"{shown(value)}: remove it"
                )
        return stored.get_tensor("items"), stored.get_tensor("shares")

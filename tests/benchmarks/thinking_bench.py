"""What the arms of `thinking.py` share: windows, layouts, companions, training from one start, and likelihood."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from datasets import Dataset as HfDataset
from numpy.typing import NDArray

from reasonrec.data_gen.histories import UserHistory
from reasonrec.data_gen.schema import Dataset
from reasonrec.data_gen.tasks.mixture import PlanConfig, make_plan
from reasonrec.data_gen.tasks.prompts import Example
from reasonrec.data_gen.tasks.render import PAIR_WINDOW, Material
from reasonrec.recipes.models.load import LoraSettings, add_adapter, restore_trainable, trainable_values
from reasonrec.recipes.policies.base import Policy
from reasonrec.recipes.policies.loading import causal_lm, load_fresh, load_trained
from reasonrec.recipes.rankers.item_teachers import CompanyTeacher
from reasonrec.recipes.rankers.likelihood import nats
from reasonrec.recipes.recommender import Recommender
from reasonrec.recipes.trainers.item_sft import ItemSFTTrainer, SftArguments

Values = dict[str, torch.Tensor]  # of everything that trains, by name

ROWS_RATE = 5  # learning rate of the code rows over that of LoRA, as in the demo
SHOWN = 10  # companions


@dataclass(frozen=True)
class Window:
    """A part of a training sequence: what is read, and the item behind it."""

    source: int
    history: NDArray[np.int64]
    target: int


@dataclass
class Bench:
    """What all arms share."""

    start: Path
    dataset: Dataset
    policy: Policy
    valid: pl.DataFrame
    tokens: int
    rates: Sequence[float]
    seed: int
    sequences: list[NDArray[np.int64]] = field(init=False)
    source_of: dict[int, int] = field(init=False)
    teacher: CompanyTeacher = field(init=False)

    def __post_init__(self) -> None:
        self.sequences = [np.asarray(items, dtype=np.int64) for items in self.dataset.train["items"].to_list()]
        self.source_of = {int(user): place for place, user in enumerate(self.dataset.train["user"].to_list())}
        assert len(self.source_of) == len(self.sequences), "one training sequence for each user"
        self.teacher = CompanyTeacher(self.dataset, PAIR_WINDOW, SHOWN)

    def windows(self, users: NDArray[np.bool_] | None = None) -> list[Window]:
        """Windows of the training sequences in a seeded order, more than any arm reads."""
        lengths = np.array([len(ids) for ids in self.policy.prompts.item_token_ids])
        config = PlanConfig({"seqrec": 1.0}, 15, False, 3, 8, self.seed + 100)
        plan = make_plan(config, Material(self.sequences, lengths)).select("source", "start", "stop")
        found = [Window(s, self.sequences[s][a : b - 1], int(self.sequences[s][b - 1])) for s, a, b in plan.rows()]
        return [w for w in found if users is None or users[w.source]]

    def companions(self, history: NDArray[np.int64], source: int, seed: int | None = None) -> list[int]:
        """The strongest companions of a history, without the user it is for; shuffled by a seed."""
        user = self.dataset.train["user"][source]
        rows = pl.DataFrame({"row": [0], "user": [user], "history": [history.tolist()]})
        best = self.teacher.top(rows, SHOWN, mask=True)[0][0]
        best = best[best >= 0]
        return list(best if seed is None else np.random.default_rng([seed, source]).permutation(best))

    def shown(self) -> list[NDArray[np.int64]]:
        """What is read of each validation case's history."""
        return [history.last(15).shown for history in UserHistory.of_rows(self.valid)]


Layout = Callable[[Bench, NDArray[np.int64], int], tuple[list[int], list[int]]]  # what stands before, and behind


def laid_out(bench: Bench, history: NDArray[np.int64], front: Sequence[int], chain: Sequence[int]) -> list[int]:
    """A prompt that ends with the begin marker, with tokens before the history and behind it."""
    head, tail = bench.policy.prompts.direct_parts()
    return [*head, *front, *bench.policy.prompts.item_ids(history), *tail[:-1], *chain, tail[-1]]


def example(bench: Bench, window: Window, layout: Layout) -> Example:
    """A window with the loss on every item, and on nothing that stands between."""
    prompts = bench.policy.prompts
    front, chain = layout(bench, window.history, window.source)
    prompt, answer = laid_out(bench, window.history, front, chain), prompts.answer(window.target)
    labels, place = [-100] * len(prompt), len(prompts.direct_parts()[0]) + len(front)
    codes = prompts.item_ids(window.history)
    labels[place : place + len(codes)] = codes
    return prompt + answer, labels + answer


def direct(bench: Bench, history: NDArray[np.int64], source: int) -> tuple[list[int], list[int]]:
    return [], []


def pause(tokens: int, *, words: bool = False, in_front: bool = False) -> Layout:
    def layout(bench: Bench, history: NDArray[np.int64], source: int) -> tuple[list[int], list[int]]:
        prompts = bench.policy.prompts
        one = list(prompts.prompter.syntax(" …"))[:1] if words else [prompts.begin_id]
        return (one * tokens, []) if in_front else ([], one * tokens)

    return layout


def evidence(*, of: Sequence[int] | None = None, shuffle: int | None = None) -> Layout:
    """Companions of the history between the delimiters of a chain; `of` exchanges users, for a control."""

    def layout(bench: Bench, history: NDArray[np.int64], source: int) -> tuple[list[int], list[int]]:
        prompts = bench.policy.prompts
        if of is not None:
            source = of[source]
            history = bench.sequences[source]
        found = bench.companions(history, source, shuffle)
        return [], [*prompts.think_ids, *prompts.item_ids(found), *prompts.close_ids]

    return layout


def examples_of(bench: Bench, layout: Layout, users: NDArray[np.bool_] | None = None) -> list[Example]:
    """As many examples as the token budget has."""
    return within(bench.tokens, (example(bench, window, layout) for window in bench.windows(users)))


def within(budget: int, examples: Iterable[Example]) -> list[Example]:
    found, used = [], 0
    for ids, labels in examples:
        if used + len(ids) > budget:
            break
        found.append((ids, labels))
        used += len(ids)
    return found


def untrained(bench: Bench) -> Values:
    """What trains in the start, before any training."""
    policy, _, setting, _ = load_trained(bench.start)
    model, _ = load_fresh(setting, policy)
    return trainable_values(causal_lm(add_adapter(model, policy.new_tokens, LoraSettings(16, 32, 0.0, "all-linear"))))


def trained(bench: Bench, examples: list[Example], rate: float, values: Values | None = None) -> Recommender:
    """The start, or the start with other values, after these examples in their order."""
    policy, model, setting, _ = load_trained(bench.start, trainable=True)
    if values is not None:
        restore_trainable(causal_lm(model), values)
    with tempfile.TemporaryDirectory() as folder:
        args = SftArguments(
            output_dir=folder, learning_rate=rate, per_device_train_batch_size=8, num_train_epochs=1,
            weight_decay=0.0, lr_scheduler_type="cosine", warmup_steps=0.05, seed=bench.seed, max_grad_norm=1.0,
            activation_checkpointing=False, save_strategy="no", report_to="none", logging_steps=10**6,
            disable_tqdm=True,
        )  # fmt: skip
        data = HfDataset.from_dict({"input_ids": [i for i, _ in examples], "labels": [x for _, x in examples]})
        trainer = ItemSFTTrainer(
            policy=policy, row_learning_rate=ROWS_RATE * rate, model=model, args=args, train_dataset=data,
            processing_class=policy.tokenizer,
        )  # fmt: skip
        trainer.train()
    return Recommender(policy, trainer.model, setting)


def prompts_of(bench: Bench, layout: Layout) -> list[list[list[int]]]:
    """One prompt for each case."""
    shown = bench.shown()
    sources = [bench.source_of[user] for user in bench.valid["user"].to_list()]
    made = (layout(bench, history, source) for history, source in zip(shown, sources, strict=True))
    return [[laid_out(bench, h, front, chain)] for h, (front, chain) in zip(shown, made, strict=True)]


def losses(bench: Bench, model: Recommender, prompts: Any, log_weights: Any = None) -> NDArray[np.float64]:
    """Nats of each case of the benchmark."""
    rows = bench.valid[: len(prompts)]
    return nats(model, rows, prompts, log_weights, batch_size=64, seed=bench.seed)


def best(bench: Bench, layout: Layout) -> tuple[Recommender, NDArray[np.float64], float]:
    """Trained at each learning rate; the one with the best likelihood."""
    examples, prompts = examples_of(bench, layout), prompts_of(bench, layout)
    found = []
    for rate in bench.rates:
        model = trained(bench, examples, rate)
        found.append((model, losses(bench, model, prompts), rate))
    return min(found, key=lambda one: float(one[1].mean()))


def variants(bench: Bench, n: int, cases: int | None = None) -> list[list[list[int]]]:
    """Direct prompts without the oldest item, the two oldest, …"""
    shown = bench.shown()[:cases]
    return [[laid_out(bench, h[min(v, max(len(h) - 1, 0)) :], [], []) for v in range(n)] for h in shown]

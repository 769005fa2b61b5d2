"""What rollouts are worth: the configured rewards, beside what they would be if every target were another prompt's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from reasonrec.data_gen.schema import Dataset
from reasonrec.data_gen.sequences import Sequences
from reasonrec.data_gen.tasks.rl_prompts import RlPrompts
from reasonrec.recipes.decoding.sample import Rollouts
from reasonrec.recipes.decoding.search import MAX_BEAMS, MAX_K
from reasonrec.recipes.models.checkpoint import OTHER
from reasonrec.recipes.policies.base import Parse, Policy
from reasonrec.recipes.policies.inference import Ranking, rank, score
from reasonrec.rewards.ahead import Later
from reasonrec.rewards.calling import BEAM
from reasonrec.rewards.collaborative import CoVisits
from reasonrec.rewards.registry import WeightedRewards
from reasonrec.rewards.sets import Codewords
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import ItemIndex, load_codewords

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 64  # prompts that are read at a time behind a chain


class Texts(Sequence[str]):
    """Decoded completions, decoded when a reward looks at them; most rewards never do.

    Args:
        ids: Token ids of each.
        decode: Turns the ids of all of them into text.
    """

    def __init__(self, ids: Sequence[Sequence[int]], decode: Callable[[Sequence[Sequence[int]]], list[str]]) -> None:
        self._ids, self._decode = ids, decode
        self._texts: list[str] | None = None

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """One text, or several."""
        if self._texts is None:
            self._texts = self._decode(self._ids)
        return self._texts[index]


@dataclass
class Scores:
    """What each rollout is worth; one row per rollout.

    Attributes:
        values: (rows, rewards) float64, NaN where a reward had nothing to say.
        total: (rows,) float64 weighted sum, NaN for rollouts that cannot be scored.
        hits: (rows,) bool; the answer is the target.
        levels: (rows,) int64; codes shared with the target from the first one on.
        permuted_total: (rows,) the sum under another prompt's target; NaN where it was not computed.
        permuted_hits: (rows,) bool, likewise.
    """

    values: NDArray[np.float64]
    total: NDArray[np.float64]
    hits: NDArray[np.bool_]
    levels: NDArray[np.int64]
    permuted_total: NDArray[np.float64]
    permuted_hits: NDArray[np.bool_]

    def take(self, rows: NDArray[np.int64]) -> Scores:
        """Some rows, in the order given."""
        return Scores(**{name: value[rows] for name, value in vars(self).items()})

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        """Several, one after the other."""
        return cls(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in vars(parts[0])})


@dataclass(frozen=True)
class Scorer:
    """Parses rollouts once and calls the rewards.

    Attributes:
        rewards: The rewards of the run.
        policy: How the model reads and answers, on its device.
        reasoning: Whether completions start with a chain.
        context: Keywords that are the same for every batch (`calling.CONTEXT_ON_REQUEST`), where rewards need them.

    Raises:
        UserError: If a reward wants a list that no search makes.
    """

    rewards: WeightedRewards
    policy: Policy
    reasoning: bool
    context: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a list that is too long before anything is rolled out."""
        most = min(MAX_K, MAX_BEAMS)
        for reward in self.rewards.rewards:
            if "beam_items" in reward.requires and reward.width > most:
                raise UserError(f"reward {reward.name!r}: k={reward.width} has to be at most {most:,}; lower it")

    @cached_property
    def parser(self) -> Parse:
        """Takes completions apart, in the mode of the run."""
        return self.policy.parser(reasoning=self.reasoning)

    def shortened(self, prompts: RlPrompts) -> str:
        """How many prompts have fewer targets left than rewards look ahead to, as a line; empty if none has."""
        horizon, size = self.rewards.horizon, len(prompts)
        short = int((prompts.later(np.arange(size), horizon - 1) < 0).sum())
        line = f"horizon={horizon}: {short} of {size} prompts have fewer targets left in their training sequence"
        return f"{line}, and look ahead to those" if short else ""

    def __call__(
        self,
        model: PreTrainedModel,
        rollouts: Rollouts,
        prompts: RlPrompts,
        numbers: NDArray[np.int64],
        permuted: NDArray[np.int64] | None,
    ) -> Scores:
        """Score rollouts.

        Args:
            model: The policy, for rewards that need it (below PEFT's wrapper, in evaluation mode).
            rollouts: What it wrote.
            prompts: The data.
            numbers: (rows,) prompt of each rollout.
            permuted: (rows,) another prompt whose target it is scored against for comparison.

        Raises:
            UserError: If a reward raises or returns something else than a number or None per completion.
        """
        parsed = self.parser(rollouts.completion_ids, rollouts.cut.tolist())
        batch: dict[str, Any] = {
            **self.context,
            **parsed.columns(),
            "prompts": Texts(rollouts.prompt_ids, self.policy.decode),
            "completions": Texts(rollouts.completion_ids, self.policy.decode),
            "completion_ids": rollouts.completion_ids,
            "history_items": [prompts.history(number).tolist() for number in numbers],
            "reasoning": self.reasoning,
        }
        required = self.rewards.requires
        batch |= self.policy.observed(model, rollouts, required)
        if "beam_items" in required:
            batch["beam_items"] = self._lists(model, rollouts)
        values, total, hits = self._against(model, rollouts, batch, prompts, numbers)
        levels = self.policy.levels(parsed, prompts.target[numbers])
        permuted_total, permuted_hits = np.full(len(total), np.nan), np.zeros_like(hits)
        if permuted is not None and "target_log_prob" not in required:  # that would be read a second time
            _, permuted_total, permuted_hits = self._against(model, rollouts, batch, prompts, permuted)
        return Scores(values, total, hits, levels, permuted_total, permuted_hits)

    def _against(
        self,
        model: PreTrainedModel,
        rollouts: Rollouts,
        batch: dict[str, Any],
        prompts: RlPrompts,
        numbers: NDArray[np.int64],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """What the answers are worth if these prompts' targets, and those that followed, are right."""
        later = []
        for places in range(1, self.rewards.horizon):
            behind = prompts.later(numbers, places)
            rows = np.flatnonzero(behind >= 0)
            if not len(rows):
                break
            later.append(Later(rows, self._told(model, rollouts.take(rows), prompts, behind[rows])))
        values = self.rewards(later=later, **batch, **self._told(model, rollouts, prompts, numbers))
        hits = np.array(batch["predicted_items"]) == prompts.target[numbers]
        return values, self.rewards.total(values), hits

    def _told(
        self, model: PreTrainedModel, rollouts: Rollouts, prompts: RlPrompts, numbers: NDArray[np.int64]
    ) -> dict[str, Any]:
        """What rewards are told about the targets of these prompts, one for each rollout."""
        target, required = prompts.target[numbers], self.rewards.requires
        told = {"target_items": target.tolist(), **self.policy.columns(target)}
        if "target_rating" in required:
            assert prompts.rating is not None  # `build_scorer` looked
            told["target_rating"] = [None if np.isnan(r) else float(r) for r in prompts.rating[numbers]]
        if "target_log_prob" in required:
            told["target_log_prob"] = self._log_probs(model, rollouts, target)
        return told

    def _lists(self, model: PreTrainedModel, rollouts: Rollouts) -> list[list[int]]:
        """The items found behind each begin marker; equal chains are read once."""
        rows = self._opened(rollouts)
        prompts = list(dict.fromkeys(rows))
        most = self.policy.catalogue.n_items
        k, width = (min(wanted, most) for wanted in (self.rewards.width, max(self.rewards.width, BEAM)))
        items = rank(self.policy, model, prompts, Ranking(k, width, batch_size=_ROWS)).items
        found = dict(zip(prompts, items.tolist(), strict=True))
        return [found[row] for row in rows]

    def _log_probs(self, model: PreTrainedModel, rollouts: Rollouts, target: NDArray[np.int64]) -> list[float]:
        """The log-probability of each target behind the begin marker; equal cases are read once."""
        rows = list(zip(self._opened(rollouts), target.tolist(), strict=True))
        cases = list(dict.fromkeys(rows))
        items = np.array([[item] for _, item in cases], dtype=np.int64)
        scores = score(self.policy, model, [prompt for prompt, _ in cases], items, batch_size=_ROWS)
        found = dict(zip(cases, scores[:, 0].tolist(), strict=True))
        return [found[row] for row in rows]

    def _opened(self, rollouts: Rollouts) -> list[tuple[int, ...]]:
        """Prompt and completion up to the begin marker, of each rollout."""
        size = len(rollouts)
        opened = rollouts.opened(self.policy.answers.begin_id) if self.reasoning else np.zeros(size, dtype=np.int64)
        rows = zip(rollouts.prompt_ids, rollouts.completion_ids, opened, strict=True)
        return [(*prompt, *completion[:stop]) for prompt, completion, stop in rows]


def build_scorer(
    rewards: WeightedRewards, policy: Policy, dataset: Dataset, *, reasoning: bool, index: str | None = None
) -> Scorer:
    """Rewards, with what these need from the training data and from the item index.

    Args:
        rewards: The rewards of the run.
        policy: How the model reads and answers.
        dataset: The training data.
        reasoning: Whether completions start with a chain.
        index: Folder of the item index, if that is known.

    Raises:
        UserError: If a reward reads ratings or categories, and the data have none; or vectors of codes, and no index
            has them.
    """
    context: dict[str, Any] = {}
    asking = {name: reward.name for reward in rewards.rewards for name in reward.requires}
    if "target_rating" in asking and "ratings" not in dataset.train.columns:
        raise UserError(
            f"reward {asking['target_rating']!r} reads ratings, and {dataset.path} has none: prepare it anew with "
            "interaction_columns.rating, or leave the reward out"
        )
    if "categories" in asking:
        context["categories"] = policy.catalogue.categories
        if (context["categories"] < 0).all():
            raise UserError(
                f"reward {asking['categories']!r} reads categories, and no item of {dataset.path} has one: prepare it "
                "anew with item_columns.category, or leave the reward out"
            )
    if "codewords" in asking:
        context["codewords"] = _codewords(asking["codewords"], policy.catalogue.codes, index)
    if "similarity" in asking:
        sequences = Sequences.of(dataset.train)
        owner = np.repeat(np.arange(len(sequences)), sequences.lengths)
        window = None if dataset.facts["order"] == "set" else 10
        context["similarity"] = CoVisits(sequences.items(0, len(sequences)), owner, dataset.n_items, window)
    if "train_counts" in asking:
        context["train_counts"] = policy.catalogue.items["train_count"].to_numpy()
    return Scorer(rewards, policy, reasoning, context)


def _codewords(reward: str, codes: ItemIndex, folder: str | None) -> Codewords:
    """The vectors of a model's codes, from the index that it was trained with."""
    needs = f"reward {reward!r} reads vectors of codes"
    if folder is None:
        raise UserError(f"{needs}, and the model does not say where its item index is: set index")
    if not np.array_equal(ItemIndex.load(folder).codes, codes.codes):
        raise UserError(f"{needs}, and index={folder} has other codes than the model: {OTHER}")
    return Codewords(codes.codes[:, :-1], load_codewords(folder, codes.depth))


def stand_in(name: str) -> Callable[..., list[float]]:
    """Stands for a reward in TRL's logs; the rewards themselves were called before."""

    def scored_before(**_: Any) -> list[float]:
        raise AssertionError("rewards are computed with the rollouts")

    scored_before.__name__ = name
    return scored_before

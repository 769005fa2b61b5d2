"""What rollouts are worth: the configured rewards, beside what they would be if every target were another prompt's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from numpy.typing import NDArray

from reasonrec.data_gen.schema import Dataset
from reasonrec.data_gen.tasks.rl_prompts import RlPrompts
from reasonrec.recipes.decoding.prefix import padded, read
from reasonrec.recipes.decoding.sample import Rollouts
from reasonrec.recipes.decoding.score import score_items
from reasonrec.recipes.decoding.search import beam_search
from reasonrec.recipes.models.checkpoint import Bundle
from reasonrec.rewards.collaborative import CoVisits
from reasonrec.rewards.exact import exact_hits
from reasonrec.rewards.parse import Parsed, Parser
from reasonrec.rewards.prefix import common_prefix
from reasonrec.rewards.registry import WeightedRewards
from reasonrec.tokenizers.trie import Trie
from reasonrec.tokenizers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BEAM = 20  # width of the search behind a chain, for rewards that ask for `beam_items`
_ROWS = 64  # prompts that are read at a time for it


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
        parser: Takes completions apart, in the mode of the run.
        item_codes: Codes of each item.
        trie: Trie of the items, on the model's device.
        vocabulary: Where the codes stand.
        decode: Turns token ids into text.
        pad_id: Token to pad with.
        context: Keywords that are the same for every batch (`similarity`, `train_counts`), where rewards need them.
    """

    rewards: WeightedRewards
    parser: Parser
    item_codes: Sequence[tuple[int, ...]]
    trie: Trie
    vocabulary: Vocabulary
    decode: Callable[[Sequence[Sequence[int]]], list[str]]
    pad_id: int
    context: Mapping[str, Any] = field(default_factory=dict)

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
            "prompts": Texts(rollouts.prompt_ids, self.decode),
            "completions": Texts(rollouts.completion_ids, self.decode),
            "completion_ids": rollouts.completion_ids,
            "history_items": [prompts.history(number).tolist() for number in numbers],
            "depth": self.parser.depth,
            "reasoning": self.parser.reasoning,
        }
        target = prompts.target[numbers]
        required = self.rewards.requires
        if "beam_items" in required:
            batch["beam_items"] = self._behind_chains(model, rollouts, None)
        if "target_log_prob" in required:
            batch["target_log_prob"] = self._behind_chains(model, rollouts, target)
        values, total, hits = self._against(batch, parsed, target)
        codes = [self.item_codes[item] for item in target]
        pairs = zip(parsed.predicted_codes, codes, strict=True)
        levels = np.array([common_prefix(p, t) if p else 0 for p, t in pairs], dtype=np.int64)
        permuted_total, permuted_hits = np.full(len(total), np.nan), np.zeros_like(hits)
        if permuted is not None and "target_log_prob" not in required:  # that would be read a second time
            _, permuted_total, permuted_hits = self._against(batch, parsed, prompts.target[permuted])
        return Scores(values, total, hits, levels, permuted_total, permuted_hits)

    def _against(
        self, batch: dict[str, Any], parsed: Parsed, target: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        codes = [self.item_codes[item] for item in target]
        values = self.rewards(**batch, target_items=target.tolist(), target_codes=codes)
        return values, self.rewards.total(values), exact_hits(parsed.predicted_codes, codes)

    @torch.no_grad()
    def _behind_chains(
        self, model: PreTrainedModel, rollouts: Rollouts, target: NDArray[np.int64] | None
    ) -> list[Any]:
        """The beam behind each begin marker, or the log-probability of a target there; equal cases are read once."""
        begin = self.vocabulary.begin_id
        prefixes = []
        for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
            stop = completion.index(begin) + 1 if begin in completion else 0
            prefixes.append((*prompt, *completion[:stop]))
        items = [-1] * len(prefixes) if target is None else target.tolist()
        cases = list(dict.fromkeys(zip(prefixes, items, strict=True)))
        found: dict[tuple[tuple[int, ...], int], Any] = {}
        for chunk in (cases[i : i + _ROWS] for i in range(0, len(cases), _ROWS)):
            ids, seen = padded([prefix for prefix, _ in chunk], self.pad_id, model.device)
            if target is None:
                k = min(BEAM, self.trie.n_items)
                beams = beam_search(model, self.trie, self.vocabulary, ids, seen, k=k, num_beams=k)
                found.update(zip(chunk, beams.items.tolist(), strict=True))
            else:
                gold = torch.tensor([[item] for _, item in chunk], device=model.device)
                prefix = read(model, ids, seen, room=self.trie.depth, ahead=self.trie.depth)
                scores = score_items(model, self.trie, self.vocabulary, prefix, gold)
                found.update(zip(chunk, scores[:, 0].tolist(), strict=True))
        return [found[case] for case in zip(prefixes, items, strict=True)]


def build_scorer(
    rewards: WeightedRewards, bundle: Bundle, dataset: Dataset, close_ids: tuple[int, ...], *, reasoning: bool
) -> Scorer:
    """Parser and rewards, with what these need from the training data.

    Args:
        rewards: The rewards of the run.
        bundle: Catalogue and tokenizer.
        dataset: The training data.
        close_ids: What ends a chain.
        reasoning: Whether completions start with a chain.
    """
    tokenizer = bundle.tokenizer
    context: dict[str, Any] = {}
    if "similarity" in rewards.requires:
        sequences = [np.asarray(items) for items in dataset.train["items"].to_list()]
        owner = np.repeat(np.arange(len(sequences)), [len(items) for items in sequences])
        window = None if dataset.facts["order"] == "set" else 10
        context["similarity"] = CoVisits(np.concatenate(sequences), owner, dataset.n_items, window)
    if "train_counts" in rewards.requires:
        context["train_counts"] = bundle.catalogue.items["train_count"].to_numpy()
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    parser = Parser(
        bundle.vocabulary, bundle.index, reasoning=reasoning, opened=not reasoning, close_ids=close_ids, end_ids=ends
    )
    return Scorer(
        rewards,
        parser,
        bundle.index.tuples(),
        bundle.trie,
        bundle.vocabulary,
        lambda ids: tokenizer.batch_decode(ids, skip_special_tokens=True),
        tokenizer.pad_token_id,
        context,
    )

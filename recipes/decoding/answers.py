"""What the engine asks of a policy: how an answer is opened, written, ranked and scored behind what was read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from reasonrec.recipes.decoding.backbone import last_hidden
from reasonrec.recipes.decoding.prefix import Prefix, padded, read
from reasonrec.recipes.decoding.prior import Prior, Tree
from reasonrec.recipes.decoding.search import Exclude, Found
from reasonrec.recipes.decoding.shared_prefix import shared_hidden

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from reasonrec.recipes.decoding.branches import Lanes
    from reasonrec.recipes.decoding.sample import Sampler, Step

Scored = tuple[Tensor, Tensor, Tensor]  # log-probability, entropy, and whether it is the most probable: (n,) each


class Choices(NamedTuple):
    """What an item was chosen from, token by token.

    Attributes:
        log_probs: (rows, levels, width) of the nodes that could follow; -inf where there is none.
        node: (rows, levels, width) these nodes, -1 where there is none.
    """

    log_probs: Tensor
    node: Tensor


class Answers(ABC):
    """The answers of a policy, in training, rollouts and inference alike.

    Attributes:
        begin_id: The token that opens an answer, the last one of every prompt.
        longest: Tokens of the longest answer.
    """

    begin_id: int
    longest: int

    @abstractmethod
    def to(self, device: torch.device | str) -> None:
        """Move what is looked up to the model's device."""

    # -- inference

    def room(self, width: int, chains: int = 1) -> int:
        """Slots that `rank` needs behind each prompt, or behind each of several chains."""
        return 0

    def scored_room(self, n: int) -> int:
        """Slots that `score` needs for `n` items."""
        return 0

    def read(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int, room: int) -> Prefix:
        """Read prompts that end with the begin marker.

        Args:
            model: Causal LM, in evaluation mode.
            prompts: Token ids of each.
            pad_id: Token to pad with.
            room: Slots to keep behind them.
        """
        ids, seen = padded(prompts, pad_id, model.device)
        return read(model, ids, seen, room=room, ahead=self.longest)

    @abstractmethod
    def rank(
        self,
        model: PreTrainedModel,
        prefix: Prefix,
        *,
        k: int,
        width: int,
        exclude: Exclude | None = None,
        exact: bool = False,
        chains: int = 1,
        prior: Prior | None = None,
    ) -> Found:
        """The most probable items of the catalogue.

        Args:
            model: The model that read the prefix.
            prefix: (users * chains) rows, those of a user together, with `room` slots left.
            k: Items to return.
            width: Width of the search, where it is one.
            exclude: For each user the items that must not appear.
            exact: Search on until the list is proven; of one chain only.
            chains: Chains of each user; an item's score is the log of its mean probability behind them.
            prior: What the model is pooled with, behind one chain; it knows what is excluded.
        """

    @abstractmethod
    def score(self, model: PreTrainedModel, prefix: Prefix, items: Tensor, prior: Prior | None = None) -> Tensor:
        """Log-probabilities of given items.

        Args:
            model: The model that read the prefix.
            prefix: Prompts, with `scored_room` slots left.
            items: (rows, n) item numbers, each at most once per row; -1 is no item.
            prior: What the model is pooled with; an excluded item then has no probability.

        Returns:
            (rows, n) float32, -inf for no item.
        """

    @property
    @abstractmethod
    def tree(self) -> Tree:
        """The answers of all items, on the model's device."""

    @abstractmethod
    def choices(self, model: PreTrainedModel, prefix: Prefix, items: Tensor) -> Choices:
        """What each token of an item's answer was chosen from.

        Args:
            model: The model that read the prefix.
            prefix: Prompts, with `scored_room(1)` slots left.
            items: (rows,) item numbers.
        """

    @abstractmethod
    def write(self, lanes: Lanes, sampler: Sampler, uniform: Tensor | None, steps: list[Step]) -> Tensor:
        """Let every lane, whose answer was opened, write it.

        Args:
            lanes: The rollouts.
            sampler: How to draw.
            uniform: (prompts, lanes, tokens) noise, that of answers behind `max_chain`; None if greedy.
            steps: What was written goes here.

        Returns:
            (prompts, lanes) item of each.
        """

    # -- training

    def hidden(self, model: PreTrainedModel, labels: Tensor, answers_only: bool, inputs: dict[str, Any]) -> Tensor:
        """Hidden states that predict the last tokens of each row: all that have a label.

        Of rollouts, each prompt is read once where that pays.

        Args:
            model: Causal LM below PEFT's wrapper.
            labels: (batch, length).
            answers_only: See `policies.base.install`.
            inputs: What the model was called with: `input_ids`, `attention_mask` …

        Returns:
            (batch, places, width) for the last `places` tokens, at most length - 1.
        """
        seen = inputs.get("attention_mask")
        if answers_only and seen is not None and bool((labels != -100).any()):
            # As in the rollout: a prompt's first token has position 0, however much padding stands in front of it.
            inputs["position_ids"] = (seen.cumsum(-1) - 1).clamp(min=0)
            first = int((labels != -100).any(0).int().argmax())
            shared = shared_hidden(model, inputs["input_ids"], seen, first)
            if shared is not None:
                return shared
        return last_hidden(model, **inputs)[:, :-1]

    @abstractmethod
    def split(self, input_ids: Tensor, labels: Tensor, answers_only: bool) -> tuple[Tensor, Tensor]:
        """Which labels are part of an answer, and which are words; others are certain.

        Args:
            input_ids: (batch, length).
            labels: (batch, length), -100 where there is none.
            answers_only: See `policies.base.install`.

        Returns:
            Booleans (batch, length - 1) for the positions 1, 2, …
        """

    @abstractmethod
    def log_probs(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        row: Tensor,
        position: Tensor,
        hidden: Tensor,
        temperature: float,
    ) -> Scored:
        """Score the tokens of answers.

        Args:
            model: Causal LM below PEFT's wrapper.
            input_ids: (batch, length) token ids; they hold the labels.
            row: (n,) batch row of each label.
            position: (n,) its position there.
            hidden: (n, width) hidden states that predict the labels.
            temperature: What the logits are divided by.
        """

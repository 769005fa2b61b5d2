"""Chains that another engine writes: what it is asked, and how what it wrote becomes rollouts of the policy.

An engine writes free text only. Where a chain ends, what is forced behind it and the item's codes are ours, as in
`sample.write_chains`: whatever an engine wrote beyond the end of a chain is dropped. The policy reads each chain once,
behind a prompt that is read once, and says how probable it is: by these numbers, not by the engine's, an update is
computed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from reasonrec.recipes.decoding.branches import Lanes
from reasonrec.recipes.decoding.prefix import extend_all, padded, read
from reasonrec.tokenizers.rows import text_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from reasonrec.recipes.decoding.answers import Answers
    from reasonrec.recipes.decoding.sample import Sampler, Step

TEXT_ROWS = 64  # rows whose full-vocabulary distribution exists at a time


class Written(NamedTuple):
    """What an engine wrote behind prompts, the generations of a prompt one after the other.

    Attributes:
        token_ids: Token ids of each row, the one that ended it included.
        log_probs: The engine's own log-probability of each token, if it gives them.
    """

    token_ids: list[list[int]]
    log_probs: list[list[float]] | None


class ChainWriter(Protocol):
    """An engine that writes chains, with the weights of the policy."""

    def update(self, step: int) -> None:
        """Take over the policy's weights.

        Args:
            step: Steps trained; the weights are the same as long as it is.
        """

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        sampler: Sampler,
        *,
        stop_ids: Sequence[int],
        noise: NDArray[np.float64] | None,
    ) -> Written:
        """Write the chains of some prompts, from the full vocabulary at the sampler's temperature.

        Args:
            prompts: Token ids of each.
            sampler: How to draw: `generations`, `temperature`, `max_chain`, `close_ids`, `greedy`.
            stop_ids: Tokens that end a chain, beside `close_ids` in a row and `max_chain` tokens.
            noise: (prompts, generations, max_chain) uniform numbers that decide what is drawn, or seed what does;
                None if greedy.
        """


class Chain(NamedTuple):
    """A chain as it ended.

    Attributes:
        token_ids: What was drawn, a begin marker included.
        opened: It ended with the begin marker.
        cut: It ended with the sequence, or had to be cut.
    """

    token_ids: list[int]
    opened: bool
    cut: bool

    @property
    def drawn(self) -> int:
        """Tokens, without the begin marker."""
        return len(self.token_ids) - self.opened


def ended(
    token_ids: Sequence[int], sampler: Sampler, begin_id: int, eos_ids: Collection[int], *, row: int = 0
) -> Chain:
    """Where what an engine wrote stops being a chain.

    Args:
        token_ids: What it wrote.
        sampler: Has `max_chain` and `close_ids`.
        begin_id: The begin marker.
        eos_ids: Tokens that end a sequence; where the begin marker is one of them, it opens an answer.
        row: Its number, for the message.

    Raises:
        ValueError: If it stops where no chain does.
    """
    close, ids = list(sampler.close_ids), list(token_ids[: sampler.max_chain])
    for n, token in enumerate(ids, 1):
        if token == begin_id:
            return Chain(ids[:n], True, False)
        if token in eos_ids:
            return Chain(ids[:n], False, True)
        if close and ids[max(n - len(close), 0) : n] == close:
            return Chain(ids[:n], False, False)
    if len(ids) < sampler.max_chain:
        raise ValueError(f"chain {row} of the engine stops behind {len(ids)} tokens, and nothing ends it there")
    return Chain(ids, False, True)


class Reading(NamedTuple):
    """Chains that the policy has read.

    Attributes:
        lanes: A lane for each, the begin marker last.
        chain: (rows, 1) int64 tokens that were drawn for each.
        cut: (rows, 1) bool; whether the chain had to be cut.
        gap: (rows,) mean absolute difference between the engine's log-probabilities and the policy's; NaN if the
            engine gives none.
    """

    lanes: Lanes
    chain: Tensor
    cut: Tensor
    gap: NDArray[np.float64]


@torch.no_grad()
def read_chains(
    model: PreTrainedModel,
    answers: Answers,
    prompts: Sequence[Sequence[int]],
    written: Written,
    sampler: Sampler,
    eos_ids: Sequence[int],
    pad_id: int,
    steps: list[Step],
) -> Reading:
    """Read chains, and what is forced behind them, with the policy's own weights.

    Args:
        model: Causal LM, in evaluation mode.
        answers: The policy's answers.
        prompts: Token ids of each prompt.
        written: Chains of these prompts.
        sampler: How they were drawn.
        eos_ids: Tokens that end a sequence.
        pad_id: Token to pad with.
        steps: What was written goes here.

    Raises:
        UserError: If the model cannot be searched, or its context is too short.
        ValueError: If a chain stops where none does.
    """
    begin, device = answers.begin_id, model.device
    chains = [ended(ids, sampler, begin, eos_ids, row=row) for row, ids in enumerate(written.token_ids)]
    forced = [[*(sampler.close_ids if c.cut else ()), *(() if c.opened else (begin,))] for c in chains]
    rows = [torch.tensor([*c.token_ids, *f]) for c, f in zip(chains, forced, strict=True)]
    token = pad_sequence(rows, batch_first=True).to(device)  # (rows, width)
    place = torch.arange(token.shape[1], device=device)
    there = place < torch.tensor([len(row) for row in rows], device=device)[:, None]
    chosen = place < torch.tensor([len(c.token_ids) for c in chains], device=device)[:, None]

    ahead = sampler.max_chain + len(sampler.close_ids) + 1 + answers.longest
    prompt = read(model, *padded(prompts, pad_id, device), room=0, ahead=ahead)
    prefix = Lanes(model, prompt, sampler.generations).prefixes(token.shape[1] + answers.longest)
    behind, hidden = extend_all(model, prefix, token, there.long())
    before = torch.cat([prefix.hidden[:, None], hidden[:, :-1]], 1)[chosen]  # what each token was drawn from
    gain = torch.zeros(token.shape, device=device)
    gain[chosen] = torch.cat(
        [
            (text_logits(model, h) / sampler.temperature).log_softmax(-1).gather(1, t[:, None])[:, 0]
            for h, t in zip(before.split(TEXT_ROWS), token[chosen].split(TEXT_ROWS), strict=True)
        ]
    )
    lanes = Lanes(model, behind, 1)
    lanes.number = torch.arange(len(rows), device=device)[:, None] % sampler.generations
    steps += zip(*(part[..., None].unbind(1) for part in (token, gain, chosen, there)), strict=True)
    return Reading(
        lanes,
        torch.tensor([[c.drawn] for c in chains], device=device),
        torch.tensor([[c.cut] for c in chains], device=device),
        _gap(written, gain.cpu().numpy(), chosen.cpu().numpy()),
    )


def _gap(written: Written, gain: np.ndarray, chosen: np.ndarray) -> NDArray[np.float64]:
    if written.log_probs is None:
        return np.full(len(gain), np.nan)
    found = zip(written.log_probs, gain, chosen.sum(1), strict=True)
    return np.array([float(np.abs(np.array(theirs[:n]) - ours[:n]).mean()) for theirs, ours, n in found])

"""Chains written by transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from reasonrec.recipes.decoding.chain_writers import Written
from reasonrec.recipes.decoding.prefix import padded
from reasonrec.recipes.decoding.sample import Sampler, check_finite, draw

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class GenerateWriter:
    """Lets `generate` write: its loop, its cache, every generation a row that reads its prompt anew.

    What is drawn is decided by the noise that the sampler would use, so the chains are those of the sampler, up to
    rounding: it shows what another engine changes, and what it does not.

    Args:
        model: The policy's causal LM, below PEFT's wrapper, in evaluation mode when it is asked.
        pad_id: Token to pad with.
    """

    def __init__(self, model: PreTrainedModel, pad_id: int) -> None:
        self._model: Any = model
        self._pad_id = pad_id

    def update(self, step: int) -> None:
        """Nothing to take over: the weights are the policy's own."""

    @torch.no_grad()
    def write(
        self,
        prompts: Sequence[Sequence[int]],
        sampler: Sampler,
        *,
        stop_ids: Sequence[int],
        noise: NDArray[np.float64] | None,
    ) -> Written:
        """See `ChainWriter`."""
        model = self._model
        ids, mask = (
            part.repeat_interleave(sampler.generations, 0) for part in padded(prompts, self._pad_id, model.device)
        )
        uniform = None if noise is None else torch.from_numpy(noise).to(model.device).flatten(0, 1)
        drawing = _Draw(sampler.temperature, uniform)
        own = model.generation_config
        # In place of the base model's, which may bring penalties that the policy knows nothing of.
        model.generation_config = GenerationConfig(
            max_new_tokens=sampler.max_chain, eos_token_id=list(stop_ids), pad_token_id=self._pad_id, use_cache=True
        )
        try:
            out = model.generate(
                ids,
                attention_mask=mask,
                logits_processor=LogitsProcessorList([drawing]),
                stopping_criteria=StoppingCriteriaList([_Closed(sampler.close_ids, ids.shape[1])]),
            )
        finally:
            model.generation_config = own
        # The padding behind a chain is behind its end, which the reader finds.
        return Written(out[:, ids.shape[1] :].tolist(), torch.stack(drawing.gains, 1).tolist())


class _Draw(LogitsProcessor):
    """Leaves only what is drawn, so that the greedy search takes it."""

    def __init__(self, temperature: float, uniform: Tensor | None) -> None:
        self._temperature, self._uniform = temperature, uniform
        self.gains: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step, logits = len(self.gains), scores / self._temperature
        check_finite(logits, f"token {step} of the chains")
        token, gain = draw(logits.log_softmax(-1), None if self._uniform is None else self._uniform[:, step])
        self.gains.append(gain)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


class _Closed(StoppingCriteria):
    """Rows that end with the closing delimiter."""

    def __init__(self, close_ids: Sequence[int], start: int) -> None:
        self._close, self._start = close_ids, start

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        close = torch.tensor(self._close, dtype=torch.int64, device=input_ids.device)
        if len(close) == 0 or input_ids.shape[1] - self._start < len(close):
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return (input_ids[:, -len(close) :] == close).all(-1)

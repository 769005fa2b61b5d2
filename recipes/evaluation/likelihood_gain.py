"""Does a chain raise the target's log-probability under a trained model? The last filter of traces.

The traces that fail are marked, not removed: what the filter does to a model shows only beside the unfiltered arm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm import tqdm

from reasonrec.data_gen.reasoning.traces import Trace
from reasonrec.data_gen.tasks.reasoning import Mention, TraceChains
from reasonrec.recipes.policies.semantic_id import install_item_policy
from reasonrec.recipes.recommender import Recommender


class ChainGain:
    """Scores chains with a model.

    Args:
        recommender: The trained model.
        mention: How chains name items.
        batch_size: Examples scored together.
    """

    def __init__(self, recommender: Recommender, mention: Mention, batch_size: int = 16) -> None:
        self.recommender = recommender
        self.batch_size = batch_size
        self._mention: Mention = mention
        bundle = recommender.bundle
        install_item_policy(recommender.model, bundle.trie.to(recommender.model.device), bundle.vocabulary)

    def __call__(self, traces: Sequence[Trace]) -> list[float]:
        """By how much each chain raises the log-probability of its trace's target, in nats."""
        bundle = self.recommender.bundle
        chains, prompts = TraceChains(bundle.prompts, bundle.catalogue.titles, traces, self._mention), bundle.prompts
        examples = []
        for trace in traces:
            answer = prompts.item_token_ids[trace.target]
            direct = prompts.direct(trace.history)
            reasoned = [*direct[:-1], *chains.ids(trace), prompts.begin_id]
            examples += [(prompt + answer, len(prompt)) for prompt in (direct, reasoned)]
        order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))
        scores = [0.0] * len(examples)
        for begin in tqdm(range(0, len(order), self.batch_size), desc="gain of chains", unit="batch", disable=None):
            chosen = order[begin : begin + self.batch_size]
            for i, score in zip(chosen, self._score([examples[i] for i in chosen]), strict=True):
                scores[i] = score
        return [with_chain - without for without, with_chain in zip(scores[::2], scores[1::2], strict=True)]

    @torch.no_grad()
    def _score(self, examples: Sequence[tuple[list[int], int]]) -> list[float]:
        model = self.recommender.model
        width = max(len(ids) for ids, _ in examples)
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in examples], device=model.device)
        place = torch.arange(width, device=model.device)
        begin = torch.tensor([start for _, start in examples], device=model.device)[:, None]
        end = torch.tensor([len(row) for row, _ in examples], device=model.device)[:, None]
        labels = torch.where((place >= begin) & (place < end), ids, -100)
        out = model(input_ids=ids, attention_mask=(place < end).long(), labels=labels, fused_lm_head=True)
        return [float(value) for value in out.log_probs.float().sum(1)]

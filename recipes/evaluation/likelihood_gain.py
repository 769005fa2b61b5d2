"""Does a chain raise the target's log-probability under a trained model? The last filter of traces.

The traces that fail are marked, not removed: what the filter does to a model shows only beside the unfiltered arm.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reasonrec.data_gen.reasoning.traces import Trace
from reasonrec.data_gen.tasks.reasoning import Mention, TraceChains
from reasonrec.recipes.policies.inference import score
from reasonrec.recipes.recommender import Recommender


class ChainGain:
    """Scores chains with a model.

    Args:
        recommender: The trained model.
        mention: How chains name items.
        batch_size: Prompts read together.
    """

    def __init__(self, recommender: Recommender, mention: Mention, batch_size: int = 16) -> None:
        self.recommender = recommender
        self.batch_size = batch_size
        self._mention: Mention = mention

    def __call__(self, traces: Sequence[Trace]) -> list[float]:
        """By how much each chain raises the log-probability of its trace's target, in nats."""
        policy = self.recommender.policy
        prompts = policy.prompts
        chains = TraceChains(prompts, policy.catalogue.titles, traces, self._mention)
        direct = [prompts.direct(trace.history) for trace in traces]
        opening = len(prompts.think_ids)  # is part of the prompt
        reasoned = [prompts.behind(trace.history, chains.ids(trace)[opening:]) for trace in traces]
        targets = np.array([[trace.target] for trace in traces] * 2, dtype=np.int64)
        scores = score(
            policy,
            self.recommender.model,
            [*direct, *reasoned],
            targets,
            batch_size=self.batch_size,
            progress="gain of chains",
        )
        without, with_chain = scores[:, 0].reshape(2, -1).astype(np.float64)
        gain: list[float] = (with_chain - without).tolist()
        return gain

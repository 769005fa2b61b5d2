"""A fixed set of validation cases, ranked from time to time during reinforcement learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reasonrec.data_gen.histories import UserHistory
from reasonrec.data_gen.schema import Dataset
from reasonrec.data_gen.tasks.choice import validation_sample
from reasonrec.recipes.decoding.sample import Sampler
from reasonrec.recipes.policies.base import Policy
from reasonrec.recipes.policies.inference import Ranking, rank, reason
from reasonrec.rewards.metrics import ndcg, rank_of_target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

K = 10


@dataclass(frozen=True)
class RankingProbe:
    """Ranks the cases as inference does: one greedy chain in reasoning mode, then the items.

    Attributes:
        policy: How the model reads and answers.
        histories: What is shown in each case.
        targets: Item of each case.
        exclude: Items that must not be recommended, for each case.
        max_chain: Longest chain; 0 is direct mode.
        num_beams: Width of the search.
        batch: Cases read at a time.
    """

    policy: Policy
    histories: Sequence[np.ndarray]
    targets: Sequence[int]
    exclude: Sequence[Sequence[int] | np.ndarray]
    max_chain: int = 0
    num_beams: int = 20
    batch: int = 32

    def __call__(self, model: PreTrainedModel, process: int, processes: int) -> list[dict[str, float]]:
        """Rank this process' share of the cases.

        Args:
            model: The policy's model, in evaluation mode.
            process: Number of this process.
            processes: How many there are.

        Returns:
            NDCG@10, HR@10 and, in reasoning mode, the chain's length, for each case.
        """
        mine = range(process, len(self.histories), processes)
        prompts, how = self.policy.prompts, Ranking(K, max(self.num_beams, K), batch_size=self.batch)
        exclude = [self.exclude[i] for i in mine]
        if self.max_chain:
            sampler = Sampler(1, max_chain=self.max_chain, close_ids=prompts.close_ids, greedy=True)
            opened = [prompts.reasoning(self.histories[i]) for i in mine]
            found = reason(self.policy, model, opened, how, sampler, exclude=exclude)
        else:
            found = rank(self.policy, model, [prompts.direct(self.histories[i]) for i in mine], how, exclude=exclude)
        place = rank_of_target(found.items, np.array([self.targets[i] for i in mine]))
        result = [
            {"ndcg@10": float(gain), "hr@10": float(hit)} for gain, hit in zip(ndcg(place, K), place > 0, strict=True)
        ]
        for case, tokens in zip(result, found.tokens, strict=False):
            case["chain_length"] = float(tokens)
        return result


def build_probe(
    policy: Policy, dataset: Dataset, rows: int, max_history: int, max_chain: int = 0
) -> RankingProbe | None:
    """A seeded sample of the validation cases.

    Args:
        policy: How the model reads and answers.
        dataset: The data set.
        rows: How many cases; 0 for no probe.
        max_history: Longest history in items.
        max_chain: Longest chain; 0 is direct mode.
    """
    sample = validation_sample(dataset, rows, "history", "masked", "target")
    if sample.height == 0:
        return None
    users, masks = UserHistory.of_rows(sample), policy.catalogue.mask_history
    return RankingProbe(
        policy,
        [user.last(max_history).shown for user in users],
        sample["target"].to_list(),
        [user.masked if masks else [] for user in users],
        max_chain,
    )

"""A fixed set of validation cases, ranked from time to time during reinforcement learning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from reasonrec.data_gen.histories import UserHistory
from reasonrec.recipes.decoding.prefix import padded, read
from reasonrec.recipes.decoding.sample import Sampler, write_chains
from reasonrec.recipes.decoding.search import search, search_room
from reasonrec.recipes.models.checkpoint import Bundle
from reasonrec.rewards.metrics import ndcg, rank_of_target
from reasonrec.tokenizers.trie import Trie
from reasonrec.tokenizers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

K = 10


@dataclass(frozen=True)
class RankingProbe:
    """Ranks the cases as inference does: one greedy chain in reasoning mode, then the item search.

    Attributes:
        prompts: Token ids of each case's prompt; in direct mode they end with the begin marker.
        targets: Item of each case.
        exclude: Items that must not be recommended, for each case.
        trie: Trie of the items.
        vocabulary: Where the codes stand.
        eos_ids: Tokens that end a sequence.
        pad_id: Token to pad with.
        max_chain: Longest chain; 0 is direct mode.
        close_ids: What ends a chain.
        num_beams: Width of the search.
        batch: Cases read at a time.
    """

    prompts: Sequence[list[int]]
    targets: Sequence[int]
    exclude: Sequence[Sequence[int] | np.ndarray]
    trie: Trie
    vocabulary: Vocabulary
    eos_ids: Sequence[int]
    pad_id: int
    max_chain: int = 0
    close_ids: tuple[int, ...] = ()
    num_beams: int = 20
    batch: int = 32

    def __call__(self, model: PreTrainedModel, process: int, processes: int) -> list[dict[str, float]]:
        """Rank this process' share of the cases.

        Args:
            model: The policy, in evaluation mode.
            process: Number of this process.
            processes: How many there are.

        Returns:
            NDCG@10, HR@10 and, in reasoning mode, the chain's length, for each case.
        """
        mine = range(process, len(self.prompts), processes)
        trie, result = self.trie.to(model.device), []
        for chunk in (mine[i : i + self.batch] for i in range(0, len(mine), self.batch)):
            prompts = [self.prompts[i] for i in chunk]
            beams = max(self.num_beams, K)
            exclude = trie.excluded_ranks([self.exclude[i] for i in chunk])
            chains = np.zeros(len(chunk))
            if self.max_chain:
                sampler = Sampler(1, max_chain=self.max_chain, close_ids=self.close_ids, greedy=True)
                written = write_chains(
                    model,
                    self.vocabulary,
                    prompts,
                    sampler,
                    eos_ids=self.eos_ids,
                    pad_id=self.pad_id,
                    room=search_room(trie, beams),
                )
                prefix, chains = written.prefix, written.chain
            else:
                ids, mask = padded(prompts, self.pad_id, model.device)
                prefix = read(model, ids, mask, room=search_room(trie, beams), ahead=trie.depth)
            found = search(model, trie, self.vocabulary, prefix, k=K, num_beams=beams, excluded=exclude)
            rank = rank_of_target(found.items.cpu().numpy(), np.array([self.targets[i] for i in chunk]))
            gains = ndcg(rank, K)
            for place in range(len(chunk)):
                case = {"ndcg@10": float(gains[place]), "hr@10": float(rank[place] > 0)}
                result.append(case | ({"chain_length": float(chains[place])} if self.max_chain else {}))
        return result


def build_probe(
    bundle: Bundle,
    valid: pl.DataFrame,
    rows: int,
    max_history: int,
    render: Callable[[np.ndarray], list[int]],
    max_chain: int = 0,
    close_ids: tuple[int, ...] = (),
) -> RankingProbe | None:
    """A seeded sample of the validation cases.

    Args:
        bundle: Catalogue and tokenizer.
        valid: The validation cases.
        rows: How many cases; 0 for no probe.
        max_history: Longest history in items.
        render: Turns a history into the token ids of a prompt.
        max_chain: Longest chain; 0 is direct mode.
        close_ids: What ends a chain.
    """
    if rows == 0 or valid.height == 0:
        return None
    sample = valid.sample(min(rows, valid.height), seed=0)
    users, masks = UserHistory.of_rows(sample), bundle.catalogue.mask_history
    return RankingProbe(
        [render(user.last(max_history).shown) for user in users],
        sample["target"].to_list(),
        [user.masked if masks else [] for user in users],
        bundle.trie,
        bundle.vocabulary,
        [bundle.tokenizer.eos_token_id],
        bundle.tokenizer.pad_token_id,
        max_chain,
        close_ids,
    )

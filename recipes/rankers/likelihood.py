"""How likely a model finds held-out items, at once or behind chains: what tells arms of a training apart.

Nats for the next item among those that are not masked. A model has one temperature at each level of an answer, fitted
on one half of the users and judged on the other, both ways round.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from reasonrec.data_gen.histories import UserHistory
from reasonrec.recipes.rankers.pool import MODEL
from reasonrec.recipes.rankers.pooled import Heard
from reasonrec.recipes.rankers.reasoning import Reasoner, Thinking
from reasonrec.recipes.recommender import Recommender

Prompt = list[int]


def nats(
    recommender: Recommender,
    rows: pl.DataFrame,
    prompts: Sequence[Sequence[Prompt]] | None = None,
    log_weights: NDArray[np.floating] | None = None,
    *,
    batch_size: int = 16,
    progress: bool = False,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Negative log-likelihood of each target (rows,); behind several prompts, of its mean probability.

    Args:
        recommender: The model; its experts are not heard.
        rows: Cases with `user`, `history`, `masked` and `target`.
        prompts: What is read in each case, the begin marker last, equally many in all; the histories by default.
        log_weights: Log of the weight of each prompt (rows, prompts); all weigh the same by default.
        batch_size: Prompts read at a time; it does not change the result.
        progress: Show a progress bar.
        seed: Seed of the halves.
    """
    n = 1 if prompts is None else len(prompts[0])
    repeated = rows[np.repeat(np.arange(rows.height), n)]
    flat = None if prompts is None else [prompt for own in prompts for prompt in own]
    heard = Heard.of(recommender, {}, repeated, prompts=flat, batch_size=batch_size, progress=progress)
    losses = heard.losses([MODEL], seed).reshape(rows.height, n)
    weighed = np.full(losses.shape, -np.log(n)) if log_weights is None else log_weights
    mean: NDArray[np.float64] = -np.logaddexp.reduce(weighed - losses, axis=1)
    return mean


def behind_chains(
    recommender: Recommender, rows: pl.DataFrame, chains: Sequence[Sequence[Sequence[int]]]
) -> list[list[Prompt]]:
    """Each case's history, one of its chains, and what opens the answer.

    Args:
        recommender: The model.
        rows: The cases.
        chains: Token ids of the chains of each case, the closing delimiter included.
    """
    behind, shown = recommender.policy.prompts.behind, recommender.shown(UserHistory.of_rows(rows))
    return [[behind(history, chain) for chain in own] for history, own in zip(shown, chains, strict=True)]


def thought_nats(
    reasoner: Reasoner, rows: pl.DataFrame, thinking: Thinking, *, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The same behind chains of the model's own, which are blind to the targets.

    Args:
        reasoner: The model.
        rows: The cases.
        thinking: How chains are written.
        seed: Seed of the halves.

    Returns:
        Nats (rows,), and the lists that the model ranks behind the chains (rows, k).
    """
    thought = reasoner(UserHistory.of_rows(rows), thinking)
    prompts = behind_chains(reasoner.recommender, rows, thought.chains)
    found = nats(
        reasoner.recommender,
        rows,
        prompts,
        batch_size=reasoner.batch_size,
        progress=reasoner.progress,
        seed=seed,
    )
    return found, thought.items

"""Whether codes are made of text alone, or of text and what is used together: asked of validation, or told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.evaluation.intervals import mean_interval
from reasonrec.recipes.rankers.baselines import CoVisitation, TrainLog
from reasonrec.tokenizers.collaborative import Blend
from reasonrec.tokenizers.count_model import Counted, CountModel
from reasonrec.tokenizers.index import build_index
from reasonrec.tokenizers.quantizers.base import Quantizer
from reasonrec.tokenizers.said import Said
from reasonrec.tokenizers.terminal import say

KS = (2.0, 10.0, 50.0)  # train occurrences at which text and company weigh alike
MOST_ROWS = 4000
Codes = NDArray[np.integer]
Embeddings = NDArray[np.float32]


@dataclass(frozen=True)
class Tried:
    """Codes that were judged.

    Attributes:
        collaboration: k, 0 for text.
        loss: Nats for an item of the validation rows that were not fitted, by `tokenizers/count_model.py`.
        difference: To text, on the same rows.
        ci95: Its interval over users.
        train_loss: Of the last items of train sequences: they had a say in these codes.
        permuted_loss: With items' codes exchanged within tenths of popularity: what their skew alone is worth.
    """

    collaboration: float
    loss: float
    difference: float
    ci95: tuple[float, float]
    train_loss: float
    permuted_loss: float


class Made(NamedTuple):
    """What codes are made of.

    Attributes:
        embeddings: (items, dim).
        report: For the health report: what was chosen and what was tried; empty for text that was asked for.
        says: What text says of company, for items that come later; None where the embeddings are of text alone.
    """

    embeddings: Embeddings
    report: dict[str, Any]
    says: Said | None = None


def embeddings_for(
    dataset: Dataset,
    text: Embeddings,
    asked: float | Literal["auto"],
    quantizer: Quantizer,
    sizes: Sequence[int],
    *,
    seed: int = 0,
) -> Made:
    """What the codes of a dataset are made of.

    `auto` tries `KS`, and takes the best of them only if its loss is below that of text by a paired interval.

    Args:
        dataset: The dataset.
        text: (items, dim) vectors of the items' text.
        asked: k, 0 for text alone, or `auto`.
        quantizer: What makes codes of embeddings.
        sizes: Codes of each level.
        seed: Of decomposition, halves and intervals.

    Raises:
        UserError: If k is given and no two items stand together in train.
    """
    if not asked:
        return Made(text, {})
    log = TrainLog.of(dataset)
    together = CoVisitation(log, baskets=dataset.facts.get("order") == "set").together

    def codes(vectors: Embeddings) -> Codes:
        return build_index(quantizer.fit_encode(vectors), sizes).codes

    if asked != "auto":
        blend = Blend(together, log.counts, text, seed=seed)
        return Made(blend(asked), {"chosen": asked}, blend.says)
    fitted, judged = halves(dataset, seed)
    if not fitted.height or not judged.height or not together.nnz:
        say("collaboration: auto has no validation rows or no pairs to judge by; codes are made of text alone")
        return Made(text, {"chosen": 0.0})
    blend = Blend(together, log.counts, text, seed=seed)
    base = codes(text)
    judge = _Judge(dataset, log, fitted, judged, base, seed)
    tried = [judge(0.0, base)] + [judge(k, codes(blend(k))) for k in KS]
    best = min(tried[1:], key=lambda one: one.loss)
    chosen = best.collaboration if best.ci95[1] < 0 else 0.0
    for one in tried:
        low, high = one.ci95
        what = f"k = {one.collaboration:g}" if one.collaboration else "text alone"
        versus = f", {one.difference:+.3f} [{low:+.3f}, {high:+.3f}] against text" if one.collaboration else ""
        say(f"codes of {what}: {one.loss:.3f} nats for a validation item{versus}")
    say(f"collaboration: auto chose {f'k = {chosen:g}' if chosen else 'text alone'}")
    report = {"chosen": chosen, "tried": [asdict(one) for one in tried]}
    return Made(blend(chosen), report, blend.says) if chosen else Made(text, report)


def halves(dataset: Dataset, seed: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Validation rows, `MOST_ROWS` at most, of two halves of the users: to fit on, and to judge codes by."""
    rows = dataset.rows("valid")
    if rows.height > MOST_ROWS:
        rows = rows.sample(MOST_ROWS, seed=seed)
    users = rows["user"].unique().sort().to_numpy()
    drawn = np.random.default_rng(seed).permutation(users)[: len(users) // 2]
    fitted = np.isin(rows["user"].to_numpy(), drawn)
    return rows.filter(fitted), rows.filter(~fitted)


class _Judge:
    """Judges codes on the same halves of the same validation rows."""

    def __init__(
        self, dataset: Dataset, log: TrainLog, fitted: pl.DataFrame, judged: pl.DataFrame, text: Codes, seed: int
    ) -> None:
        self.train = Counted(log.popularity, log.pairs(1))
        self.fitted, self.judged, self.seed = fitted, judged, seed
        self.of_text = self._losses(text)
        tails = dataset.train.filter(pl.col("items").list.len() > 1).sample(fraction=1, shuffle=True, seed=seed)
        before = pl.col("items").list.head(pl.col("items").list.len() - 1)
        self.tails = tails.head(fitted.height + judged.height).select(
            before.alias("history"),
            pl.col("items").list.last().alias("target"),
            (before if dataset.facts.get("mask_history") else before.list.head(0)).alias("masked"),
        )
        order = np.random.default_rng(seed).permutation(len(log.popularity))
        by_popularity = order[np.argsort(log.popularity[order], kind="stable")]
        self.exchanged = np.empty(len(order), dtype=np.int64)
        for tenth in np.array_split(by_popularity, 10):
            self.exchanged[tenth] = np.roll(tenth, 1)

    def __call__(self, k: float, codes: Codes) -> Tried:
        mine = self._losses(codes) if k else self.of_text
        difference = mine - self.of_text
        return Tried(
            k,
            float(mine.mean()),
            float(difference.mean()),
            mean_interval(self.judged["user"].to_numpy(), difference, seed=self.seed),
            float(CountModel(codes, self.train, self.tails).losses(self.tails).mean()),
            float(self._losses(codes[self.exchanged]).mean()),
        )

    def _losses(self, codes: Codes) -> NDArray[np.float64]:
        return CountModel(codes, self.train, self.fitted).losses(self.judged)

"""Quantizers side by side, before any model is trained: on the same embeddings, with both ways to tell items apart.

What stands in the table describes; the one number to choose by is the loss on validation, by the model that counts
(`tokenizers/count_model.py`). It looks at test rows only to say how many of them a collision touches.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.evaluation.intervals import mean_interval
from reasonrec.recipes.indexing.build import measure
from reasonrec.recipes.indexing.collaboration import embeddings_for, halves
from reasonrec.recipes.indexing.item_vectors import item_embeddings
from reasonrec.recipes.rankers.baselines import TrainLog
from reasonrec.recipes.rankers.top_k import rank_rows
from reasonrec.rewards.metrics import per_row
from reasonrec.tokenizers.artefact import write_json
from reasonrec.tokenizers.count_model import Counted, CountModel
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.health import mutual_information
from reasonrec.tokenizers.index import ItemIndex, build_index
from reasonrec.tokenizers.quantizers.reassigned import reassign
from reasonrec.tokenizers.terminal import say

if TYPE_CHECKING:
    from reasonrec.recipes.index_items import IndexConfig

_HEADS = (
    "| quantizer | unique by | codes used | perplexity | colliding items | test targets | NMI, category (chance) "
    "| MI of levels (chance) | variance left | tokens | s | NLL, nats | to the first | HR@10 | 95% |"
)


def compare(config: IndexConfig, dataset: Dataset, folder: Path) -> str:
    """Compare the quantizers of `config.compare`, and write `quantizers.json`.

    Args:
        config: What to embed and how many codes there are. Where collaboration is `auto`, its own quantizer decides
            what all of them code.
        dataset: The dataset.
        folder: Where to write.

    Returns:
        The table, for the terminal.
    """
    text = item_embeddings(config, dataset)
    judged_by = config.build_quantizer(config.quantizer)
    embeddings, tried, _ = embeddings_for(
        dataset, text, config.collaboration, judged_by, config.codebook_sizes, seed=config.seed
    )
    judge = _Judge(dataset, config.seed)
    rows = []
    for name in config.compare:
        quantizer = config.build_quantizer(name)
        start = time.perf_counter()
        codes = quantizer.fit_encode(embeddings)
        seconds = time.perf_counter() - start
        for unique in ("disambiguate", "reassign"):
            start = time.perf_counter()
            row: dict[str, Any] = {"quantizer": name, "unique": unique}
            if unique == "reassign":
                try:
                    codes, dealt = reassign(codes, config.codebook_sizes[-1], embeddings, quantizer.reconstruct)
                except UserError as error:  # the table is still of use without this row
                    say(f"{name}: {error}")
                    continue
                row["reassigned"] = dealt
                seconds += time.perf_counter() - start
            index = build_index(codes, config.codebook_sizes)
            report = measure(index, dataset, embeddings, quantizer, config.seed)
            row |= _described(index, report, dataset, config.seed) | {"seconds": seconds}
            rows.append(row | judge(index))
    facts = {"sizes": config.codebook_sizes, "seed": config.seed, "items": dataset.n_items, "collaboration": tried}
    write_json(folder / "quantizers.json", facts | {"rows": rows})
    return _table(rows)


def _described(index: ItemIndex, report: dict[str, Any], dataset: Dataset, seed: int) -> dict[str, Any]:
    """What an index is like, out of its health report and what that leaves out."""
    levels, prefixes = report["levels"], report["agreement"]["prefixes"]
    collides = index.codes[:, -1] >= 0
    targets = dataset.test["target"].to_numpy()
    columns = index.codes[:, : index.depth].T.astype(np.int64)
    pairs = [(a, b) for number, a in enumerate(columns) for b in columns[number + 1 :]]
    random = np.random.default_rng(seed)
    return {
        "utilisation": float(np.mean([level["utilisation"] for level in levels])),
        "perplexity": [level["perplexity"] for level in levels],
        "collisions": float(collides.mean()),
        "collisions_of_test_targets": float(collides[targets].mean()) if len(targets) else None,
        "agreement": prefixes[0] if prefixes else None,
        # Of every two levels. With few items most of it is chance, hence the shuffle beside it.
        "information": float(np.mean([mutual_information(a, b) for a, b in pairs])) if pairs else None,
        "information_by_chance": (
            float(np.mean([mutual_information(a, random.permutation(b)) for a, b in pairs])) if pairs else None
        ),
        "unexplained": levels[-1]["unexplained"],
        "tokens": float(index.depth + collides.mean()),
    }


class _Judge:
    """Judges codes on the same half of the same validation rows, against the first that it was shown."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        log = TrainLog.of(dataset)
        self.train, self.seed = Counted(log.popularity, log.pairs(1)), seed
        self.fitted, self.judged = halves(dataset, seed)
        self.users = self.judged["user"].to_numpy()
        self.first: NDArray[np.float64] | None = None

    def __call__(self, index: ItemIndex) -> dict[str, Any]:
        """Loss in nats, its difference to the first, and HR@10, with intervals over users; None without rows."""
        if not len(self.users):
            return dict.fromkeys(("nll", "difference", "ci95", "hr@10", "hr@10_ci95"))
        model = CountModel(index.codes, self.train, self.fitted)
        mine = model.losses(self.judged)
        self.first = mine if self.first is None else self.first
        difference = mine - self.first
        lists = rank_rows(model.log_probs, self.judged, 10, self.train.counts)
        hits = per_row(lists, self.judged["target"].to_numpy(), (10,))["hr@10"]
        return {
            "nll": float(mine.mean()),
            "difference": float(difference.mean()),
            "ci95": mean_interval(self.users, difference, seed=self.seed),
            "hr@10": float(hits.mean()),
            "hr@10_ci95": mean_interval(self.users, hits, seed=self.seed),
        }


def _table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table of text; a Markdown one, so that it can be shown as it is."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [_HEADS, re.sub(r"[^|]+", "---", _HEADS)]
    for row in rows:
        agreement = row["agreement"] or {"nmi": None, "nmi_by_chance": None}
        low, high = row["ci95"] or (None, None)
        hit_low, hit_high = row["hr@10_ci95"] or (None, None)
        cells = (
            row["quantizer"],
            row["unique"],
            number(row["utilisation"], ".1%"),
            ", ".join(number(value, ".0f") for value in row["perplexity"]),
            number(row["collisions"], ".1%"),
            number(row["collisions_of_test_targets"], ".1%"),
            f"{number(agreement['nmi'], '.3f')} ({number(agreement['nmi_by_chance'], '.3f')})",
            f"{number(row['information'], '.2f')} ({number(row['information_by_chance'], '.2f')})",
            number(row["unexplained"], ".1%"),
            number(row["tokens"], ".2f"),
            number(row["seconds"], ".1f"),
            number(row["nll"], ".3f"),
            f"{number(row['difference'], '+.3f')} [{number(low, '+.3f')}, {number(high, '+.3f')}]",
            number(row["hr@10"], ".3f"),
            f"{number(hit_low, '.3f')}–{number(hit_high, '.3f')}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

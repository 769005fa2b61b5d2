"""Named parts of the held-out rows: where a recommender wins, and where nothing in the table does."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.rankers.top_k import tie_order
from reasonrec.rewards.metrics import flatten
from reasonrec.tokenizers.errors import UserError

HEAD_SHARE = 0.2
# Lower ends of the history-length bins; the last one is open.
LENGTH_BINS = (0, 3, 6, 11, 21, 51)

DESCRIPTIONS = {
    "head": "target among the 20% of items bought most often in train",
    "tail": "target among the other 80%",
    "cold": "target occurs in no train sequence",
    "repeat": "target is in the row's history",
    "new to user": "target is not in the row's history",
    "same time": "target carries the timestamp of its predecessor: their order is an artefact",
    "other time": "target comes later than its predecessor",
}


def in_train(dataset: Dataset) -> NDArray[np.bool_]:
    """Which items occur in a train sequence, as target or not (n_items,); the others are cold."""
    return np.bincount(flatten(dataset.train["items"])[0], minlength=dataset.n_items) > 0


def among_cold(rows: pl.DataFrame, dataset: Dataset) -> pl.DataFrame:
    """The held-out rows whose target is cold, with all items masked that are not.

    Whatever ranks them ranks cold items only: over the full catalogue, items that anybody had are in front, and the
    lists say nothing about the others.

    Args:
        rows: Held-out rows of the dataset.
        dataset: The dataset.

    Raises:
        UserError: If there is none.
    """
    seen = in_train(dataset)
    cold = rows.filter(~pl.Series(seen[rows["target"].to_numpy()]))
    if not cold.height:
        raise UserError(
            "candidates=cold: every target of these cases occurs in a train sequence; leave candidates at all, or "
            "evaluate the other split"
        )
    known = pl.lit(pl.Series([np.flatnonzero(seen)]).cast(rows.schema["masked"]))
    return cold.with_columns(pl.col("masked").list.set_union(known))


def slices(rows: pl.DataFrame, dataset: Dataset) -> dict[str, NDArray[np.bool_]]:
    """Boolean masks over held-out rows, in the order of the report; a mask may be empty.

    Args:
        rows: Held-out rows of the dataset.
        dataset: The dataset: train counts and train sequences decide what is head, tail and cold.

    Returns:
        Name to mask (rows,). `head`/`tail`, `repeat`/`new to user`, `same time`/`other time` and the
        `history …` bins each cover all rows; `cold` is a part of `tail`.
    """
    target = rows["target"].to_numpy()
    history = rows["history"].list.len().fill_null(0).to_numpy()
    head_items = tie_order(dataset.items["train_count"].to_numpy())[: int(np.ceil(HEAD_SHARE * dataset.n_items))]
    head = np.isin(target, head_items) & (dataset.items["train_count"].to_numpy()[target] > 0)
    contains = rows.select(pl.col("history").list.contains(pl.col("target")).fill_null(False).alias("repeat"))
    repeat = contains["repeat"].to_numpy()
    same_time = rows["same_time"].to_numpy()
    result = {
        "head": head,
        "tail": ~head,
        "cold": ~in_train(dataset)[target],
        "repeat": repeat,
        "new to user": ~repeat,
        "same time": same_time,
        "other time": ~same_time,
    }
    for low, high in zip(LENGTH_BINS, (*LENGTH_BINS[1:], None), strict=True):
        name = f"history {low}+" if high is None else f"history {low}–{high - 1}"
        result[name] = (history >= low) & (True if high is None else history < high)
    return result

"""Slices: which rows belong where."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

from reasonrec.recipes.evaluation.slices import among_cold, in_train, slices
from reasonrec.tokenizers.errors import UserError


@pytest.fixture
def dataset() -> Any:
    train = pl.DataFrame({"items": [[5, 0, 0, 0], [1, 1]]}, schema={"items": pl.List(pl.Int32)})
    counts = [3, 2, 0, 0, 0, 0]  # item 5 is only ever history: not cold, not head
    return SimpleNamespace(train=train, items=pl.DataFrame({"train_count": counts}), n_items=6)


def test_masks_by_hand(dataset: Any) -> None:
    rows = pl.DataFrame(
        {
            "history": [[1], [0, 0, 2], [], list(range(5)) * 11],
            "target": [0, 2, 5, 1],
            "same_time": [True, False, False, False],
        },
        schema_overrides={"history": pl.List(pl.Int32), "target": pl.Int32},
    )
    found = {name: mask.tolist() for name, mask in slices(rows, dataset).items()}
    assert found["head"] == [True, False, False, True]  # ceil(20% of 6) = 2 items: 0 and 1
    assert found["tail"] == [False, True, True, False]
    assert found["cold"] == [False, True, False, False]
    assert found["repeat"] == [False, True, False, True]
    assert found["new to user"] == [True, False, True, False]
    assert found["same time"] == [True, False, False, False]
    assert found["other time"] == [False, True, True, True]
    assert found["history 0–2"] == [True, False, True, False]
    assert found["history 3–5"] == [False, True, False, False]
    assert found["history 51+"] == [False, False, False, True]


def test_history_bins_cover_every_row_once(dataset: Any) -> None:
    rows = pl.DataFrame(
        {"history": [[0] * n for n in range(60)], "target": [0] * 60, "same_time": [False] * 60},
        schema_overrides={"history": pl.List(pl.Int32)},
    )
    bins = [mask.astype(int) for name, mask in slices(rows, dataset).items() if name.startswith("history")]
    assert (sum(bins) == 1).all()


def test_cold_cases_have_cold_items_left_only(dataset: Any) -> None:
    rows = pl.DataFrame(
        {"target": [0, 2, 5, 4], "masked": [[], [1, 3], [], []]},
        schema={"target": pl.Int32, "masked": pl.List(pl.Int32)},
    )
    assert in_train(dataset).tolist() == [True, True, False, False, False, True]
    found = among_cold(rows, dataset)
    assert found["target"].to_list() == [2, 4]
    assert [sorted(masked) for masked in found["masked"].to_list()] == [[0, 1, 3, 5], [0, 1, 5]]
    assert found.schema == rows.schema
    with pytest.raises(UserError, match="candidates=cold: every target"):
        among_cold(rows.head(1), dataset)

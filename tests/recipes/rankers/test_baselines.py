"""Baselines: small cases by hand, and the published numbers where the benchmark data is at hand."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from reasonrec.recipes.rankers import baselines, sasrec
from reasonrec.recipes.rankers.base import Ranker
from reasonrec.recipes.rankers.baselines import (
    CoVisitation,
    Markov,
    PersonalFrequency,
    Popularity,
    RepeatLast,
    TrainLog,
)
from reasonrec.recipes.rankers.top_k import top_k
from reasonrec.rewards.metrics import per_row, valid_ratio

DATA = Path(os.environ.get("REASONREC_DATA", Path(__file__).parents[4] / "shared" / "data"))
INDUSTRIAL = DATA / "industrial" / "Industrial_and_Scientific"
_recbole = importlib.util.find_spec("recbole")
MOVIELENS = Path(_recbole.origin or "").parent / "dataset_example/ml-100k/ml-100k.inter" if _recbole else None


def rows_of(cases: list[tuple[list[int], int, list[int]]], users: list[int] | None = None) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "row": range(len(cases)),
            "user": users or range(len(cases)),
            "history": [case[0] for case in cases],
            "target": [case[1] for case in cases],
            "masked": [case[2] for case in cases],
            "same_time": [False] * len(cases),
        },
        schema={
            "row": pl.Int32,
            "user": pl.Int32,
            "history": pl.List(pl.Int32),
            "target": pl.Int32,
            "masked": pl.List(pl.Int32),
            "same_time": pl.Boolean,
        },
    )


def dataset_of(sequences: dict[int, list[int]], n_items: int, first_target: int = 0, **splits: Any) -> Any:
    train = pl.DataFrame(
        {
            "user": list(sequences),
            "items": list(sequences.values()),
            "first_target": [first_target] * len(sequences),
        },
        schema={"user": pl.Int32, "items": pl.List(pl.Int32), "first_target": pl.Int32},
    )
    targets = [item for items in sequences.values() for item in items[first_target:]]
    items = pl.DataFrame({"train_count": np.bincount(targets, minlength=n_items).astype(np.int32)})
    facts = {"order": "sequence", "repeats": True, "mask_history": False, **splits.pop("facts", {})}
    rows = {"valid": splits.get("valid", rows_of([])), "test": splits.get("test", rows_of([]))}
    return SimpleNamespace(train=train, items=items, n_items=n_items, facts=facts, rows=rows.__getitem__, **rows)


@pytest.fixture
def log() -> TrainLog:
    # Successors of 0: 2 (first), 1, 1, 2. Popularity: 0 four times, 1 and 2 twice, 3 once, 4 never.
    return TrainLog.of(dataset_of({0: [0, 2, 3], 1: [0, 1], 2: [0, 1], 3: [0, 2]}, 5))


def test_popularity_masks(log: TrainLog) -> None:
    found = Popularity(log).rank(rows_of([([0], 1, []), ([0], 1, [0, 1])]), 4)
    assert found.tolist() == [[0, 1, 2, 3], [2, 3, 4, -1]]


def test_popularity_by_user_counts_each_user_once() -> None:
    log = TrainLog.of(dataset_of({0: [0, 0, 0, 1], 1: [1, 2]}, 3))
    rows = rows_of([([0], 1, [])])
    assert Popularity(log).rank(rows, 3).tolist() == [[0, 1, 2]]
    assert Popularity(log, by_user=True).rank(rows, 3).tolist() == [[1, 0, 2]]


def test_repeat_last_is_one_item_or_nothing() -> None:
    found = RepeatLast().rank(rows_of([([4, 2], 2, []), ([4, 2], 2, [2]), ([], 2, [])]), 3)
    assert found.tolist() == [[2, -1, -1], [-1, -1, -1], [-1, -1, -1]]


def test_markov_ties(log: TrainLog) -> None:
    rows = rows_of([([3, 0], 1, []), ([], 1, []), ([0], 1, [2])])
    assert Markov(log).rank(rows, 4).tolist() == [[2, 1, 0, 3], [0, 1, 2, 3], [1, 0, 3, 4]]
    assert Markov(log, ties="popularity").rank(rows, 2)[0].tolist() == [1, 2]


def test_transitions_do_not_cross_sequences() -> None:
    log = TrainLog.of(dataset_of({0: [0, 1], 1: [2, 3]}, 4))
    assert [pair.tolist() for pair in log.pairs(1)] == [[0, 2], [1, 3]]
    assert [pair.tolist() for pair in log.pairs(2)] == [[], []]


def test_co_visitation_by_hand() -> None:
    log = TrainLog.of(dataset_of({0: [0, 1, 2], 1: [0, 0]}, 4))
    model = CoVisitation(log, exponent=0.5)
    # C[0][1] = 1, C[0][2] = 1/2, C[1][2] = 1, C[0][0] = 2 (a self-pair in both directions); f = 3, 1, 1.
    scores = model.scores(rows_of([([1, 0], 2, [])])).toarray()[0]
    expected = [2 / 3 + 0.5 / np.sqrt(3), 1 / np.sqrt(3), 0.5 / np.sqrt(3) + 0.5, 0.0]
    assert scores == pytest.approx(expected)
    assert model.rank(rows_of([([1, 0], 2, [0])]), 4).tolist() == [[2, 1, 3, -1]]


def test_co_visitation_looks_at_the_last_items_only() -> None:
    log = TrainLog.of(dataset_of({0: [0, 1], 1: [2, 3]}, 4))
    found = CoVisitation(log, last=1).scores(rows_of([([0, 2], 3, [])])).toarray()[0]
    assert (found > 0).tolist() == [False, False, False, True]


def test_co_visitation_in_baskets_ignores_order() -> None:
    log = TrainLog.of(dataset_of({0: [0, 1, 2], 1: [1, 3]}, 4))
    model = CoVisitation(log, baskets=True)
    scores = model.scores(rows_of([([0, 1], 2, []), ([1, 0], 2, [])])).toarray()
    assert (scores[0] == scores[1]).all()
    # f = 1, 2, 1, 1; a pair of the first basket weighs 1/2, of the second 1; no item is its own companion.
    expected = [0.5 / np.sqrt(2), 0.5 / np.sqrt(2), 0.5 + 0.5 / np.sqrt(2), 1 / np.sqrt(2)]
    assert scores[0] == pytest.approx(expected)


def test_tuning_uses_validation_and_keeps_the_choice() -> None:
    valid = rows_of([([0], 1, [])])
    data = dataset_of({0: [0, 1], 1: [0, 2, 3], 2: [2, 3], 3: [0, 2, 3]}, 4, valid=valid)
    model = CoVisitation(TrainLog.of(data))
    tried = model.tune(valid, (0.0, 3.0), k=1)
    assert tried == {0.0: 0.0, 3.0: 1.0}
    assert model.exponent == 3.0


def test_personal_frequency_counts_then_recency(log: TrainLog) -> None:
    found = PersonalFrequency(log).rank(rows_of([([4, 3, 4, 2], 2, []), ([], 2, [])]), 5)
    assert found.tolist() == [[4, 2, 3, 0, 1], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("facts", "absent"),
    [
        ({}, {"popularity by users"}),
        ({"mask_history": True}, {"repeat last", "personal frequency", "popularity by users"}),
        ({"order": "set", "repeats": False}, {"repeat last", "personal frequency", "Markov"}),
    ],
)
def test_standard_baselines_fit_the_dataset(facts: dict[str, Any], absent: set[str]) -> None:
    cases = rows_of([([0, 1], 2, []), ([3], 0, [3, 1])])
    data = dataset_of({0: [0, 1, 2], 1: [3, 0], 2: [1, 2, 2]}, 4, facts=facts, valid=cases)
    found = {model.name: model.rank(cases, 4) for model, _ in baselines.standard(data)}
    assert not absent & set(found)
    assert {"popularity", "co-visitation", "co-visitation, tuned"} <= set(found)
    for name, ranking in found.items():
        assert ranking.shape == (2, 4), name
        assert valid_ratio(ranking, 4, cases["masked"]) == 1.0, name


def test_scores_of_given_items_are_those_that_rank() -> None:
    cases = rows_of([([0, 1], 2, []), ([3], 0, []), ([2, 2, 1], 3, [])])
    data = dataset_of({0: [0, 1, 2], 1: [3, 0], 2: [1, 2, 2]}, 5, facts={"repeats": True}, valid=cases)
    log = baselines.TrainLog.of(data)
    everything = np.tile(np.arange(5), (3, 1))
    rankers: list[Ranker] = [model for model, _ in baselines.standard(data)]
    rankers.append(sasrec.fit(data, sasrec.SasrecConfig(epochs=1, hidden=8, heads=1), progress=False))
    for ranker in rankers:
        scores = ranker.score(cases, everything)
        filled = ranker.name != "repeat last"
        expected = top_k(scores, 5, log.popularity, cases["masked"], fill=filled)
        assert (ranker.rank(cases, 5) == expected).all(), ranker.name
        order = everything[:, ::-1]
        assert (ranker.score(cases, order) == scores[:, ::-1]).all(), ranker.name


def _table(data: Any, split: str = "test") -> dict[str, tuple[float, float]]:
    rows, result = data.rows(split), {}
    for model, _ in baselines.standard(data):
        found = per_row(model.rank(rows, 10), rows["target"].to_numpy(), (10,))
        result[model.name] = (float(found["hr@10"].mean()), float(found["ndcg@10"].mean()))
    return result


@pytest.mark.skipif(not Path(f"{INDUSTRIAL}.train.inter").is_file(), reason="the Industrial split is not at hand")
def test_industrial_numbers() -> None:
    def read(split: str) -> list[tuple[int, list[int], int]]:
        lines = [line.split("\t") for line in Path(f"{INDUSTRIAL}.{split}.inter").read_text().splitlines()[1:]]
        return [(int(user), [int(item) for item in history.split()], int(item)) for user, history, item in lines]

    sequences: dict[int, list[int]] = {}
    for user, history, item in read("train"):
        sequences.setdefault(user, list(history)).append(item)
    splits = {}
    for split in ("valid", "test"):
        lines = read(split)
        splits[split] = rows_of([(history, item, []) for _, history, item in lines], [line[0] for line in lines])
    table = _table(dataset_of(sequences, 3686, first_target=1, **splits))
    expected = {
        "popularity": (0.0567, 0.0411),
        "repeat last": (0.0269, 0.0269),
        "Markov": (0.1193, 0.0936),
        "Markov, ties by popularity": (0.1249, 0.0967),
        "co-visitation": (0.1317, 0.0934),
        "co-visitation, tuned": (0.1432, 0.0997),
    }
    for name, numbers in expected.items():
        assert table[name] == pytest.approx(numbers, abs=5e-4), name


@pytest.mark.skipif(MOVIELENS is None or not MOVIELENS.is_file(), reason="MovieLens-100K (recbole) is not installed")
def test_movielens_numbers() -> None:
    log = pl.read_csv(str(MOVIELENS), separator="\t", new_columns=["user", "item", "rating", "time"])
    log = log.filter(pl.len().over("item") >= 5).sort("user", "time", maintain_order=True)  # ties in file order
    log = log.with_columns(pl.col("item").rank("dense") - 1)
    users = log.group_by("user", maintain_order=True).agg("item")["item"].to_list()
    test = rows_of([(items[:-1], items[-1], items[:-1]) for items in users])
    data = dataset_of({user: items[:-2] for user, items in enumerate(users)}, 1349, test=test)
    train = TrainLog.of(data)
    for model, numbers in (
        (Popularity(train), (0.087, 0.045)),
        (CoVisitation(train, window=5), (0.216, 0.115)),
    ):
        found = per_row(model.rank(test, 10), test["target"].to_numpy(), (10,))
        assert (found["hr@10"].mean(), found["ndcg@10"].mean()) == pytest.approx(numbers, abs=5e-4), model.name

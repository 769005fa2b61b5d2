"""Teachers of soft targets: by hand, and what may not reach them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.rankers import sasrec
from reasonrec.recipes.rankers.baselines import CoVisitation, TrainLog
from reasonrec.recipes.rankers.item_teachers import (
    ITEM_TEACHERS,
    CompanyTeacher,
    ItemTeacher,
    Others,
    PopularityTeacher,
    SequentialTeacher,
    UniformTeacher,
)
from reasonrec.tokenizers.errors import UserError

TEACHERS = {"co_visitation": {"window": 3, "last": 4}, "sasrec": {}, "popularity": {}, "uniform": {}}


@pytest.fixture(autouse=True)
def _few_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = sasrec.SasrecConfig

    def short(**options: int) -> sasrec.SasrecConfig:
        return config(**{"epochs": 2, "hidden": 16, "layers": 1, **options})

    monkeypatch.setattr(sasrec, "SasrecConfig", short)


@pytest.fixture
def dataset(tiny_dataset: Path) -> Dataset:
    """Two sequences of some users, and items that stand twice in one."""
    found = Dataset.load(tiny_dataset)
    train = found.train.select("user", "items", "first_target")
    again = train.head(20).with_columns(items=pl.col("items").list.reverse(), first_target=pl.lit(1, pl.Int32))
    twice = train.tail(5).with_columns(items=pl.col("items").list.concat(pl.col("items").list.head(2)))
    return with_train(found, pl.concat([train.head(train.height - 5), twice, again]))


def with_train(dataset: Dataset, train: pl.DataFrame) -> Dataset:
    from reasonrec.data_gen.schema import count_targets

    counts = pl.Series("train_count", count_targets(train, dataset.n_items))
    return replace(dataset, train=train, items=dataset.items.with_columns(counts))


def as_sets(dataset: Dataset) -> Dataset:
    train = dataset.train.with_columns(items=pl.col("items").list.unique(maintain_order=True))
    manifest = replace(dataset.manifest, facts={**dataset.facts, "order": "set"})
    return replace(with_train(dataset, train), manifest=manifest)


def places(dataset: Dataset, users: list[int]) -> pl.DataFrame:
    """Every place of some users' sequences."""
    found = []
    for user, items in dataset.train.filter(pl.col("user").is_in(users)).select("user", "items").iter_rows():
        found += [(user, items[:stop]) for stop in range(len(items))]
    schema = {"row": pl.Int64, "user": pl.Int32, "history": pl.List(pl.Int32)}
    return pl.DataFrame([(row, *place) for row, place in enumerate(found)], schema=schema, orient="row")


@pytest.mark.parametrize("order", ["sequence", "set"])
def test_co_visitation_is_that_of_a_log_without_the_user(dataset: Dataset, order: str) -> None:
    if order == "set":
        dataset = as_sets(dataset)
    users = [0, 3, 7, int(dataset.train["user"].max())]
    rows = places(dataset, users)
    found = CompanyTeacher(dataset, window=3, last=4).weights(rows)
    assert (found > 0).mean() > 0.05
    for user in users:
        here = rows["user"].to_numpy() == user
        log = TrainLog.of(with_train(dataset, dataset.train.filter(pl.col("user") != user)))
        alone = CoVisitation(log, window=3, last=4, baskets=order == "set")
        expected = alone.scores(rows.filter(here)).toarray()
        np.testing.assert_allclose(found[here], expected, rtol=1e-9, atol=1e-12)
        assert ((found[here] > 0) == (expected > 0)).all(), "what only the user's own pairs said is gone"


def test_popularity_is_that_of_the_others(dataset: Dataset) -> None:
    rows = places(dataset, [0, 5])
    found = PopularityTeacher(dataset).weights(rows)
    for user in (0, 5):
        others = with_train(dataset, dataset.train.filter(pl.col("user") != user))
        expected = others.items["train_count"].to_numpy()
        assert (found[rows["user"].to_numpy() == user] == expected).all()


def test_sasrec_of_a_fold_never_saw_its_users(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    fit, seen = sasrec.fit, []
    monkeypatch.setattr(sasrec, "fit", lambda data, config: (seen.append(data), fit(data, config, progress=False))[1])
    teacher = SequentialTeacher(dataset, folds=2, seed=0)
    users = set(dataset.train["user"].to_list())
    taught = [{user for user in users if teacher.fold[user] == fold} for fold in (0, 1)]
    assert abs(len(taught[0]) - len(taught[1])) <= 1
    for own, data in zip(taught, seen, strict=True):
        assert set(data.train["user"].to_list()) == users - own
        assert set(data.valid["user"].to_list()) <= users - own
        assert data.items["train_count"].sum() == (data.train["items"].list.len() - data.train["first_target"]).sum()
        whole = dataset.train.filter(~pl.col("user").is_in(list(own)))["items"].list.len().sum()
        assert data.train["items"].list.len().sum() == whole - data.valid.height, "what it stops by is held out"
    rows = places(dataset, [0, 1, 2, 3])
    found = teacher.weights(rows)
    empty = rows["history"].list.len().to_numpy() == 0
    assert not found[empty].any()
    np.testing.assert_allclose(found[~empty].sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("name", TEACHERS)
def test_held_out_cases_and_the_places_own_user_teach_nothing(dataset: Dataset, name: str) -> None:
    """Other validation and test cases, and another life of one user: what it is told at the same place stays."""
    rng, user = np.random.default_rng(0), 2
    scrambled = {
        split: getattr(dataset, split).with_columns(
            pl.Series("target", rng.integers(0, dataset.n_items, getattr(dataset, split).height), dtype=pl.Int32),
            history=pl.col("history").list.reverse(),
        )
        for split in ("valid", "test")
    }
    other = pl.when(pl.col("user") == user).then((pl.col("items") + 17) % dataset.n_items).otherwise("items")
    changed = with_train(replace(dataset, **scrambled), dataset.train.with_columns(items=other))
    gone = replace(dataset, valid=dataset.valid.clear(), test=dataset.test.clear())
    rows = places(dataset, [user])
    options = ITEM_TEACHERS.make(name, TEACHERS[name])
    mine, others, without = (options.build(data, 0).top(rows, 5, mask=True) for data in (dataset, changed, gone))
    for told in (others, without):
        assert (told[0] == mine[0]).all()
        np.testing.assert_allclose(told[1], mine[1], rtol=1e-6)
    assert mine[1].sum() > 0
    if name != "uniform":  # and another user's life does matter
        elsewhere = pl.when(pl.col("user") > user).then((pl.col("items") + 17) % dataset.n_items).otherwise("items")
        moved = options.build(with_train(dataset, dataset.train.with_columns(items=elsewhere)), 0)
        assert (moved.top(rows, 5, mask=True)[0] != mine[0]).any()


class Written(ItemTeacher):
    def weights(self, rows: pl.DataFrame) -> np.ndarray:
        return np.array([[4.0, 0, 2, 2, 1], [0, 0, 0, 0, 0], [4, 0, 0, 0, 0]])


def test_the_best_items_and_their_shares() -> None:
    kinds = {"row": pl.Int64, "user": pl.Int32, "history": pl.List(pl.Int32)}
    rows = pl.DataFrame({"row": [0, 1, 2], "user": [0, 0, 1], "history": [[0], [], [0]]}, schema=kinds)
    items, shares = Written().top(rows, 2, mask=False)
    assert items.tolist() == [[0, 2], [-1, -1], [0, -1]]
    np.testing.assert_allclose(shares, [[4 / 6, 2 / 6], [0, 0], [1, 0]], rtol=1e-6)
    items, shares = Written().top(rows, 2, mask=True)
    assert items.tolist() == [[2, 3], [-1, -1], [-1, -1]]
    np.testing.assert_allclose(shares, [[0.5, 0.5], [0, 0], [0, 0]])


def test_uniform_draws_anew_at_each_place_and_masks(dataset: Dataset) -> None:
    rows = places(dataset, [0, 1])
    teacher = UniformTeacher(dataset.n_items, seed=0)
    items, shares = teacher.top(rows, 5, mask=True)
    assert (shares == np.float32(0.2)).all()
    assert len({tuple(row) for row in items.tolist()}) > 0.9 * rows.height
    assert not any(set(row) & set(history) for row, history in zip(items.tolist(), rows["history"], strict=True))
    again, _ = teacher.top(rows[3:], 5, mask=True)
    assert (again == items[3:]).all(), "whatever stands in one chunk with a place"
    assert len(np.unique(teacher.top(rows, 1000, mask=False)[0][0])) == dataset.n_items + 1, "the whole catalogue, -1"


def test_entries_of_users(dataset: Dataset) -> None:
    others = Others(dataset)
    users = np.array([1, 4])
    entries = others.of(users)
    expected = dataset.train.filter(pl.col("user").is_in([1, 4])).sort("user", maintain_order=True)["items"]
    assert others.items[entries].tolist() == expected.explode().to_list()
    assert others.is_target.sum() == dataset.items["train_count"].sum()


def test_what_cannot_teach(dataset: Dataset) -> None:
    short = dataset.train.with_columns(items=pl.col("items").list.head(1), first_target=pl.lit(0, pl.Int32))
    with pytest.raises(UserError, match="no two items stand together in train"):
        ITEM_TEACHERS.make("co_visitation", {}).build(with_train(dataset, short), 0)
    with pytest.raises(UserError, match="sasrec stops early on the last items of train sequences, and none"):
        ITEM_TEACHERS.make("sasrec", {}).build(with_train(dataset, short), 0)
    with pytest.raises(UserError, match="folds=3 of 2 users"):
        ITEM_TEACHERS.make("sasrec", {"folds": 3}).build(with_train(dataset, dataset.train.head(2)), 0)
    for name, options in (
        ("co_visitation", {"window": 0}),
        ("co_visitation", {"last": 1.5}),
        ("sasrec", {"folds": 1}),
    ):
        with pytest.raises(UserError, match=r"soft_targets\[.*\]=.* has to be a whole number"):
            ITEM_TEACHERS.make(name, options)

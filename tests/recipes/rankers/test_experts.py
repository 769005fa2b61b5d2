"""Experts: probabilities by hand, and what comes back from a checkpoint."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import sparse

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.rankers.experts import EXPERTS, Before, Company, Expert, Text, build_experts
from reasonrec.recipes.rankers.text import TextNeighbours
from reasonrec.tokenizers.errors import UserError


def cases(history: list[list[int]], masked: list[list[int]] | None = None, target: list[int] | None = None):
    kinds = {"history": pl.List(pl.Int32), "masked": pl.List(pl.Int32), "target": pl.Int32}
    rows = {"history": history, "masked": masked or [[]] * len(history), "target": target or [0] * len(history)}
    return pl.DataFrame(rows, schema=kinds)


@pytest.fixture(scope="module")
def company() -> Company:
    table = np.array([[0, 3, 1, 0], [3, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=np.float64)
    expert = Company(sparse.csr_array(table), 2, np.array([4, 2, 0, 0]))
    expert.temper = 0.5
    return expert


def test_company_by_hand(company: Company) -> None:
    popular = np.array([5, 3, 1, 1]) / 10
    found = np.exp(company.log_probs(cases([[1, 0], [3], []])))
    # 1/2 for item 1 (one place back): 3/2 for item 0; item 0 is the last: 3 for item 1, 1 for item 2. In all 5.5.
    shares = np.array([np.array([1.5, 3, 1, 0]) / 5.5, popular, popular])  # it has counted nothing for the last two
    np.testing.assert_allclose(found, 0.5 * shares + 0.5 / 4, rtol=1e-5)


def test_powers_sharpen(company: Company) -> None:
    rows = cases([[1, 0]])
    sharp = copy.copy(company)
    sharp.power = 2.0
    squared = np.exp(company.log_probs(rows)) ** 2
    np.testing.assert_allclose(np.exp(sharp.log_probs(rows)), squared / squared.sum(), rtol=1e-5)
    assert (sharp.rank(rows, 4) == company.rank(rows, 4)).all()


def test_losses_are_among_what_is_not_masked(company: Company) -> None:
    rows = cases([[3]], masked=[[0, 3]], target=[1])
    even, squared = company.losses(rows, [(0.5, 1.0), (0.5, 2.0)])[:, 0]
    kept = 0.5 * np.array([0.3, 0.1]) + 0.5 / 4  # items 1 and 2
    assert even == pytest.approx(-np.log(kept[0] / kept.sum()))
    assert squared == pytest.approx(-np.log(kept[0] ** 2 / (kept**2).sum()))


def test_the_temper_is_that_of_the_best_likelihood() -> None:
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8]], dtype=np.float32)
    sharp, blunt = (Text(TextNeighbours(vectors, np.zeros(3, dtype=np.int64))) for _ in range(2))
    assert sharp.settle(cases([[0]], target=[0])) < 0.01
    assert sharp.temper == max(sharp.tempers)
    blunt.settle(cases([[0]], target=[1]))
    assert blunt.temper == min(blunt.tempers)


@pytest.fixture(scope="module")
def experts(tiny_dataset: Path) -> dict[str, Expert]:
    return build_experts({"co_visitation": {"window": 3}, "sasrec": {}}, Dataset.load(tiny_dataset), seed=0)


def test_they_say_the_same_when_they_come_back(experts: dict[str, Expert], tiny_dataset: Path) -> None:
    rows = Dataset.load(tiny_dataset).test
    for name, expert in experts.items():
        back = EXPERTS.find(name).expert.restore(expert.tensors(), expert.facts(), expert.popularity)
        back.temper, back.power = expert.temper, expert.power
        found = expert.log_probs(rows)
        np.testing.assert_allclose(np.exp(found.astype(np.float64)).sum(1), 1, atol=1e-5)
        np.testing.assert_allclose(back.log_probs(rows), found, atol=1e-5)
        assert (back.rank(rows, 5) == expert.rank(rows, 5)).all()


def test_held_out_cases_teach_them_nothing(tiny_dataset: Path, experts: dict[str, Expert]) -> None:
    """Other validation and test targets: the same pairs, and other weights of tempers at most."""
    dataset = Dataset.load(tiny_dataset)
    scrambled = {
        split: getattr(dataset, split).with_columns(target=pl.col("target").shuffle(seed=1))
        for split in ("valid", "test")
    }
    dataset = replace(dataset, **scrambled)
    other = build_experts({"co_visitation": {"window": 3}}, dataset, seed=0)["co_visitation"]
    mine = experts["co_visitation"]
    assert isinstance(mine, Company)
    assert isinstance(other, Company)
    assert (mine.table.astype(bool) != other.table.astype(bool)).nnz == 0


def test_sasrec_is_trained_as_it_was_asked_for(tiny_dataset: Path) -> None:
    asked = {"sasrec": {"dropout": 0.2, "batch_size": 4, "hidden": 8}}
    facts = build_experts(asked, Dataset.load(tiny_dataset), seed=3)["sasrec"].facts()
    assert facts.items() >= {"dropout": 0.2, "batch_size": 4, "hidden": 8, "layers": 2, "seed": 3}.items()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"sasrek": {}}, ["expert 'sasrek' is unknown", "did you mean 'sasrec'?"]),
        ({"co_visitation": {"windows": 3}}, ["the expert co_visitation has no option 'windows'", "window, last"]),
        ({"co_visitation": {"window": 0}}, ["window=0 has to be a whole number, at least 1"]),
        ({"sasrec": {"trials": 0}}, ["trials=0 has to be a whole number, at least 1"]),
        ({"sasrec": {"dropout": 1.0}}, ["dropout=1.0 has to be a number from 0 on and below 1"]),
        ({"sasrec": {"batch_size": "32"}}, ["batch_size='32'", "whole number"]),
        ({"sasrec": {"hidden": 65}}, ["hidden=65 must be a multiple of heads=2"]),
        ({}, ["0 experts", "name at least one of co_visitation, sasrec, text"]),
    ],
)
def test_mistakes_are_named(asked: dict, words: list[str], tiny_dataset: Path) -> None:
    with pytest.raises(UserError) as error:
        build_experts(asked, Dataset.load(tiny_dataset), seed=0)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t: t.pop("indptr"), KeyError),
        (lambda t: t.update(data=-t["data"]), ValueError),
        (lambda t: t.update(indices=t["indices"] + 4), ValueError),
    ],
)
def test_tables_of_another_shape_are_refused(company: Company, change, error) -> None:
    tensors = company.tensors()
    change(tensors)
    with pytest.raises(error):
        Company.restore(tensors, company.facts(), company.popularity)


def test_an_expert_from_before_has_no_opinion_of_what_came_later(company: Company) -> None:
    later = Before(company, np.array([4, 2, 0, 0, 0, 0]))
    found = np.exp(later.log_probs(cases([[1, 4, 0], [5]])))
    known = np.exp(company.log_probs(cases([[1, 0], []])))  # an item that it does not know is none of the history
    np.testing.assert_allclose(found, np.concatenate([known, np.full((2, 2), 1 / 4)], axis=1), rtol=1e-5)
    assert later.tensors().keys() == company.tensors().keys()

"""A model that counts: by hand, and on codes that only look easy to guess."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from reasonrec.tokenizers.count_model import Counted, CountModel, _fit

CODES = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
COUNTS = np.array([3, 1, 2, 2])
NOTHING = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
ROWS = {"history": pl.List(pl.Int32), "target": pl.Int32, "masked": pl.List(pl.Int32)}


def rows(*cases: tuple[list[int], int, list[int]]) -> pl.DataFrame:
    history, target, masked = zip(*cases, strict=True)
    return pl.DataFrame({"history": history, "target": target, "masked": masked}, schema=ROWS)


def test_popularity_by_hand() -> None:
    cases = rows(([], 0, []), ([], 0, [1]), ([], 3, []))
    found = CountModel(CODES, Counted(COUNTS, NOTHING), cases).losses(cases)
    # Every item counts half more than it is a target: 3.5, 1.5, 2.5, 2.5.
    expected = [5 / 10 * 3.5 / 5, 3.5 / 8.5, 5 / 10 * 1 / 2]
    assert np.exp(-found) == pytest.approx(expected)


def test_the_three_ways_by_hand() -> None:
    pairs = (np.array([2, 2, 3]), np.array([0, 1, 2]))  # behind the first code 1: twice 0, once 1
    case = rows(([0, 3], 0, []))
    found = CountModel(CODES, Counted(COUNTS, pairs), case.clear()).losses(case)
    # Nothing was fitted, so each way has a third. Recent: 0 with 1/2, 3 with 1.
    first = (5 / 10 + 2 / 3 + 0.5 / 1.5) / 3
    second = (3.5 / 5 + 1 / 2 + 1) / 3
    assert np.exp(-found[0]) == pytest.approx(first * second)


def test_probabilities_of_the_unmasked_items_sum_to_one() -> None:
    rng = np.random.default_rng(0)
    codes = np.array([[a, b, c] for a in range(3) for b in range(3) for c in range(2)])
    counts = rng.integers(0, 9, len(codes))
    pairs = (rng.integers(0, len(codes), 60), rng.integers(0, len(codes), 60))
    free = [item for item in range(len(codes)) if item not in (4, 9)]
    cases = rows(*(([4, 9, 4], item, [4, 9]) for item in free))
    model = CountModel(codes, Counted(counts, pairs), cases.head(5))
    found = model.losses(cases)
    assert np.exp(-found).sum() == pytest.approx(1)
    everything = model.log_probs(cases.head(1))[0]
    np.testing.assert_allclose(everything[free], -found, rtol=1e-5)
    assert np.isneginf(everything[[4, 9]]).all()


def test_weights_are_the_likeliest() -> None:
    ways = np.random.default_rng(1).uniform(0.05, 1, (40, 3))
    best = np.log(ways @ _fit(ways)).sum()
    for other in np.random.default_rng(2).dirichlet(np.ones(3), 200):
        assert np.log(ways @ other).sum() <= best + 1e-3


def test_codes_by_popularity_are_easy_to_begin_with_and_lose() -> None:
    """Users stay in one of eight kinds of items half of the time; within each, few items have most of the users."""
    rng = np.random.default_rng(3)
    kind, taste = np.repeat(np.arange(8), 16), (1.0 + np.tile(np.arange(16), 8)) ** -1.5
    within = [np.where(kind == k, taste, 0) / taste[kind == k].sum() for k in range(8)]
    sequences = []
    for _ in range(600):
        kinds = [int(rng.integers(8))]
        while len(kinds) < 12:
            kinds.append(kinds[-1] if rng.random() < 0.5 else int(rng.integers(8)))
        sequences.append(np.array([rng.choice(128, p=within[k]) for k in kinds]))
    counts = np.bincount(np.concatenate([s[:-1] for s in sequences]), minlength=128)
    pairs = (np.concatenate([s[:-2] for s in sequences]), np.concatenate([s[1:-1] for s in sequences]))
    cases = rows(*((s[:-1].tolist(), int(s[-1]), []) for s in sequences))
    train = Counted(counts, pairs)

    def loss(first: np.ndarray, levels: int) -> float:
        second = np.empty(128, dtype=np.int64)
        for group in range(8):
            second[first == group] = np.arange((first == group).sum())
        model = CountModel(np.stack([first, second], 1)[:, :levels], train, cases.head(300))
        return float(model.losses(cases.tail(300)).mean())

    by_popularity = np.argsort(np.argsort(-counts, kind="stable")) // 16
    assert loss(by_popularity, 1) < loss(kind, 1) - 0.1, "the first code is easier to guess"
    assert loss(kind, 2) < loss(by_popularity, 2) - 0.1

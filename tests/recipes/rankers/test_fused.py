"""Fusion: by hand, and against every choice it could have made."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonrec.recipes.rankers.fused import STEP, Fused, _simplex
from reasonrec.recipes.rankers.top_k import top_k
from reasonrec.rewards.metrics import per_row
from reasonrec.tokenizers.errors import UserError

NOTHING = np.zeros(4, dtype=np.int64)
LACKS = -np.inf


@dataclass
class Given:
    """An expert with written scores (rows, items), by row number."""

    table: np.ndarray
    name: str = "given"

    def rank(self, rows: pl.DataFrame, k: int) -> np.ndarray:
        return top_k(self.table[rows["row"].to_numpy()], k, np.zeros(self.table.shape[1]), rows["masked"])

    def score(self, rows: pl.DataFrame, items: np.ndarray) -> np.ndarray:
        return np.take_along_axis(self.table[rows["row"].to_numpy()], items, axis=1)


def cases(targets: list[int], history: list[list[int]] | None = None, masked: list[list[int]] | None = None):
    n = len(targets)
    return pl.DataFrame(
        {"row": range(n), "target": targets, "history": history or [[]] * n, "masked": masked or [[]] * n},
        schema={"row": pl.Int32, "target": pl.Int32, "history": pl.List(pl.Int32), "masked": pl.List(pl.Int32)},
    )


def test_the_sum_by_hand() -> None:
    logs = Given(np.array([[-4.0, -2.0, 0.0, 50.0]]))  # over what is not masked: 0, .5, 1
    counts = Given(np.array([[9.0, LACKS, 4.0, 1.0]]))  # roots 3, 0, 2: 1, 0, 2/3
    rows = cases([0], [[0, 0]], [[3]])
    fused = Fused([logs, counts], (0.25, 0.75), 0.1, NOTHING, "both")
    found = fused.score(rows, np.array([[0, 1, 2]]))[0]
    assert found == pytest.approx([0.75 - 0.1, 0.125, 0.25 + 0.5], abs=1e-6)
    assert fused.rank(rows, 4).tolist() == [[2, 0, 1, -1]]


def test_an_expert_that_says_nothing_changes_nothing() -> None:
    right, flat = Given(np.array([[1.0, 3.0, 2.0, 0.0]])), Given(np.full((1, 4), 7.0))
    rows = cases([1])
    for weights in ((1.0, 0.0), (0.5, 0.5)):
        assert Fused([right, flat], weights, 0, NOTHING, "").rank(rows, 4).tolist() == [[1, 2, 0, 3]]


def test_users_without_a_history_or_with_everything_masked() -> None:
    expert = Given(np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]))
    rows = cases([3, 0], [[], [2]], [[], [0, 1, 2, 3]])
    assert Fused([expert], (1.0,), 0.5, NOTHING, "").rank(rows, 2).tolist() == [[3, 2], [-1, -1]]


@given(st.integers(0, 10_000), st.booleans())
def test_no_choice_of_the_first_grid_is_better(seed: int, repeats: bool) -> None:
    rng = np.random.default_rng(seed)
    n, items = 30, 12
    popularity = rng.integers(0, 5, items)
    experts = [Given(rng.normal(size=(n, items))), Given(np.where(rng.random((n, items)) < 0.6, LACKS, 2.0))]
    masked = None if repeats else [rng.choice(items, 2, replace=False).tolist() for _ in range(n)]
    targets = [
        int(rng.choice([i for i in range(items) if masked is None or i not in masked[row]])) for row in range(n)
    ]
    rows = cases(targets, [rng.choice(items, 3).tolist() for _ in range(n)], masked)

    def value(fused: Fused) -> float:
        return float(per_row(fused.rank(rows, 10), rows["target"].to_numpy(), (10,))["ndcg@10"].mean())

    fused = Fused.fit(experts, rows, popularity, "both")
    assert value(fused) == pytest.approx(fused.tried)
    for weights, penalty in itertools.product(_simplex(2, 2 * STEP), (0.0, 0.2, 0.5) if repeats else (0.0,)):
        assert fused.tried >= value(Fused(experts, weights, penalty, popularity, "")) - 1e-9


@pytest.mark.parametrize(("n", "step", "many"), [(1, 0.1, 1), (2, 0.1, 11), (3, 0.05, 231), (4, 0.1, 286)])
def test_weights_are_all_that_sum_to_one(n: int, step: float, many: int) -> None:
    found = list(_simplex(n, step))
    assert len(set(found)) == len(found) == many
    assert all(sum(weights) == pytest.approx(1) and min(weights) >= 0 for weights in found)


def test_it_says_what_it_needs() -> None:
    with pytest.raises(UserError, match="1 rankers and 0 validation rows"):
        Fused.fit([Given(np.zeros((1, 4)))], cases([]), NOTHING, "fused")
    fused = Fused([Given(np.zeros((1, 4)), "a"), Given(np.zeros((1, 4)), "b")], (0.3, 0.7), 0.2, NOTHING, "", 0.125)
    assert str(fused) == "0.30 × a + 0.70 × b, − 0.2 for what was had; chosen on validation (NDCG@10 0.1250)"

"""Weights of a pool: by hand, against their own gradient, and what they find."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import approx_fprime

from reasonrec.recipes.rankers.pool import RIDGE, Level, _losses, fit_level, fit_weights, losses


def level(said: np.ndarray, target: np.ndarray) -> Level:
    n, _, width = said.shape
    return Level(said, np.tile(np.arange(width), (n, 1)), target, np.arange(n))


def spoken(n: int, seed: int, weights: np.ndarray, width: int = 6) -> Level:
    """Voices drawn by chance, and targets drawn from their pool; the last place is of no child in every second row."""
    rng = np.random.default_rng(seed)
    said = rng.normal(scale=2, size=(n, len(weights), width))
    said[::2, :, -1] = -np.inf
    said -= np.logaddexp.reduce(said, axis=2, keepdims=True)
    mixed = np.where(
        np.isneginf(said[:, 0]), -np.inf, np.einsum("v,nvw->nw", weights, np.where(np.isinf(said), 0, said))
    )
    chances = np.exp(mixed - np.logaddexp.reduce(mixed, axis=1, keepdims=True))
    return level(said, np.array([rng.choice(width, p=p) for p in chances]))


def test_losses_by_hand() -> None:
    said = np.log([[[0.5, 0.5], [0.8, 0.2]]])
    found, gradient = _losses(np.array([1.0, 2.0]), said, np.array([1]))
    want = 0.5 * 0.04 / (0.5 * 0.64 + 0.5 * 0.04)
    assert found == pytest.approx([-np.log(want)])
    # Of the second voice: expected log(.8) and log(.2) under the pool, less log(.2).
    assert gradient[0] == pytest.approx([0, (1 - want) * (np.log(0.8) - np.log(0.2))])


@given(st.lists(st.floats(0, 3), min_size=2, max_size=2), st.integers(0, 20))
def test_the_gradient_is_that_of_the_losses(weights: list[float], seed: int) -> None:
    one = spoken(5, seed, np.ones(2))

    def total(w: np.ndarray) -> float:
        return float(_losses(w, one.said, one.target)[0].sum())

    near = approx_fprime(np.array(weights), total, 1e-6)
    np.testing.assert_allclose(_losses(np.array(weights), one.said, one.target)[1].sum(0), near, atol=1e-3)


def test_the_weights_that_drew_the_targets_are_found() -> None:
    truth = np.array([0.8, 0.0, 1.4])
    found = fit_level(spoken(4000, 0, truth), np.full(3, 1 / 3))
    np.testing.assert_allclose(found, truth, atol=0.1)
    assert (found >= 0).all()


def test_a_level_that_few_rows_reach_follows_the_one_above() -> None:
    start = np.array([0.4, 0.6])
    nobody = level(np.empty((0, 2, 3)), np.empty(0, dtype=np.int64))
    assert (fit_level(nobody, start) == start).all()
    one = spoken(1, 1, np.ones(2))
    found = fit_level(one, start)
    assert np.abs(found - start).max() < 2 / RIDGE
    many = spoken(3000, 0, np.array([1.5, 0.1]))
    weights = fit_weights([many, nobody], ["model", "counts"], ["model", "counts"])
    assert weights["model"][0] == weights["model"][1] == pytest.approx(1.5, abs=0.15)


def test_only_fitted_rows_count_and_only_who_is_heard() -> None:
    both = spoken(400, 3, np.array([1.0, 0.5]))
    half = np.arange(400) < 200
    one = fit_weights([both], ["a", "b"], ["a", "b"], half)
    first = both._replace(said=both.said[half], target=both.target[half], row=both.row[half])
    two = fit_weights([first], ["a", "b"], ["a", "b"])
    np.testing.assert_allclose(one["a"], two["a"])
    alone = fit_weights([both], ["a", "b"], ["b"])
    assert alone.keys() == {"b"}
    found = losses([both, both], ["a", "b"], {"b": np.array([1.0, 0.0])}, 400)
    legal = (~np.isneginf(both.said[:, 1])).sum(1)
    np.testing.assert_allclose(found, -both.said[np.arange(400), 1, both.target] + np.log(legal))

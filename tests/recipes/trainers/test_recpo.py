"""RecPO's arms against numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from reasonrec.recipes.trainers.algorithms import build_algorithm
from reasonrec.recipes.trainers.recpo import batch_means, leave_one_out, released_leave_one_out, winners
from reasonrec.tokenizers.errors import UserError

ONE = np.array([1.0, 0, 0, 0])
TWO = np.array([1.0, 0, 0, 0, 0, 0.5, 0, 0.5])
NOTHING = np.zeros(4, dtype=bool)


def test_leave_one_out():
    assert leave_one_out(ONE, 4).tolist() == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    assert leave_one_out(np.full(3, 0.1), 3).tolist() == [0, 0, 0]
    # The released formula: 1 · (1 + 1/4) − 1/4 = 1 and 0 − 1/4; the sum is the mean reward, not 0.
    assert released_leave_one_out(ONE, 4).tolist() == pytest.approx([1, -0.25, -0.25, -0.25])


def test_one_rollout_of_a_group_wins():
    assert winners(np.array([0.0, 2, 1, 2, 0, 0, 0, 0]), 4).tolist() == [False, True, *[False] * 6]


def test_the_equation():
    algorithm = build_algorithm("recpo", {"item_weight": 2.0}, 4)
    advantage = algorithm(ONE, NOTHING)
    assert advantage.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-4)  # mean 1/4, deviation 1/2
    chain, item = algorithm.split(advantage)
    assert chain.tolist() == advantage.tolist()
    assert item.tolist() == pytest.approx([3, 0, 0, 0], abs=1e-4)


def test_the_released_objective_collapses_on_whole_groups():
    algorithm = build_algorithm("recpo_released", {}, 4)
    chain, item = algorithm.split(algorithm(ONE, NOTHING))
    assert np.abs(chain).max() < 1e-8, "every token weighs mean(A)"
    assert item.tolist() == pytest.approx([1.5 / 4] * 4, abs=1e-4), "every item weighs mean(A · winner), won or not"
    # A group that is cut in two gets weights of opposite signs.
    algorithm = build_algorithm("recpo_released", {"batch_rows": 2}, 4)
    chain, item = algorithm.split(algorithm(ONE, NOTHING))
    assert chain.tolist() == pytest.approx([0.5, 0.5, -0.5, -0.5], abs=1e-4)
    assert item.tolist() == pytest.approx([0.75, 0.75, 0, 0], abs=1e-4)
    # Leave-one-out as released raises the likelihood of everything sampled.
    algorithm = build_algorithm("recpo_released", {"baseline": "leave_one_out", "batch_rows": 8}, 4)
    chain, _ = algorithm.split(algorithm(TWO, np.zeros(8, dtype=bool)))
    assert chain.tolist() == pytest.approx([0.25 / 4] * 8)


def test_batches_may_end_short():
    assert batch_means(np.array([1.0, 3, 5]), 2).tolist() == [2, 2, 5]


def test_without_reasoning_every_target_is_raised():
    algorithm = build_algorithm("infonce", {}, 4)
    chain, item = algorithm.split(algorithm(ONE, NOTHING))
    assert chain.tolist() == [0] * 4
    assert item.tolist() == [1] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"item_weight": -1}, "item_weight=-1 has to be a finite number, 0 or more"),
        ({"baseline": "none"}, "baseline='none': choose group or leave_one_out"),
        ({"weight": 1}, "the algorithm recpo has no option 'weight'; it has baseline, item_weight"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        build_algorithm("recpo", options, 4)

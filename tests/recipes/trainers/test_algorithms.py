"""Algorithms by name, with their own options."""

from __future__ import annotations

import numpy as np
import pytest

from reasonrec.recipes.trainers.algorithms import ALGORITHMS, Algorithm, Grpo, Srpo, build_algorithm
from reasonrec.tokenizers.errors import UserError


def test_srpo_adds_the_bonus_and_grpo_does_not():
    total, hits = np.array([1.0, 0, 0, 0]), np.array([True, False, False, False])
    plain, bonus = (made(total, hits) for made in (Grpo(4), Srpo(4, bonus_k=2)))
    assert plain.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-4)
    # n = 4, k = 2, c = 1: ρ = 1 − C(3,2)/C(4,2) = 1/2, σ = 1/2; hit .5/.5 = 1, miss (.5 − C(2,1)/C(3,1))/.5 = −1/3.
    assert (bonus - plain).tolist() == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3], abs=1e-4)
    with pytest.raises(UserError, match="k=5 with 4 rollouts"):
        build_algorithm("srpo", {"bonus_k": 5}, 4)


def test_the_nearest_name_and_the_options_are_named():
    with pytest.raises(UserError, match=r"algorithm 'srop' is unknown \(did you mean 'srpo'"):
        build_algorithm("srop", {}, 4)
    with pytest.raises(UserError, match="the algorithm grpo has no option 'bonus_k'; it has none"):
        build_algorithm("grpo", {"bonus_k": 2}, 4)
    with pytest.raises(UserError, match="the algorithm srpo has no option 'k'; it has bonus_k"):
        build_algorithm("srpo", {"k": 2}, 4)


def test_one_of_your_own_needs_no_edit(monkeypatch):
    class Mean(Algorithm):
        def __call__(self, total, hits):
            return total - total.mean()

    ALGORITHMS.entries()
    monkeypatch.setattr(ALGORITHMS, "_entries", dict(ALGORITHMS._entries))
    ALGORITHMS.add("mean", Mean, __name__)
    advantage = build_algorithm("mean", {}, 2)(np.array([1.0, 3.0]), np.array([False, True]))
    assert advantage.tolist() == [-1, 1]

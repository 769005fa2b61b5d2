"""The rules of consistent paths, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from reasonrec.recipes.args import parse
from reasonrec.recipes.decoding.consistency import Checks, Consistency
from reasonrec.tokenizers.errors import UserError

STEPS = np.arange(6)


@pytest.mark.parametrize(
    ("every", "expected"),
    [(1, [False, True, True, True, True, True]), (2, [False, False, True, False, True, False]),
     (3, [False, False, False, True, False, False])],
)  # fmt: skip
def test_every_so_many_steps_are_compared(every: int, expected: list[bool]) -> None:
    assert Consistency(0.06, check_every=every).compared(STEPS).tolist() == expected


def test_a_path_goes_back_but_not_before_its_first_code() -> None:
    assert Consistency(0.06, rollback=1).back_to(STEPS).tolist() == [0, 0, 1, 2, 3, 4]
    assert Consistency(0.06, rollback=3).back_to(STEPS).tolist() == [0, 0, 0, 0, 1, 2]


def test_theta_decides_what_is_a_jump() -> None:
    before = np.array([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0], [0.9, 0.1]])
    now = np.array([[0.5, 0.5], [0.5001, 0.4999], [0.0, 1.0], [0.6, 0.4]])  # divergences 0, 7e-9, 1 and 0.0913
    assert Consistency(0).jumped(before, now).tolist() == [False, True, True, True]
    assert Consistency(0.0912).jumped(before, now).tolist() == [False, False, True, True]
    assert Consistency(0.0914).jumped(before, now).tolist() == [False, False, True, False]
    assert not Consistency(1).jumped(before, now).any()
    assert not Consistency().jumped(before, now).any()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--theta", "1.5"], r"theta=1\.5 has to be at most 1"),
        (["--theta", "-0.1"], r"theta=-0\.1 has to be at least 0"),
        (["--check_every", "0"], "check_every=0 has to be at least 1"),
        (["--rollback", "0"], "rollback=0 has to be at least 1"),
        (["--retries", "-1"], "retries=-1 has to be at least 0"),
        (["--fallback", "popular"], "fallback.*unchecked.*none"),
    ],
)
def test_a_wrong_value_is_named(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse([Consistency], flags)


def test_thresholds_are_asked_of_models_that_are_there() -> None:
    there = {"models": True, "reasoning_models": True, "exact": False}
    Consistency(0.06, chain_theta=0.5).check_asked(**there)
    Consistency().check_asked(models=False, reasoning_models=False, exact=True)
    Consistency(chain_theta=0.5).check_asked(**there | {"models": False, "exact": True})
    with pytest.raises(UserError, match=r"^theta=0\.06 is asked of models, and there are none"):
        Consistency(0.06).check_asked(**there | {"models": False})
    with pytest.raises(UserError, match=r"^chain_theta=0\.5 is asked of reasoning_models, and there are none"):
        Consistency(chain_theta=0.5).check_asked(**there | {"reasoning_models": False})
    with pytest.raises(UserError, match=r"theta=0\.06 prunes the paths of a beam search: set exact: false"):
        Consistency(0.06).check_asked(**there | {"exact": True})


def test_what_was_pruned_is_told() -> None:
    checks = Checks(users=100, compared=400, pruned=100, back=60, read=5000, again=300, unchecked=40, dead=12, short=3)
    told = checks.told(Consistency(0.01))
    assert "theta=0.01 pruned 25.0% of 400 paths" in told
    assert "all paths of 12 of 100 users were pruned, who keep the unchecked list; other lists" in told
    assert "50.0 codes read a user, 3.0 of them behind paths that went back, 0.4 for unchecked lists" in told
    assert "12 of 100 users were pruned, who get no list" in checks.told(Consistency(0.01, fallback="none"))
    assert "of 0 paths" in Checks().told(Consistency(1))

"""Rewards that look ahead, against numbers worked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonrec.rewards.ahead import Later, look_ahead
from reasonrec.rewards.calling import Reward
from reasonrec.rewards.registry import load_reward, load_rewards
from reasonrec.tokenizers.errors import UserError

# Three answers; behind the first stand two more targets, behind the second one, behind the third none.
BATCH = {"completions": ["a", "b", "c"], "predicted_items": [5, 7, 3], "target_items": [4, 6, 3]}
LATER = [
    Later(np.array([0, 1]), {"target_items": [5, 7]}),
    Later(np.array([0]), {"target_items": [5]}),
]


def hits(horizon: int, decay: float = 0.8) -> list[float]:
    found = look_ahead(load_reward("exact", {"horizon": horizon, "decay": decay}), BATCH, LATER)
    return found.tolist()  # type: ignore[no-any-return]


def test_the_equation() -> None:
    """(0 + 0.8 + 0.64) / (1 + 0.8 + 0.64); with one target left (0 + 0.8) / (1 + 0.8); with none the hit alone."""
    assert hits(3) == pytest.approx([1.44 / 2.44, 0.8 / 1.8, 1])
    assert hits(2) == pytest.approx([0.8 / 1.8, 0.8 / 1.8, 1])
    assert hits(1) == [0, 0, 1]
    assert hits(3, 1.0) == pytest.approx([2 / 3, 1 / 2, 1])
    assert hits(9) == hits(3), "what there is"


def test_a_target_about_which_there_is_nothing_to_say_has_no_weight() -> None:
    def picky(*, target_items: list[int], **_: Any) -> list[float | None]:
        return [None if item in (4, 7) else float(item) for item in target_items]

    found = look_ahead(Reward("picky", picky, horizon=3, decay=0.5), BATCH, LATER)
    assert found[:2].tolist() == [(0.5 * 5 + 0.25 * 5) / 0.75, 6]
    silent = look_ahead(
        Reward("picky", lambda *, completions, **_: [None] * len(completions), horizon=3), BATCH, LATER
    )
    assert np.isnan(silent).all()


@given(st.floats(0.01, 1), st.lists(st.floats(-5, 5), min_size=1, max_size=5))
def test_it_is_a_mean(decay: float, values: list[float]) -> None:
    later = [Later(np.array([0]), {"target_items": [value]}) for value in values[1:]]
    reward = Reward("same", lambda *, target_items, **_: list(target_items), horizon=len(values), decay=decay)
    (found,) = look_ahead(reward, {"completions": [""], "target_items": values[:1]}, later)
    assert min(values) - 1e-9 <= found <= max(values) + 1e-9


def test_rewards_of_one_run_look_as_far_as_each_is_told() -> None:
    rewards = load_rewards({"exact": {"weight": 1.0, "horizon": 3}, "category": {"weight": 0, "horizon": 2}})
    assert rewards.horizon == 3
    assert load_rewards({"exact": 1}).horizon == 1
    values = rewards(later=LATER, categories=np.array([0] * 6 + [1] * 2), **BATCH)
    np.testing.assert_allclose(values, [[1.44 / 2.44, 1], [0.8 / 1.8, 1], [1, 1]])


def test_an_own_keyword_of_that_name_is_the_rewards(tmp_path: Any) -> None:
    (tmp_path / "own.py").write_text(
        "def own(*, completions, decay=0.5, **_):\n    return [decay] * len(completions)\n"
    )
    loaded = load_reward(f"{tmp_path / 'own.py'}:own", {"decay": 3, "horizon": 2})
    assert (loaded.options, loaded.horizon, loaded.decay) == ({"decay": 3}, 2, 0.8)
    assert loaded(completions=[""]) == [3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "reward 'exact': horizon=0 has to be a whole number, at least 1"),
        ({"horizon": 2.5}, "reward 'exact': horizon=2.5 has to be a whole number"),
        ({"horizon": 2, "decay": 0}, "reward 'exact': decay=0 has to be a number above 0 and at most 1"),
        ({"horizon": 2, "decay": 1.1}, "reward 'exact': decay=1.1 has to be a number above 0 and at most 1"),
        ({"horizon": 2, "decay": float("nan")}, "reward 'exact': decay=nan has to be"),
        ({"horizon": 2, "decay": "much"}, "reward 'exact': decay='much' has to be"),
        ({"decay": 0.5}, "reward 'exact': decay=0.5 changes nothing without a horizon above 1"),
        ({"horzon": 2}, r"reward 'exact' has no option 'horzon'; did you mean 'horizon'\?"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_reward("exact", options)

"""What a model draws before reinforcement learning."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from reasonrec.recipes.sizing.rollouts import pass_at_k, try_rollouts


def test_pass_at_k_by_hand() -> None:
    # Of 4 draws 0, 1 and 4 are right; two of them miss the one right draw with C(3,2)/C(4,2) = 1/2.
    right = np.array([0, 1, 4])
    assert pass_at_k(right, 4, 1) == pytest.approx((0 + 1 / 4 + 1) / 3)
    assert pass_at_k(right, 4, 2) == pytest.approx((0 + 1 / 2 + 1) / 3)
    assert pass_at_k(right, 4, 4) == pytest.approx(2 / 3)


def test_a_trained_model(adapter: Path) -> None:
    said = try_rollouts(str(adapter), None, 20, 8, False)
    assert "20 validation cases, 8 draws each" in said
    assert "valid answers 1.000" in said
    one, four, eight = (float(x) for x in re.findall(r"pass@\d+ ([\d.]+)", said))
    assert 0 <= one <= four <= eight <= 1
    assert said == try_rollouts(str(adapter), None, 20, 8, False), "the same draws every time"

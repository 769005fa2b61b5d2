"""The custom reward of the examples, used as its text says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from reasonrec.rewards.cases import GOLDEN, cases, make_batch
from reasonrec.rewards.registry import load_reward, load_rewards

ROOT = Path(__file__).parents[2]
SPEC = "examples/custom_reward.py:fresh_items"
TEXT = (ROOT / "examples" / "custom_reward.py").read_text(encoding="utf-8").split('"""')[1]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_it_pays_for_fresh_items_that_fit() -> None:
    fresh_items = load_reward(SPEC)
    assert fresh_items.name == "fresh_items"
    assert fresh_items.requires == ("train_counts",)
    # Four items on two levels; freshness by the ranks of 50, 10, 10, 0: 0, 1/2, 1/2, 1.
    codes = {0: (0, 0), 1: (0, 1), 2: (1, 0), 3: (0, 2)}
    predicted = [0, 1, 2, 3, 3, 0, -1, 1]
    target = [0, 0, 0, 0, 0, 1, 0, 0]
    history = [[], [], [], [], [3], [], [], []]
    batch = {
        "completions": [""] * 8,
        "predicted_items": predicted,
        "predicted_codes": [codes.get(item) for item in predicted],
        "target_codes": [codes[item] for item in target],
        "history_items": history,
        "train_counts": np.array([50, 10, 10, 0]),
        "depth": 2,
    }
    # The hit; half fresh and one of two codes right, over 3; not of that kind; fresh; owned already; a bestseller.
    assert fresh_items(**batch) == pytest.approx([1, 0.5 / 3, 0, 1 / 3, 0, 0, 0, 0.5 / 3])
    strict = load_reward(SPEC, {"relevance": 2})
    assert strict(**batch) == pytest.approx([1, 0, 0, 0, 0, 0, 0, 0])


def test_the_configuration_in_its_text_works() -> None:
    start = TEXT.index("rewards:")
    config = yaml.safe_load(TEXT[start : TEXT.index("With weight 0")])["rewards"]
    rewards = load_rewards(config)
    assert rewards.names == ("rsvr", "fresh_items", "length")
    assert rewards.weights == (1.0, 0.2, 0.0)
    assert rewards.requires == ("train_counts",)
    chosen = cases(reasoning=True)
    total = rewards.total(rewards(**make_batch(chosen, reasoning=True)))
    golden = [case.name for case in chosen].index(GOLDEN)
    assert total[golden] == pytest.approx(1.2)
    misses = [value for case, value in zip(chosen, total, strict=True) if case.kind == "miss"]
    assert max(misses) < total[golden]


def test_the_check_in_its_text_passes() -> None:
    (line,) = [line.strip() for line in TEXT.splitlines() if line.strip().startswith("python -m")]
    command = [sys.executable, *line.split()[1:], "--strict"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reasoning: an exact hit scores highest" in done.stdout
    assert done.stdout.endswith("it can be used\n")

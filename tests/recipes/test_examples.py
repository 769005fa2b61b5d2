"""The examples do what they say, on a model that the training stage wrote."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.recommender import Recommender

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_follow_a_user(adapter: Path, tiny_dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("follow_a_user", EXAMPLES / "follow_a_user.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    recommender = Recommender.from_pretrained(adapter)
    whole = Dataset.load(tiny_dataset).test["history"][-1].to_list()
    example.main(str(adapter), recommender.items.ids(whole), clicks=2)
    first, second = [line for line in capsys.readouterr().out.splitlines() if line.startswith("after ")]

    titles = recommender.policy.catalogue.titles
    items, scores = recommender.rank([whole[-5:]], k=10, num_beams=20, exclude=[whole])
    expected = f"after {titles[whole[-1]]!r}: {titles[items[0, 0]]!r} (log-probability {scores[0, 0]:.2f})"
    assert first == expected
    assert second.startswith(f"after {titles[items[0, 0]]!r}: ")

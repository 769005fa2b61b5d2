"""The examples do what they say, on a model that the training stage wrote."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.recommender import Recommender

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def test_quickstart(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recommender = Recommender.from_pretrained(adapter)
    history = recommender.policy.catalogue.item_ids[:3]
    best = recommender.recommend(history, k=5)
    load("quickstart").main(str(adapter), history)
    *listed, two, again = capsys.readouterr().out.splitlines()
    assert listed == [
        f"{n:>3}  {i.title}  ({i.id}, log-probability {i.score:.2f})" for n, i in enumerate(best, start=1)
    ]
    assert two == f"two users: {[[i.id for i in row] for row in recommender.recommend([history, history[:1]], k=5)]}"
    assert again.startswith("with repeats, without the first: ")
    assert f"'{best[0].id}'" not in again


def test_follow_a_user(adapter: Path, tiny_dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = load("follow_a_user")
    recommender = Recommender.from_pretrained(adapter)
    whole = Dataset.load(tiny_dataset).test["history"][-1].to_list()
    example.main(str(adapter), recommender.items.ids(whole), clicks=2)
    first, second = [line for line in capsys.readouterr().out.splitlines() if line.startswith("after ")]

    titles = recommender.policy.catalogue.titles
    items, scores = recommender.rank([whole[-5:]], k=10, num_beams=20, exclude=[whole])
    expected = f"after {titles[whole[-1]]!r}: {titles[items[0, 0]]!r} (log-probability {scores[0, 0]:.2f})"
    assert first == expected
    assert second.startswith(f"after {titles[items[0, 0]]!r}: ")

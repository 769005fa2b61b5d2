from __future__ import annotations

from pathlib import Path

import pytest

from reasonrec.recipes.trainers.best import best_folder, copy_best, keep_best


def writing(text: str):
    def write(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "weights").write_text(text)

    return write


def log(*values: tuple[int, float]) -> list[dict[str, float]]:
    return [{"step": step, "ndcg": value} for step, value in values] + [{"step": 9, "loss": 1.0}]


def test_the_best_is_kept_until_a_better_one_is_there(tmp_path: Path) -> None:
    keep_best(tmp_path, 0, writing("start"))
    keep_best(tmp_path, 4, writing("four"))
    assert [path.name for path in tmp_path.iterdir()] == ["best-4"]

    def killed(folder: Path) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep_best(tmp_path, 6, killed)
    assert best_folder(tmp_path, 4).is_dir()
    assert copy_best(tmp_path, tmp_path / "out", log((0, 0.1), (4, 0.3), (6, 0.4)), "ndcg") == 4, "the whole one"
    assert (tmp_path / "out" / "weights").read_text() == "four"
    keep_best(tmp_path, 6, writing("six"))
    keep_best(tmp_path, 6, writing("six again"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-6", "out"]


def test_of_equal_steps_the_earliest_counts_and_without_any_there_is_none(tmp_path: Path) -> None:
    assert copy_best(tmp_path, tmp_path / "out", log((0, 0.1)), "ndcg") is None
    for step in (2, 4):
        best_folder(tmp_path, step).mkdir()
    assert copy_best(tmp_path, tmp_path / "out", log((2, 0.3), (4, 0.3)), "ndcg") == 2

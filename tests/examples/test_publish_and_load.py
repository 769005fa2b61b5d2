"""The publishing example: a folder that recommends when the run that it came from is gone."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "publish_and_load.py"


def test_a_published_folder_outlives_its_run(
    tiny_base: Path, tiny_dataset: Path, tiny_index: Path, stage, tmp_path: Path, monkeypatch, capsys
) -> None:
    spec = importlib.util.spec_from_file_location("publish_and_load", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    run = tmp_path / "run"
    for name, made in (("dataset", tiny_dataset), ("index", tiny_index)):
        shutil.copytree(made, run / name)
    world = ["--dataset", str(run / "dataset"), "--index", str(run / "index"), "--model", str(tiny_base)]
    short = ["--method", "lora", "--max_history", "6", "--num_train_epochs", "0.1"]
    stage("sft", *world, *short, "--output_dir", str(run / "sft"))
    folder = tmp_path / "published"
    example.main(str(run / "sft"), str(folder), ["0-0-0", "0-0-1"], base_model=str(tiny_base))
    first = capsys.readouterr().out.splitlines()
    assert "dry run: nothing was pushed" in first
    shutil.rmtree(run)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.rename(elsewhere / "mine")
    monkeypatch.chdir(elsewhere)
    example.recommend("mine", ["0-0-0", "0-0-1"], base_model=str(tiny_base))
    second = [line for line in capsys.readouterr().out.splitlines() if "log-probability" in line]
    assert len(second) == 3
    assert second == [line for line in first if "log-probability" in line]


def test_its_text_says_what_is_there(pytestconfig: pytest.Config) -> None:
    text = EXAMPLE.read_text(encoding="utf-8").split('"""')[1]
    assert f"python examples/{EXAMPLE.name} " in text

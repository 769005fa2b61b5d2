"""A run's folder says nothing of the machine it was made on, and works wherever it is moved to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import polars as pl
import pytest

from reasonrec.recipes.rankers.model import ModelRanker
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.artefact import read_manifest
from reasonrec.tokenizers.errors import UserError

Stage = Callable[..., CompletedProcess[str]]
LOG = [f"u{n % 12},i{(n * 7) % 16},{1700000000 + n * 60}" for n in range(192)]
TABLES = {
    "log.csv": ["user_id,item_id,timestamp", *LOG],
    "items.csv": ["item_id,title,category", *(f"i{n},title {n},kind {n % 3}" for n in range(16))],
}
SHORT = ["--precision", "fp32", "--report_to", "none", "--activation_checkpointing", "false", "--save_steps", "9"]
REWARD = "def short(*, completions, **_):\n    return [1.0] * len(completions)\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, stage: Stage) -> Path:
    """A run from tables of one's own to reinforcement learning, all paths absolute."""
    root = tmp_path_factory.mktemp("my company")
    for name, lines in TABLES.items():
        (root / name).write_text("\n".join(lines) + "\n")
    (root / "codes.json").write_text(json.dumps({str(n): [f"<a_{n // 4}>", f"<b_{n % 4}>"] for n in range(16)}))
    (root / "mine.py").write_text(REWARD)
    shutil.copytree(tiny_base, root / "models" / "base")
    made = {name: str(root / "run" / name) for name in ("dataset", "index", "sft", "grpo", "report", "traces")}
    tables = ["--interactions", str(root / "log.csv"), "--items", str(root / "items.csv")]
    stage("prepare", "--source", "tables", *tables, "--output_dir", made["dataset"])
    codes = ["--quantizer", "external", "--external_index", str(root / "codes.json")]
    stage("index_items", "--dataset", made["dataset"], *codes, "--output_dir", made["index"])
    stage("synthesize", "--dataset", made["dataset"], "--rows", "8", "--valid_rows", "4", "--min_history", "1",
          "--label_field", "category", "--output_dir", made["traces"])  # fmt: skip
    world = ["--dataset", made["dataset"], "--index", made["index"]]
    lora = ["--model", str(root / "models" / "base"), "--method", "lora", "--max_history", "6"]
    stage("sft", *world, *lora, *SHORT, "--num_train_epochs", "0.1", "--output_dir", made["sft"])
    steps = ["--num_generations", "4", "--max_steps", "1", "--valid_rows", "0", "--per_device_train_batch_size", "4"]
    rewards = ["--rewards", f"{{rsvr: 1.0, '{root}/mine.py:short': 0.5}}"]
    stage("grpo", "--model", made["sft"], *rewards, *steps, *SHORT, "--output_dir", made["grpo"])
    ranked = ["--models", made["sft"], made["grpo"], "--sasrec_trials", "0", "--max_rows", "4"]
    stage("eval_ranking", "--dataset", made["dataset"], *ranked, "--output_dir", made["report"])
    return root


def test_no_manifest_names_a_place_of_this_machine(run: Path) -> None:
    kinds = {folder.name: read_manifest(folder) for folder in (run / "run").iterdir() if folder.is_dir()}
    assert len(kinds) == 6
    for file in (run / "run").rglob("*.json"):
        text = file.read_text()
        assert str(run) not in text or file.parent.name == "report", file
        assert str(Path.home()) not in text, file
    for name, manifest in kinds.items():
        assert "my company" not in str(manifest), name
    assert kinds["dataset"].config["interactions"] == "log.csv"
    assert kinds["grpo"].config["base_model"] == "../../models/base"
    assert kinds["grpo"].facts["setting"]["base_model"] == "base"
    assert kinds["grpo"].config["rewards"] == {"rsvr": 1.0, "mine.py:short": 0.5}
    assert set(kinds["report"].inputs) == {"dataset", "../sft", "../grpo"}


def test_a_run_moves_as_a_whole(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Recommender.from_pretrained(run / "run" / "grpo").rank([[1, 2, 3]], k=4)
    moved = tmp_path / "on another" / "machine"
    shutil.copytree(run, moved)
    away = run.rename(run.with_name("gone"))
    try:
        monkeypatch.chdir(tmp_path)
        after = Recommender.from_pretrained("on another/machine/run/grpo").rank([[1, 2, 3]], k=4)
        assert (after[0] == before[0]).all()
        shutil.move(moved / "run" / "grpo", tmp_path / "alone")
        with pytest.raises(UserError, match="if it moved, pass --base_model PATH"):
            Recommender.from_pretrained(tmp_path / "alone")
        shutil.rmtree(moved / "run")  # dataset, index, the training it started from
        alone = Recommender.from_pretrained(tmp_path / "alone", base_model=str(moved / "models" / "base"))
        assert (alone.rank([["i1", "i2", "i3"]], k=4)[0] >= 0).all()
        assert (alone.rank([[1, 2, 3]], k=4)[0] == before[0]).all()
        lists = pl.List(pl.Int32)
        cases = pl.DataFrame({"history": [[1, 2, 3]], "masked": [[]]}, schema={"history": lists, "masked": lists})
        ranker = ModelRanker(alone, "alone")
        assert (ranker.rank(cases, 4) == before[0]).all()
        np.testing.assert_allclose(ranker.score(cases, before[0]), before[1], atol=1e-4)
    finally:
        away.rename(run)

"""The invented shop: its tables are what the script makes, and every stage of the example runs on them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

ROOT = Path(__file__).parents[2]
SHOP, CONFIGS = ROOT / "examples" / "own_shop", ROOT / "recipes" / "configs" / "example"
# Each stage at its smallest: the flags that differ from the shipped configuration.
SMALLEST = {
    "prepare": [],
    "index": [],
    "sft": ["--layers", "1", "--num_train_epochs", "0.1", "--eval_steps", "10", "--valid_rows", "10"],
    "grpo": ["--max_steps", "2", "--per_device_train_batch_size", "16", "--valid_rows", "10", "--eval_steps", "2",
             "--save_steps", "2"],
    "fuse": [],
    "eval": ["--max_rows", "20"],
    "publish": [],
}  # fmt: skip


def test_the_tables_are_what_the_script_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(SHOP / "make_tables.py"), str(tmp_path)], check=True)
    for name in ("items.csv", "interactions.csv"):
        assert (tmp_path / name).read_bytes() == (SHOP / name).read_bytes()
    items, bought = pl.read_csv(SHOP / "items.csv"), pl.read_csv(SHOP / "interactions.csv")
    assert set(bought["sku"]) <= set(items["sku"])
    assert items["sku"].is_unique().all()


@pytest.mark.slow
def test_every_stage_runs_and_the_end_recommends(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")

    def reasonrec(*words: str) -> str:
        code = "import sys; from reasonrec.recipes.cli import main; sys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(SMALLEST)
    for stage, flags in SMALLEST.items():
        reasonrec(stage, "--config", str(CONFIGS / f"{stage}.yaml"), *flags)
    said = reasonrec("recommend", "--model", "runs/example/published", "--history", "cyc-048,cyc-051", "--k", "3")
    assert [line.split()[0] for line in said.splitlines() if " id " in line] == ["1", "2", "3"]
    rows = json.loads((tmp_path / "runs/example/report/metrics.json").read_text())["rows"]
    assert {"popularity", "fused, its experts alone"} <= {row["name"] for row in rows}

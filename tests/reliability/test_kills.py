"""A stage that is killed at any file operation of its finish leaves nothing half, and ends the same when run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Report = Callable[[str, int, list[str]], None]
RECIPES = Path(__file__).parents[2] / "recipes"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
TRAINING = [
    *("--per_device_train_batch_size", "16", "--learning_rate", "5e-3", "--precision", "fp32", "--report_to", "none"),
    *("--activation_checkpointing", "false"),
]


def run(stage: str, points: int, out: Path, flags: list[str]) -> dict[str, object]:
    command = [sys.executable, str(Path(__file__).with_name("kill_at.py")), stage, str(points), str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def flags(
    request: pytest.FixtureRequest, tmp_path: Path, tiny_base: Path, tiny_dataset: Path, tiny_index: Path
) -> list[str]:
    """What each stage is run with."""
    world = ["--dataset", str(tiny_dataset), "--index", str(tiny_index)]
    if request.param == "prepare":
        return ["--source", "synthetic", "--train_users", "60", "--held_out_users", "20"]
    if request.param == "index":
        codes = tmp_path / "codes.json"
        codes.write_text(json.dumps({str(i): [f"<a_{i // 8}>", f"<b_{i % 8}>"] for i in range(48)}))
        return ["--dataset", str(tiny_dataset), "--quantizer", "external", "--external_index", str(codes)]
    if request.param == "sft":
        lora = ["--method", "lora", "--max_history", "6", "--num_train_epochs", "0.5", "--save_steps", "4"]
        return [*world, "--model", str(tiny_base), *lora, *TRAINING]
    start = tmp_path / "start"
    lora = ["--method", "lora", "--max_history", "6", "--num_train_epochs", "0.5", "--output_dir", str(start)]
    command = [sys.executable, str(RECIPES / "sft.py"), *world, "--model", str(tiny_base), *lora, *TRAINING]
    subprocess.run(command, capture_output=True, env=ENVIRONMENT, check=True)
    steps = ["--num_generations", "4", "--max_steps", "2", "--save_steps", "1", "--eval_steps", "1", "--beta", "0"]
    return ["--model", str(start), "--valid_rows", "8", *steps, *TRAINING]


@pytest.mark.parametrize("flags", ["prepare", "index", "sft", "grpo"], indirect=True)
def test_kills_in_the_finish(
    flags: list[str], request: pytest.FixtureRequest, tmp_path: Path, large: bool, report: Report
) -> None:
    stage = request.node.callspec.params["flags"]
    found = run(stage, 0 if large else 3, tmp_path / "out", flags)
    assert found["operations"] or found["faults"], "the finish makes file operations"
    report(f"kills in the finish of {stage}", found["tries"], found["faults"])  # type: ignore[arg-type]

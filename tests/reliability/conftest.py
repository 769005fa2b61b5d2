"""Small by default; `REASONREC_RELIABILITY=large` (make bench BENCH=reliability) tries everything."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

LARGE = os.environ.get("REASONREC_RELIABILITY") == "large"
Stage = Callable[..., subprocess.CompletedProcess[str]]
SHORT = [
    *("--per_device_train_batch_size", "16", "--learning_rate", "5e-3", "--precision", "fp32", "--report_to", "none"),
    *("--activation_checkpointing", "false"),
]
LORA = ["--method", "lora", "--max_history", "6", "--num_train_epochs", "0.5", "--save_steps", "4", *SHORT]
STEPS = ["--num_generations", "4", "--max_steps", "2", "--save_steps", "1", "--eval_steps", "1", "--beta", "0", *SHORT]


@pytest.fixture(scope="session")
def large() -> bool:
    """Whether everything is tried."""
    return LARGE


@pytest.fixture
def report() -> Callable[[str, int, list[str]], None]:
    """A function that takes an area's tries and faults down, and fails the test if there is a fault."""

    def take_down(area: str, tries: int, faults: list[str]) -> None:
        if folder := os.environ.get("REASONREC_RELIABILITY_OUT"):
            with Path(folder, "tries.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"area": area, "tries": tries, "faults": faults}) + "\n")
        assert tries > 0
        assert not faults, "\n".join(faults[:20])

    return take_down


@pytest.fixture(scope="session")
def flags_of(
    stage: Stage, tiny_base: Path, tiny_dataset: Path, tiny_index: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[str]]:
    """A function that gives what a stage is run with in the tiny world, without its output."""
    dataset, world = ["--dataset", str(tiny_dataset)], ["--dataset", str(tiny_dataset), "--index", str(tiny_index)]
    adapter = tmp_path_factory.mktemp("start") / "adapter"

    def start() -> str:
        if not adapter.exists():
            stage("sft", *flags("sft"), "--output_dir", str(adapter))
        return str(adapter)

    def flags(name: str) -> list[str]:
        if name == "prepare":
            return ["--source", "synthetic", "--train_users", "60", "--held_out_users", "20"]
        if name == "index_items":
            codes = tmp_path_factory.mktemp("codes") / "codes.json"
            codes.write_text(json.dumps({str(i): [f"<a_{i // 8}>", f"<b_{i % 8}>"] for i in range(48)}))
            return [*dataset, "--quantizer", "external", "--external_index", str(codes)]
        if name == "synthesize":
            return [*dataset, "--rows", "40", "--valid_rows", "8", "--min_history", "2", "--label_field", "category"]
        if name == "sft":
            return [*world, "--model", str(tiny_base), *LORA]
        if name == "grpo":
            return ["--model", start(), "--valid_rows", "8", *STEPS]
        assert name == "eval_ranking"
        return [*dataset, "--models", start(), "--sasrec_trials", "0", "--max_rows", "6", "--precision", "fp32"]

    return flags


@pytest.fixture(scope="session")
def made(
    stage: Stage, flags_of: Callable[[str], list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A function that gives what a stage made of the tiny world."""
    found: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in found:
            out = tmp_path_factory.mktemp("made") / name
            stage(name, *flags_of(name), "--output_dir", str(out))
            found[name] = out
        return found[name]

    return make

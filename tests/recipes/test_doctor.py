"""The doctor, as its own process: it tries a real configuration and leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from reasonrec.recipes.sizing import machine

RECIPES = Path(__file__).parents[2] / "recipes"


def doctor(cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RECIPES / "doctor.py"), *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def training(sft_flags: list[str], tmp_path: Path) -> Path:
    names, values = [flag[2:] for flag in sft_flags[::2]], sft_flags[1::2]
    config = dict(zip(names, values, strict=True)) | {
        "method": "lora", "lora_r": 4, "max_history": 6, "num_train_epochs": 3, "per_device_train_batch_size": 4,
        "output_dir": str(tmp_path / "never"), "valid_rows": 10, "eval_strategy": "steps",
    }  # fmt: skip
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "sft.yaml"


@pytest.mark.slow
def test_a_training_is_tried_and_not_done(training: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = doctor(tmp_path, "--training", str(training))
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "all versions are in the ranges" in said
    assert "precision: " in said
    for word in ("weights", "gradients", "optimiser", "activations", "logits", "counted", "measured", "free"):
        assert f"\n    {word}" in said
    assert "tried: " in said
    assert "it fits" in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_wrong_configuration_is_one_line(training: Path, tmp_path: Path) -> None:
    training.write_text(training.read_text().replace("lora_r: 4", "lorar: 4"))
    done = doctor(tmp_path, "--training", str(training))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "lora_r" in done.stderr
    training.write_text(training.read_text().replace("lorar: 4", "lora_r: 4").replace("index: ", "index: /nowhere"))
    done = doctor(tmp_path, "--training", str(training))
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)


def test_the_longest_examples_are_what_is_tried(
    stage, sft_flags: list[str], lora_flags: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "trial.json"
    stage("sft", *sft_flags, *lora_flags, "--output_dir", str(tmp_path / "out"), "--trial", str(out))
    found = json.loads(out.read_text())
    assert not (tmp_path / "out").exists()
    assert 0 < found["share"] <= 1
    assert found["seconds"] > 0
    assert found["peak"] > 10**7
    # Two passes in batches of 16, as long as the log of the real training says.
    real = stage("sft", *sft_flags, *lora_flags, "--output_dir", str(tmp_path / "real"))
    log = json.loads((tmp_path / "real" / "train_metrics.json").read_text())["log"]
    assert found["steps"] == max(entry["step"] for entry in log)
    assert f"only {found['steps']} updates: new tokens" in real.stdout


def test_a_version_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda name: "1.2" if name == "trl" else real(name))
    said = list(machine.versions())
    assert len(said) == 2
    assert said[1].startswith("trl 1.2 is installed, ")

    def missing(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(machine.importlib.metadata, "version", missing)
    assert list(machine.versions())[1].startswith("peft is missing: pip install 'peft")

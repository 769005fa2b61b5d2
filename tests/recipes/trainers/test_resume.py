"""What an interrupted run knows of itself: what makes it start anew, what is only said, and its report in the end."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reasonrec.recipes.models.precision import choose
from reasonrec.recipes.trainers import resume
from reasonrec.recipes.trainers.resume import keep_or_clear
from reasonrec.recipes.trainers.versions import versions
from reasonrec.tokenizers.artefact import file_hash, partial_folder, read_manifest

Stage = Callable[..., subprocess.CompletedProcess[str]]
REWARD = """
def firsts(*, predicted_codes, target_codes, completions, **_):
    return [{sign} * float(bool(p) and p[0] == t[0]) for p, t in zip(predicted_codes, target_codes)]
"""


def report(folder: Path) -> dict[str, Any]:
    """The final figures that do not depend on how long a machine took."""
    metrics = json.loads((folder / "train_metrics.json").read_text())["train"]
    assert metrics.pop("train_runtime") > 0
    return metrics


# --- settings ---------------------------------------------------------------------------------------------------


def test_versions_are_said_and_do_not_clear(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    run: tuple[Any, ...] = (out, {"seed": 1}, {"dataset": "a"}, choose("fp32", "cpu"))
    assert {"reasonrec", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes"} == versions().keys()
    keep_or_clear(*run)
    (partial_folder(out) / "state").touch()
    before = versions()["torch"]
    monkeypatch.setattr(resume, "versions", lambda: {**versions(), "torch": "99.0"})
    keep_or_clear(*run)
    assert f"was begun with torch {before}: going on with 99.0" in capsys.readouterr().out
    assert (partial_folder(out) / "state").exists()


def test_another_base_model_or_other_traces_start_anew(tmp_path, capsys):
    out, precision = tmp_path / "out", choose("fp32", "cpu")
    for name in ("base model's weights", "traces"):
        keep_or_clear(out, {"seed": 1}, {name: "a"}, precision)
        (partial_folder(out) / "state").touch()
        keep_or_clear(out, {"seed": 1}, {name: "b"}, precision)
        assert f"other settings ({name}): starting anew" in capsys.readouterr().out.splitlines()[-1]
        assert not (partial_folder(out) / "state").exists()


def test_sft_passes_the_weights_of_its_base(adapter, sft_flags, lora_flags, tmp_path, killed_behind):
    out = tmp_path / "out"
    killed_behind(5, "sft", *sft_flags, *lora_flags, "--output_dir", str(out))
    settings = json.loads((partial_folder(out) / "unfinished.json").read_text())["settings"]
    assert settings["base model's weights"] == read_manifest(adapter).facts["setting"]["fingerprint"]


# --- grpo, as in the words of a user ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(adapter, tmp_path_factory, killed_behind) -> tuple[Path, Path, list[str]]:
    """A run with a reward of its own, killed behind step 4 of 6: its output folder, the reward's file, its flags."""
    folder = tmp_path_factory.mktemp("grpo")
    reward, out = folder / "mine.py", folder / "out"
    reward.write_text(REWARD.format(sign=1))
    flags = [
        *("--model", str(adapter), "--rewards", f"{{'{reward}:firsts': 1.0}}", "--num_generations", "4"),
        *("--per_device_train_batch_size", "16", "--max_steps", "6", "--save_steps", "4", "--learning_rate", "1e-3"),
        *("--valid_rows", "0", "--bf16", "false", "--activation_checkpointing", "false", "--report_to", "none"),
        *("--disable_tqdm", "true", "--keep", "last", "--save_total_limit", "9", "--logging_steps", "3"),
    ]
    killed_behind(4, "grpo", *flags, "--output_dir", str(out))
    partial_folder(out).rename(folder / "kept")
    return out, reward, flags


def restore(out: Path) -> None:
    """Put the partial folder back as the kill left it."""
    for folder in (out, partial_folder(out)):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(out.with_name("kept"), partial_folder(out))


def test_a_killed_grpo_run_reports_the_whole(killed, stage: Stage):
    out, reward, flags = killed
    restore(out)
    assert "going on from" in stage("grpo", *flags, "--output_dir", str(out)).stdout
    whole = out.with_name("whole")
    stage("grpo", *flags, "--output_dir", str(whole))
    assert report(out) == report(whole)
    assert report(out)["num_tokens"] > 0
    assert (out / "README.md").read_text() == (whole / "README.md").read_text()
    assert read_manifest(out).facts["reinforced"]["reward_files"] == {str(reward): file_hash(reward)}


def test_an_edited_reward_starts_anew(killed, stage: Stage):
    out, reward, flags = killed
    restore(out)
    reward.write_text(REWARD.format(sign=-1))
    printed = stage("grpo", *flags, "--output_dir", str(out)).stdout
    assert "was begun with other settings (rewards): starting anew" in printed
    assert "going on" not in printed

"""What an interrupted run knows of itself: what makes it start anew, what is only said, and its report in the end."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from reasonrec.recipes.models.precision import choose
from reasonrec.recipes.trainers import resume
from reasonrec.recipes.trainers.resume import adopted, keep_or_clear, last_checkpoint
from reasonrec.recipes.trainers.versions import versions
from reasonrec.tokenizers.artefact import file_hash, read_manifest, staged
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.output import MARKER, partial_folder, resume_folder

PRECISION = choose("fp32", "cpu")
Stage = Callable[..., subprocess.CompletedProcess[str]]
REWARD = """
def firsts(*, predicted_codes, target_codes, completions, **_):
    return [{sign} * float(bool(p) and p[0] == t[0]) for p, t in zip(predicted_codes, target_codes)]
"""


# --- checkpoints, settings, adoption ---------------------------------------------------------------------------------


def checkpoint(folder: Path, step: int, state: str | None = "{}") -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"a": torch.arange(9.0)}, path / "adapter_model.safetensors")
    torch.save({"step": torch.arange(99.0)}, path / "optimizer.pt")
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_the_last_checkpoint_is_the_newest_whole_one(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nowhere") is None
    assert last_checkpoint(tmp_path) is None
    checkpoint(tmp_path, 300, state=None)  # killed before the state was written
    assert last_checkpoint(tmp_path) is None
    nine, ten = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert last_checkpoint(tmp_path) == ten, "by number, not by name"
    checkpoint(tmp_path, 11, state=json.dumps({"global_step": 11})[:-4])  # killed while it was written
    checkpoint(tmp_path, 12, state="")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-best" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-20").write_text("no folder")
    assert last_checkpoint(tmp_path) == ten
    (ten / "trainer_state.json").unlink()
    assert last_checkpoint(tmp_path) == nine


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("harm", ["missing", "truncated", "empty"])
def test_a_checkpoint_needs_its_weights_and_its_optimiser(tmp_path: Path, name: str, harm: str) -> None:
    whole, torn = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    assert last_checkpoint(tmp_path) == torn
    if harm == "missing":
        (torn / name).unlink()
    else:
        content = (torn / name).read_bytes()
        (torn / name).write_bytes(content[: len(content) - 8] if harm == "truncated" else b"")
    assert last_checkpoint(tmp_path) == whole


def test_a_changed_byte_of_the_optimiser_is_noticed(tmp_path: Path) -> None:
    whole, torn = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    content = bytearray((torn / "optimizer.pt").read_bytes())
    at = content.index(torch.arange(99.0).numpy().tobytes())
    content[at + 5] ^= 1
    (torn / "optimizer.pt").write_bytes(content)
    assert last_checkpoint(tmp_path) == whole


def test_other_settings_clear_what_was_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    keep_or_clear(out, {"rate": 1, "save_steps": 5}, {"dataset": "a"}, PRECISION)
    left = checkpoint(resume_folder(out), 5)
    keep_or_clear(out, {"rate": 1, "save_steps": 9}, {"dataset": "a"}, PRECISION)
    assert left.is_dir()
    assert capsys.readouterr().out == ""
    keep_or_clear(out, {"rate": 1}, {"dataset": "b"}, PRECISION)
    assert not left.exists()
    assert capsys.readouterr().out == f"{resume_folder(out)} was begun with other settings (dataset): starting anew\n"


def test_a_folder_of_somebody_else_is_not_cleared(tmp_path: Path) -> None:
    out = tmp_path / "out"
    resume_folder(out).mkdir()
    (resume_folder(out) / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"out\.resume is nothing of this kit .*: move it away"):
        keep_or_clear(out, {}, {"dataset": "a"}, PRECISION)
    assert (resume_folder(out) / "thesis.tex").is_file()


def test_a_run_that_lacks_only_its_name_is_adopted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    about = {"kind": "notes", "config": {"rate": 1}, "seed": 0, "inputs": {"dataset": "a"}, "overwrite": False}
    with staged(out, **about) as (folder, _):
        (folder / "a.txt").write_text("a")
    out.rename(partial_folder(out))
    (partial_folder(out) / MARKER).write_text("{}")
    left = checkpoint(resume_folder(out), 5)
    (resume_folder(out) / MARKER).write_text("{}")
    assert not adopted(out, **about | {"config": {"rate": 2}})
    assert not adopted(out, **about | {"inputs": {"dataset": "b"}})
    assert not adopted(out, **about | {"kind": "other"})
    assert left.is_dir()
    assert adopted(out, **about)
    assert capsys.readouterr().out == f"{out} was whole but for its name, which it has now\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / MARKER).exists()
    assert read_manifest(out).config == {"rate": 1}


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
    (resume_folder(out) / "state").touch()
    before = versions()["torch"]
    monkeypatch.setattr(resume, "versions", lambda: {**versions(), "torch": "99.0"})
    keep_or_clear(*run)
    assert f"was begun with torch {before}: going on with 99.0" in capsys.readouterr().out
    assert (resume_folder(out) / "state").exists()


def test_another_base_model_or_other_traces_start_anew(tmp_path, capsys):
    out, precision = tmp_path / "out", choose("fp32", "cpu")
    for name in ("base model's weights", "traces"):
        keep_or_clear(out, {"seed": 1}, {name: "a"}, precision)
        (resume_folder(out) / "state").touch()
        keep_or_clear(out, {"seed": 1}, {name: "b"}, precision)
        assert f"other settings ({name}): starting anew" in capsys.readouterr().out.splitlines()[-1]
        assert not (resume_folder(out) / "state").exists()


def test_sft_passes_the_weights_of_its_base(adapter, sft_flags, lora_flags, tmp_path, killed_behind):
    out = tmp_path / "out"
    killed_behind(5, "sft", *sft_flags, *lora_flags, "--output_dir", str(out))
    settings = json.loads((resume_folder(out) / MARKER).read_text())["settings"]
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
    resume_folder(out).rename(folder / "kept")
    return out, reward, flags


def restore(out: Path) -> None:
    """Put the partial folder back as the kill left it."""
    for folder in (out, resume_folder(out)):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(out.with_name("kept"), resume_folder(out))


def test_a_killed_grpo_run_reports_the_whole(killed, stage: Stage):
    out, reward, flags = killed
    restore(out)
    assert "going on from" in stage("grpo", *flags, "--output_dir", str(out)).stdout
    whole = out.with_name("whole")
    stage("grpo", *flags, "--output_dir", str(whole))
    assert report(out) == report(whole)
    assert report(out)["num_tokens"] > 0
    assert (out / "README.md").read_text() == (whole / "README.md").read_text()
    assert read_manifest(out).facts["reinforced"]["reward_files"] == {reward.name: file_hash(reward)}


def test_an_edited_reward_starts_anew(killed, stage: Stage):
    out, reward, flags = killed
    restore(out)
    reward.write_text(REWARD.format(sign=-1))
    printed = stage("grpo", *flags, "--output_dir", str(out)).stdout
    assert "was begun with other settings (rewards): starting anew" in printed
    assert "going on" not in printed

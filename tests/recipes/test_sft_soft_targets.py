"""Soft targets as a user launches them: what they change, what a kill costs, what is refused."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reasonrec.tokenizers.artefact import read_manifest
from reasonrec.tokenizers.output import resume_folder

Stage = Callable[..., subprocess.CompletedProcess[str]]
COMPANY = ["--soft_targets", "{teacher: co_visitation, alpha: 0.5, top_k: 8, window: 3}"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*model.safetensors")
    return load_file(path)


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_no_part_for_the_teacher_is_no_teacher_to_the_bit(
    stage: Stage, sft_flags: list[str], lora_flags: list[str], adapter: Path, tmp_path: Path
) -> None:
    asked = ["--soft_targets", "{teacher: sasrec, alpha: 0}"]
    printed = stage("sft", *sft_flags, *lora_flags, *asked, "--output_dir", str(tmp_path / "out")).stdout
    assert "soft targets:" not in printed
    assert same_bits(weights(tmp_path / "out"), weights(adapter))


def test_a_killed_run_goes_on_to_the_same_bits(
    stage: Stage,
    sft_flags: list[str],
    lora_flags: list[str],
    adapter: Path,
    killed_behind: Callable[..., None],
    tmp_path: Path,
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = [*sft_flags, *lora_flags, *COMPANY]
    assert "soft targets: at " in stage("sft", *flags, "--output_dir", str(whole)).stdout
    killed_behind(5, "sft", *flags, "--output_dir", str(killed))
    assert (resume_folder(killed) / "soft_targets.safetensors").exists()
    printed = stage("sft", *flags, "--output_dir", str(killed)).stdout
    assert "going on from" in printed
    assert "soft targets: at " not in printed, "the teacher is not asked again"
    assert same_bits(weights(killed), weights(whole))
    assert not same_bits(weights(whole), weights(adapter)), "a teacher is heard"
    assert {path.name for path in whole.iterdir()} == {path.name for path in adapter.iterdir()}, "and does not travel"
    assert not resume_folder(killed).exists()
    assert read_manifest(whole).config["soft_targets"]["teacher"] == "co_visitation"
    tokens = [json.loads((folder / "train_metrics.json").read_text())["log"][-1] for folder in (whole, adapter)]
    assert tokens[0]["num_tokens"] == tokens[1]["num_tokens"], "arms see the same examples"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--soft_targets", "{teacher: co_visitation, alpha: 1.5}"], ["soft_targets[alpha]=1.5", "from 0 to 1"]),
        (["--soft_targets", "{teacher: sasrek}"], ["'sasrek'", "did you mean 'sasrec'"]),
        (["--tasks", "{item2index: 1}", *COMPANY], ["soft_targets are for the task seqrec"]),
    ],
    ids=["alpha", "teacher", "tasks"],
)
def test_mistakes_are_named(
    stage: Stage, sft_flags: list[str], tmp_path: Path, flags: list[str], words: list[str]
) -> None:
    done = stage("sft", *sft_flags, *flags, "--output_dir", str(tmp_path / "out"), status=2)
    message = done.stderr.splitlines()[-1]
    assert message.startswith("error: ")
    assert all(word in message for word in words), message
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_policy_without_codes_is_refused(stage: Stage, tiny_base: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    data = ["--dataset", str(tiny_dataset), "--model", str(tiny_base), "--policy", "dual_head"]
    done = stage("sft", *data, *COMPANY, "--output_dir", str(tmp_path / "out"), status=2)
    assert "policy=dual_head has none" in done.stderr.splitlines()[-1]
    assert not resume_folder(tmp_path / "out").exists()

"""The configurations in a card lead through all trainings, name no place, and launch."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from reasonrec.recipes.args import parse
from reasonrec.recipes.publishing.commands import launch_file, lineage, stage_of
from reasonrec.recipes.sft import SftStage
from reasonrec.recipes.trainers.keys import inherited
from reasonrec.tokenizers.artefact import read_manifest


def test_a_configuration_launches_the_same_training(adapter: Path, tmp_path: Path) -> None:
    manifest = read_manifest(adapter)
    text = launch_file(manifest)
    assert text.startswith("# accelerate launch recipes/sft.py --config sft.yaml\n")
    values = yaml.safe_load(text)
    assert values["lora_r"] == 4
    assert values["tasks"] == {"seqrec": 1, "item2index": 0.3, "fusionseqrec": 0.2}
    assert not any("/" in str(value) for value in values.values())
    (tmp_path / "sft.yaml").write_text(text)
    stage, given = parse([SftStage, inherited("sft")], ["--config", str(tmp_path / "sft.yaml"), "--output_dir", "out"])
    assert stage.lora_dropout == manifest.config["lora_dropout"]
    assert given["learning_rate"] == manifest.config["learning_rate"]
    assert given["seed"] == manifest.seed


def test_the_checkpoints_before_are_found_while_they_are_there(
    adapter: Path, stage, edit_manifest, tmp_path: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "start")
    words = ["--experts", "{co_visitation: {}}", "--precision", "fp32", "--output_dir", str(tmp_path / "fused")]
    base = str(read_manifest(adapter).config["base_model"])
    base = str((adapter / base).resolve()) if base.startswith(".") else base
    stage("fuse", "--model", str(tmp_path / "start"), "--base_model", base, "--dataset",
          str((adapter / read_manifest(adapter).config["dataset"]).resolve()), *words)  # fmt: skip
    fused = read_manifest(tmp_path / "fused")
    found = lineage(tmp_path / "fused", fused)
    assert [stage_of(made) for made in found] == ["sft", "fuse"]
    assert "co_visitation" in launch_file(found[1])
    edit_manifest(tmp_path / "start", lambda manifest: manifest.facts.update(more=1))  # trained again since
    assert lineage(tmp_path / "fused", fused) == [fused]
    shutil.rmtree(tmp_path / "start")
    assert lineage(tmp_path / "fused", fused) == [fused]

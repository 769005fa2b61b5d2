"""A model that is trained on its first layers alone, from training to recommending."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from reasonrec.recipes.recommender import Recommender


def test_a_model_of_its_first_layers(stage, sft_flags: list[str], lora_flags: list[str], tmp_path: Path) -> None:
    out = tmp_path / "first"
    stage("sft", *sft_flags, *lora_flags, "--layers", "1", "--num_train_epochs", "0.2", "--output_dir", str(out))
    assert all("layers.0" in name or "embed" in name for name in load_file(out / "adapter_model.safetensors"))
    assert "num_hidden_layers=1)" in (out / "README.md").read_text()
    recommender = Recommender.from_pretrained(out, dtype="fp32", device="cpu")
    assert len(recommender.model.model.layers) == 1
    assert (recommender.rank([[1, 2, 3]], k=5)[0] >= 0).all()
    more = [*sft_flags, *lora_flags, "--model", str(out), "--num_train_epochs", "0.2"]
    refused = stage("sft", *more, "--output_dir", str(tmp_path / "more"), status=2).stderr
    assert "layers=None, but model=" in refused
    assert "has 1: set layers to that" in refused

